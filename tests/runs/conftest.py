"""Fixtures of whole runs: the data and the config of a short one."""

import pyarrow.parquet as pq
import pytest

SHARD = "train-00000-of-00001.parquet"


@pytest.fixture(scope="session")
def two_forgotten(tmp_path_factory, snapshot):
    """A snapshot of two forgotten and four retained people."""
    folder = tmp_path_factory.mktemp("two_forgotten")

    def keep(config, chosen):
        table = pq.read_table(snapshot / config / SHARD)
        ids = table["ID"].to_pylist()
        rows = [i for i, row_id in enumerate(ids) if row_id in chosen(sorted(set(ids)))]
        (folder / config).mkdir()
        pq.write_table(table.take(rows), folder / config / SHARD)
        return {ids[i] for i in rows}

    forgotten = keep("forget_10", lambda ids: ids[:2])
    retained = keep("retain_90", lambda ids: ids[:4])
    keep("Test_Set", lambda ids: forgotten | retained)
    keep("Retain_Set", lambda ids: ids[:6])
    return folder


@pytest.fixture(scope="session")
def make_config(get_config, two_forgotten, tiny_folder):
    def make(arg="", **changes):
        config = get_config("tiny.py", arg)
        config.data.source = str(two_forgotten)
        config.model.update(path=str(tiny_folder), base="", retain_only="")
        config.eval.update(max_items=6, batch_size=16)
        short = dict(steps=3, warmup_steps=1, log_every=1, checkpoint_every=2)
        config.train.update(batch_size=dict(forget=4, retain=4), **short)
        config.finetune.train.update(batch_size=dict(image=4, text=4), **short)
        config.update_from_flattened_dict(changes)
        return config

    return make
