"""What a run read and wrote, and what it must not do again."""

import json
import tempfile

from vkd_jax import benchmarks
from vkd_jax.checkpoints import export, hf
from vkd_jax.evaluation import evaluate
from vkd_jax.training import loop


def read(snapshot, **options):
    """The sets of a snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        return benchmarks.read(benchmarks.create("mllmu", {"source": str(snapshot)}), folder, **options)


def files(folder):
    """The content of each file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(workdir, name):
    """The records of the answers of one model of a run."""
    return [json.loads(line) for line in (workdir / "answers" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def forbid(monkeypatch, *names):
    """Makes these functions raise an error, "loop.fit" for example."""
    for name in names:

        def never(*_, name=name, **__):
            raise AssertionError(f"{name} ran again")

        owner, attribute = name.rsplit(".", 1)
        monkeypatch.setattr({"evaluate": evaluate, "loop": loop, "export": export, "hf": hf}[owner], attribute, never)
