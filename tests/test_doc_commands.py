"""The commands of the documentation: each of their flags, arguments and fields exists, and they fit together."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags

from vkd_jax import cli, compare, main, plan, requests
from vkd_jax.config import command_line
from vkd_jax.config.arguments import HelpShown

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DEFINITIONS = {"unlearn": main.define, "compare": compare.define, "plan": plan.define, "requests": requests.define}
MODULES = {command.module: name for name, command in cli.COMMANDS.items()}
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections


def commands(text):
    """The commands of this package in the code blocks of a page, as (name of the command, its arguments)."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*\n(?:^ {4}.*\n)*)", text, re.MULTILINE)
    for line in re.sub(r"\\\n\s*", " ", "\n".join(indented + fenced)).splitlines():
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part, comments=True) if re.match(r"\s*(vkd \w|python -m vkd_jax)", part) else []
            if words[:2] == ["python", "-m"] and words[2] in MODULES:
                yield MODULES[words[2]], words[3:]
            elif words[:1] == ["vkd"]:
                yield words[1], [word for word in words[2:] if word != "..."]


def imported(name):
    """The module of a command, which a package has as `__main__`."""
    module = importlib.import_module(cli.COMMANDS[name].module)
    return importlib.import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module


class Parsed(BaseException):
    """Raised in place of what a command does."""


def parse(name, arguments, monkeypatch):
    """Parses the arguments of a command as the command does, and checks the config, if it has one."""
    module = imported(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])  # ml_collections reads overrides of the config there
    if name in DEFINITIONS and (name, *arguments[:1]) not in [("requests", x) for x in ("add", "show", "purge")]:
        values = flags.FlagValues()
        DEFINITIONS[name](values)
        command_line.parse(sys.argv, values)
        return
    original = command_line.ArgumentParser.parse_args

    def parsed(self, *positional):
        raise Parsed(original(self, *positional))

    monkeypatch.setattr(command_line.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed) as caught:
        module.main()
    if name == "verify":
        module._check_combination(caught.value.args[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_valid(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, arguments in commands(page.read_text("utf-8")):
        with monkeypatch.context() as patch:
            try:
                parse(name, arguments, patch)
            except HelpShown:
                assert arguments[-1].endswith(":help")


def test_the_pages_of_a_new_user_have_commands():
    found = {page.stem: list(commands(page.read_text("utf-8"))) for page in PAGES}
    assert [name for name, _ in found["tutorial_review"]] == ["verify", "ask", "unlearn"]
    assert {name for names in found.values() for name, _ in names} == cli.COMMANDS.keys() - {"report"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_the_help_are_valid(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        parse(name, shlex.split(cli.COMMANDS[name].example)[2:], patch)
    for line in re.findall(rf"^vkd {name} .*$", imported(name).__doc__, re.MULTILINE):
        words = shlex.split(re.split(r"\[|\s{3,}", line)[0])[2:]
        with monkeypatch.context() as patch:
            parse(name, words, patch)
