"""The results of `planner.plan` as a page of plain text."""

from collections.abc import Callable, Mapping
from typing import Any

from vkd_jax.planner import flops
from vkd_jax.planner.memory import GIB, KINDS
from vkd_jax.planner.plan import why_not
from vkd_jax.reporting.tables import contributions

Step = Mapping[str, Any]


def render(results: Mapping[str, Any]) -> str:
    """Renders one column for each step, the reasons why steps do not fit, and their comparison."""
    steps = results["steps"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in results["mesh"].items())
    rows = " + ".join(f"{count} {name}" for name, count in results["rows"].items())
    lines = [
        f"{results['model']}, {results['quantize'] or 'not quantized'}, on {results['topology']}: {results['chips']} "
        f"chips of {results['hbm_gib']} GiB, mesh {mesh}",
        f"batch {rows} rows of {results['tokens']} tokens, of which {results['answer_tokens']} are the answer",
        "",
        f"{'':28}" + "".join(f"{name:>26}" for name in steps),
    ]
    for section, cells in _sections(steps):
        lines.append(section)
        lines += [
            f"  {title:26}" + "".join(f"{cell(step):>26}" for step in steps.values()) for title, cell in cells.items()
        ]
    for name, step in steps.items():
        if not step["fits"]:
            lines += ["", f"{name} does not fit: {why_not(step, results['usable_gib'])}"]
    if results["ratios"]:
        lines += ["", *compared(results)]
    return "\n".join(lines)


def _sections(steps: Mapping[str, Step]) -> list[tuple[str, dict[str, Callable[[Step], str]]]]:
    """The sections of the page: (title, function of a step to the cell of each line)."""

    def gib(value: float | None) -> str:
        return "?" if value is None else f"{value / GIB:.3f}"

    def milliseconds(value: float | None) -> str:
        return "?" if value is None else f"{1e3 * value:.1f}"

    def tera(value: float) -> str:
        return f"{value / 1e12:.2f}"

    memory = {kind: lambda step, kind=kind: gib(step["bytes"][kind]) for kind in KINDS} | {
        "temporaries": lambda step: gib(step["compiler"]["temporaries"]),
        "total by the compiler": lambda step: gib(step["compiler"]["total"]),
        "total of the run": lambda step: gib(step["total"]),
        "fits": lambda step: "yes" if step["fits"] else "no",
    }
    parts = dict.fromkeys(part for step in steps.values() for part in step["flops"])
    work = {part: lambda step, part=part: tera(flops.Work(**step["flops"].get(part, {})).total) for part in parts}
    for name in flops.PASSES:
        title = f"({name.replace('_', ' ')})"
        work[title] = lambda step, name=name: tera(sum(part[name] for part in step["flops"].values()))
    work["total"] = lambda step: tera(step["flops_total"])
    kinds = dict.fromkeys(kind for step in steps.values() for kind in step["compiler"]["collectives"])
    sent = {
        kind: lambda step, kind=kind: gib(step["compiler"]["collectives"].get(kind, {"bytes": 0.0})["bytes"])
        for kind in kinds
    }
    names = ("compute", "interconnect")
    times = {name: lambda step, name=name: milliseconds(step["seconds"][name]) for name in names}
    times["compiler's cycles"] = lambda step: milliseconds(step["seconds_by_cycles"])
    return [
        ("GiB per chip", memory),
        ("TFLOP per step", work),
        ("GiB sent by each chip", sent),
        ("milliseconds at least", times),
    ]


def compared(results: Mapping[str, Any]) -> list[str]:
    """Two lines: the ratio of two steps' least times and of their memory, and the contributions to each."""
    (name, step), (other, baseline) = results["steps"].items()
    by = results["ratios"]
    times = " and ".join(f"{1e3 * x['seconds_at_least']:.1f} ms by {x['bound']}" for x in (step, baseline))
    refused = [label for label, x in results["steps"].items() if x["compiler"]["refused"]]
    caveat = f"; {' and '.join(refused)} does not fit, so only its compute time is known" if refused else ""
    cycles = ""
    if by["seconds_by_cycles"]:
        estimates = " and ".join(f"{1e3 * x['seconds_by_cycles']:.1f} ms" for x in (step, baseline))
        cycles = f"; by the compiler's cycles {_percent_less(by['seconds_by_cycles'])} ({estimates})"
    memory = "not known"
    if by["bytes"] is not None:
        memory = f"{_percent_less(by['bytes'])}: {contributions(by['bytes_by'])}"
    return [
        f"least time of {name} / {other}: {_percent_less(by['seconds'])} ({times}{caveat}){cycles}; FLOPs: "
        f"{contributions(by['flops_by'])}",
        f"memory of {name} / {other}: {memory}",
    ]


def _percent_less(ratio: float) -> str:
    return f"{ratio:.2f}, {abs(100 * (1 - ratio)):.0f} % {'less' if ratio <= 1 else 'more'}"
