"""A short run that does all that a run can do, and what it leaves, so that two runs can be compared.

Its people are one in the forget set and two in the retain set, its model is new and tiny, and each training has four
steps.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fork_server import ROOT

CONFIG = """
import importlib.util

import ml_collections

spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def get_config(arg=""):
    config = tiny.get_config(arg)
    config.data.source = {data!r}
    config.model.update(path="", base="", retain_only="")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.model.create = ml_collections.ConfigDict(
        dict(
            vocab_size=400,
            vision=dict(sizes, image_size=16, patch_size=8, projection_dim=16),
            text=dict(sizes, num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=160),
        )
    )
    config.eval.update(max_items=2, batch_size=16)
    short = dict(steps=4, warmup_steps=1, log_every=1, checkpoint_every=2)
    config.train.update(batch_size=dict(forget=4, retain=4), **short)
    config.finetune.train.update(batch_size=dict(image=4, text=4), **short)
    config.method.update(fisher_samples=8, augment_forget=1, augment_retain=1)
    config.attacks.names = "leak,quantize,relearn"
    config.attacks.quantize.bits = ("int8",)
    config.attacks.relearn.update(attackers=("visual",), shares=(0.5,), people=(), steps=(2,), batch_size=4)
    return config
"""


def write_job(folder: Path) -> None:
    """Writes config.py and its data: all that a run can do.

    One person is in the forget set and two are in the retain set; the test set asks about these three.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from vkd_jax import benchmarks
    from vkd_jax.benchmarks.synthetic import mllmu_writer

    full, data, shard = folder / "all", folder / "data", "train-00000-of-00001.parquet"
    mllmu_writer.write_snapshot(full, [name for name in mllmu_writer.CONFIGS if name != "ft_Data"])
    people = []
    for config, count in (("forget_10", 1), ("retain_90", 2), ("Test_Set", None), ("Retain_Set", 2)):
        table = pq.read_table(full / config / shard).slice(0, count)
        if config == "Test_Set":
            table = table.filter(pc.is_in(table["ID"], pa.array(people)))
        people += table["ID"].to_pylist()
        (data / config).mkdir(parents=True)
        pq.write_table(table, data / config / shard)
    sets = benchmarks.read(benchmarks.create("mllmu", {"source": str(data)}), folder / "cache")
    rows = []
    for example in [e for name in ("forget", "retain", "real") for e in sets[name][::8]]:
        pairs = [{"Question": example.question, "Answer": example.answer, "ID": example.person or "R001"}]
        image = example.image and {"bytes": example.image, "path": "x.png"}
        rows.append({"image": image, "ID": example.person or "R001", "metadata": json.dumps(pairs)})
    (data / "ft_Data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), data / "ft_Data" / shard)
    (folder / "config.py").write_text(CONFIG.format(tiny=str(ROOT / "configs" / "tiny.py"), data=str(data)))
    shutil.rmtree(full)
    shutil.rmtree(folder / "cache")


def contents(workdir: Path) -> dict[str, bytes]:
    """Each file of a finished run by name, without what differs between two undisturbed runs."""
    files = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_dir() or re.match(r"(data|train/(.*/)?checkpoints)/|timing\.json|records\.json", name):
            continue
        if not path.name.startswith("events.out.tfevents"):
            files[name] = NORMALIZED.get(path.name, Path.read_bytes)(path)
    return files


def state_of(workdir: Path) -> Iterator[tuple[str, str]]:
    """The name and digest of each file of a run, but for the lock, times and what is removed when the run goes on."""
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_file() and ".tmp" not in name and not name.startswith(("lock.json", "timing.json")):
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def _results(path: Path) -> bytes:
    results = json.loads(path.read_bytes())
    for key in ("timing", "step_bytes"):
        results.pop(key, None)
    for key in ("date", "commit"):
        results["meta"].pop(key)
    return json.dumps(results, sort_keys=True).encode()


def _provenance(path: Path) -> bytes:
    """A record of how a model was made, without the date, the commit and the digests of files that hold them."""
    provenance = json.loads(path.read_bytes())
    for key in ("date", "commit"):
        provenance.pop(key)
    for name in ("provenance.json", "README.md"):
        provenance.get("files", {}).pop(name, None)
    return json.dumps(provenance, sort_keys=True).encode()


def _metrics(path: Path) -> bytes:
    """The metrics of each step; the last line of a step counts."""
    rows: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # of a run that was killed while it wrote
            continue
        rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k not in SPEED})
    return json.dumps(sorted(rows.items())).encode()


def _report(path: Path) -> bytes:
    """A report or a model card, in Markdown or HTML, without dates, the commit and the table of times."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "", path.read_text())
    text = re.sub(r"\| stage \| seconds \|\n(\|.*\n)*|<th[^>]*>stage</th>(.|\n)*?</table>", "", text)
    return re.sub(r".*Code:.*|, at commit `[^`]*`", "", text).encode()


SPEED = ("data_wait_share", "examples_per_second", "step_bytes", "steps_per_sec", "uptime")
NORMALIZED: Mapping[str, Callable[[Path], bytes]] = {
    "results.json": _results,
    "provenance.json": _provenance,
    "certificate.json": _provenance,
    "metrics.jsonl": _metrics,
    "report.md": _report,
    "README.md": _report,
    "report.html": _report,
}


def differences(expected: Mapping[str, bytes], actual: Mapping[str, bytes]) -> Iterator[str]:
    """What differs between two finished runs, as parts of a sentence."""
    if missing := sorted(expected.keys() - actual.keys()):
        yield f"the run lacks {', '.join(missing)}"
    if surplus := sorted(actual.keys() - expected.keys()):
        yield f"the run also has {', '.join(surplus)}"
    for name in sorted(expected.keys() & actual.keys()):
        old, new = expected[name], actual[name]
        if old != new:
            begin = len(os.path.commonprefix([old, new]))
            yield f"{name} differs: {old[begin - 30 : begin + 30]!r} is {new[begin - 30 : begin + 30]!r}"
