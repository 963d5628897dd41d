"""Tests of folders in a bucket (gs://): complete models, downloads of changed files only, and runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bucket import Bucket

from vkd_jax.config.comparison import CompareConfig
from vkd_jax.config.schema import RunConfig
from vkd_jax.reporting import report, view
from vkd_jax.results import RunResults
from vkd_jax.runs import sweep
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runtime import hub, storage
from vkd_jax.runtime.files import read_bytes, write_bytes
from vkd_jax.training.preemption import Stopped
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of TensorFlow's imports


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serves the bucket "mine" to this process and its child processes."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which creates the server's certificate, is not installed")
    with Bucket(tmp_path_factory.mktemp("bucket")) as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.variables.items():
            patch.setenv(name, value)
        patch.syspath_prepend(bucket.packages)
        yield bucket


@pytest.fixture
def bucket(served, tmp_path, monkeypatch):
    """The bucket and the local cache, both empty."""
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    served.clear()
    return served


def config(**changes):
    return RunConfig(**changes)


def put(bucket, folder, **files):
    for name, text in files.items():
        bucket.objects[f"{folder}/{name.replace('__', '.')}"] = text.encode()


def read(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


# ---- Names ----


def test_paths_are_local_or_in_a_bucket():
    assert storage.resolve("a/b") == Path("a/b") and isinstance(storage.resolve(Path("/a")), Path)
    assert str(storage.resolve("gs://mine/run/") / "x.json") == "gs://mine/run/x.json"
    for name in ("s3://mine/run", "gs://", "gs:///", "://", "http://mine/run"):
        with pytest.raises(UserError, match=f"{name} is not supported: pass a folder on a disk, or gs://"):
            storage.resolve(name)


def test_local_copies_of_a_bucket(monkeypatch):
    monkeypatch.setattr(storage, "CACHE", Path("/cache"))
    assert storage.local_copy("a/b") == Path("a/b")
    assert storage.local_copy("gs://mine/run/data") == storage.local_copy(storage.resolve("gs://mine/run") / "data")
    assert storage.local_copy("gs://mine/run/data") == Path("/cache/gs/mine/run/data")


def test_comparisons_need_a_local_folder():
    with pytest.raises(UserError, match="--workdir=gs://mine/x: the runs of a comparison need a folder"):
        sweep.run(config(compare=CompareConfig()).to_config_dict(), "gs://mine/x")


def test_an_adapter_is_uploaded_with_its_configuration(bucket):
    folder = storage.resolve("gs://mine/run/adapter")
    local = storage.local_copy(folder)
    local.mkdir(parents=True)
    for name in (hub.ADAPTER_CONFIG, "adapter_model.safetensors"):
        (local / name).write_text(name)
    storage.upload_model(folder, hub.ADAPTER_CONFIG)
    assert bucket.objects["run/adapter/adapter_model.safetensors"] == b"adapter_model.safetensors"
    assert bucket.objects[f"run/adapter/{hub.ADAPTER_CONFIG}"] == hub.ADAPTER_CONFIG.encode()


# ---- A workdir ----


def test_workdir_in_a_bucket(bucket):
    workdir = Workdir("gs://mine/run", config())
    assert not workdir.has("answers/vanilla.jsonl")
    with workdir.stage("evaluate"):
        workdir.write_lines("answers/vanilla.jsonl", [{"said": "Zoë"}, {"said": "\u2028"}])
    assert workdir.has("answers/vanilla.jsonl")
    again = Workdir("gs://mine/run/", config())
    assert again.read_lines("answers/vanilla.jsonl") == [{"said": "Zoë"}, {"said": "\u2028"}]
    assert list(again.timing) == ["evaluate"]
    with pytest.raises(UserError, match=r"gs://mine/run has a run of another config \(seed: 0 in the folder, 1 now\)"):
        Workdir("gs://mine/run", config(seed=1))
    written = {name for name, data in bucket.objects.items() if data}
    names = ("config.json", "records.json", "timing.json", "answers/vanilla.jsonl")
    assert written == {f"run/{name}" for name in names}


def test_folders_and_files_without_a_run_are_not_used(bucket):
    put(bucket, "thesis", a__txt="mine")
    with pytest.raises(UserError, match="gs://mine/thesis is not empty and has no run"):
        Workdir("gs://mine/thesis", config())
    with pytest.raises(UserError, match="gs://mine/thesis/a.txt is a file"):
        Workdir("gs://mine/thesis/a.txt", config())
    assert list(bucket.objects) == ["thesis/a.txt"]


def test_missing_and_forbidden_buckets_are_errors(bucket, monkeypatch):
    with pytest.raises(UserError, match="the bucket cannot be used: .*bucket does not exist.*; check its name"):
        Workdir("gs://others/run", config())
    bucket.refuse("/upload/")
    with pytest.raises(UserError, match="code 403.*and that this machine may read and write it"):
        Workdir("gs://mine/run", config())


def test_missing_package_of_orbax_is_reported_first(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match="pip install google-cloud-storage"):
        Workdir("gs://mine/run", config())
    assert not bucket.log


def test_metrics_grow_line_by_line(bucket):
    from vkd_jax.training.metric_writer import JsonLinesWriter

    file = storage.resolve("gs://mine/run/train/metrics.jsonl")
    for step in (1, 2):
        JsonLinesWriter(file, step - 1).write_scalars(step, {"loss": 0.5})
    assert report.json_lines(file, torn=True) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert report.json_lines(storage.resolve("gs://mine/run/none.jsonl"), torn=True) == []
    with pytest.raises(UserError, match="gs://mine/run has no results.json"):
        RunResults.read(storage.resolve("gs://mine/run"))


def test_a_file_that_somebody_else_deletes_is_missing(bucket):
    file = storage.resolve("gs://mine/run/records.json")
    Workdir("gs://mine/run", config()).write("a.json", {})
    assert file.exists()
    bucket.clear()
    assert not file.exists()
    with pytest.raises(UserError, match="There is no file gs://mine/run/records.json"):
        read_bytes(file, 100)
    Workdir("gs://mine/run", config())


# ---- Models ----

FILES = {"config.json": "{}", "model-1.safetensors": "one", "model-2.safetensors": "two", "LICENSE": "free"}


def write_model(folder):
    for name, text in FILES.items():
        write_bytes(folder / name, text.encode())


def test_models_exist_only_when_complete(bucket, monkeypatch):
    workdir, existed = Workdir("gs://mine/run", config()), []

    def create(folder):
        existed.append(folder.exists())
        write_model(folder)

    put(bucket, "old", config__json="{}")
    storage.local_copy("gs://mine/run/vanilla").mkdir(parents=True)  # from a run that is no longer in the bucket
    bucket.refuse("name=run%2Fvanilla%2Fmodel-2")
    with pytest.raises(UserError, match="code 403"):
        workdir.model("vanilla", create)
    assert "run/vanilla/model-1.safetensors" in bucket.objects and not workdir.has_model("vanilla")
    bucket.refuse()
    before = len(bucket.log)
    assert read(workdir.model("vanilla", create)) == FILES and existed == [False, False]
    uploads = [request for request in bucket.log[before:] if "POST" in request and "vanilla" in request]
    assert len(uploads) == len(FILES) and uploads[-1].endswith("config.json")
    assert not [
        request for request in bucket.log[before:] if request.startswith("GET /mine/")
    ]  # created files are not downloaded
    assert workdir.model("vanilla", create) == storage.local_copy("gs://mine/run/vanilla") and len(existed) == 2


def test_only_changed_files_are_downloaded(bucket):
    def fetched():
        before = len(bucket.log)
        folder = read(hub.fetch_model("gs://mine/models/a"))
        requests = [request for request in bucket.log[before:] if request.startswith("GET /mine/")]
        return folder, sorted(request.rpartition("%2F")[2] for request in requests)

    put(bucket, "models/a", config__json="{}", model__safetensors="one", pytorch_model__bin="unsafe", notes__txt="x")
    put(bucket, "models/a/optimizer", state__json="{}")
    content = {"config.json": "{}", "model.safetensors": "one", "notes.txt": "x"}
    assert fetched() == (content, sorted(content))
    assert fetched() == (content, [])
    put(bucket, "models/a", model__safetensors="other")
    del bucket.objects["models/a/notes.txt"]
    assert fetched() == ({"config.json": "{}", "model.safetensors": "other"}, ["model.safetensors"])


def test_folder_without_a_model_is_an_error(bucket):
    put(bucket, "models/half", model__safetensors="one")
    for name in ("half", "none"):
        with pytest.raises(UserError, match=f"There is no model folder gs://mine/models/{name}; pass one with config"):
            hub.fetch_model(f"gs://mine/models/{name}")


# ---- Training, and a whole run ----


def test_a_training_in_a_bucket_is_stopped_and_resumes_with_the_same_bits(bucket, monkeypatch):
    """The slow test below does this with a whole run."""
    import toy_training

    toy, folder = toy_training.split_toy(), storage.resolve("gs://mine/run/train")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped at step 3, which is saved"):
        toy_training.at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        toy_training.fit(toy, folder, steps=4)
    assert "run/train/checkpoints/3/commit_success.txt" in bucket.objects
    toy_training.assert_same_bits(toy_training.fit(toy, folder, steps=4), toy_training.fit(toy, None, steps=4))
    rows = report.json_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


STEPS = 300
PATIENCE = 600  # seconds


@pytest.fixture
def start(bucket):
    """Starts runs of the command line with a tiny model and folders of images; kills them at the end."""
    processes = []

    def start(workdir, model, data, cache):
        fields = {"model.path": model, "model.dtype": "float32", "eval.protocol": "options", "eval.max_new_tokens": 4}
        fields |= {f"data.{part}": f"{data}/{part}" for part in ("forget", "retain")}
        fields |= {"train.steps": STEPS, "train.epochs": 0.0, "train.log_every": 20, "train.checkpoint_every": 1000}
        fields |= {"train.warmup_steps": 0, "train.batch_size.forget": 2, "train.batch_size.retain": 4}
        fields |= {"train.buckets": 1, "method.fisher_samples": 4, "method.fisher_chunk": 2, "method.augment_forget": 1}
        flags = [f"--config={ROOT}/configs/llava.py:folder", f"--workdir={workdir}"]
        flags += [f"--config.{name}={value}" for name, value in fields.items()]
        env = {"PYTHONPATH": os.pathsep.join([str(bucket.packages), str(ROOT)]), "XDG_CACHE_HOME": str(cache)}
        env = os.environ | env | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "vkd_jax.main", *flags]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(process, status):
    """Waits for a process, checks its exit status and returns its log."""
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, err[-3000:]
    return err


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_and_equals_a_run_on_a_disk(start, bucket, tiny_folder, request_folders, tmp_path):
    """Model and workdir are in the bucket; the second process starts with an empty local cache."""
    local = start(tmp_path / "local", tiny_folder, request_folders, tmp_path / "cache")
    for file in tiny_folder.iterdir():
        bucket.objects[f"model/{file.name}"] = file.read_bytes()
    names = ("gs://mine/run", "gs://mine/model", request_folders, tmp_path / "cache")
    first = start(*names)
    deadline = time.monotonic() + PATIENCE
    while "run/train/metrics.jsonl" not in bucket.objects and first.poll() is None:
        assert time.monotonic() < deadline, "training never began"
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    stopped = re.search(r"stopped at step (\d+), which is saved", wait_for(first, 143))
    assert f"run/train/checkpoints/{stopped[1]}/commit_success.txt" in bucket.objects
    shutil.rmtree(tmp_path / "cache" / "vkd_jax")
    assert f"resumed at step {stopped[1]} of {STEPS}" in wait_for(start(*names), 0)

    wait_for(local, 0)
    found = json.loads(bucket.objects["run/results.json"])
    expected = json.loads((tmp_path / "local/results.json").read_text())
    assert found["manifest"]["changed"] and found["trainable"] == expected["trainable"]
    assert found.pop("step_bytes") == pytest.approx(expected.pop("step_bytes"), rel=0.01)  # compiled anew, or cached
    for field in expected.keys() - {"meta", "timing"}:
        assert found[field] == expected[field], field
    text = bucket.objects["run/report.md"].decode()
    report_run = view.Run(RunResults.from_json(expected), {})
    for name in ("accuracy", "text_metrics"):
        assert report.render_section(name, view.SECTIONS[name](report_run)) in text
    files = {str(file.relative_to(tmp_path / "local")) for file in (tmp_path / "local").rglob("*") if file.is_file()}
    files = {name for name in files if not name.startswith(("data/", "train/"))}
    assert files <= {name.removeprefix("run/") for name in bucket.objects}
    weights = (tmp_path / "local/unlearned/model.safetensors").read_bytes()
    assert bucket.objects["run/unlearned/model.safetensors"] == weights
    rows = report.json_lines(storage.resolve("gs://mine/run/train/metrics.jsonl"))
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(20, STEPS + 1, 20))
