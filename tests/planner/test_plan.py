"""The planner's figures, its page and its table, and the command."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags
from planned import LENGTHS, build_step

from vkd_jax import plan as command
from vkd_jax.config.schema import RunConfig
from vkd_jax.planner import memory, page, plan, table
from vkd_jax.planner.compile import compile_step
from vkd_jax.planner.tpu_specs import TPUS, topology_devices
from vkd_jax.reporting import tables
from vkd_jax.runtime import files, provenance, storage
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one


def test_two_values_of_four_bits_are_a_byte():
    assert memory.nbytes(jax.ShapeDtypeStruct((3, 5), jnp.int4)) == 8
    assert memory.nbytes(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)) == 30


@pytest.mark.parametrize("topology", ["v9:1x1", "v5e", "v5e:two"])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(UserError, match=r"give a chip \(v4, v5e, v5p, v6e\) and a shape, such as v5e:2x2"):
        topology_devices(topology)


# ---- Figures, without the TPU compiler ----


def figures_of(forward=0.0, weights=0.0, total=None, temporaries=0, refused=None, saved=0, fits=True, **parts):
    """A step's figures as `plan.figures` has them, of a chip of 1 TFLOP a second."""
    work = dict(forward=forward, backward=0.0, weight_gradients=weights, recomputed=0.0)
    seconds = (forward + weights) / 1e12
    return {
        "bytes": dict.fromkeys(memory.KINDS, 0) | parts,
        "quantized_saving": saved,
        "flops": {"language_model": work},
        "flops_total": forward + weights,
        "compiler": dict(
            program="p", seconds=120.0, temporaries=temporaries, total=total, refused=refused, collectives={}
        ),
        "total": total,
        "fits": fits,
        "seconds_by_cycles": None if refused else 2 * seconds,
        "seconds": dict(compute=seconds, interconnect=None if refused else 0.0),
        "bound": "compute",
        "seconds_at_least": seconds,
    }


OWN = figures_of(2e12, 0.0, total=30, frozen=8, trainable=2, optimizer=4, original=2, saved=4)
TRAINS_ALL = figures_of(2e12, 2e12, total=120, trainable=24, optimizer=48, original=24)


def test_contributions_to_time_and_memory_by_hand():
    """Of 120 bytes: 4 by four bits, 10 by bfloat16, 22 and 44 by what does not train, and of what is left 10."""
    by = plan.ratios(OWN, TRAINS_ALL)
    assert by["seconds"] == by["flops"] == 0.5 and by["bytes"] == 0.25
    assert by["flops_by"] == {"forward": 0.0, "backward": 0.0, "weight gradients": -0.5, "recomputed": 0.0}
    expected = {
        "quantized weights": -4,
        "weights not in float32": -10,
        "weights as loaded": -22,
        "optimizer": -44,
        "mask": 0,
        "batches and caches": 0,
        "gradients and activations": -10,
    }
    assert by["bytes_by"] == {name: pytest.approx(n / 120) for name, n in expected.items()}
    assert sum(by["flops_by"].values()) == by["flops"] - 1
    assert sum(by["bytes_by"].values()) == pytest.approx(by["bytes"] - 1)


def page_of(**steps):
    own, usual = steps.values()
    return {"steps": steps, "ratios": plan.ratios(own, usual), "usable_gib": 15.75}


def test_the_two_lines_at_the_end():
    by_time, by_memory = page.compared(page_of(vkd=OWN, grad_diff=TRAINS_ALL))
    assert by_time == (
        "least time of vkd / grad_diff: 0.50, 50 % less (2000.0 ms by compute and 4000.0 ms by compute); "
        "by the compiler's cycles 0.50, 50 % less (4000.0 ms and 8000.0 ms); FLOPs: weight gradients -50.0 %"
    )
    assert by_memory == (
        "memory of vkd / grad_diff: 0.25, 75 % less: optimizer -36.7 %, weights as loaded -18.3 %, "
        "weights not in float32 -8.3 %, gradients and activations -8.3 %, quantized weights -3.3 %"
    )


def test_the_two_lines_where_the_other_step_does_not_fit():
    refused = "the step requires 20.00 GiB of 15.75 GiB, 4.25 GiB too much"
    results = page_of(vkd=OWN, grad_diff=TRAINS_ALL | figures_of(2e12, 2e12, total=None, refused=refused, fits=False))
    by_time, by_memory = page.compared(results)
    assert by_time.endswith(
        "by compute; grad_diff does not fit, so only its compute time is known); FLOPs: weight gradients -50.0 %"
    )
    assert by_memory == "memory of vkd / grad_diff: not known"
    assert plan.why_not(results["steps"]["grad_diff"], 15.75) == refused
    too_much = figures_of(total=16 * memory.GIB, fits=False)
    assert plan.why_not(too_much, 15.75) == ("the run requires 16.00 GiB of 15.75 GiB, 0.25 GiB too much")


def short_step(config):
    """A step with fewer operations than VKD's, which is traced and lowered in less time."""
    return build_step(config, "grad_diff", train="visual")


def test_a_refusal_for_lack_of_memory_is_a_figure(config, monkeypatch):
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded"

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(refusal)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    results = plan.figures(short_step(config), TPUS["v5e"])
    assert results["compiler"]["total"] == 20 * memory.GIB and not results["fits"]
    assert results["compiler"]["refused"] == "the step requires 20.00 GiB of 15.75 GiB, 4.25 GiB too much"
    assert results["bound"] == "compute" and results["seconds"]["interconnect"] is None
    refusal, config.train.clip_norm = "INTERNAL: Mosaic failed to compile", 0.5
    with pytest.raises(UserError, match="the TPU compiler refuses this step: Mosaic failed to compile"):
        plan.figures(short_step(config), TPUS["v5e"])


def test_memory_that_the_runtime_reserves_is_not_usable(config):
    """What a run holds beside the step counts, and so does what the runtime keeps for itself."""
    step = short_step(config)
    results = plan.figures(step, TPUS["v5e"])
    compiled = results["compiler"]
    assert results["fits"] and results["total"] == compiled["total"] + results["bytes"]["original"]
    room = dataclasses.replace(TPUS["v5e"], usable=(results["total"] - 1) / memory.GIB)
    assert not plan.figures(step, room)["fits"]


def test_bytes_that_quantized_weights_save(config):
    """Compared with the dtype that the model computes in; scales count."""
    plain = build_step(config)
    assert memory.quantized_saving(plain) == 0
    config.model.quantize = "int8"
    step = build_step(config)
    saved = memory.bytes_by_kind(plain)["frozen"] - memory.bytes_by_kind(step)["frozen"]
    assert memory.quantized_saving(step) == saved > 0


def test_the_baseline_rematerializes_if_it_does_not_fit_otherwise(config, monkeypatch):
    tried, fits = [], {"": False, "full": True}

    def figures(step, tpu):
        tried.append(step.model_config.remat)
        return {"fits": fits[tried[-1]]}

    monkeypatch.setattr(plan, "figures", figures)
    arguments = RunConfig.from_config_dict(config), make_mesh(), LENGTHS, TPUS["v5e"]
    assert plan.baseline(*arguments)["fits"] and tried == ["", "full"] and config.model.remat == ""
    fits[""] = True
    plan.baseline(*arguments)
    assert tried == ["", "full", ""]


# A compiled program, as short as can be.
PAGE = """ENTRY %e (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4] all-reduce(%p), replica_groups={}, backend_config={"estimated_cycles":"7"}
}
"""


@pytest.fixture
def here(monkeypatch):
    """The planner with this machine's devices in the place of TPUs and a compiler by hand; what that compiled."""
    compiled = []

    class Program:
        def memory_analysis(self):
            names = dict(argument=100, output=50, alias=50, temp=30)
            return types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in names.items()})

        def as_text(self):
            return PAGE

    def compile_(lowered, compiler_options):
        compiled.append(lowered)
        return Program()

    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    return compiled


def test_a_program_that_jaxlib_cannot_read_is_read_from_the_compilers_dump(config, here, monkeypatch):
    known = compile_step(short_step(config))
    config.train.clip_norm = 0.5
    compile_ = jax.stages.Lowered.compile

    def unreadable(lowered, compiler_options):
        program = compile_(lowered, compiler_options)
        (Path(compiler_options["xla_dump_to"]) / "module_0.after_codegen.txt").write_text(PAGE.replace('"7"', '"8"'))
        program.as_text = fail
        return program

    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Lowered, "compile", unreadable)
    results = compile_step(short_step(config))
    assert results["cycles"] == known["cycles"] + 1


def test_a_plan_as_a_page(config, here):
    results = plan.plan(RunConfig.from_config_dict(config), "v5e:1x1", LENGTHS)
    assert json.loads(json.dumps(results)) == results and len(here) == 2
    text = page.render(results)
    assert results["ratios"]["flops"] < 1 and text.splitlines()[-2].startswith("least time of vkd / grad_diff, all")
    assert "  total by the compiler" in text and "v5e:1x1: 1 chips of 16 GiB" in text
    alone = plan.plan(RunConfig.from_config_dict(config), "v5e:1x1", LENGTHS, compare=False)
    assert alone["ratios"] is None and "least time" not in page.render(alone)


# ---- The table ----


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch):
    """A table of one model on three slices, with an empty cache; the batch of the last one is refused."""
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    base = f"--config={ROOT}/configs/tiny.py:method=grad_diff --config.model.path={tiny_folder}"
    base += " --text_tokens=12 --answer_tokens=5"

    def cell(name, forget, *more):
        rows = [f"--config.train.batch_size.{stream}={n}" for stream, n in (("forget", forget), ("retain", 4))]
        return "Tiny", name, " ".join([base, *rows, *more])

    cells = [cell(name, rows, "--nocompare") for name, rows in (("v5e-1", 4), ("v5e-4", 2), ("none", 0))]
    return ml_collections.ConfigDict(dict(stage="plan", plans=dict(rows=cells, only=(), examples=7200)))


def test_the_table_resumes(small, here, tmp_path, capsys, monkeypatch):
    file, write = tmp_path / "plans.json", files.write_bytes
    monkeypatch.setattr(provenance, "commit", lambda but=None: "0123abc")

    def once(path, data):
        if path == file and file.exists():
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(files, "write_bytes", once)
    with pytest.raises(KeyboardInterrupt):
        table.write(small, file, command.plan_flags)
    (first,) = json.loads(file.read_text())
    monkeypatch.setattr(files, "write_bytes", write)
    table.write(small, file, command.plan_flags)
    rows = json.loads(file.read_text())
    assert [row["slice"] for row in rows] == ["v5e-1", "v5e-4", "none"]
    assert rows[0]["steps"] == first["steps"] and len(here) == 1 + 1  # no program is compiled again
    assert "each value a whole number of at least 1" in rows[2]["error"] and "error" not in rows[1]
    assert rows[1]["run"] == {"examples": 7200}
    assert "Tiny on v5e-1, " in capsys.readouterr().out
    small.plans.only = ("v5e-1",)
    small.plans.rows = (*small.plans.rows[::-1],)
    table.write(small, file, command.plan_flags)  # what is of this commit is not even traced
    assert (json.loads(file.read_text()), capsys.readouterr().out) == (rows, "")
    monkeypatch.setattr(provenance, "commit", lambda but=None: "0123abc+changes")  # which may be any
    table.write(small, file, command.plan_flags)
    assert len(here) == 2 and [row["slice"] for row in json.loads(file.read_text())] == ["none", "v5e-4", "v5e-1"]


@pytest.mark.slow
def test_two_processes_may_write_one_table(small, here, tmp_path, monkeypatch):
    file, planned = tmp_path / "plans.json", command.plan
    small.plans.only = ("v5e-1",)

    def meanwhile(*args):
        monkeypatch.setattr(command, "plan", planned)
        other = small.copy_and_resolve_references()
        other.plans.only = ("v5e-4",)
        table.write(other, file, command.plan_flags)
        return planned(*args)

    monkeypatch.setattr(command, "plan", meanwhile)
    table.write(small, file, command.plan_flags)
    assert [row["slice"] for row in json.loads(file.read_text())] == ["v5e-1", "v5e-4"]


def test_a_program_that_changed_is_compiled_again(config, here):
    results = compile_step(short_step(config))
    assert compile_step(short_step(config)) == results and len(here) == 1
    config.train.clip_norm = 0.5
    assert compile_step(short_step(config))["program"] != results["program"] and len(here) == 2


def test_a_refusal_is_cached(config, monkeypatch):
    requests = []

    def refuse(lowered, compiler_options):
        requests.append(lowered)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm. Exceeded")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    first, second = (compile_step(short_step(config)) for _ in range(2))
    assert first == second and first["refused"] and len(requests) == 1


def test_arguments_that_no_row_matches_are_refused(small, tmp_path):
    small.plans.only = ("v5e-1", "v5e-4")
    with pytest.raises(UserError, match="no row is of v5e-1 and v5e-4: give one model, one slice, or one of each."):
        table.write(small, tmp_path / "plans.json", command.plan_flags)


def test_a_file_that_is_not_a_table_is_left_unchanged(small, tmp_path):
    (tmp_path / "plans.json").write_text('{"steps": 1}')
    with pytest.raises(UserError, match="exists and contains no rows of this table"):
        table.write(small, tmp_path / "plans.json", command.plan_flags)


def test_the_table_as_a_page(small, here, tmp_path, capsys):
    table.write(small, tmp_path / "plans.json", command.plan_flags)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: plans.json plans -->\n<!-- /table -->\n")
    assert tables.main([str(page)]) == 0 and tables.main([str(page), "--check"]) == 0
    lines = page.read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| Tiny")]
    assert [(row[1], row[4]) for row in cells] == [("v5e-1", "4 + 4"), ("v5e-4", "2 + 4"), ("none", "–")]


def test_rows_of_plans_that_do_not_fit_say_by_how_much():
    row = {"model_name": "M", "slice": "s", "dtype": "bfloat16", "quantize": "", "mesh": dict(fsdp=2, tensor=3)}
    row |= {"rows": dict(forget=4, retain=5), "usable_gib": 15.75, "commit": "abcdef123", "tokens": 7}
    row |= {"run": dict(examples=4800), "chips": 6, "versions": dict(jaxlib="1.2", libtpu="0.4")}
    steps = [
        figures_of(1e12, total=memory.GIB),
        figures_of(total=16 * memory.GIB, fits=False),
        figures_of(refused="vmem", fits=False),
    ]
    # Two seconds by cycles, the longer ones, for nine rows on six chips.
    error = {key: row[key] for key in ("model_name", "slice", "commit")} | {"error": "why"}
    lines = tables.plans([*(row | {"steps": {"vkd": x}} for x in steps), error]).splitlines()[2:]
    arguments = "| M | s | bfloat16 | 2 × 3 | 4 + 5 | "
    assert lines[:4] == [
        arguments + "1.00 of 15.75 | yes | 1.0 | 1,000.0 | compute | 2,000.0 | 4.5 | 1.78 | 0.00 |",
        arguments + "16.00 of 15.75 | no, 0.25 too much | 0.0 | – | – | – | – | – | – |",
        arguments + "– | no | 0.0 | – | – | – | – | – | – |",
        "| M | s | – | – | – | – | no: why | – | – | – | – | – | – | – |",
    ]
    assert "Tokens per example: M 7." in lines[-1]
    assert "Compiled in 6 minutes by jaxlib 1.2, libtpu 0.4; commit abcdef1." in lines[-1]


def test_chip_hours_by_hand():
    """Six chips, four seconds for nine rows: 4800 rows take 3.56 chip-hours."""
    row = {"model_name": "M", "slice": "s", "rows": dict(forget=4, retain=5), "run": dict(examples=4800), "chips": 6}
    slow, large = figures_of(4e12), figures_of(total=16 * memory.GIB, fits=False)
    slow["seconds_by_cycles"] = 4.0
    rows = [row | {"steps": {"vkd": slow}}, row | {"slice": "t", "steps": {"vkd": large}}]
    rows += [{"model_name": "N", "slice": "s", "error": "why"}]
    assert tables.chip_hours(rows).splitlines() == [
        "| chip-hours | s | t |",
        "| --- | ---: | ---: |",
        "| M | 3.56 | too large |",
        "| N | no | – |",
    ]


def test_each_row_of_the_tables_config_is_a_command(get_config, monkeypatch):
    """Models on slices, by the rule of the table, on as many chips as the slice has, with batches that divide."""
    rows = get_config("plans.py").plans.rows
    assert len(rows) == len({(model, name) for model, name, _ in rows}) == 4 * 9 + 14 * 5
    for _, name, arguments in rows:
        values = flags.FlagValues()
        command.define(values)
        argv = ["plan", *arguments.replace("configs/", f"{ROOT}/configs/").split()]
        monkeypatch.setattr("sys.argv", argv)
        values(argv)
        mesh, rows_ = values.config.mesh, values.config.train.batch_size
        chips = int(np.prod([int(x) for x in values.topology.partition(":")[2].split("x")]))
        assert chips == int(name.partition("-")[2]) // (2 if name in ("v4-8", "v5p-8") else 1)
        fsdp = chips // mesh.tensor if mesh.fsdp == -1 else mesh.fsdp
        assert fsdp * mesh.tensor == chips and rows_.forget % fsdp == rows_.retain % fsdp == 0
        if name == "v5e-1":
            assert values.config.model.quantize.startswith("int4") and rows_.forget >= 4 <= rows_.retain
    one = get_config("plans.py", "v5e-16,Qwen2-VL-2B").plans
    assert one.only == ("Qwen2-VL-2B", "v5e-16") and len(one.rows) == len(rows)
    assert get_config("plans.py", "slice=v5e-16").plans.only == ("v5e-16",)
    with pytest.raises(UserError, match="v5e-2: unknown argument. Available: model=all"):
        get_config("plans.py", "v5e-2")


def test_a_table_requires_a_file(get_config, capsys):
    values = flags.FlagValues()
    command.define(values)
    values(["plan", f"--config={ROOT}/configs/plans.py"])
    assert command.run(["plan"], values) == 2 and "pass --json FILE" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(get_config, monkeypatch, tmp_path, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(command, "plan_values", lambda values: {})
    monkeypatch.setattr(command.files, "write_bytes", full)
    values = flags.FlagValues()
    command.define(values)
    values(["plan", f"--config={ROOT}/configs/tiny.py", f"--json={tmp_path}/plan.json"])
    assert command.run(["plan"], values) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write at {tmp_path}/plan.json: No space left")


# ---- As a program ----


@pytest.fixture
def run(tmp_path):
    """Results and printed page of the planner."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install '.[tpu]'")

    def run(*flags):
        done = subprocess.run(
            [sys.executable, "-m", "vkd_jax.plan", *flags, "--json=found.json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / "found.json").read_text()), done.stdout

    return run


def test_as_a_program(run, tiny_folder):
    """The TPU compiler's figures of a tiny step, on the page and in the file."""
    flags = [f"--config={ROOT}/configs/tiny.py", f"--config.model.path={tiny_folder}", "--topology=v5e:1x1"]
    results, page = run(*flags, "--text_tokens=12", "--answer_tokens=5")
    own, usual = results["steps"]["vkd"], results["steps"]["grad_diff, all weights"]
    for step in (own, usual):
        assert step["fits"] and step["compiler"]["total"] > step["compiler"]["arguments"] > 0
        assert step["compiler"]["collectives"] == {}  # of one chip
    assert own["flops_total"] < usual["flops_total"]
    assert "total by the compiler" in page and "v5e:1x1: 1 chips of 16 GiB" in page
