"""Records of a run and its inputs: what is damaged is computed again, and what changed is refused."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import inputs
from vkd_jax.runs.workdir import Workdir, exclusive
from vkd_jax.runtime import locks, records, storage
from vkd_jax.types import Example, UserError

RECORD = "answers/vanilla.jsonl"


def config(settings=""):
    return RunConfig().override(f"train.steps=3 {settings}")


def make_model(folder):
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with answers, a model and inputs."""
    workdir = Workdir(tmp_path / "run", config())
    workdir.bind(described())
    with workdir.stage("data"):
        workdir.write_lines(RECORD, [{"id": "1"}, {"id": "2"}])
    workdir.model("unlearned", make_model)
    return workdir.path


def examples(count=2, **changes):
    return [
        dataclasses.replace(Example(str(i), "Zoë", b"image", "1", "Who?", "a judge"), **changes) for i in range(count)
    ]


def described(sets=None, **models):
    return inputs.describe({"forget": examples(), "retain": examples(3)} | (sets or {}), models)


DAMAGE = {
    "cut at a line end": lambda data: data[: data.index(b"\n") + 1],
    "cut in a line": lambda data: data[:-4],
    "empty": lambda data: b"",
    "a line more": lambda data: data + data,
    "a bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "not Unicode": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_counts_as_missing(run, damage):
    assert Workdir(run, config()).has(RECORD)
    (run / RECORD).write_bytes(DAMAGE[damage]((run / RECORD).read_bytes()))
    workdir = Workdir(run, config())
    assert not workdir.has(RECORD)
    workdir.write_lines(RECORD, [{"id": "1"}, {"id": "2"}])
    assert Workdir(run, config()).has(RECORD)


@pytest.mark.parametrize("damage", [*DAMAGE, "missing", "another file"])
def test_a_damaged_model_is_written_again(run, damage):
    file = run / "unlearned" / "model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "another file":
        (run / "unlearned" / "model-2.safetensors").write_text("more")
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes() + b"\n... and more"))
    workdir = Workdir(run, config())
    assert not workdir.has_model("unlearned")
    workdir.model("unlearned", make_model)
    assert file.read_text() == file.name and workdir.has_model("unlearned") and len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize("text", [None, b"", b"{", b"\xff", b"[]", b"[" * 10**5, b'{"data": NaN}', b'{"data": "x"}'])
@pytest.mark.parametrize("name", ["timing.json", "records.json"])
def test_what_can_be_made_again_is(run, name, text):
    (run / name).unlink() if text is None else (run / name).write_bytes(text)
    workdir = Workdir(run, config())
    assert workdir.timing == {} or name != "timing.json"
    assert workdir.has(RECORD) is (name == "timing.json")
    with workdir.stage("data"):
        workdir.write_lines(RECORD, [{"id": "1"}])
    assert json.loads((run / name).read_text()) and Workdir(run, config()).has(RECORD)


@pytest.mark.parametrize("text", [None, b"", b"{", b"\xff", b"[]", b"[" * 10**5, b'{"seed": NaN}'])
@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_what_identifies_a_run_is_named_if_it_is_damaged(run, name, text):
    (run / name).unlink() if text is None else (run / name).write_bytes(text)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{name}|no run of this program") as raised:
        Workdir(run, config()).bind(described())
    assert "pass another --workdir" in str(raised.value)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_damaged_config_of_a_run_without_results_is_written_again(tmp_path):
    Workdir(tmp_path, config())
    (tmp_path / "config.json").write_text("{")
    Workdir(tmp_path, config())
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 3


CHANGED = {
    "the set forget had 2 questions with 1 images and has 3 questions with 1 images": {"forget": examples(3)},
    "the set forget had 2 questions with 1 images and has 2 questions with 0 images": {"forget": examples(image=None)},
    r"the set retain has other questions, answers or images \(3 questions": {"retain": examples(3, answer="a baker")},
    "the set retain has other questions, answers or images": {"retain": examples(3, image=b"other")},
    "the set test had 0 questions with 0 images and has 2": {"test": examples()},
}


@pytest.mark.parametrize("message", CHANGED)
def test_other_data_is_refused_by_set(run, message):
    Workdir(run, config()).bind(described())
    with pytest.raises(UserError, match=f"was computed from other inputs: {message}.*Restore them, pass another"):
        Workdir(run, config()).bind(described(CHANGED[message]))


def test_an_edited_file_of_the_inputs_is_refused(run):
    Workdir(run, config()).bind(described())
    (run / "inputs.json").write_text((run / "inputs.json").read_text() + "\n")
    with pytest.raises(UserError, match="inputs.json is damaged or was changed.*; restore that file from a copy"):
        Workdir(run, config()).bind(described())


def test_another_model_is_refused_by_file(tmp_path):
    make_model(tmp_path / "model")
    workdir = Workdir(tmp_path / "run", config())
    workdir.bind(described(path=tmp_path / "model"))
    workdir.write_text(RECORD, "")
    (tmp_path / "model" / "provenance.json").write_text("{}")  # has the date of the export
    Workdir(tmp_path / "run", config()).bind(described(path=tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_text("other")
    with pytest.raises(UserError, match=r"the model of config.model.path changed in model.safetensors\. Restore"):
        Workdir(tmp_path / "run", config()).bind(described(path=tmp_path / "model"))


def test_models_with_the_same_weights_are_refused(caplog):
    vanilla = {"model.safetensors": "1", "config.json": "2"}
    copy, retained, third, fourth = (vanilla | {"config.json": "3"}, *({"model.safetensors": x} for x in "456"))
    reference = "attacks.membership.reference"
    different = {"path": vanilla, "retain_only": retained, "unlearned": third, reference: fourth}
    inputs.check_models({"models": different})
    assert not caplog.text
    inputs.check_models({"models": different | {"unlearned": copy}})
    assert "config.model.unlearned has the same weights as config.model.path: nothing was unlearned" in caplog.text
    inputs.check_models({"models": {"base": vanilla, reference: vanilla}})  # the base model is not attacked
    for field, value, other in (
        ("retain_only", copy, "model.path"),
        ("unlearned", retained, "model.retain_only"),
        (reference, copy, "model.path"),
        (reference, third, "model.unlearned"),
        (reference, retained, "model.retain_only"),
    ):
        with pytest.raises(UserError, match=rf"config\.\S*{field} has the same weights as config\.{other}, "):
            inputs.check_models({"models": different | {field: value}})


def test_a_changed_reference_model_is_another_input():
    saved, now = ({"sets": {}, "models": {inputs.REFERENCE: {"model.safetensors": x}}} for x in "12")
    expected = ["the model of config.attacks.membership.reference changed in model.safetensors"]
    assert list(inputs.differences(saved, now)) == expected
    assert list(inputs.differences({"sets": {}, "models": {}}, now)) == []  # an earlier version did not record it


def test_a_changed_wording_of_prompts_is_another_input(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('{"letter": "{question}"}')
    saved = inputs.describe({}, {}, {"prompts": str(file)})
    assert list(inputs.differences(saved, inputs.describe({}, {}, {"prompts": str(file)}))) == []
    file.write_text('{"letter": "{question}!"}')
    assert list(inputs.differences(saved, inputs.describe({}, {}, {"prompts": str(file)}))) == [
        "the file of config.eval.prompts changed"
    ]


def test_inputs_may_change_before_there_are_results(tmp_path):
    Workdir(tmp_path, config()).bind(described())
    Workdir(tmp_path, config()).bind(described({"forget": examples(5)}))
    assert json.loads((tmp_path / "inputs.json").read_text())["sets"]["forget"]["questions"] == 5


BAD_FOLDERS = {
    "a link to nothing": lambda root: (root / "x").symlink_to(root / "none"),
    "a loop of links": lambda root: (root / "x").symlink_to(root / "x"),
    "a file": lambda root: (root / "x").write_text(""),
    "in a file": lambda root: (root / "x").write_text(""),
    "a long name": lambda root: None,
    "NUL": lambda root: None,
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_what_cannot_be_a_folder_is_refused(tmp_path, kind):
    BAD_FOLDERS[kind](tmp_path)
    names = {"in a file": "x/run", "a long name": "x" * 5000, "NUL": "a\0b"}
    for enter in (lambda path: exclusive(path, "").__enter__(), lambda path: Workdir(path, config())):
        with pytest.raises(UserError, match="pass (another|a) (--workdir|folder)|is a link to|is too long"):
            enter(tmp_path / names.get(kind, "x"))


def test_two_runs_cannot_use_one_folder(tmp_path):
    """The second is refused before it writes anything, and the first removes what a killed one left unfinished."""
    (tmp_path / "run" / "answers").mkdir(parents=True)
    (tmp_path / "run" / "answers" / f".vanilla.jsonl.{'0' * 32}.tmp").write_text("")
    (tmp_path / "run" / "config.json").write_text("{}")
    with exclusive(tmp_path / "run", "first"):
        assert not list((tmp_path / "run" / "answers").iterdir())
        shutil.rmtree(tmp_path / "run" / "answers")
        (tmp_path / "run" / "config.json").unlink()
        lock = json.loads((tmp_path / "run" / "lock.json").read_text())
        assert lock["command"] == "first"
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
    lock |= {"pid": os.getppid(), "started": locks.process_start(os.getppid())}
    (tmp_path / "copy" / "lock.json").write_text(json.dumps(lock))
    with pytest.raises(UserError, match=r"is used by process \d+ on .* \(first\)"):
        exclusive(tmp_path / "copy", "second").__enter__()
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["lock.json"]
    assert not list((tmp_path / "run").iterdir())


def full(code=errno.ENOSPC):
    return OSError(code, os.strerror(code), "/there")


def caused(error, cause):
    error.__cause__ = cause
    return error


FULL_DISK = {
    "by the system": full(),
    "as the cause of another error": caused(RuntimeError("a checkpoint could not be saved"), full()),
    "by TensorStore": ValueError(
        "RESOURCE_EXHAUSTED: Failed to write: \"x\": No space left on device [os_error_code='28']"
    ),
    "by TensorStore, protected": ValueError("PERMISSION_DENIED: Failed to open: \"x\": Denied [os_error_code='13']"),
    "by TensorStore, a mounted file": ValueError("FAILED_PRECONDITION: Failed to rename: \"x\" [os_error_code='16']"),
    "by TensorFlow": type("E", (Exception,), {"__module__": "tensorflow.x"})("x; No space left on device"),
    "quota": RuntimeError("Disk quota exceeded"),
    "limit": full(errno.EFBIG),
    "moved": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/moved/metrics.jsonl"),
}


@pytest.mark.parametrize("error", [error for error in FULL_DISK if error.startswith("by TensorStore")])
def test_the_file_is_named_where_the_error_does_not(error, tmp_path):
    with pytest.raises(UserError, match="cannot write at ledger.jsonl: .*; free some space or pass another folder"):
        with storage.write_errors("folder", Path("ledger.jsonl")):
            raise FULL_DISK[error]


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_disk_that_is_full_is_one_sentence_whoever_says_so(error):
    with pytest.raises(UserError, match="cannot write.*; free some space or pass another --workdir"):
        with storage.write_errors():
            raise FULL_DISK[error]


@pytest.mark.parametrize(
    "error",
    [
        full(errno.EIO),
        RuntimeError("the loss is broken"),
        UserError("No space left on device"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/missing"),
    ],
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, storage.write_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
@pytest.mark.parametrize("name", [RECORD, "results.json", "attacks/leak/vanilla.jsonl"])
def test_results_need_the_answers_that_they_report(run, name, damage):
    workdir = Workdir(run, config())
    workdir.write_lines("attacks/leak/vanilla.jsonl", [{"id": "1"}, {"id": "2"}])
    workdir.write("results.json", {"models": {}})
    assert workdir.has_results("results.json") and not workdir.has_results("results.json", "report.md")
    file = run / name
    file.unlink() if damage == "missing" else file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert not Workdir(run, config()).has_results("results.json")


@pytest.mark.parametrize("name", ["answers/unlearned.jsonl", "attacks/leak/unlearned.jsonl"])
def test_answers_whose_entries_were_removed_with_them_are_missing_if_there_are_figures_of_them(run, name):
    workdir = Workdir(run, config())
    both = ("answers/unlearned.jsonl", "attacks/leak/unlearned.jsonl")
    for file in both:
        workdir.write_lines(file, [{"id": "1"}])
    workdir.write("results.json", {"models": {"unlearned": {}}, "attacks": {"leak": {}}})
    assert workdir.has_results("results.json")
    (run / name).unlink()
    entries = json.loads((run / records.FILE).read_text())
    del entries[name]
    (run / records.FILE).write_text(json.dumps(entries))
    assert not Workdir(run, config()).has_results("results.json")
    with pytest.raises(UserError, match=rf"{name} is missing; restore it"):
        records.Records(run).check_results("results.json", remedy="restore it")


@pytest.mark.parametrize("damage", [*DAMAGE, "missing", "no entry", "no records"])
def test_another_run_is_read_only_if_it_is_as_it_was_written(run, damage):
    assert records.read_lines(run, RECORD) == [{"id": "1"}, {"id": "2"}]
    if damage == "missing":
        (run / RECORD).unlink()
    elif damage == "no entry":
        (run / records.FILE).write_text("{}")
    elif damage == "no records":
        (run / records.FILE).unlink()
    else:
        (run / RECORD).write_bytes(DAMAGE[damage]((run / RECORD).read_bytes()))
    with pytest.raises(UserError, match=r"There is no file|run the command of that run again\.$"):
        records.read_lines(run, RECORD)


LENT = {  # what differs, and the inputs of the run that borrows
    "nothing": lambda model: described(path=model),
    "a set that only one of them reads": lambda model: described({"held_out": examples()}, path=model),
    "a model that only one of them reads": lambda model: described(path=model, base=model),
    "the set retain": lambda model: described({"retain": examples(3, answer="a nurse")}, path=model),
    "the set forget": lambda model: described({"forget": examples(3)}, path=model),
    "config.model.path": lambda model: described(path=other(model)),
    "config.eval.prompts": lambda model: described(path=model) | {"prompts": "c0ffee"},
}


def other(model):
    copy = shutil.copytree(model, model.with_name("other"))
    (copy / "model.safetensors").write_text("other")
    return copy


@pytest.mark.parametrize("made", [True, False], ids=["fine-tuned", "given"])
@pytest.mark.parametrize("difference", LENT)
def test_answers_are_borrowed_only_from_a_run_of_the_same_inputs(tmp_path, difference, made):
    make_model(tmp_path / "vanilla")
    lender = Workdir(tmp_path / "lender", config())
    lender.bind(described() if made else described(path=tmp_path / "vanilla"))
    lender.model("vanilla", make_model)
    lender.write_lines(RECORD, [{"id": "1"}])
    borrower = Workdir(tmp_path / "borrower", config())
    borrower.bind(LENT[difference](tmp_path / "vanilla"))
    if difference.startswith(("nothing", "a ")):
        borrower.borrow(lender.path, [RECORD, "answers/retain_only.jsonl"])
        assert borrower.read_lines(RECORD) == [{"id": "1"}] and borrower.has(RECORD)
        return
    with pytest.raises(UserError, match=f"computed from other inputs: .*{difference}.*start over"):
        borrower.borrow(lender.path, [RECORD])
    assert not borrower.has(RECORD)


def test_records_of_another_kind_are_not_trusted(run):
    entries = json.loads((run / records.FILE).read_text())
    for entry in (None, 3, [], {}, {"lines": "2"}):
        (run / records.FILE).write_text(json.dumps(entries | {RECORD: entry, "unlearned": entry}))
        workdir = Workdir(run, config())
        assert not workdir.has(RECORD) and not workdir.has_model("unlearned")


def test_answers_of_a_model_may_contain_any_text(tmp_path):
    """A tokenizer of bytes can write NUL."""
    answers = [{"prediction": text} for text in ("a\0b", "\u2028", "Zoë")]
    Workdir(tmp_path, config()).write_lines(RECORD, answers)
    assert Workdir(tmp_path, config()).read_lines(RECORD) == answers


def test_a_named_pipe_is_never_opened_and_counts_as_missing(run):
    (run / RECORD).unlink()
    os.mkfifo(run / RECORD)
    assert not records.Records(run).has(RECORD)


def test_an_entry_of_a_name_that_no_file_has_counts_as_missing(run):
    entries = json.loads((run / records.FILE).read_text())
    (run / records.FILE).write_text(json.dumps(entries | {"answers/" + "x" * 5000: entries[RECORD]}))
    assert not records.Records(run).has_results(RECORD)


# ---- What a finished run has beside its results ----

PAGES = ("report/losses.png", "portraits/1.png", "report.md")


@pytest.fixture
def finished(run):
    """The folder of a run with results, a report and a training whose metrics were recorded."""
    workdir = Workdir(run, config())
    with workdir.training() as folder:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    workdir.write("results.json", {"models": {}})
    for name in (*PAGES, "unlearned/README.md"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    workdir.replace_records(("report", "portraits/"), lambda: PAGES)
    workdir.add_record("unlearned/README.md")
    assert is_complete(run)
    return run


def is_complete(run, without=()):
    workdir = Workdir(run, config())
    workdir.check_logs()
    return workdir.is_complete("results.json", without=without)


@pytest.mark.parametrize("damage", ["a bit flipped", "empty", "missing"])
@pytest.mark.parametrize(
    "name", [*PAGES, "unlearned/README.md", "unlearned/model.safetensors", "unlearned/config.json"]
)
def test_a_finished_run_notices_damage_of_everything_that_it_wrote(finished, name, damage):
    file = finished / name
    file.unlink() if damage == "missing" else file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert not is_complete(finished)
    assert is_complete(finished, without=("report", "portraits/")) is (name in PAGES)


@pytest.mark.parametrize("damage", ["cut at a line end", "empty", "a bit flipped", "missing"])
def test_damaged_metrics_are_named_since_nothing_computes_them_again(finished, damage):
    log = finished / "train" / "metrics.jsonl"
    log.unlink() if damage == "missing" else log.write_bytes(DAMAGE[damage](log.read_bytes()))
    with pytest.raises(
        UserError, match=r"metrics\.jsonl is (missing|damaged).* restore it from a copy, or remove .*train"
    ):
        is_complete(finished)


@pytest.mark.parametrize("name", ["unlearned", "train"])
def test_a_finished_run_does_without_large_folders_that_were_removed(finished, name):
    shutil.rmtree(finished / name)
    assert is_complete(finished)


def test_a_training_that_goes_on_is_not_taken_for_damage(finished):
    with Workdir(finished, config()).training() as folder:
        (folder / "metrics.jsonl").write_text('{"step": 3}\n')
        Workdir(finished, config()).check_logs()  # as of a run that was killed here
    assert is_complete(finished)


def test_entries_of_an_earlier_report_are_dropped(finished):
    (finished / PAGES[0]).unlink()
    Workdir(finished, config()).replace_records(("report", "portraits/"), lambda: PAGES[1:])
    assert is_complete(finished)


def test_replies_of_a_judge_are_not_asked_for_again_in_a_finished_run(finished):
    Workdir(finished, config()).write_lines("judge/vanilla.jsonl", [{"id": "1"}])
    (finished / "judge" / "vanilla.jsonl").unlink()
    assert is_complete(finished)
