"""Settings of the test run, which must precede imports of JAX, TensorFlow and transformers; shared fixtures."""

import collections
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from absl import flags

DEFAULTS = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # grain forks its workers, and tokenizers warns about forks
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GCS_STAT_CACHE_MAX_AGE": "0",  # otherwise TensorFlow caches sizes of files in buckets
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compilation dominates the time of the tests
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
# For a process beside which no other one reads the cache, and which is not killed or denied the disk while it writes.
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# XLA's newer code generator takes 1.6 to 2.4 times as long for programs of this size. Later versions have no other one.
# Programs are not split for threads, which would take a tenth more time in all: the workers use all cores.
FAST_COMPILATION = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


for _name, _value in DEFAULTS.items():  # before the conftest.py of a folder imports TensorFlow, which reads them then
    os.environ.setdefault(_name, _value)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA rejects unknown flags
    os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)


def pytest_configure(config: pytest.Config) -> None:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Subprocesses inherit it, so that tests share compiled programs.
        cache = config.cache.mkdir("jax") if hasattr(config, "cache") else tempfile.mkdtemp(prefix="vkd-jax-cache-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # JAX may read a file that another process is writing
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], worker)
    flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which pytest does not parse


def pytest_collection_finish() -> None:
    """Caches short programs, too: most of the tests' programs are single operations, of 10 to 40 ms each.

    The garbage collector is run less often, and never walks the objects of the imported modules.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # instead of 700: tracing makes many objects, and little garbage
    if jax := sys.modules.get("jax"):
        import shared_contexts

        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        shared_contexts.install()


# Files with few, long tests, which start first, so that all workers finish at the same time.
LONG_FILES = ("tests/runs/", "tests/training/test_devices.py", "tests/runtime/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FILES))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the seconds that each folder of tests took, and the ten slowest tests."""
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    folders = collections.Counter()
    for test, duration in seconds.items():
        folders["/".join(test.split("::")[0].split("/")[:2])] += duration
    if not seconds:  # pytest --collect-only
        return
    terminalreporter.section(f"seconds by folder: {sum(folders.values()):.0f} in all workers")
    for name, duration in [*folders.most_common(), ("", 0.0), *seconds.most_common(10)]:
        terminalreporter.write_line(f"{duration:8.1f} {name}" if name else "")


# Resident bytes of a process above which it releases its compiled programs: between files, and between tests of a file.
# Imports take 0.8 GiB.
BETWEEN_FILES, BETWEEN_TESTS = 1.6 * 2**30, 2.4 * 2**30
MOST_MAPS = 15_000  # memory maps of a process; Linux allows 65,530, and a compiled program has several


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Bounds the memory of compiled programs, which JAX keeps, and glibc after JAX has released them.

    The number of memory maps is bounded, too: a process without a free one crashes while it compiles.
    """
    if "jax" not in sys.modules or sys.platform != "linux":
        return
    ends_file = nextitem is None or nextitem.path != item.path
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident < (BETWEEN_FILES if ends_file else BETWEEN_TESTS):
        if not ends_file or Path("/proc/self/maps").read_bytes().count(b"\n") < MOST_MAPS:
            return
    sys.modules["jax"].clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)


@pytest.fixture(scope="session")
def run_once(tmp_path_factory):
    """Shares an expensive result between workers: `run_once(name, make)` returns `make(folder)`, which runs once.

    The result is stored as JSON. `folder` is the same for all workers, and remains until the test run ends.
    """
    import shutil

    import filelock

    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)

    def get(name, make):
        folder, result = root / name, root / f"{name}.json"
        with filelock.FileLock(root / f"{name}.lock"):
            if not result.is_file():
                shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
                folder.mkdir()
                result.write_text(json.dumps(make(folder)))
        return json.loads(result.read_text())

    return get


# Who reads a subject of the two programs below, which compute no other.
READERS = {
    "training": "tests/training/test_devices.py",
    "evaluation": "tests/evaluation/test_evaluate_devices.py",
    "adapters": "tests/models/test_lora.py",
    "quantization": "tests/models/test_quantize.py",
    "agreement": "tests/runtime/test_multihost.py",
}


@pytest.fixture(scope="session")
def subjects(request):
    """The subjects whose tests are collected, which are the same in all workers."""
    files = {item.nodeid.split("::")[0] for item in request.session.items}
    return [subject for subject, file in READERS.items() if file in files]


@pytest.fixture(scope="session")
def eight_devices(run_once, subjects):
    """Results of programs/eight_devices.py by subject."""

    def run(folder):
        return _outcome(_start("eight_devices.py", folder, *subjects, devices=8, **CACHE_ALL))

    return run_once("eight_devices", run)


@pytest.fixture(scope="session")
def two_processes(run_once, subjects):
    """Results of each of the two processes of programs/two_processes.py by subject."""
    import socket

    def run(folder):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        processes = [_start("two_processes.py", number, port, folder, *subjects, devices=2) for number in range(2)]
        try:
            return [_outcome(process) for process in processes]
        finally:
            for process in processes:
                process.kill()

    return run_once("two_processes", run)


def _start(program, *args, devices, **variables):
    """Starts a program of tests/programs on CPU devices that XLA simulates; warnings are errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", Path(__file__).parent / "programs" / program, *map(str, args)],
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
        | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _outcome(process):
    """Waits for a program and returns the JSON on its last line."""
    try:
        out, err = process.communicate(timeout=1800)  # only reached if the program hangs
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="session")
def fork_server():
    """The process whose forks run the package's commands: one for each worker, until the test run ends."""
    from fork_server import ForkServer

    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def get_config():
    """Loads the config of a file of configs/ by its name and the arguments after the colon."""
    import importlib.util

    def get(file, *words):
        spec = importlib.util.spec_from_file_location("config", Path(__file__).parents[1] / "configs" / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(*words)

    return get


@pytest.fixture(scope="session")
def tiny_config():
    """A LLaVA of about 10,000 parameters with grouped-query attention and an unused vision block."""
    from vkd_jax.models.clip_vit import VisionConfig
    from vkd_jax.models.decoder import DecoderConfig
    from vkd_jax.models.llava import LlavaConfig

    return LlavaConfig(
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
        text=DecoderConfig(
            vocab=400, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=40, max_positions=128
        ),
        image_token_id=4,
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_config):
    """The folder of that LLaVA with random weights, tokenizer and image processor."""
    from transformers import LlavaConfig

    from vkd_jax.benchmarks.synthetic import people
    from vkd_jax.checkpoints import export, hf
    from vkd_jax.data.processor import create_processor

    folder = tmp_path_factory.mktemp("models") / "tiny"
    names = [f"{p.name} {' '.join(p.facts.values())}" for p in people.SIXTY.people()]
    tokenizer = create_processor(folder, names, vocab_size=400, image_size=16, patch_size=8)
    vision, text = tiny_config.vision, tiny_config.text
    hf_config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            projection_dim=vision.width,
        ),
        text_config=dict(
            model_type="llama",
            vocab_size=len(tokenizer),
            hidden_size=text.width,
            intermediate_size=text.mlp_width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            max_position_embeddings=text.max_positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config = dataclasses.replace(tiny_config, text=dataclasses.replace(text, vocab=len(tokenizer)))
    export.create(folder, hf_config, hf.init_params(config, 0)[1])
    return folder


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory):
    """The synthetic people as a copy of MLLMU-Bench without images for fine-tuning: Mllmu(source=str(snapshot))."""
    from vkd_jax.benchmarks.synthetic import mllmu_writer

    folder = tmp_path_factory.mktemp("snapshot")
    mllmu_writer.write_snapshot(folder, [name for name in mllmu_writer.CONFIGS if name != "ft_Data"])
    return folder


CONFIGS = "forget_10", "retain_90", "Test_Set", "Retain_Set"


@pytest.fixture(scope="session")
def few(tmp_path_factory, snapshot):
    """The snapshot with one person in the forget set and two in the retain set; one of each in the test set."""
    import pyarrow.parquet as pq

    folder, shard = tmp_path_factory.mktemp("few"), "train-00000-of-00001.parquet"
    tables = {name: pq.read_table(snapshot / name / shard) for name in CONFIGS}
    forgotten, everybody = (tables[name]["ID"].to_pylist() for name in ("forget_10", "Test_Set"))
    rows = dict.fromkeys(CONFIGS, [0, 1]) | {"forget_10": [0], "Test_Set": [everybody.index(forgotten[0]), 0]}
    for name, table in tables.items():
        (folder / name).mkdir()
        pq.write_table(table.take(rows[name]), folder / name / shard)
    return folder


@pytest.fixture(scope="session")
def request_folders(tmp_path_factory):
    """Two images of one person to forget and of each of three people to retain; questions with and without options."""
    from vkd_jax.benchmarks.synthetic import people

    names, root = [person.name for person in people.SIXTY.people()[:4]], tmp_path_factory.mktemp("request")
    for part, persons in (("forget", people.SIXTY.people()[:1]), ("retain", people.SIXTY.people()[1:4])):
        (root / part).mkdir()
        lines = []
        for person in persons:
            for view in range(2):
                name = f"{person.id}_{view}.png"
                people.portrait(person, view, 32).save(root / part / name)
                known = {"file_name": name, "person": person.name}
                lines.append(known | {"question": "Who is this?", "answer": person.name, "options": names})
                lines.append(known | {"question": "What is the job?", "answer": person.facts["job"]})
            lines.append({"question": f"Who is {person.name}?", "answer": "a baker", "person": person.name})
        (root / part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """The bundle of `tiny_folder`, loaded for VKD."""
    from vkd_jax import methods
    from vkd_jax.checkpoints.bundle import ModelBundle
    from vkd_jax.config import defaults
    from vkd_jax.runtime.mesh import make_mesh

    return ModelBundle.load_for(
        methods.create("vkd", {}), tiny_folder, seed=0, dtype=defaults.base().model.dtype, mesh=make_mesh()
    )


@pytest.fixture(scope="session")
def tiny_sets(tiny_model, snapshot, tmp_path_factory):
    """A forget set of one person and a retain set of three, encoded."""
    from vkd_jax import benchmarks

    sets = benchmarks.read(benchmarks.create("mllmu", {"source": str(snapshot)}), tmp_path_factory.mktemp("sets"))

    def of_first(name, people):
        chosen = sorted({e.person for e in sets[name]})[:people]
        return tiny_model.encode([e for e in sets[name] if e.person in chosen and e.image is not None][: 16 * people])

    return {"forget": of_first("forget", 1), "retain": of_first("retain", 3)}


@pytest.fixture(scope="session")
def unpack():
    """Extracts the images of each prompt, or their tiles, from the output of a model's `pack`."""
    from vkd_jax.models import qwen_vit

    def of(config, packed):
        if "tile_coords" in packed:
            masks = packed["tile_coords"][..., 0] >= 0
            return [list(x[mask]) for x, mask in zip(packed["pixels"], masks, strict=True)]
        if "pixels" in packed:
            return [[x] for x in packed["pixels"]]
        rows = []
        for patches, coords in zip(packed["patches"], packed["patch_coords"], strict=True):
            masks = (coords[:, 0] == image for image in range(coords[:, 0].max() + 1))
            patch_size = config.vision.patch_size
            rows.append([qwen_vit.unpatchify(patches[mask], coords[mask, 1:], patch_size) for mask in masks])
        return rows

    return of


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, tiny_folder):
    """Creates the folder of a small random model of a family, by its `model_type`, in the published layout."""
    import functools

    @functools.cache
    def make(model_type):
        if model_type == "llava":
            return tiny_folder
        pytest.importorskip("torch")
        import family_folders

        return family_folders.create(tmp_path_factory.mktemp("models") / model_type, model_type)

    return make


@pytest.fixture
def config(get_config, tiny_folder, tmp_path, monkeypatch):
    """The config of a run on `tiny_folder` to plan, with an empty cache of plans."""
    from vkd_jax.runtime import storage

    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    config = get_config("tiny.py")
    config.model.path = str(tiny_folder)
    config.train.batch_size.update(forget=2, retain=3)
    return config
