"""Tests of the notebooks: they match their scripts, their commands are valid, the demo runs, and LLaVA-7B fits."""

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

import vkd_jax
from vkd_jax import ask, plan
from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.results import AttackCell, AttackResults, Summary
from vkd_jax.runs.job import check_config
from vkd_jax.runtime import hub

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colabs").glob("*.py"))
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as for users; other tests disable optimizations
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_match_their_scripts(script):
    """Otherwise create the notebook again from its script with jupytext."""
    import jupytext

    notebook = jupytext.read(script.with_suffix(".ipynb"))
    expected = jupytext.read(script, fmt="py:percent")
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in expected.cells]
    assert jupytext.writes(notebook, "py:percent") == jupytext.writes(expected, "py:percent")


def test_recorded_outputs_of_the_demo_are_complete_and_clean():
    """The outputs have all figures and results, but no error, warning or path of the machine that recorded them."""
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
    """Lines that run in a shell are replaced by `pass`."""
    import jupytext

    for cell in jupytext.read(script.with_suffix(".ipynb")).cells:
        if cell.cell_type == "code":
            shell = re.compile(r"^( *)[!%](?:.*\\\n)*.*$", re.MULTILINE)
            compile(shell.sub(r"\1pass", cell.source), script.name, "exec")


def commands(script: Path, module: str) -> list[list[str]]:
    """Returns the arguments of each `python -m MODULE` in a notebook, with its variables substituted."""
    source = script.read_text(encoding="utf-8")
    variables = {
        node.targets[0].id: node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    lines = re.findall(r"^# !((?:.*\\\n#)*.*)$", source, re.MULTILINE)
    lines = [shlex.split(re.sub(r"\\\n#", "", line)) for line in lines]
    calls = [line[3:] for line in lines if line[:3] == ["python", "-m", module]]
    return [[re.sub(r"\{(\w+)\}", lambda m: str(variables.get(m[1], m[0])), x) for x in call] for call in calls]


ONE_CHIP = ROOT / "colabs" / "llava_7b_v5e1.py"
LAPTOP = ROOT / "colabs" / "smolvlm_laptop.py"


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


def test_commands_of_the_laptop_notebook_are_valid(monkeypatch):
    """The dry run checks the run that follows."""
    monkeypatch.chdir(ROOT)
    checked, run = commands(LAPTOP, "vkd_jax.main")
    assert [x for x in checked if x != "--dry_run"] == run and "{" not in " ".join(run)
    values = flags.FlagValues()
    command_line.define(values)
    monkeypatch.setattr("sys.argv", ["program", *run])
    assert command_line.parse(sys.argv, values) == ["program"]
    config = values.config
    assert (
        config.data.benchmark == "folder"
        and hub.is_id(config.model.path)
        and check_config(RunConfig.from_config_dict(config))
    )
    assert (
        config.train.batch_size.forget == config.train.batch_size.retain == 2 and config.model.max_pixels == 512 * 512
    )


@pytest.mark.parametrize("script", [ONE_CHIP, LAPTOP], ids=lambda path: path.stem)
def test_notebooks_ask_both_models_the_same(script, monkeypatch):
    calls = []
    monkeypatch.setattr(ask, "_load", lambda model, *_, **__: model)
    monkeypatch.setattr(ask, "_read_image", lambda name: name)

    def answer(model, question, image, **_):
        calls.append((model, question, image))
        return "An answer."

    monkeypatch.setattr(ask, "answer", answer)
    for arguments in commands(script, "vkd_jax.ask"):
        monkeypatch.setattr(sys, "argv", ["ask", *arguments])
        assert ask.main() == 0
    original, unlearned = calls
    assert hub.is_id(original[0]) and unlearned[0].endswith("/unlearned") and original[1:] == unlearned[1:]


def test_packages_of_the_notebooks_are_pinned_to_tested_versions():
    lines = [line for line in (ROOT / "colabs/pinned.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines) and all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    tested = (ROOT / "constraints/py311.txt").read_text().lower().replace("_", "-").splitlines()
    assert [line for line in lines if line not in tested] == ["libtpu==0.0.42.1"]  # used on TPUs only
    for script in SCRIPTS:
        installs = re.findall(r"^ *# !pip install .*$", script.read_text(encoding="utf-8"), re.MULTILINE)
        assert installs and all("--constraint colabs/pinned.txt" in line for line in installs)


def test_the_address_of_the_repository_is_in_one_place_of_each_notebook():
    for script in SCRIPTS:
        source = script.read_text(encoding="utf-8")
        assert source.count('REPOSITORY = ""  # @param {type:"string"}\n') == 1
        assert re.findall(r"git clone .*", source) == ["git clone --quiet --depth 1 {REPOSITORY} vkd_jax"]


def test_pinned_packages_of_the_notebooks_are_compatible():
    """Checks the requirements of the pinned packages that are installed here, since pip rejects a conflict."""
    lines = (ROOT / "colabs/pinned.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    if metadata.version("jax") != pinned["jax"]:
        pytest.skip(f"the requirements of JAX {pinned['jax']} are known only when it is installed")
    checked = []
    for name in pinned.keys() & {d.name.lower().replace("_", "-") for d in metadata.distributions()}:
        same = metadata.version(name) == pinned[name]
        for requirement in map(Requirement, metadata.requires(name) or [] if same else []):
            marker = requirement.marker
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", "tpu"))
            if applies and (other := canonicalize_name(requirement.name)) in pinned:
                assert requirement.specifier.contains(pinned[other]), f"{name} requires {requirement}"
                checked.append((name, other))
    assert {("jax", "libtpu"), ("jax", "jaxlib")} <= set(checked)


@pytest.mark.slow
def test_the_one_chip_step_fits_in_memory(tmp_path):
    """Runs the planner's command of the notebook, which uses the TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install '.[tpu]'")
    (arguments,) = commands(ONE_CHIP, "vkd_jax.plan")
    process = subprocess.run(
        [sys.executable, "-m", "vkd_jax.plan", *arguments, f"--json={tmp_path}/plan.json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | OPTIMIZED,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads((tmp_path / "plan.json").read_text())
    (step,) = results["steps"].values()
    assert step["fits"] and step["total"] <= 13.6 * 2**30 < 15.0 * 2**30
    assert min(results["rows"].values()) >= 4 and results["tokens"] == 704


def test_the_demo_runs_on_stubbed_results(monkeypatch, tmp_path, capsys):
    """Runs all cells except the installation, with a stub of the pipeline and stubbed answers."""
    import matplotlib
    from PIL import Image

    from vkd_jax.benchmarks.synthetic import people
    from vkd_jax.runs import pipeline

    matplotlib.use("agg")
    cell = dict(model="unlearned", attacker="visual", share=0.1, unit="questions", set="forget", mean=0.5, n=4)
    configs = []

    def run(config, workdir, command):
        configs.append(config)
        (Path(workdir) / "report").mkdir()
        Image.new("RGB", (20, 20)).save(Path(workdir) / "report" / "relearning.png")
        return types.SimpleNamespace(
            summary=lambda model, name, kind: Summary(0.25, correct=1, n=4, low=0.0, high=0.5),
            attacks={"relearn": AttackResults("Relearning", "", cells=(AttackCell(**cell, recovery=0.5),))},
            text_logits_identical=True,
        )

    forgotten = people.SIXTY.forgotten(10)
    names = (person.name for person in sorted(people.SIXTY.people(), key=lambda person: person.id not in forgotten))
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(vkd_jax, "load", lambda folder: folder)
    monkeypatch.setattr(vkd_jax, "answer", lambda model, *_: next(names) if model == "tiny_llava" else "nobody")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runpy.run_path(str(ROOT / "colabs" / "demo.py"))
    out = capsys.readouterr().out
    assert "to forget: 6 of 6 named before, 0 after" in out and "50.0 % of the lost accuracy recovered" in out
    assert configs[0].attacks.names == "relearn" and check_config(RunConfig.from_config_dict(configs[0]))


@pytest.mark.slow
def test_the_demo_forgets_the_six_faces(tmp_path):
    """Runs all cells except the installation."""
    process = subprocess.run(
        [sys.executable, ROOT / "colabs" / "demo.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)} | OPTIMIZED,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = process.stdout.splitlines()
    (forgotten,) = (line for line in lines if line.startswith("to forget: 6 of 6"))
    (retained,) = (line for line in lines if line.startswith("to retain: 6 of 6"))
    assert forgotten.startswith("to forget: 6 of 6 named before, ") and int(forgotten.split()[-2]) <= 1
    assert any("of the lost accuracy recovered" in line for line in lines)
    assert retained.startswith("to retain: 6 of 6 named before, ") and int(retained.split()[-2]) >= 5
