"""The command line, and every kind of bad input: one sentence, exit status 2, and no incomplete file."""

import errno
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags, logging

from vkd_jax import main
from vkd_jax.checkpoints import safetensors_files
from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.runtime import log

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
SHARD = "train-00000-of-00001.parquet"
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def data(few, tmp_path):
    return Path(shutil.copytree(few, tmp_path / "data"))


@pytest.fixture
def model(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def run(monkeypatch, capfd, tiny_folder, few, tmp_path):
    """Runs the command in this process: (exit status, stderr)."""

    def run(*args, config=TINY, data=few, model=tiny_folder, workdir=tmp_path / "run"):
        argv = ["main", f"--config={config}", f"--workdir={workdir}"]
        if config.startswith(TINY):
            argv += [f"--config.data.source={data}", f"--config.model.path={model}", "--config.train.steps=1"]
            argv += ["--config.model.base=", "--config.model.retain_only="]
        given = {arg.partition("=")[0] for arg in args}  # a flag with two values is refused
        return call([*(arg for arg in argv if arg.partition("=")[0] not in given), *args])

    def call(argv):
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        main.define(values)
        capfd.readouterr()
        try:
            status = main.main(command_line.parse(argv, values), values)
        except SystemExit as stop:
            status = stop.code
        return status, capfd.readouterr().err

    run.call = call
    return run


def refused(result, *parts):
    status, err = result
    assert status == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for fragment in parts:
        assert fragment in err
    return err


@pytest.fixture
def untouched(tmp_path):
    """Checks after the test that the workdir is absent, or contains only complete files of the config."""
    yield
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    data = {name for name in left if name.split("/")[0] == "data"}  # it is read before the model
    expected = {"config.json", "inputs.json", "records.json", "timing.json"}
    assert left - data <= expected and not any("incomplete" in name for name in data), left
    for path in (tmp_path / "run").glob("*.json"):
        json.loads(path.read_text())


# ---- The command line ----


@pytest.mark.parametrize("text", ["def get_config():\n    raise KeyboardInterrupt\n", "raise KeyboardInterrupt\n"])
def test_ctrl_c_in_a_config_file_ends_the_command_with_its_status(run, untouched, tmp_path, text):
    (tmp_path / "slow.py").write_text(text)
    status, err = run.call(["main", f"--config={tmp_path / 'slow.py'}", f"--workdir={tmp_path / 'run'}"])
    assert (status, err) == (130, "stopped by Ctrl-C before anything was run\n")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--config.foo=1"], ["unknown field 'foo'"]),
        (["--config.train.foo=1"], ["unknown field 'foo'"]),
        (["--config.trian.steps=1"], ["--config.trian.steps: unknown field 'trian'. Did you mean 'train'?"]),
        (["--config.train.stepz=1"], ["--config.train.stepz: unknown field 'stepz'. Did you mean 'steps'?"]),
        (
            ["--config.method.lora_rnk=3"],
            ["--config.method.lora_rnk: unknown field 'lora_rnk'. Did you mean 'lora_rank'?"],
        ),
        (["--config.=3"], ["--config.: '' is not the name of a field; give one such as train.steps."]),
        (["--config.train..steps=3"], ["--config.train..steps: 'train..steps' is not the name of a field"]),
        (["--config.train.", "3"], ["--config.train.: 'train.' is not the name of a field"]),
        (["--config.train/steps=3"], ["--config.train/steps: 'train/steps' is not the name of a field"]),
        (["--config.train.class=3"], ["--config.train.class: 'train.class' is not the name of a field"]),
        (["--config.method.taps[0]=features"], ["--config.method.taps[0]: 'method.taps[0]' is not the name of a"]),
        (["--noconfig..symlinks"], ["--noconfig..symlinks: '.symlinks' is not the name of a field"]),
        (["--config.model.path.x=3"], ["--config.model.path.x: a value has no fields; docs/configuration.md lists"]),
        (
            ["--config.train.steps.more=1"],
            ["--config.train.steps.more: a value has no fields; docs/configuration.md lists"],
        ),
        (["--config.train.steps=abc"], ["--config.train.steps=abc is not allowed. Give a whole number."]),
        (["--config.seed=1.0"], ["--config.seed=1.0 is not allowed. Give a whole number."]),
        (["--config.train.learning_rate=fast"], ["learning_rate=fast is not allowed. Give a number."]),
        (
            ["--config.eval=3"],
            ["--config.eval=3 is not allowed. Give a field of this section, as in --config.eval.FIELD="],
        ),
        (["--workdri=x"], ["--workdri is no flag of this command; --help shows its flags. Did you mean --workdir?"]),
        (["--workdir="], ["--workdir is empty; pass its path."]),
        (["--config="], ["--config is empty; pass its path."]),
        (["more"], ["unexpected argument 'more'"]),
        (["--nodry_run=true"], ["--nodry_run=true: a flag with --no takes no value; give --nodry_run or --dry_run=fa"]),
        (["--noconfig.data.symlinks="], ["--noconfig.data.symlinks=: a flag with --no takes no value; give --noconf"]),
        (["--config.train.log_every"], ["--config.train.log_every has no value; give --config.train.log_every=VALUE."]),
        (["--", "--config.seed=3"], ["--config.seed=3: what follows -- is no flag; leave out the --."]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_wrong_flags_are_refused(run, untouched, args, parts):
    refused(run(*args), *parts)


def test_missing_flags_are_named(run, untouched):
    refused(run.call(["main"]), "pass --config FILE and --workdir DIR")
    refused(run.call(["main", "--config.train.steps=3", f"--config={TINY}"]), "before a value for --config")


def test_the_arguments_of_a_config_are_printed(run, monkeypatch):
    texts = []
    monkeypatch.setattr(command_line, "show", texts.append)
    assert run.call(["main", f"--config={TINY}:help"]) == (0, "")
    assert len(texts) == 1 and texts[0].startswith("Arguments after the colon")


def test_without_a_workdir_the_config_is_printed_and_nothing_runs(run, tmp_path, capfd, monkeypatch):
    words = f"--config={ROOT / 'configs' / 'llava.py'}:mllmu,forget=5,size=7b"
    argv = ["main", words, "--config.data.source=SNAPSHOT", "--config.model.path=MODEL"]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    main.define(values)
    assert main.main(command_line.parse(argv, values), values) == 0
    out, err = capfd.readouterr()
    assert "nothing was run" in err and list(tmp_path.iterdir()) == []
    for line in ("  benchmark: mllmu", "  forget: 5", "  source: SNAPSHOT", "  path: MODEL", "    lora_rank: 16"):
        assert line in out.splitlines()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--config.method.name=magic"], ["method.name: unknown method 'magic'", "npo, rmu, vkd"]),
        (
            ["--config.method.name=finetune"],
            ["method.augment_forget: finetune has no such field. ", "FILE.py:method="],
        ),
        (["--config.method.distance=cubic"], ["method.distance: 'cubic' is not allowed. Give one of mse"]),
        (["--config.stage=dream"], ["stage: 'dream' is not", "unlearn, finetune, retain_only, all"]),
        (["--config.stage=all"], ["model.base: no model to fine-tune is given"]),
        (["--config.model.path="], ["model.path: no vanilla model is given"]),
        (["--config.train.epochs=1"], ["train.steps: steps=1 and epochs=1.0", "Give one of them"]),
        (["--config.model.dtype=bf16"], ["model.dtype: 'bf16'", "bfloat16"]),
        (["--config.model.quantize=int3"], ["model.quantize: 'int3'", "int4"]),
        (["--config.model.max_pixels=99"], ["have one size", "model.max_pixels"]),
        (["--config.method.taps=()"], ["method.taps: () is not allowed"]),
        (["--config.data.forget=7"], ["data.forget: 7 is not allowed", "5, 10, 15"]),
        (["--config.mesh.data=1000"], ["1000 devices", "config.mesh"]),
        (["--config.eval.protocol=coin"], ["eval.protocol: 'coin'", "options, letter"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_wrong_values_are_refused(run, untouched, args, parts):
    refused(run(*args), *parts)


def test_an_unknown_argument_of_the_config_is_refused(run, untouched):
    refused(run(config=TINY + ":nonsense"), "nonsense: unknown argument", "grad_ascent|grad_diff")


def test_every_hyperparameter_can_be_overridden(monkeypatch):
    """Fields that may be None included; fields that are not given have their defaults in the config."""
    args = ["--config.method.mask_threshold=1.5", "--config.method.mask_keep=None", "--config.method.blocks=1"]
    argv = ["main", f"--config={TINY}", "--workdir=x", *args]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    main.define(values)
    assert command_line.parse(argv, values) == ["main"]
    from vkd_jax import methods

    fields = values.config.method.to_dict()
    assert (fields["mask_threshold"], fields["mask_keep"], fields["blocks"]) == (1.5, None, 1)
    names = ("mask_threshold", "mask_keep", "blocks", "augment_retain")
    expected = methods.create("vkd", {name: fields[name] for name in names})
    assert RunConfig.from_config_dict(values.config).method == expected


@pytest.mark.parametrize(
    ("level", "file", "shown"),
    [
        (20, f"{Path(main.__file__).parent}/train.py", True),
        (20, "/lib/clu/periodic_actions.py", True),
        (20, "/vkd_jax/lib/orbax/checkpoint/manager.py", False),  # a library inside a folder of the same name
        (30, "/vkd_jax/lib/orbax/checkpoint/manager.py", True),
    ],
)
def test_only_messages_of_this_program_and_warnings_are_shown(level, file, shown):
    assert log._is_shown(types.SimpleNamespace(levelno=level, pathname=file)) is shown


@pytest.mark.parametrize(("process", "level"), [(0, logging.INFO), (3, logging.WARNING)])
def test_only_process_0_logs_more_than_warnings(run, monkeypatch, process, level):
    from vkd_jax.reporting import terminal
    from vkd_jax.runs import pipeline

    done = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: done.append("initialize"))
    monkeypatch.setattr(jax, "process_index", lambda: done.append("process_index") or process)
    monkeypatch.setattr(pipeline, "run", lambda *_: done.append(logging.get_verbosity()))
    monkeypatch.setattr(terminal, "summary", lambda *_: done.append("summary") or "")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        assert run("--distributed")[0] == 0
    finally:
        logging.set_verbosity(before)
    finished = ["process_index", *(["summary"] if process == 0 else [])]
    assert done == ["initialize", "process_index", level, *finished]


# ---- The model ----


def tensors(folder):
    """The tensors of a single file by name."""
    from safetensors.numpy import load_file

    return load_file(folder / WEIGHTS)


def save(folder, content):
    from safetensors.numpy import save_file

    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})


def spoil_shapes(folder):
    content = tensors(folder)
    first, second, *_ = sorted(content)
    content[first] = content[first][..., None]
    content["surprise.weight"] = content.pop(second)
    save(folder, content)
    return [first, f"missing tensor {second}", "unknown tensor surprise.weight"]


def spoil_index(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    homes = dict.fromkeys(convert_names(folder), "model-00001-of-00002.safetensors")
    homes[sorted(homes)[0]] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return [INDEX, "files that are missing: model-00002-of-00002.safetensors"]


def convert_names(folder):
    return list(safetensors_files.read_header(folder / "model-00001-of-00002.safetensors"))


def spoil_length(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    return [f"{WEIGHTS} is truncated"]


def spoil_pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    return ["only pickled weights (pytorch_model.bin)", "safetensors"]


def spoil_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    return ["Model type 'gpt2' is not supported", "llava"]


def spoil_existence(folder):
    shutil.rmtree(folder)
    return ["There is no model folder", "with config.json and safetensors"]


@pytest.mark.parametrize("spoil", [spoil_shapes, spoil_index, spoil_length, spoil_pickle, spoil_type, spoil_existence])
def test_wrong_models_are_refused(run, untouched, model, spoil):
    parts = spoil(model)
    refused(run(model=model), *parts)


# ---- The data ----


def rewrite(data, config, change):
    path = data / config / SHARD
    pq.write_table(change(pq.read_table(path)), path)


def spoil_column(data):
    rewrite(data, "forget_10", lambda table: table.drop(["Mask_Task"]))
    return ["Column 'Mask_Task' is missing", "forget_10"]


def spoil_picture(data):
    def change(table):
        broken = pa.array([{"bytes": b"\x89PNG\r\n", "path": "x"}] * len(table), table.schema.field("image").type)
        return table.set_column(table.schema.get_field_index("image"), "image", broken)

    rewrite(data, "retain_90", change)
    return ["image cannot be used", "row 0", "retain_90"]


def spoil_forget(data):
    rewrite(data, "forget_10", lambda table: table.slice(0, 0))
    return ["forget set is empty"]


def spoil_retain(data):
    shutil.copy(data / "forget_10" / SHARD, data / "retain_90" / SHARD)
    return ["share 1 person"]


def spoil_shard(data):
    (data / "forget_10" / SHARD).rename(data / "forget_10" / "train-00000-of-00002.parquet")
    return ["forget_10", "has 1 of 2 parquet files"]


def spoil_config(data):
    shutil.rmtree(data / "Test_Set")
    return ["The config Test_Set is missing"]


def spoil_parquet(data):
    path = data / "Retain_Set" / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    return ["Retain_Set", "cannot be read as parquet"]


@pytest.mark.parametrize(
    "spoil",
    [spoil_column, spoil_picture, spoil_forget, spoil_retain, spoil_shard, spoil_config, spoil_parquet],
)
def test_wrong_data_is_refused(run, untouched, data, spoil):
    parts = spoil(data)
    refused(run(data=data), *parts)


# ---- The workdir ----


def test_a_corrected_command_may_use_the_same_workdir(run, untouched):
    refused(run("--config.method.name=magic"), "unknown method 'magic'")
    refused(run("--config.data.forget=7"), "data.forget: 7 is not allowed")


def test_a_workdir_of_another_config_is_refused(run, tmp_path):
    refused(run("--config.model.path=nowhere"))
    (tmp_path / "run" / "answers").mkdir()
    before = (tmp_path / "run" / "config.json").read_bytes()
    refused(run("--config.data.forget=5"), "has a run of another config (data.forget: 10 in the folder, 5 now)")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_workdir_that_cannot_be_used_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(workdir=tmp_path / "file"), f"{tmp_path / 'file'} is a file")
    refused(run(workdir=tmp_path / "file" / "run"), f"{tmp_path / 'file' / 'run'} cannot be used (Not a directory)")
    refused(run(workdir=tmp_path), "not empty and has no run of this program")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["config.json", "vanilla.jsonl"])
def test_a_full_disk(run, tmp_path, monkeypatch, name):
    from vkd_jax.evaluation import evaluate

    write_bytes = pathlib.Path.write_bytes

    def full(self, data):
        if self.name.startswith(f".{name}.") and self.suffix == ".tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write_bytes(self, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: [])
    refused(run(), f"cannot write at {tmp_path / 'run'}", "No space left on device", "free some space")
    assert not [path for path in (tmp_path / "run").rglob("*.jsonl*")]


# ---- As a program ----


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        ([f"--config={TINY}", "--workdir=run", "--config.model.path=nowhere", "--config.data.source=none"], "none"),
        ([f"--config={TINY}", "--workdir=run", "--distributed"], "--distributed: JAX finds no other processes"),
    ],
)
def test_as_a_program(tmp_path, args, fragment):
    """The log goes to stderr before it; the last line is the error."""
    done = subprocess.run(
        [sys.executable, "-m", "vkd_jax.main", *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    *log, last = done.stderr.splitlines()
    assert last.startswith("error: ") and fragment in last
    assert all(line.startswith(("I", "W")) for line in log), log


@pytest.mark.slow
def test_two_processes_find_each_other(tmp_path):
    """Started as Slurm would: each has one device and knows of two, before anything is read."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    env = os.environ | slurm | {"JAX_COORDINATOR_PORT": port, "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-m", "vkd_jax.main", f"--config={TINY}", "--distributed", "--config.mesh.data=3"]
    processes = [
        subprocess.Popen(
            [*args, f"--workdir={tmp_path / str(number)}"],
            env=env | {"SLURM_PROCID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 2 and "3 devices, but there are 2" in err.splitlines()[-1], err
    finally:
        for process in processes:
            process.kill()
