"""Tests of cached data sets: rows are complete, sets are built once, and changed sources are built again."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vkd_jax import benchmarks, registry
from vkd_jax.benchmarks import cache
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.types import Example, UserError


def example(name, image=None, person="1", **fields):
    image_id = "" if image is None else fields.pop("image_id", name.rpartition("/")[0] + "/0")
    return Example(name, person, image, image_id, f"Who is {name}?", "Zoë \ud800 Ω", **fields)


ROWS = {
    "forget": [
        [
            example("f/0/0", b"\x89\x00\xff", options=("a", "b"), task="classification"),
            example("f/0/1", b"\x89\x00\xff"),
        ],
        [example("f/1/0", b"", image_id="f/1/0"), example("f/1/1", b"x", image_id="f/1/1"), example("f/1/2")],
    ],
    "retain": [[example(f"r/{i}/0", person="2", paraphrase="p", perturbed=("q", "r"))] for i in range(300)],
}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A benchmark with its rows in memory that records each read."""

    forget: int = 10
    reads = []
    parts = {"evaluation": ROWS, "finetune": {"finetune_retain": [[example("t/0/0", person="2")]]}}
    version = ["a"]

    label = "fixed"
    EVAL_SETS = Mllmu.EVAL_SETS

    def check(self):
        if self.forget > 50:
            raise UserError("too many.")

    def state(self, part):
        return [part, *self.version]

    @contextlib.contextmanager
    def rows(self, part):
        self.reads.append(part)
        yield {name: iter(rows) for name, rows in self.parts[part].items()}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(Fixed, "reads", [])
    monkeypatch.setattr(Fixed, "version", ["a"])
    return Fixed()


def test_sets_are_read_as_they_were_written(benchmark, tmp_path):
    sets = cache.read(benchmark, tmp_path)
    assert sets == {name: [e for row in rows for e in row] for name, rows in ROWS.items() if rows}
    assert list(sets) == ["forget", "retain"]
    assert sets["forget"][0].image is sets["forget"][1].image
    assert type(sets["forget"][0].image) is bytes and type(sets["forget"][0].options) is tuple


def test_sets_are_built_once_and_fine_tuning_sets_on_request(benchmark, tmp_path):
    sets = cache.read(benchmark, tmp_path)
    assert benchmark.reads == ["evaluation"]
    assert cache.read(benchmark, tmp_path) == sets and benchmark.reads == ["evaluation"]
    more = cache.read(benchmark, tmp_path, finetune=True)
    assert benchmark.reads == ["evaluation", "finetune"]
    assert more == sets | {"finetune_retain": [example("t/0/0", person="2")]}


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "missing"])
@pytest.mark.parametrize("pattern", ["*.array_record*", "dataset_info.json", "features.json"])
def test_a_damaged_cache_is_built_again(benchmark, tmp_path, pattern, damage):
    sets = cache.read(benchmark, tmp_path)
    for file in tmp_path.rglob(pattern):
        data = {"cut": file.read_bytes()[:-9], "empty": b"", "other": b"{}" * 99, "missing": None}[damage]
        file.unlink() if data is None else file.write_bytes(data)
    assert cache.read(benchmark, tmp_path) == sets
    assert cache.read(benchmark, tmp_path) == sets and len(benchmark.reads) <= 2


def test_a_cache_whose_set_has_other_rows_is_built_again(benchmark, tmp_path):
    sets = cache.read(benchmark, tmp_path)
    [forget], [retain] = (list(tmp_path.rglob(f"*-{name}.array_record*")) for name in ("forget", "retain"))
    forget.write_bytes(retain.read_bytes())
    assert cache.read(benchmark, tmp_path) == sets and len(benchmark.reads) == 2


def test_changed_source_field_or_reader_builds_again(benchmark, tmp_path, monkeypatch):
    cache.read(benchmark, tmp_path)
    benchmark.version.append("b")
    cache.read(benchmark, tmp_path)
    assert len(benchmark.reads) == 2
    cache.read(Fixed(forget=5), tmp_path)
    assert len(benchmark.reads) == 3
    monkeypatch.setattr(cache, "_source_digest", lambda: "another reader")
    cache.read(benchmark, tmp_path)
    assert len(benchmark.reads) == 4
    benchmark.version.pop()
    monkeypatch.undo()


def test_fields_are_checked_before_anything_is_read(benchmark, tmp_path):
    with pytest.raises(UserError, match="too many"):
        cache.read(Fixed(forget=60), tmp_path)
    assert not benchmark.reads and not any(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [[], [[], []]])
@pytest.mark.parametrize("name", ["forget", "test", "retain", "retain_test", "real", "finetune_forget"])
def test_empty_set_is_an_error(benchmark, tmp_path, monkeypatch, name, rows):
    part = "finetune" if name.startswith("finetune") else "evaluation"
    monkeypatch.setattr(Fixed, "parts", Fixed.parts | {part: Fixed.parts[part] | {name: rows}})
    with pytest.raises(UserError, match=f"The {name} set of fixed is empty"):
        cache.read(benchmark, tmp_path, finetune=True)


@pytest.mark.parametrize("error", [UserError("row 7 is broken."), KeyboardInterrupt()])
def test_interrupted_build_leaves_no_files(benchmark, tmp_path, monkeypatch, error):
    def broken():
        yield from ROWS["retain"]
        raise error

    monkeypatch.setattr(Fixed, "parts", {"evaluation": ROWS | {"retain": broken()}})
    with pytest.raises(type(error)) as raised:
        cache.read(benchmark, tmp_path)
    assert str(raised.value) == str(error)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(Fixed, "parts", {"evaluation": ROWS})
    assert len(cache.read(benchmark, tmp_path)["retain"]) == 300


def test_what_a_killed_process_left_is_removed(benchmark, tmp_path):
    cache.read(benchmark, tmp_path)
    (built,) = tmp_path.glob("vkd_jax/*/1.0.0")
    built.rename(left := built.with_name("incomplete.PU1BVS_1.0.0"))
    cache.read(benchmark, tmp_path)
    assert built.exists() and not left.exists()


@pytest.mark.parametrize("when", ["before this one begins to write", "while it writes"])
def test_another_process_may_build_the_same_set(benchmark, tmp_path, monkeypatch, when):
    def other():
        if len(benchmark.reads) == 1:
            cache.read(benchmark, tmp_path)

    def retain():
        yield ROWS["retain"][0]
        other()
        yield from ROWS["retain"][1:]

    def rows(self, part):
        self.reads.append(part)
        if "begins" in when:
            other()
        return contextlib.nullcontext({"forget": iter(ROWS["forget"]), "retain": retain()})

    monkeypatch.setattr(Fixed, "rows", rows)
    assert len(cache.read(benchmark, tmp_path)["retain"]) == 300
    assert len(benchmark.reads) == 2


def test_full_disk_is_an_error(benchmark, tmp_path, monkeypatch):
    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.Rows, "download_and_prepare", full)
    with pytest.raises(OSError, match="No space"):
        cache.read(benchmark, tmp_path)


def test_building_and_reading_print_nothing(benchmark, tmp_path, capfd, caplog):
    caplog.set_level("INFO")
    cache.read(benchmark, tmp_path)
    cache.read(benchmark, tmp_path)
    assert capfd.readouterr() == ("", "") and caplog.messages == []


def test_reading_does_not_import_tensorflow(tmp_path, few):
    code = (
        "import sys; from vkd_jax import benchmarks; assert 'tensorflow_datasets' not in sys.modules\n"
        f"benchmark = benchmarks.create('mllmu', dict(source={str(few)!r}))\n"
        f"for _ in range(2): assert benchmarks.read(benchmark, {str(tmp_path)!r})['forget']\n"
        "print('tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "True False\n", run.stderr


def test_registered_benchmarks_have_a_label_and_a_complete_recipe(tmp_path):
    for name in registry.BENCHMARKS:
        benchmark = benchmarks.create(name, {})
        assert name in benchmark.label
        assert set(benchmark.RECIPE) - {"train", "blocks"} == {
            "lora_rank", "lora_alpha", "lora_dropout", "learning_rate", "batch_size", "epochs",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(question=" \n"), "the question is blank"),
        (dict(options=("a judge", " ")), "one of its options is blank"),
        (dict(options=("a judge",)), "all of its options are 'a judge'"),
        (dict(options=("a judge", "a  judge ")), "all of its options are 'a judge'"),
    ],
)
def test_questions_that_ask_nothing_or_leave_no_choice_are_refused(tmp_path, fields, problem):
    row = [dataclasses.replace(example("f/0/0"), **fields)]
    benchmark = Fixed()
    object.__setattr__(benchmark, "parts", {"evaluation": ROWS | {"forget": [row]}})
    with pytest.raises(UserError, match=f"row f/0/0 .*: {problem}"):
        benchmarks.read(benchmark, tmp_path)
