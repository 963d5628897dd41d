"""Who is who in data that others wrote: how names and ids of people are spelled, and which ones may be one person."""

import unicodedata
from collections.abc import Set

from vkd_jax.messages import listed, people
from vkd_jax.types import UserError

INVISIBLE = "Cf"  # Unicode's category of zero-width characters, directions of writing and soft hyphens


def plain_name(name: str) -> str:
    """A name or an id as it is read: composed letters (NFC), no invisible characters, single spaces.

    Example:
        >>> plain_name(" Jose\u0301\u00a0 Lin\u200bdt") == "Jos\u00e9 Lindt"
        True
    """
    return _visible(unicodedata.normalize("NFC", name))


def name_key(name: str) -> str:
    """What two spellings of one name share: neither case nor the width or style of letters and digits (NFKC) counts.

    Example:
        >>> name_key("ANNA \uff17") == name_key("Anna 7")
        True
    """
    return _visible(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()))


def similar_names(first: Set[str], second: Set[str]) -> list[str]:
    """Pairs of different names of two sets that may be one person, in words."""
    keys = {name_key(name): name for name in sorted(second, reverse=True)}
    pairs = [(name, keys[key]) for name in sorted(first) if (key := name_key(name)) in keys and keys[key] != name]
    return [f"{name} and {other}" for name, other in pairs]


def check_apart(forget: tuple[str, Set[str]], retain: tuple[str, Set[str]]) -> None:
    """Checks that no person is in two sets, under one name or under two spellings of it.

    Args:
        forget: where the people to forget are from, and their names.
        retain: where the people to retain are from, and their names.

    Raises:
        UserError: a person is in both, or may be.
    """
    if both := sorted(forget[1] & retain[1]):
        raise UserError(
            f"{forget[0]} and {retain[0]} share {people(len(both))}: {listed(both)}; remove them from one of the two."
        )
    if pairs := similar_names(forget[1], retain[1]):
        raise UserError(
            f"{forget[0]} has {people(len(pairs))} who may be in {retain[0]} under another spelling: {listed(pairs)}. "
            "Spell one person's name in one way, or give different people IDs that differ in more than case or letter "
            "style."
        )


def _visible(name: str) -> str:
    return " ".join("".join(c for c in name if unicodedata.category(c) != INVISIBLE).split())
