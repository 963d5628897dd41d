"""The notebooks: each is what its script says, and the demo runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colabs").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_are_what_their_scripts_say(script):
    """Else: jupytext --to ipynb colabs/*.py"""
    import jupytext

    notebook = jupytext.read(script.with_suffix(".ipynb"))
    assert jupytext.writes(notebook, "py:percent") == jupytext.writes(jupytext.read(script), "py:percent")
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    """All of it but the cell that installs, without a screen; the faces of the six are forgotten."""
    done = subprocess.run(
        [sys.executable, ROOT / "colabs" / "demo.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    (gone,) = (line for line in lines if line.startswith("to forget: "))
    (kept,) = (line for line in lines if line.startswith("to keep: "))
    assert gone.startswith("to forget: 6 of 6 named before, ") and int(gone.split()[-2]) <= 1
    assert any("of what was lost came back" in line for line in lines)
    assert kept.startswith("to keep: 6 of 6 named before, ") and int(kept.split()[-2]) >= 5
