"""Forgetting part of what is known of the people to forget: some of the facts about them go, the others stay.

`data.forget_facts` names the facts to forget. Questions about the people to forget are then divided by the fact that
they ask for:

    forget, test                     the named facts, which are forgotten
    other_facts, other_facts_test    their other facts, on the same images, which are retained

Unlearning trains on `other_facts` as a stream of its own, see `vkd_jax.methods.other_facts`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from vkd_jax import messages
from vkd_jax.benchmarks.names import text_key
from vkd_jax.types import EvalSet, Example, Role, UserError

HELP = (
    "Facts about the people to forget that are forgotten, while their other facts are retained; () forgets everything "
    "about them."
)
OTHER_FACTS = "other_facts"
SPLIT = {"forget": OTHER_FACTS, "test": "other_facts_test"}  # the set of other facts, by the set that is divided
EVAL_SETS = (
    EvalSet(OTHER_FACTS, Role.RETAIN_FACTS, "other facts about the people to forget", "other facts"),
    EvalSet(
        SPLIT["test"],
        Role.RETAIN_FACTS,
        "other facts about the people to forget, other images or wordings",
        "other facts test",
    ),
)
_TITLES = {"forget": "facts to forget", "test": "facts to forget, other images or wordings"}


def retitled(sets: Iterable[EvalSet]) -> tuple[EvalSet, ...]:
    """The evaluation sets of a benchmark, whose titles say that facts are forgotten, not people."""
    return tuple(dataclasses.replace(s, title=_TITLES.get(s.name, s.title)) for s in sets)


def check_facts(chosen: Sequence[str], known: Iterable[str], folder: str = "") -> None:
    """Checks the names of the facts to forget. Spellings of one name are one, see `names.text_key`.

    Args:
        chosen: the names that were given.
        known: the facts about the people to forget.
        folder: the folder of the forget set, for messages.

    Raises:
        UserError: a name is unknown, or these are all facts.
    """
    known, place = {text_key(name): name for name in known}, f" in data.forget={folder}" if folder else ""
    if unknown := [name for name in chosen if text_key(name) not in known]:
        raise UserError(
            f"data.forget_facts: no question about the people to forget{place} asks for {messages.listed(unknown)}. "
            f"Available: {messages.choices(list(known.values()))}."
        )
    if chosen and not known.keys() - set(map(text_key, chosen)):
        raise UserError(
            f"data.forget_facts: these are all facts about the people to forget{place}, so that none would stay. "
            "Leave it empty, which forgets everything about them."
        )


def select(rows: Iterable[list[Example]], is_chosen: Callable[[Example], bool]) -> Iterator[list[Example]]:
    """The chosen questions of each row; rows without one are left out."""
    return filter(None, ([example for example in row if is_chosen(example)] for row in rows))
