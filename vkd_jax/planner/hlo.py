"""Bytes that a compiled program sends between chips, and the cycles it takes, read from its HLO text.

Loop bodies are multiplied by their trip count. By the ring algorithms, each of the n chips of a group sends

    all-gather [n]      (n - 1) / n of the result, which is n parts      reduce-scatter       n - 1 times the result
    all-reduce          2 (n - 1) / n of the result                      collective-permute   the result
    all-to-all          (n - 1) / n of the result

bytes: Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005.

For v5e the compiler splits an all-gather into a chain of fusions that multiply between its parts: one starts it, others
continue it, and one ends it. Each of them contains the instruction; only the first one counts.

The compiler's message about a program that it refuses is read here, too.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

_CALLERS = {"while", "call", "conditional", "async-start"}  # whose computations are counted instead of themselves
_PAIRS = {"all-gather-start", "collective-permute-start"}  # whose type is (operands, results, ...)
_CHAINED, _STARTS = 'chain_id="', 'custom_call_target="AsyncCollectiveStart"'

# As libtpu 0.0.42 and 0.0.52 write it, before they lay out a program's memory and after that.
_REFUSALS = (
    re.compile(
        r"total memory required for HLO temporaries \(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])"
    ),
    re.compile(r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of KINDS
    nbytes: int  # of the result
    group: int  # how many chips take part
    times: int  # how often it runs

    @property
    def sent(self) -> float:
        """Bytes that each chip sends in all runs together."""
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
    """A line of HLO: its type, its opcode, and the text behind the opcode."""

    type: str
    opcode: str
    rest: str

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        """Parses the text behind "name = "."""
        end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
        opcode, _, rest = text[end:].strip().partition("(")
        return cls(text[:end], opcode, rest)

    @property
    def called(self) -> Iterator[str]:
        """The names of the computations that it calls."""
        yield from _CALLS.findall(self.rest)
        for names in _LISTS.findall(self.rest):
            yield from (name.strip().removeprefix("%") for name in names.split(","))


Program = Mapping[str, list[Instruction]]


@functools.lru_cache(maxsize=1)  # the text is megabytes, and it is read twice
def parse(text: str) -> tuple[Program, str]:
    """Returns the instructions of every computation, and the name of the entry."""
    program: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.fullmatch(line.rstrip()):
            current = program.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.fullmatch(line)):
            current.append(Instruction.parse(match[2]))
    return program, entry


def collectives(text: str, devices: int) -> list[Collective]:
    """Lists all collectives of a program whose groups have more than one chip.

    Args:
        text: The HLO text of the compiled program.
        devices: The number of chips, for collectives that name no groups.
    """
    program, entry = parse(text)
    starts = {name for name, lines in program.items() if any(_STARTS in line.rest for line in lines)}
    operations = []
    for name, line, times, fusions in _runs(program, entry):
        kind = line.opcode.removesuffix("-start")
        if kind not in KINDS or (_CHAINED in line.rest and name not in starts):
            continue
        group, size = _group_size(line.rest, devices), _result_bytes(line)
        if kind == "all-reduce" and any("all-reduce-scatter" in fusion for fusion in fusions):
            kind, size = "reduce-scatter", size // group  # the fusion keeps only the part of this chip
        if group > 1:
            operations.append(Collective(kind, size, group, times))
    return operations


def cycles(text: str) -> int:
    """Sums the compiler's estimates of the cycles of a chip's core; it gives none for collectives."""
    program, entry = parse(text)
    total = 0
    for _, line, times, fusions in _runs(program, entry):
        if not fusions and line.opcode not in _CALLERS and (estimate := _CYCLES.search(line.rest)):
            total += times * int(estimate[1])
    return total


def _runs(
    program: Program, name: str, times: int = 1, fusions: tuple[str, ...] = ()
) -> Iterator[tuple[str, Instruction, int, tuple[str, ...]]]:
    """Yields every instruction that runs: (its computation, it, how often, the fusions around it)."""
    for line in program.get(name, ()):
        yield name, line, times, fusions
        if line.opcode.endswith(("-done", "-update")):
            continue  # the computation was visited at its start
        repeats = times * (trip_count(line, program) if line.opcode == "while" else 1)
        for called in line.called:
            yield from _runs(program, called, repeats, fusions if line.opcode in _CALLERS else (*fusions, called))


def trip_count(loop: Instruction, program: Program) -> int:
    """The trip count of a `while`: what the compiler annotated, else the constant in its condition."""
    if known := re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    lines = list(program.get(condition[1] if condition else "", ()))
    lines += [line for caller in lines for name in caller.called for line in program.get(name, ())]
    constants = [re.match(r"\d+", line.rest) for line in lines if line.opcode == "constant"]
    return max((int(match[0]) for match in constants if match), default=1)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A compiler's refusal: for lack of memory if `required` is known."""

    required: int | None  # bytes of the chip's main memory, including the program's arguments
    available: int | None  # bytes that a program may use
    sentence: str

    @classmethod
    def parse(cls, message: str) -> "Refusal":
        """Parses the compiler's message, whose numbers have at most two decimals."""
        for pattern in _REFUSALS:
            if match := pattern.search(message):
                required, available = (_bytes(*match.group(*pair)) for pair in ((1, 2), (3, 4)))
                sizes = re.findall(r"^\s*(?:program|arguments)\s+([\d.]+)([BKMGT])", message, re.MULTILINE)
                required = max(required, sum(_bytes(*size) for size in sizes))
                excess = max(required - available, 0) / 2**30
                text = f"{excess:.2f} GiB too much" if excess >= 0.01 else "a few MiB too much"
                sentence = f"the step requires {required / 2**30:.2f} GiB of {available / 2**30:.2f} GiB, {text}"
                return cls(required, available, sentence)
        first = " ".join((message.strip().splitlines() or ["the compiler gives no reason"])[0].split())
        return cls(None, None, re.sub(r"^(?:[A-Z_]+: |E\d+: |\w+: (?=Ran out))+", "", first))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])


def nbytes(type_: str) -> int:
    """Bytes of a type, also of a tuple: "(bf16[8,128]{1,0}, s4[3])" is 2050."""
    return sum(
        math.ceil(BITS.get(kind, 0) * math.prod(map(int, filter(None, sizes.split(",")))) / 8)
        for kind, sizes in _SHAPE.findall(type_)
    )


def _result_bytes(instruction: Instruction) -> int:
    """Bytes of the result of a collective."""
    return nbytes(_members(instruction.type)[1] if instruction.opcode in _PAIRS else instruction.type)


def _members(type_: str) -> list[str]:
    """The members of a tuple type."""
    members, depth, start = [], 0, 1
    for i, c in enumerate(type_):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or depth == 0:
            members.append(type_[start:i].strip())
            start = i + 1
    return members


def _closing(text: str) -> int:
    """The position of the bracket that closes the one at the start."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    raise ValueError(f"HLO: a bracket never closes in {text[:80]!r}")


def _group_size(rest: str, devices: int) -> int:
    """The number of chips in each group of a collective."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", rest):  # the axes, and over which it goes
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(size or sizes[axis]) for axis, size in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return devices
