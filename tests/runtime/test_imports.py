"""Libraries that cannot be imported are one sentence, and other errors are not mistaken for them."""

import importlib
import os
import subprocess
import sys

import pytest

from vkd_jax.runtime import commands, imports


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Makes a library whose module has the given lines."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield make
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_an_error_at_the_import_of_a_library_names_the_library(broken):
    broken("inner_library", 'raise ValueError("SOME_VARIABLE is nonsense")')
    broken("outer_library", "import inner_library")
    with pytest.raises(ValueError, match="nonsense") as raised:
        exec("import outer_library", {"__name__": "vkd_jax.reporting.plots"})
    sentence = imports.problem(raised.value)
    assert sentence.startswith(
        "outer_library cannot be imported (ValueError in inner_library: SOME_VARIABLE is nonsense); correct the"
    )


def test_a_library_that_is_missing_is_named():
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module("no_such_library.part")
    assert imports.problem(raised.value).startswith(
        "no_such_library cannot be imported (ModuleNotFoundError: No module"
    )


@pytest.mark.parametrize("own", ["vkd_jax.reporting.plots", "__main__"])
def test_errors_of_this_package_and_of_functions_are_others(broken, own):
    library = importlib.import_module(broken("library", 'def call():\n    raise ValueError("a fault")'))
    for line in ("library.call()", 'raise ValueError("a fault")', "import json; json.loads('{')"):
        with pytest.raises(ValueError) as raised:
            exec(line, {"__name__": own, "library": library})
        assert imports.problem(raised.value) is None


def test_a_command_says_what_a_library_refuses_when_it_is_first_used(broken, capsys):
    broken("late_library", 'raise RuntimeError("no settings")')

    @commands.guarded
    def command():
        exec("import late_library", {"__name__": "vkd_jax.reporting.plots"})

    assert command() == 2
    assert capsys.readouterr().err.startswith("error: late_library cannot be imported (RuntimeError: no settings);")


def test_a_command_says_what_a_library_refuses_while_it_starts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vkd_jax.runs.rebuild_report", tmp_path],
        env={**os.environ, "MPLBACKEND": "nonsense", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: matplotlib cannot be imported (ValueError: Key backend: 'nonsense' is not a")
