"""Names of people: which spellings are one name, and which ones may be one person."""

import json

import pytest
from PIL import Image

from vkd_jax.benchmarks import names
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.benchmarks.parquet import check_people
from vkd_jax.runs import requests
from vkd_jax.types import UserError, person_digest

SAME = {  # spellings that are read as one name
    "composed and decomposed": ("Jos\u00e9", "Jose\u0301"),
    "a zero-width space": ("Zo\u00eb", "Zo\u200b\u00eb"),
    "a joiner": ("Ada", "A\u200dda"),
    "a byte order mark": ("Ada", "\ufeffAda"),
    "marks of direction": ("Ada", "\u202eAda\u202c"),
    "a soft hyphen": ("Ada Lind", "Ada Li\u00adnd"),
    "a grapheme joiner": ("Otto", "Ot\u034fto"),
    "a variation selector": ("Otto", "Otto\ufe0f"),
    "a Hangul filler": ("Otto", "Otto\u3164"),
    "a blank of Braille": ("Otto", "Ot\u2800to"),
    "a control character": ("Otto", "Ot\x1fto\x07"),
    "spaces": ("Ada Lind", " Ada\u00a0\u2003Lind\n"),
}
SIMILAR = {  # different names that may be one person
    "case": ("Ada Lind", "ada lind"),
    "a power of ten of a spreadsheet": ("1E+05", "100000"),
    "case of an id": ("a7", "A7"),
    "a Turkish letter without its dot": ("I\u015f\u0131l", "I\u015eIL"),
    "a Turkish letter with its dot": ("\u0130pek", "ipek"),
    "sharp s": ("Stra\u00dfe", "STRASSE"),
    "full-width digits": ("Ada 7", "Ada \uff17"),
    "digits of another script": ("93", "\u0669\u0663"),
    "leading zeros": ("093", "0093"),
    "a number as a fraction": ("93", "093.0"),
    "kinds of hyphens": ("Anne-Marie", "Anne\u2011Marie"),
    "a dash": ("Anne-Marie", "Anne\u2013Marie"),
    "a minus": ("a-7", "a\u22127"),
    "apostrophes": ("Pat O'Neil", "Pat O\u2019Neil"),
    "a modifier letter": ("Pat O'Neil", "Pat O\u02bcNeil"),
    "an accent for an apostrophe": ("Pat O'Neil", "Pat O\u00b4Neil"),
    "a ligature": ("So\ufb01", "Sofi"),
    "letters of a formula": ("\U0001d400da", "Ada"),
}
DIFFERENT = [
    ("Ada", "Aba"),
    ("a7", "a70"),
    ("93", "930"),
    ("0", "00x"),
    ("9.5", "9"),
    ("R093", "R93"),
    ("Jose", "Jos\u00e9"),
    ("x", "\u0445"),
]


@pytest.mark.parametrize("kind", SAME)
def test_spellings_of_one_name(kind):
    first, second = map(names.plain_name, SAME[kind])
    assert first == second and names.plain_name(first) == first


@pytest.mark.parametrize("kind", SIMILAR)
def test_names_that_may_be_one_person(kind):
    first, second = SIMILAR[kind]
    assert names.plain_name(first) != names.plain_name(second)
    for pair in ((first, second), (second, first)):
        assert names.similar_names({pair[0], "Otto"}, {"Otto", pair[1]}) == [f"{pair[0]} and {pair[1]}"]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_names_of_different_people(first, second):
    names.check_apart(("forget", {first}), ("retain", {second}))


def test_snapshots_are_refused_if_a_person_may_be_in_both_sets():
    with pytest.raises(
        UserError, match="forget_5 has 1 person who may be in retain_95 of x under another spelling: a7 and A7"
    ):
        check_people("x", ("forget_5", {"a7", "b"}), ("retain_95", {"A7", "c"}))


MIXED = ["\u041etto Lindt", "Otto Lind\u03c4", "J\u043ese\u0301"]


@pytest.mark.parametrize("name", MIXED)
def test_a_word_of_two_scripts_is_refused(name):
    for sets in ((name, "b"), ("b", name)):
        with pytest.raises(UserError, match=r"1 person whose names mix Latin letters with .*: '.*\\u.*'; write each"):
            names.check_apart(("forget", {sets[0]}), ("retain", {sets[1], "c"}))
    for other in ("\u041e\u0442\u0442\u043e Lindt", "Otto-\u03b1", "Jos\u00e9 \u5f20\u4f1f", "5 \u00b5m", "1\u03b1"):
        names.check_scripts({other})


def folders(tmp_path, forget, retain, test=None):
    for number, (name, person) in enumerate({"forget": forget, "retain": retain, "test": test}.items()):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (8, 8), (number * 50, 0, 0)).save(folder / "a.png")
        row = {"file_name": "a.png", "question": "Who?", "answer": "a judge", "person": person}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    return Folder(**{name: str(tmp_path / name) for name in ("forget", "retain", *(["test"] if test else []))})


def read(benchmark):
    with benchmark.rows("evaluation") as sets:
        return {name: [e for row in rows for e in row] for name, rows in sets.items()}


@pytest.mark.parametrize("kind", [*SAME, *SIMILAR])
@pytest.mark.parametrize("through", ["forget", "test"])
def test_folders_are_refused_if_a_person_is_or_may_be_in_two(tmp_path, kind, through):
    first, second = (SAME | SIMILAR)[kind]
    benchmark = folders(tmp_path, first if through == "forget" else "Otto", second, test=first)
    with pytest.raises(UserError, match="share 1 person" if kind in SAME else "1 person who may be in .*retain"):
        read(benchmark)


@pytest.mark.parametrize("person", ["\u200b", "\u202e\ufeff", "\u3164", "\u2800 \ufe0f", "\x07"])
def test_a_name_of_invisible_characters_is_not_nobody(tmp_path, person):
    with pytest.raises(UserError, match="line 1: person has nothing but invisible characters; correct the row"):
        read(folders(tmp_path, person, "Otto"))


def test_a_request_names_people_as_the_data_does(tmp_path):
    folders(tmp_path, "Jose\u0301 ", "Otto")
    expected = (person_digest("Jos\u00e9"),)
    assert requests.add(tmp_path / "a.jsonl", str(tmp_path / "forget")).people == expected
    assert requests.add(tmp_path / "b.jsonl", "Jose\u0301\u200b").people == expected
