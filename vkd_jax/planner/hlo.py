"""What a compiled program sends between chips and moves through their memory, read from its HLO text.

Loops are counted as often as they turn. Between chips,

    all-gather [n]      (n - 1) / n of the result, which is n parts      reduce-scatter       n - 1 times the result
    all-reduce          2 (n - 1) / n of the result                      collective-permute   the result
    all-to-all          (n - 1) / n of the result

are the bytes that each of the n chips of a group sends, by the ring algorithms: Thakur et al., "Optimization of
Collective Communication Operations in MPICH", 2005.

Through its memory a chip moves what each instruction reads and writes there: a fusion its operands and results, and of
an operand that it only slices the slice; what stays in the memory on the chip, S(1) in a layout, moves nothing.

For v5e the compiler cuts an all-gather into a chain of fusions, which multiply between its parts: one that starts it,
others that go on with it, and one that ends it. Each holds the instruction; the first alone counts.

What the compiler says of a program that it refuses is read here, too.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^{}]*?S\(([1-9]\d*)\)[^{}]*\})?")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")

# What moves nothing: names of what is there already, and the ends of what has begun.
_NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
}
_NOTHING |= {"domain", "replica-id", "add-dependency"}
_CALLERS = {"while", "call", "conditional", "async-start"}
_PAIRS = {"all-gather-start", "collective-permute-start"}  # whose type is (operands, results, ...)

# As libtpu 0.0.42 and 0.0.52 write it, before they lay out a program's memory and after that.
_REFUSALS = (
    re.compile(
        r"total memory required for HLO temporaries \(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])"
    ),
    re.compile(r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm"),
)
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
_CHAINED, _STARTS, _ENDS = 'chain_id="', 'custom_call_target="AsyncCollectiveStart"', '"AsyncCollectiveDone"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of KINDS
    shape: str  # of the result, as HLO writes it without layouts
    nbytes: int  # of the result
    group: int  # how many chips take part
    times: int  # how often it runs

    @property
    def sent(self) -> float:
        """Bytes that each chip sends, all runs together."""
        n = self.group
        share = {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1.0,
            "collective-permute": 1.0,
            "all-to-all": (n - 1) / n,
        }
        return share[self.kind] * self.nbytes * self.times


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: its name, type, opcode, and what stands behind the opcode."""

    name: str
    type: str
    opcode: str
    rest: str

    @classmethod
    def parse(cls, name: str, text: str) -> "Instruction":
        """Of what stands behind "name = "."""
        end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
        opcode, _, rest = text[end:].strip().partition("(")
        return cls(name, text[:end], opcode, rest)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(re.findall(r"%([\w.-]+)", self.rest[: _closing("(" + self.rest, 0) - 1]))


@functools.lru_cache(maxsize=1)  # a page is megabytes, and three things are read from it
def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions, and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.fullmatch(line.rstrip()):
            current = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.fullmatch(line)):
            current.append(Instruction.parse(match[1], match[2]))
    return found, entry


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a program with more than one chip to a group.

    Args:
        text: of the compiled program.
        devices: how many there are, for those that name no groups.
    """
    program, entry = computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int, scatters: bool) -> None:
        starts = any(_STARTS in instruction.rest for instruction in program.get(name, ()))
        for instruction in program.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS and _CHAINED in instruction.rest and not starts:
                continue
            if kind in KINDS:
                group = _group(instruction.rest, devices)
                shape, size = _result(instruction)
                if scatters and kind == "all-reduce":  # the fusion keeps this chip's part alone
                    kind, size = "reduce-scatter", size // group
                if group > 1:
                    found.append(Collective(kind, shape, size, group, times))
            elif not instruction.opcode.endswith(("-done", "-update")):
                turns = trips(instruction, program) if instruction.opcode == "while" else 1
                fused = instruction.opcode == "fusion"
                for called in _called(instruction):
                    visit(called, times * turns, scatters or (fused and "all-reduce-scatter" in called))

    visit(entry, 1, False)
    return found


def traffic(text: str) -> float:
    """Bytes that a chip reads from its memory and writes there, loops as often as they turn; no cache is assumed."""
    program, entry = computations(text)
    named = {name: {line.name: line for line in lines} for name, lines in program.items()}

    def moved(line: Instruction, here: Mapping[str, Instruction]) -> float:
        if line.opcode in _NOTHING or line.opcode.endswith(("-done", "-update")) or _ALLOCATES in line.rest:
            return 0.0
        types = [here[name].type if name in here else "" for name in line.operands]
        if line.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):  # from one memory to another
            sides = _parts(line.type)[:2]
            return float(min(map(nbytes, sides)) * sum(in_memory(side) > 0 for side in sides))
        if line.opcode == "fusion":
            (called,) = _called(line)
            lines = program.get(called, ())
            read = sum(min(_read(lines, i, program), in_memory(type_)) for i, type_ in enumerate(types))
            return read + min(_written(lines, program), in_memory(line.type))
        if line.opcode in ("dynamic-slice", "slice", "gather"):
            return in_memory(line.type) * (2.0 if in_memory(types[0]) else 1.0)
        if line.opcode == "dynamic-update-slice":
            return nbytes(types[1]) * (in_memory(line.type) > 0) + in_memory(types[1])
        result = _parts(line.type)[1] if line.opcode in _PAIRS else line.type
        return float(sum(map(in_memory, types)) + in_memory(result))

    return sum(times * moved(line, named[name]) for name, line, times in _runs(program, entry))


def cycles(text: str) -> int:
    """Cycles of a chip's core that the compiler reckons with, loops as often as they turn; collectives have none."""
    program, entry = computations(text)
    total = 0
    for _, line, times in _runs(program, entry):
        if found := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
            total += times * int(found[1])
    return total


def _runs(
    program: Mapping[str, list[Instruction]], name: str, times: int = 1
) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that runs, a fusion as one: (its computation, it, how often)."""
    for line in program.get(name, ()):
        if line.opcode in _CALLERS:
            turns = trips(line, program) if line.opcode == "while" else 1
            for called in _called(line):
                yield from _runs(program, called, times * turns)
        else:
            yield name, line, times


def _read(lines: Sequence[Instruction], number: int, program: Mapping[str, list[Instruction]]) -> float:
    """Bytes that a fused computation reads of a parameter: all of it, or no more than the slices that it takes.

    What a fusion computes element by element it computes where it is asked for: of a slice of a conversion of all
    layers' weights one layer's weights are read.
    """
    parameter = next((x for x in lines if x.opcode == "parameter" and x.rest.startswith(f"{number})")), None)
    if parameter is None:
        return math.inf
    if _ENDS in lines[-1].rest:
        return 0.0
    starts = _STARTS in lines[-1].rest
    size, elements = nbytes(parameter.type), _elements(parameter.type)
    total, same = 0.0, {parameter.name: parameter.type}
    for line in lines:  # which stand in the order in which they are computed
        for place, operand in enumerate(line.operands):
            if operand not in same:
                continue
            inside = (
                _read(program.get(next(_called(line)), ()), place, program) if line.opcode == "fusion" else math.inf
            )
            if line.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += nbytes(line.type) * size / nbytes(same[operand])
            elif inside < math.inf:
                total += inside
            elif line.opcode == "dynamic-update-slice" and place == 0:
                continue
            elif _CHAINED in line.rest and not starts:
                continue
            elif line is lines[-1] and line.opcode == "tuple" and operand == parameter.name:
                continue  # handed on where it lies
            elif line is not lines[-1] and elements == _elements(line.type):
                same[line.name] = line.type
            else:
                return math.inf
    return total


def _elements(type_: str) -> int:
    return sum(math.prod(map(int, filter(None, sizes.split(",")))) for _, sizes, _ in _SHAPE.findall(type_))


def _written(lines: Sequence[Instruction], program: Mapping[str, list[Instruction]]) -> float:
    """Bytes that a fused computation writes: its result, or the part of it that it updates in its place."""
    named = {line.name: line for line in lines}
    starts = bool(lines) and _STARTS in lines[-1].rest

    def size(line: Instruction) -> float:
        if line.opcode == "parameter" or _ENDS in line.rest or (_CHAINED in line.rest and not starts):
            return 0.0
        if line.opcode == "dynamic-update-slice" and line.operands[1] in named:
            return nbytes(named[line.operands[1]].type)
        if line.opcode == "fusion":
            return _written(program.get(next(_called(line)), ()), program)
        if line.opcode in ("bitcast", "tuple") and all(name in named for name in line.operands):
            return sum(size(named[name]) for name in line.operands)
        return nbytes(line.type)

    return size(lines[-1]) if lines else math.inf


def trips(loop: Instruction, program: Mapping[str, list[Instruction]]) -> int:
    """How often a `while` turns: what the compiler noted, or else the constant that its condition compares with."""
    if known := re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    inside = list(program.get(condition[1] if condition else "", ()))
    inside += [line for caller in inside for name in _called(caller) for line in program.get(name, ())]
    limits = [
        int(number[0])
        for instruction in inside
        if instruction.opcode == "constant" and (number := re.match(r"\d+", instruction.rest))
    ]
    return max(limits, default=1)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why the compiler made no program: for want of memory, if `needs` is known."""

    needs: int | None  # bytes of the chip's main memory, the program's arguments among them
    has: int | None  # bytes that a program may use
    sentence: str

    @classmethod
    def parse(cls, message: str) -> "Refusal":
        """Of the compiler's message, which gives its numbers with two decimals at most."""
        for form in _REFUSALS:
            if match := form.search(message):
                needs, has = (_bytes(*match.group(*pair)) for pair in ((1, 2), (3, 4)))
                held = re.findall(r"^\s*(?:program|arguments)\s+([\d.]+)([BKMGT])", message, re.MULTILINE)
                needs = max(needs, sum(_bytes(*pair) for pair in held))
                over = max(needs - has, 0) / 2**30
                more = f"{over:.2f} GiB too much" if over >= 0.01 else "a few MiB too much"
                return cls(needs, has, f"it needs {needs / 2**30:.2f} GiB of {has / 2**30:.2f}, {more}")
        first = " ".join((message.strip().splitlines() or ["it does not say why"])[0].split())
        return cls(None, None, re.sub(r"^(?:[A-Z_]+: |E\d+: |\w+: (?=Ran out))+", "", first))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])


def nbytes(type_: str) -> int:
    """Bytes of a type, tuples and all: "(bf16[8,128]{1,0}, s4[3])" is 2050."""
    return sum(_size(kind, sizes) for kind, sizes, _ in _SHAPE.findall(type_))


def in_memory(type_: str) -> int:
    """Bytes of those parts of a type that lie in the chip's main memory (HBM)."""
    return sum(_size(kind, sizes) for kind, sizes, space in _SHAPE.findall(type_) if not space)


def _size(kind: str, sizes: str) -> int:
    return math.ceil(BITS.get(kind, 0) * math.prod(map(int, filter(None, sizes.split(",")))) / 8)


def _called(instruction: Instruction) -> Iterator[str]:
    yield from (name for _, name in _CALLS.findall(instruction.rest))
    for names in _LISTS.findall(instruction.rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _result(instruction: Instruction) -> tuple[str, int]:
    """The type of a collective's result without layouts, and its bytes."""
    result = instruction.type
    if instruction.opcode in _PAIRS:
        result = _parts(result)[1]
    shapes = [f"{kind}[{sizes}]" for kind, sizes, _ in _SHAPE.findall(result)]
    return ", ".join(shapes), nbytes(result)


def _parts(type_: str) -> list[str]:
    """The members of a tuple type."""
    parts, depth, start = [], 0, 1
    for i, c in enumerate(type_):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or depth == 0:
            parts.append(type_[start:i].strip())
            start = i + 1
    return parts


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"HLO: a bracket never closes in {text[:80]!r}")


def _group(rest: str, devices: int) -> int:
    """How many chips a collective's groups have."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", rest):  # the axes, and over which it goes
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return devices
