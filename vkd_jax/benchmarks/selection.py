"""Selects the people to forget from the data of a benchmark, instead of the forget set that the benchmark declares."""

from collections.abc import Mapping, Sequence
from typing import Any

from vkd_jax.benchmarks.names import check_apart
from vkd_jax.config.request import RequestConfig
from vkd_jax.messages import listed
from vkd_jax.types import Example, Role, UserError, person_digest


def select_people(
    benchmark: Any, sets: Mapping[str, Sequence[Example]], request: RequestConfig
) -> dict[str, list[Example]]:
    """Moves each question into the forget or the retain set, by the person that it is about.

    Questions about people of earlier requests are dropped, and so are those of a holdout set that the benchmark lacks.

    Args:
        benchmark: the benchmark.
        sets: its sets.
        request: who is forgotten now, and who was before.

    Returns:
        The sets, without empty ones.

    Raises:
        UserError: the benchmark does not divide its questions by person, a person is not in the data or may be in it
            under another spelling, too, or nobody would be retained.
    """
    pairs = _pairs(benchmark, sets)
    now, before = set(request.people), set(request.earlier)
    people = {e.person for pair in pairs[:1] for name in pair for e in sets[name] if e.person}
    digests = {person: person_digest(person) for person in people}
    if missing := sorted(now - set(digests.values())):
        raise UserError(
            f"{len(missing)} of the {len(now)} people of this request are not in the data, such as the one whose ID "
            f"has the SHA-256 {missing[0][:12]}...; pass the data that they are in, or withdraw the request."
        )
    if not set(digests.values()) - now - before:
        raise UserError(
            f"nobody would be retained: all {len(people)} people of the data are to be forgotten, so nothing would "
            "keep what the model knows; add people to retain to the data."
        )
    names = {person for person, digest in digests.items() if digest in now | before}
    check_apart(("the requests", names), ("the people to retain", people - names))
    selected = {name: list(examples) for name, examples in sets.items()}
    for forget, retain in pairs:
        questions = [e for name in (forget, retain) if name for e in selected.pop(name, ())]
        owners = [person_digest(e.person) if e.person else "" for e in questions]
        selected[forget] = [e for e, owner in zip(questions, owners, strict=True) if owner in now]
        if retain:
            selected[retain] = [e for e, owner in zip(questions, owners, strict=True) if owner not in now | before]
    order = [s.name for s in benchmark.EVAL_SETS]
    ordered = sorted(selected, key=lambda name: order.index(name) if name in order else len(order))
    return {name: selected[name] for name in ordered if selected[name]}


def _pairs(benchmark: Any, sets: Mapping[str, Sequence[Example]]) -> list[tuple[str, str]]:
    """The pairs of sets that differ in their people alone: those that unlearning trains on, first, and evaluation sets.

    Raises:
        UserError: the benchmark has several sets of a role, or forgets a part of what is known of a person.
    """
    names = {role: [s.name for s in benchmark.EVAL_SETS if s.role is role] for role in Role if role is not Role.GENERAL}
    trained = benchmark.UNLEARN["forget"], benchmark.UNLEARN["retain"]
    problem = ""
    if several := [name for name, found in names.items() if len(found) > 1]:
        problem = f"it has several sets of the role {several[0]}"
    forget, retain = (names[role][0] for role in (Role.FORGET, Role.RETAIN))
    if further := [s.title for s in getattr(benchmark, "further_sets", ())]:
        problem = f"it keeps a part of what is known of them ({listed(further)})"
    if (forget in trained) != (retain in trained):
        problem = "it trains on other people than those that it asks about"
    elif both := {e.person for e in sets[trained[0]]} & {e.person for e in sets[trained[1]]} - {""}:
        problem = f"some people are in its forget and in its retain set ({listed(sorted(both))})"
    if problem:
        raise UserError(f"{benchmark.TITLE} cannot be divided by person: {problem}; use mllmu, clear, umu or folder.")
    holdouts = [(names[role] or [""])[0] for role in (Role.FORGET_HOLDOUT, Role.RETAIN_HOLDOUT)]
    return list(dict.fromkeys([trained, (forget, retain), *([tuple(holdouts)] if holdouts[0] else [])]))
