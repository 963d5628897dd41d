"""The notebooks: each is what its script says, its commands are those of the programs, the demo runs, and 7B fits."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
from absl import flags
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vkd_jax import ask, plan
from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs.job import check_config
from vkd_jax.runtime import hub

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colabs").glob("*.py"))
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as users run it, and unlike the other tests
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_are_what_their_scripts_say(script):
    """Else make them anew, as the README says."""
    import jupytext

    notebook = jupytext.read(script.with_suffix(".ipynb"))
    expected = jupytext.read(script, fmt="py:percent")
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in expected.cells]
    assert jupytext.writes(notebook, "py:percent") == jupytext.writes(expected, "py:percent")


def test_the_demo_shows_what_it_printed():
    """Pictures of the twelve before and after, what came back; no error, and nothing of the machine it ran on."""
    import jupytext

    cells = jupytext.read(ROOT / "colabs" / "demo.ipynb").cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 4
    text = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "to forget: 6 of 6 named before, " in text and "of what was lost came back" in text
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert not re.search(r"/home|/root|site-packages|Warning", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_code_cells_parse(script):
    """Without the lines that are the shell's."""
    import jupytext

    for cell in jupytext.read(script.with_suffix(".ipynb")).cells:
        if cell.cell_type == "code":
            shell = re.compile(r"^( *)[!%](?:.*\\\n)*.*$", re.MULTILINE)
            compile(shell.sub(r"\1pass", cell.source), script.name, "exec")


def commands(script: Path, module: str) -> list[list[str]]:
    """The arguments of each `python -m MODULE` in a notebook's cells, with what its cells assign put in."""
    source = script.read_text(encoding="utf-8")
    assigned = {
        node.targets[0].id: node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    lines = re.findall(r"^# !((?:.*\\\n#)*.*)$", source, re.MULTILINE)
    lines = [shlex.split(re.sub(r"\\\n#", "", line)) for line in lines]
    found = [line[3:] for line in lines if line[:3] == ["python", "-m", module]]
    return [[re.sub(r"\{(\w+)\}", lambda m: str(assigned.get(m[1], m[0])), x) for x in line] for line in found]


ONE_CHIP = ROOT / "colabs" / "llava_7b_v5e1.py"


@pytest.mark.parametrize(
    "module, define_flags",
    [("vkd_jax.plan", plan.define), ("vkd_jax.main", command_line.define)],
    ids=["vkd_jax.plan", "vkd_jax.main"],
)
def test_commands_of_the_one_chip_notebook_are_valid(module, define_flags, monkeypatch):
    """Each flag and each argument of the config exists, and the planned job is the one that runs."""
    monkeypatch.chdir(ROOT)
    (arguments,) = commands(ONE_CHIP, module)
    values = flags.FlagValues()
    define_flags(values)
    monkeypatch.setattr("sys.argv", ["program", *arguments])  # ml_collections reads overrides of the config there
    assert command_line.parse(sys.argv, values) == ["program"]
    assert values.config.model.quantize and min(values.config.train.batch_size.values()) >= 4
    assert hub.is_id(values.config.model.path)
    if module == "vkd_jax.main":
        assert values.config.data.benchmark == "folder" and values.workdir and "{" not in " ".join(arguments)
    else:
        assert values.topology == "v5e:1x1" and not values.compare


def test_the_one_chip_notebook_asks_both_models(monkeypatch):
    asked = []
    monkeypatch.setattr(ask, "load", lambda model, **_: model)
    monkeypatch.setattr(ask, "answer", lambda model, question, image, **_: asked.append((model, question, image)))
    for given in commands(ONE_CHIP, "vkd_jax.ask"):
        monkeypatch.setattr(sys, "argv", ["ask", *given])
        assert ask.main() == 0
    before, after = asked
    assert hub.is_id(before[0]) and after[0].endswith("/unlearned") and before[1:] == after[1:]


def test_what_the_notebooks_install_is_pinned():
    """Nothing is loaded, built or fetched by another name than that of an exact version."""
    lines = [line for line in (ROOT / "colabs/pinned.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines) and all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    tested = (ROOT / "constraints/py311.txt").read_text().lower().replace("_", "-").splitlines()
    assert [line for line in lines if line not in tested] == ["libtpu==0.0.42.1"]  # which runs on TPUs alone
    for script in SCRIPTS:
        installs = re.findall(r"^ *# !pip install .*$", script.read_text(encoding="utf-8"), re.MULTILINE)
        assert installs and all("--constraint colabs/pinned.txt" in line for line in installs)


def test_what_the_notebooks_install_goes_together():
    """pip refuses versions of which one asks for another of the next; what this checks is what is installed here."""
    lines = (ROOT / "colabs/pinned.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    if metadata.version("jax") != pinned["jax"]:
        pytest.skip(f"what JAX {pinned['jax']} asks for is not known where another one is installed")
    asked = []
    for name in pinned.keys() & {d.name.lower().replace("_", "-") for d in metadata.distributions()}:
        same = metadata.version(name) == pinned[name]
        for needed in map(Requirement, metadata.requires(name) or [] if same else []):
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", "tpu"))
            if wanted and (other := canonicalize_name(needed.name)) in pinned:
                assert needed.specifier.contains(pinned[other]), f"{name} asks for {needed}"
                asked.append((name, other))
    assert {("jax", "libtpu"), ("jax", "jaxlib")} <= set(asked)


@pytest.mark.slow
def test_the_one_chip_step_takes_15_gib(tmp_path):
    """The planner's command in the notebook, by the TPU's own compiler; and what it took when this was written."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install '.[tpu]'")
    (given,) = commands(ONE_CHIP, "vkd_jax.plan")
    done = subprocess.run(
        [sys.executable, "-m", "vkd_jax.plan", *given, f"--json={tmp_path}/found.json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | OPTIMISED,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    (step,) = found["steps"].values()
    assert step["fits"] and step["total"] <= 13.6 * 2**30 < 15.0 * 2**30
    assert min(found["rows"].values()) >= 4 and found["tokens"] == 704


def test_the_cells_of_the_demo_run_on_recorded_results(monkeypatch, tmp_path, capsys):
    """All cells but the one that installs, with figures in the place of the run and names in that of the answers."""
    import matplotlib
    from PIL import Image

    from vkd_jax.benchmarks.synthetic import people
    from vkd_jax.runs import pipeline

    matplotlib.use("agg")
    figures = {"accuracy": 0.25}
    sets = {name: {"vqa": figures, "qa": figures} for name in ("forget", "test", "retain", "real")}
    cell = {
        "model": "unlearned",
        "attacker": "visual",
        "share": 0.1,
        "unit": "questions",
        "set": "forget",
        "recovery": 0.5,
    }
    planned = []

    def run(config, workdir):
        planned.append(config)
        (Path(workdir) / "report").mkdir()
        Image.new("RGB", (20, 20)).save(Path(workdir) / "report" / "relearning.png")
        results = {
            "models": {name: sets for name in ("vanilla", "unlearned", "retain_only")},
            "attacks": {"relearn": {"cells": [cell]}},
            "text_logits_identical": True,
        }
        return types.SimpleNamespace(to_json=lambda: results)

    forgotten = people.forgotten_ids(6)
    names = (person.name for person in sorted(people.people(), key=lambda person: person.id not in forgotten))
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(ask, "load", lambda folder: folder)
    monkeypatch.setattr(ask, "answer", lambda model, *_: next(names) if model == "tiny_llava" else "nobody")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "colabs" / "demo.py"))
    out = capsys.readouterr().out
    assert "to forget: 6 of 6 named before, 0 after" in out and "50.0 % of what was lost came back" in out
    assert planned[0].attacks.names == "relearn" and check_config(RunConfig.from_config_dict(planned[0]))


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    """All of it but the cell that installs, without a screen; the faces of the six are forgotten."""
    done = subprocess.run(
        [sys.executable, ROOT / "colabs" / "demo.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)} | OPTIMISED,
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
