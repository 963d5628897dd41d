"""The records of a run that a test wrote by hand."""

from pathlib import Path

from vkd_jax.runtime.records import Records


def add_records(*folders: Path) -> None:
    """Records the digests of results and answers in folders of runs, as a run does when it writes them."""
    for folder in folders:
        entries = Records(folder)
        for pattern in ("results.json", "answers/*.jsonl", "attacks/*/*.jsonl"):
            for file in folder.glob(pattern):
                entries.add(str(file.relative_to(folder)))
