"""What a compiled program sends between chips, read from its HLO text; loops are counted as often as they turn.

    all-gather [n]      (n - 1) / n of the result, which is n parts      reduce-scatter       n - 1 times the result
    all-reduce          2 (n - 1) / n of the result                      collective-permute   the result
    all-to-all          (n - 1) / n of the result

are the bytes that each of the n chips of a group sends, by the ring algorithms: Thakur et al., "Optimization of
Collective Communication Operations in MPICH", 2005. A collective in the body of a `while` counts for each turn.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


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
        for instruction in program.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
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


def nbytes(type_: str) -> int:
    """Bytes of a type, tuples and all: "(bf16[8,128]{1,0}, s4[3])" is 2050."""
    return sum(
        math.ceil(BITS.get(kind, 0) * math.prod(map(int, filter(None, sizes.split(",")))) / 8)
        for kind, sizes in _SHAPE.findall(type_)
    )


def _called(instruction: Instruction) -> Iterator[str]:
    yield from (name for _, name in _CALLS.findall(instruction.rest))
    for names in _LISTS.findall(instruction.rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _result(instruction: Instruction) -> tuple[str, int]:
    """The type of a collective's result without layouts, and its bytes."""
    result = instruction.type
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, ...)
        result = _parts(result)[1]
    shapes = [f"{kind}[{sizes}]" for kind, sizes in _SHAPE.findall(result)]
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
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return devices
