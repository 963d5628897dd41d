"""Spellings in data that others wrote: of texts, of names and ids of people, and which ones may be one person."""

import contextlib
import unicodedata
from collections.abc import Set
from decimal import Decimal

import regex

from vkd_jax.messages import listed, people
from vkd_jax.types import UserError

# What Unicode shows as nothing: zero width, directions of writing, soft hyphens, fillers, variation selectors; control
# characters that are no space; and the blank of Braille.
_INVISIBLE = regex.compile(r"(?V1)[\p{Default_Ignorable_Code_Point}\p{Cf}\p{Cc}\u2800--\s]")
_DASHES = regex.compile(r"\p{Dash}")
_APOSTROPHES = regex.compile("[\u2018\u2019\u201b\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u2032`\u00b4\ua78c\uff07]")
_WORD = regex.compile(r"[\w\p{M}]+")
# Letters of these scripts look like Latin ones.
_MIXED = regex.compile(r"(?=.*\p{Script=Latin})(?=.*[\p{Script=Cyrillic}\p{Script=Greek}])", regex.DOTALL)
# How pandas, R, SQL and spreadsheets write a missing value as text. "Nan" and "Null" are names.
MISSING = frozenset({"nan", "NaN", "<NA>", "NaT", "null", "NULL", "#N/A"})
_SEVERAL = regex.compile(r"[,;&+/|]| and ")  # between the names of several people
_POWER = regex.compile(r"[0-9](?:\.[0-9]{1,20})?[eE]\+([0-9]{2})")
_WHOLE = regex.compile(r"(0*+)(\d*+)(?:\.0*+)?")


def plain_name(name: str) -> str:
    """A name or an id as it is read: composed letters (NFC), no invisible characters, single spaces.

    Example:
        >>> plain_name(" Jose\u0301\u00a0 Lin\u200bdt") == "Jos\u00e9 Lindt"
        True
    """
    return _visible(unicodedata.normalize("NFC", name))


def name_key(name: str) -> str:
    """What two spellings of one name share.

    It is that of texts, see `text_key`; and it does not count how a number is written.

    Example:
        >>> name_key("0093") == name_key("93.0")
        True
    """
    return plain_number(text_key(name))


def text_key(text: str) -> str:
    """What two spellings of one text share, such as those of a true answer and of the same words of a model.

    Neither case nor the width or style of letters and digits (NFKC) counts, nor the kind of a dash or an apostrophe,
    nor characters that are not seen, nor the number and kind of spaces.

    Example:
        >>> text_key("ANNA \uff17") == text_key("An\u00adna\u00a07")
        True
    """
    text = _APOSTROPHES.sub("'", text)  # before NFKC, which takes some of them for accents
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.replace("\u0131", "i").replace("i\u0307", "i")  # Turkish: I and i are the cases of letters of their own
    return _visible(_DASHES.sub("-", text))


def answer_key(text: str) -> str:
    """The `text_key` of an answer or an option without the period at its end."""
    return text_key(text).rstrip(" .")


def question_key(text: str) -> str:
    """The `text_key` of a question without the punctuation at its end."""
    return text_key(text).rstrip(" ?.!:") or text_key(text)


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit that is seen. Others, such as ".", are in almost any answer.

    Example:
        >>> has_words("A+"), has_words("\u3164 ...")
        (True, False)
    """
    return any(map(str.isalnum, text_key(text)))


def plain_number(name: str) -> str:
    """An ID that is a whole number as tables write it, such as "0093", "93.0" or "9.3E+01", as "93". Others stay.

    Example:
        >>> plain_number("0093"), plain_number("93.0"), plain_number("R093")
        ('93', '93', 'R093')
    """
    if (power := _POWER.fullmatch(name)) and int(power[1]) < 20:  # as a spreadsheet shows a large number
        name = f"{Decimal(name):f}"
    match = _WHOLE.fullmatch(name)
    if match is None or not (digits := match[2] or match[1][:1]):
        return name
    return "".join(str(unicodedata.decimal(digit)) for digit in digits)


def check_scripts(names: Set[str]) -> None:
    """Checks that no word of a name mixes Latin letters with Cyrillic or Greek ones, which look like them.

    Raises:
        UserError: one does, so that the name may be another one's with a look-alike letter.
    """
    mixed = [name for name in sorted(names) if not name.isascii() and any(map(_MIXED.match, _WORD.findall(name)))]
    if mixed:
        raise UserError(
            f"{people(len(mixed))} whose names mix Latin letters with Cyrillic or Greek ones in one word: "
            f"{listed([ascii(name) for name in mixed])}; write each word in one script."
        )


def similar_names(first: Set[str], second: Set[str]) -> list[str]:
    """Pairs of different names of two sets that may be one person, in words.

    They have one key, with underscores read as spaces, and UTF-8 that was read as Windows-1252 as what it was
    ("JosÃ©"); or one is a part of the other, as in "Ada Bell & Otto Lindt".
    """
    keys, parts = {}, {}
    for name in sorted(second, reverse=True):
        keys[_loose_key(name)] = name
        parts |= dict.fromkeys(_parts(name), name)
    pairs = []
    for name in sorted(first):
        others = [keys.get(_loose_key(name)), parts.get(_loose_key(name)), *map(keys.get, _parts(name))]
        pairs += [(name, other) for other in dict.fromkeys(others) if other not in (None, name)]
    return [f"{name} and {other}" for name, other in pairs]


def _loose_key(name: str) -> str:
    with contextlib.suppress(UnicodeError):
        name = name if name.isascii() else name.encode("cp1252").decode("utf-8")
    return name_key(name.replace("_", " "))


def _parts(name: str) -> list[str]:
    """The keys of several names in one text; [] if there is one."""
    parts = [key for part in _SEVERAL.split(name) if (key := _loose_key(part))]
    return parts if len(parts) > 1 else []


def check_apart(forget: tuple[str, Set[str]], retain: tuple[str, Set[str]]) -> None:
    """Checks that no person is in two sets, under one name or under two spellings of it.

    Args:
        forget: where the people to forget are from, and their names.
        retain: where the people to retain are from, and their names.

    Raises:
        UserError: a person is in both, or may be.
    """
    check_scripts(forget[1] | retain[1])
    if both := sorted(forget[1] & retain[1]):
        raise UserError(
            f"{forget[0]} and {retain[0]} share {people(len(both))}: {listed(both)}; remove them from one of the two."
        )
    if pairs := similar_names(forget[1], retain[1]):
        raise UserError(
            f"{forget[0]} has {people(len(pairs))} who may be in {retain[0]} under another spelling: {listed(pairs)}. "
            "Spell one person's name in one way, or give different people IDs that differ in more than case, letter "
            "style, dashes, underscores or leading zeros, and give each line one person."
        )


def _visible(name: str) -> str:
    return " ".join((name if name.isascii() and name.isprintable() else _INVISIBLE.sub("", name)).split())
