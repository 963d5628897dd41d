"""The console command: its help, its errors, and the modules that it runs."""

import importlib
import re
import subprocess
import sys

import pytest
from absl import flags

import vkd_jax
from vkd_jax import cli
from vkd_jax.config import command_line


def test_help_names_every_command_with_an_example(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown and command.help in shown
        assert command.example.startswith(f"vkd {name} ") and command.example in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_help_needs_no_docstrings(monkeypatch, capsys):
    """As with python -OO."""
    monkeypatch.setattr(vkd_jax, "__doc__", None)
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"vkd {vkd_jax.__version__}\n\nCommands:\n")


def test_a_closed_stdout_is_reported():
    program = "from vkd_jax import cli; cli.main(['--help'])"
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{program}" >&-'], capture_output=True, text=True)
    problem = "error: the output cannot be written (stdout is closed); write it to another place.\n"
    assert (done.returncode, done.stderr) == (2, problem)


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{vkd_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"), [([], "no command is given"), (["unlern", "--help"], "unlern: unknown command")]
)
def test_an_unknown_command_is_refused_with_the_known_ones(capsys, arguments, problem):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {problem}. Available: {', '.join(cli.COMMANDS)}; vkd --help explains them.\n"
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_runs_its_module_with_the_rest_of_the_line(name, monkeypatch):
    calls = []
    monkeypatch.setattr(cli.imports, "begin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["vkd"])
    monkeypatch.setattr(cli.runpy, "run_module", lambda module, **options: calls.append((module, options, sys.argv)))
    cli.main([name, "--help"])
    assert calls == [(cli.COMMANDS[name].module, dict(run_name="__main__", alter_sys=True), [f"vkd {name}", "--help"])]
    assert importlib.import_module(cli.COMMANDS[name].module).__doc__


def test_help_of_a_command_shows_its_flags_and_no_other_librarys(monkeypatch, capsys):
    values = flags.FlagValues()
    command_line.define(values)
    flags.DEFINE_string("of_a_library", "", "Something else.", flag_values=values, module_name="library")
    with pytest.raises(SystemExit) as stop:
        command_line.parse(["main", "--help"], values)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  --(\w+)", shown, re.MULTILINE) == ["config", "workdir", "distributed"]
