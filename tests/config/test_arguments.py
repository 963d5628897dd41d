"""Arguments after a config's colon: keys, bare words and errors."""

from pathlib import Path

import pytest

from vkd_jax.config.arguments import Argument, HelpShown, parse
from vkd_jax.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs"

ARGUMENTS = [
    Argument("size", "Model.", {"7b": "the small one", "13b": "the large one"}, "7b"),
    Argument("stage", "Stage.", {"unlearn": "one model", "all": "all models"}, "unlearn"),
    Argument("train", "Weights.", {"all": "all weights", "visual": "the tower"}, "visual", frozenset(["all"])),
    Argument("attacks", "Attacks.", {"none": "", "every": "each"}, "none", frozenset(["every"]), bare_key="every"),
    Argument("copies", "Copies.", {"7b": "another meaning", "2": "two"}, "2", frozenset(["7b"])),
]
DEFAULTS = dict(size="7b", stage="unlearn", train="visual", attacks="none", copies="2")


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("13b", dict(size="13b")),
        ("size=13b", dict(size="13b")),
        ("all,13b", dict(stage="all", size="13b")),
        ("train=all", dict(train="all")),
        ("train=all,all", dict(train="all", stage="all")),
        ("attacks", dict(attacks="every")),
        ("attacks=none", {}),
        ("7b,size=7b,", {}),
    ],
)
def test_keys_and_bare_words_are_accepted(text, changes):
    assert parse(text, ARGUMENTS) == DEFAULTS | changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70b", "70b: unknown argument. Available: size=7b|13b; stage=unlearn|all; train=all|visual; "),
        ("tint=3", "tint=3: unknown argument. Available: size=7b|13b; "),
        ("size", "size: unknown argument."),
        ("size=70b", "size=70b: unknown value. Available for size: 7b, 13b."),
        ("size=", "size=: unknown value. Available for size: 7b, 13b."),
        ("every", "every: unknown argument."),
        ("7b,size=13b", "7b,size=13b: two values for size, 7b and 13b. Keep one."),
    ],
)
def test_errors_name_the_argument_as_it_was_typed(text, message):
    with pytest.raises(UserError) as error:
        parse(text, ARGUMENTS)
    assert str(error.value).startswith(message) and "\\" not in str(error.value)


def test_a_bare_word_that_two_arguments_have_requires_its_key():
    twice = [*ARGUMENTS, Argument("other", "Other.", {"13b": "", "x": ""}, "x")]
    with pytest.raises(UserError, match="13b: several arguments take this value. Give size=13b or other=13b."):
        parse("13b", twice)
    assert parse("size=13b", twice)["size"] == "13b"


def test_the_default_must_be_one_of_the_values():
    with pytest.raises(ValueError, match="size: the default '3b' is not among"):
        Argument("size", "Model.", {"7b": ""}, "3b")


@pytest.mark.parametrize(
    "file",
    sorted(path.name for path in CONFIGS.glob("*.py") if path.name != "plans.py"),
)
def test_help_shows_every_argument_and_field_with_its_meaning(get_config, file):
    with pytest.raises(HelpShown) as stop:
        get_config(file, "help")
    printed = stop.value.text.splitlines()
    assert stop.value.code == 0
    assert any(
        line.split() == ["all", *"base -> vanilla -> retain-only -> unlearned -> report".split()] for line in printed
    )
    for start in (
        "method: ",
        "  vkd ",
        "benchmark: ",
        "  all          base ->",
        "  5 ",
        "  all   every attack (also: attacks)",
    ):
        assert any(line.startswith(start) for line in printed), start
    for field in (
        "model.path: ",
        "train.learning_rate: Peak learning rate. Allowed: a number",
        "attacks.relearn.steps:",
    ):
        assert any(line.startswith(f"  {field}") for line in printed), field
