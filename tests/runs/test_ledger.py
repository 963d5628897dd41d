"""The ledger of requests: what it records, and every kind of line that it refuses."""

import json
import shutil

import pytest

from vkd_jax import requests as command
from vkd_jax.runs import ledger, requests
from vkd_jax.runs.ledger import START, Ledger, append, line_hash
from vkd_jax.runtime import files, locks
from vkd_jax.types import UserError, person_digest

ANN, BOB, CLEO = (person_digest(name) for name in ("ann", "bob", "cleo"))
DONE = dict(
    run="/runs/0001", model_before="b", model_after="a", commit="c", config={}, data={}, features={}, versions={}
)
CELL = {"accuracy": 0.25, "correct": 1, "n": 4, "chance": None}
FIGURES = {"text_identical": True, "language_model_changed": 0, "seconds": 1.5}
FIGURES |= {"before": {}, "after": {"forgotten": CELL}}
DONE |= {"figures": FIGURES}


def figures(**changes):
    """The lines of a request that was run, with other figures."""
    return [("add", 1, {}), ("done", 1, DONE | {"figures": FIGURES | changes})]


def write(path, *lines):
    """Writes lines (kind, request, fields) with right hashes, and returns them as they are in the file."""
    written = []
    for kind, request, fields in lines:
        append_fields = {"people": [ANN], "forget": "", "test": ""} | fields if kind == "add" else fields
        content = {
            "line": len(written) + 1,
            "kind": kind,
            "request": request,
            "time": "2026-01-01T00:00:00+00:00",
            **append_fields,
        }
        content["previous"] = written[-1]["hash"] if written else START
        content |= content.pop("over", {})
        written.append({**content, "hash": line_hash(content)})
    save(path, written)
    return written


def save(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_are_bound_to_each_other_and_name_nobody(tmp_path):
    path = tmp_path / "requests.jsonl"
    assert requests.add(path, "ann, bob").people == (ANN, BOB)
    requests.add(path, "cleo")
    requests.withdraw(path, 2)
    requests.add(path, "cleo")  # a withdrawn request may be made again
    append(path, lambda _: ("done", 1, DONE), Ledger.read(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["add", "add", "withdraw", "add", "done"]
    assert [line["previous"] for line in lines] == [START, *(line["hash"] for line in lines[:-1])]
    assert "ann" not in path.read_text()
    read = Ledger.read(path)
    assert read.head == lines[-1]["hash"]
    assert [r.number for r in read.pending] == [3] and [r.number for r in read.finished] == [1]
    shown = requests.shown(path)
    assert read.head in shown and "everyone forgotten so far 25.0" in shown and "withdrawn" in shown


def test_the_hash_of_a_line_can_be_computed_without_this_package():
    """printf '{"kind":"add","line":1}' | sha256sum"""
    assert line_hash({"line": 1, "kind": "add"}) == "3d39a85066dffb6c1612fd1b9c4fb78c214cb0144ccab556149f5396059c1c4c"


def test_a_line_that_another_process_appends_meanwhile_is_kept(tmp_path):
    path, calls = tmp_path / "requests.jsonl", []

    def slow(current):
        calls.append(len(current.requests))
        if len(calls) == 1:
            requests.add(path, "bob")
        return "add", len(current.requests) + 1, {"people": [ANN], "forget": "", "test": ""}

    append(path, slow, ledger.read_or_new(path))
    assert calls == [0, 1] and [r.people for r in Ledger.read(path).requests] == [(BOB,), (ANN,)]


@pytest.mark.parametrize("other", [None, BOB], ids=["moved", "replaced"])
def test_a_ledger_that_is_moved_while_a_command_works_is_not_begun_anew(other, tmp_path):
    path = tmp_path / "LEDGER"
    write(path, ("add", 1, {}))

    def move(current):
        if not (tmp_path / "moved").exists():
            path.rename(tmp_path / "moved")
            other and write(path, ("add", 1, {"people": [other]}))
        return "withdraw", 1, {}

    with pytest.raises(UserError, match="LEDGER is not the ledger that was there when this command began; move"):
        append(path, move, Ledger.read(path))
    assert not path.exists() if other is None else Ledger.read(path).lines == 1


def test_a_ledger_with_two_names_is_refused_before_anything_is_done(tmp_path, capsys):
    write(tmp_path / "LEDGER", ("add", 1, {}))
    (tmp_path / "second").hardlink_to(tmp_path / "LEDGER")
    for words in (["add", "--forget=bob"], ["withdraw", "1"], ["purge"]):
        assert command.main([words[0], str(tmp_path / "second"), *words[1:]]) == 2
        assert "second has 2 names (hard links), and a new line would be" in capsys.readouterr().err
    assert (tmp_path / "LEDGER").samefile(tmp_path / "second") and Ledger.read(tmp_path / "LEDGER").lines == 1


HOSTILE = {
    "a person in two requests": ([("add", 1, {}), ("add", 2, {})], "already requested, in request 1"),
    "a person twice": ([("add", 1, {"people": [ANN, ANN]})], "named twice"),
    "nobody": ([("add", 1, {"people": []})], "the request is empty"),
    "a name": ([("add", 1, {"people": ["ann"]})], "not digests"),
    "a number": ([("add", 1, {"people": [7]})], "not digests"),
    "a wrong number": ([("add", 2, {})], "request 2 is added after 0 requests"),
    "an unknown kind": ([("edit", 1, {})], "its kind is 'edit'"),
    "a list as kind": ([("add", 1, {"over": {"kind": []}})], "its kind is"),
    "a run of 5000 letters": ([("add", 1, {}), ("done", 1, DONE | {"run": "x" * 5000})], "too long for a file name"),
    "a folder of 5000 letters": ([("add", 1, {"forget": "x/" * 2500})], "too long for a file name"),
    "an unknown field": ([("add", 1, {"x": 1})], "its field 'x'"),
    "a missing field": ([("done", 1, {})], "its field"),
    "a field of another type": ([("add", 1, {"forget": 1})], "its field 'forget'"),
    "a time that is none": ([("add", 1, {"over": {"time": "\x1b[31mnow"}})], "not one of ISO 8601"),
    "a number that is true": ([("add", 1, {"over": {"request": True}})], "its field 'request'"),
    "no figures": ([("add", 1, {}), ("done", 1, DONE | {"figures": {}})], "its figures"),
    "figures of a text": (figures(text_identical="yes"), "have no text_identical"),
    "figures without a time": (figures(seconds=None), "have no seconds"),
    "figures that are a list": (figures(after=[]), "lack those after the request"),
    "an unknown group": (figures(after={"x": CELL}), "group 'x', which is unknown"),
    "a group that is a number": (figures(before={"general": 3}), "group 'general', which is"),
    "a group without a count": (figures(after={"forgotten": {"accuracy": 1}}), "no accuracy of 'forgotten'"),
    "an accuracy of 7": (figures(after={"forgotten": CELL | {"accuracy": 7}}), "no accuracy of 'forgotten'"),
    "a chance that is a text": (figures(after={"forgotten": CELL | {"chance": "x"}}), "no accuracy of 'forgotten'"),
    "done before it was added": ([("done", 1, DONE)], "request 1 is not in the ledger"),
    "done twice": ([("add", 1, {}), ("done", 1, DONE), ("done", 1, DONE)], "already run"),
    "done out of order": (
        [("add", 1, {}), ("add", 2, {"people": [BOB]}), ("done", 2, DONE)],
        "request 2 was run before request 1",
    ),
    "done after it was withdrawn": ([("add", 1, {}), ("withdraw", 1, {}), ("done", 1, DONE)], "already withdrawn"),
    "withdrawn after it was done": ([("add", 1, {}), ("done", 1, DONE), ("withdraw", 1, {})], "already run"),
    "purged before it was run": ([("add", 1, {}), ("purge", 1, {})], "was not run"),
    "purged while it is run": ([("add", 1, {}), ("begin", 1, {"run": "/runs/0001"}), ("purge", 1, {})], "was not run"),
    "begun before it was added": ([("begin", 1, {"run": "/runs/0001"})], "request 1 is not in the ledger"),
    "begun without a folder": ([("add", 1, {}), ("begin", 1, {})], "its field 'run'"),
    "begun after it was withdrawn": (
        [("add", 1, {}), ("withdraw", 1, {}), ("begin", 1, {"run": "/runs/0001"})],
        "already withdrawn",
    ),
    "begun out of order": (
        [("add", 1, {}), ("add", 2, {"people": [BOB]}), ("begin", 2, {"run": "/runs/0002"})],
        "request 2 was run before request 1",
    ),
    "a line number": ([("add", 1, {"over": {"line": 2}})], "does not follow"),
    "another chain": ([("add", 1, {"over": {"previous": "1" * 64}})], "does not follow"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_ledger_that_contradicts_itself_is_refused(case, tmp_path, capsys):
    lines, problem = HOSTILE[case]
    write(tmp_path / "requests.jsonl", *lines)
    refused(tmp_path / "requests.jsonl", problem, len(lines), capsys)


def refused(path, problem, line, capsys):
    """Every command refuses the ledger with one sentence that names the line, and leaves it as it is."""
    before = path.read_bytes()
    for words in (["show", path], ["add", path, "--forget=dan"], ["withdraw", path, "1"], ["purge", path]):
        assert command.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert problem in error and f"line {line}" in error, error
    assert path.read_bytes() == before


def edit(lines):
    lines[0]["people"] = [CLEO]


def swap(lines):
    lines[0], lines[1] = lines[1], lines[0]


DAMAGE = {
    "edited": (edit, "was edited", 1),
    "reordered": (swap, "does not follow", 1),
    "removed": (lambda lines: lines.pop(0), "does not follow", 1),
    "repeated": (lambda lines: lines.append(lines[-1]), "does not follow", 3),
    "without a hash": (lambda lines: lines[1].pop("hash"), "was edited", 2),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_changed_ledger_is_refused(case, tmp_path, capsys):
    path, (damage, problem, line) = tmp_path / "requests.jsonl", DAMAGE[case]
    lines = write(path, ("add", 1, {}), ("add", 2, {"people": [BOB]}))
    damage(lines)
    save(path, lines)
    refused(path, problem, line, capsys)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (lambda data: data[:-1], "is cut"),
        (lambda data: data[:-30], "is cut"),
        (lambda data: data + b"\n", "line 2: it is blank"),
        (lambda data: data + b" \n\n", "line 2: it is blank"),
        (lambda data: data + b"{]\n", "not JSON"),
        (lambda data: data + b"[]\n", "expected an object"),
        (lambda data: data + b"\xff\n", "not UTF-8"),
        (lambda data: data + b"[" * 100_000 + b"\n", "nested"),
    ],
)
def test_a_damaged_file_is_refused(data, problem, tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    write(path, ("add", 1, {}))
    path.write_bytes(data(path.read_bytes()))
    for words in (["show", str(path)], ["add", str(path), "--forget=dan"]):
        assert command.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and problem in error, error


def test_a_ledger_that_an_editor_saved_is_refused(tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    write(path, ("add", 1, {}))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert command.main(["show", str(path)]) == 2
    assert "line 1: it begins with a byte order mark" in capsys.readouterr().err
    assert command.main(["add", str(path), "--forget=dan"]) == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["add", "LEDGER", "--forget= , "], "the request is empty"),
        (["add", "LEDGER", "--forget=bob,bob"], "named twice"),
        (
            ["add", "LEDGER", "--forget=017,\uff11\uff17"],
            "'017' and '\\uff11\\uff17' may be one person; give the ID of",
        ),
        (["add", "LEDGER", "--forget=017,17"], "'017' and '17' may be one person"),
        (["add", "LEDGER", "--forget=Bob,bob"], "'Bob' and 'bob' may be one person"),
        (["add", "LEDGER", "--forget=017;023"], "'017;023' has a semicolon; separate IDs by commas"),
        (["add", "LEDGER", "--forget=bob,ann"], "1 of the 2 people were already requested, in request 1"),
        (
            ["add", "LEDGER", "--forget=people.jsonl"],
            "--forget: people.jsonl is a file; pass a folder of images, or IDs",
        ),
        (["add", "-", "--forget=bob"], "-: the ledger must be a file, not the standard input"),
        (["add", "LEDGER", "--forget=no/folder"], "there is no folder no/folder"),
        (["add", "LEDGER", "--forget=bob", "--test=."], "--test"),
        (["add", "LEDGER", "--forget=."], "metadata.jsonl"),
        (["add", "no/folder/LEDGER", "--forget=bob"], "there is no folder"),
        (["add", "gs://bucket/LEDGER", "--forget=bob"], "must be a file of this machine"),
        (["add", ".", "--forget=bob"], "a folder"),
        (["withdraw", "LEDGER", "2"], "request 2 is not in the ledger"),
        (["purge", "LEDGER", "1"], "request 1 was not run"),
        (["purge", "LEDGER", "0"], "request 0 is not in the ledger"),
        (["show", "MISSING"], "There is no file MISSING"),
        (["withdraw", "MISSING", "1"], "There is no file MISSING"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "LEDGER", ("add", 1, {}))
    (tmp_path / "people.jsonl").write_text("bob")
    before = (tmp_path / "LEDGER").read_bytes()
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error, error
    assert (tmp_path / "LEDGER").read_bytes() == before and not (tmp_path / "MISSING").exists()


def test_what_an_interrupted_run_left_of_a_withdrawn_request_is_shown_and_purged(tmp_path, capsys):
    path, run = tmp_path / "LEDGER", tmp_path / "runs" / "0001"
    for name in ("records.json", "features/questions.jsonl", "answers/vanilla.jsonl", "unlearned/model.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (tmp_path / "runs" / "data").mkdir()
    write(path, ("add", 1, {}), ("begin", 1, {"run": str(run)}))
    assert command.main(["purge", str(path), "1"]) == 2
    assert "request 1 has a run that has not ended; run it, or withdraw it first" in capsys.readouterr().err
    assert command.main(["withdraw", str(path), "1"]) == command.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "withdrawn" in out and f"questions in {run / 'features'}; answers in {run / 'answers'}" in out
    assert command.main(["purge", str(path)]) == 0
    assert "3 files and folders were deleted" in capsys.readouterr().out
    assert sorted(p.name for p in run.iterdir()) == ["records.json", "unlearned"]
    assert not (tmp_path / "runs" / "data").exists() and Ledger.read(path).requests[0].purged
    assert command.main(["show", str(path)]) == 0 and "nothing" in capsys.readouterr().out


FEATURES = {"features/features.safetensors": {}, "features/questions.jsonl": {}}


@pytest.fixture
def purgeable(tmp_path):
    """The ledger of a request that was run, and the folder of its run."""
    run = tmp_path / "runs" / "0001"
    for name in (*FEATURES, "records.json", "answers/vanilla.jsonl", "results.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(FEATURES) if name == "records.json" else "{}")
    lines = [("begin", 1, {"run": str(run)}), ("done", 1, DONE | {"run": str(run), "features": FEATURES})]
    write(tmp_path / "LEDGER", ("add", 1, {}), *lines)
    return tmp_path / "LEDGER", run


def link(path, target):
    path.rename(target)
    path.symlink_to(target)


NOT_PURGED = {
    "the workdir was moved": (lambda run: run.parent.rename(run.parents[1] / "moved"), "there is no folder"),
    "the run was moved": (
        lambda run: run.rename(run.with_name("old")),
        "0001, in which it was run; move it back, mount",
    ),
    "no records": (lambda run: (run / "records.json").unlink(), "There is no file"),
    "records that are damaged": (lambda run: (run / "records.json").write_text("{"), "records.json: it is not JSON"),
    "records that are a folder": (
        lambda run: ((run / "records.json").unlink(), (run / "records.json").mkdir()),
        "records.json is a folder",
    ),
    "no features": (
        lambda run: (run / "features").rename(run.parents[1] / "features"),
        "features.safetensors is missing, although its run wrote it; move it back",
    ),
    "a part of the features": (
        lambda run: (run / "features" / "questions.jsonl").unlink(),
        "questions.jsonl is missing",
    ),
    "features that are a link": (
        lambda run: link(run / "features", run.parents[1] / "disk"),
        "disk, where nothing may be deleted; replace it by what it leads to",
    ),
    "features that are a link to nothing": (
        lambda run: (link(run / "features", run.parents[1] / "x"), (run.parents[1] / "x").rename(run.parents[1] / "y")),
        "features.safetensors is missing",
    ),
    "answers that are a link": (lambda run: link(run / "answers", run.parents[1] / "disk"), "answers is a link to"),
    "a link in the answers": (
        lambda run: link(run / "answers" / "vanilla.jsonl", run.parents[1] / "disk"),
        "vanilla.jsonl is a link to",
    ),
    "a run of another ledger": (
        lambda run: (
            ledger.claim_workdir(run.parent, Ledger.read(run.parents[1] / "LEDGER")),
            shutil.copytree(run, run.with_name("0002")),
        ),
        "0002 is a run that no line of",
    ),
    "a baseline without records": (
        lambda run: (run.parent / "naive" / "0002" / "answers").mkdir(parents=True),
        "naive/0002/records.json",
    ),
}


@pytest.mark.parametrize("case", NOT_PURGED)
def test_nothing_is_purged_if_a_part_of_it_is_not_there(case, purgeable, tmp_path, capsys):
    (path, run), (damage, problem) = purgeable, NOT_PURGED[case]
    damage(run)
    before, there = path.read_bytes(), sorted(tmp_path.rglob("*"))
    assert command.main(["purge", str(path), "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error, error
    assert path.read_bytes() == before and sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("failure", ["refused", "without effect"])
def test_what_cannot_be_deleted_is_no_line_of_the_ledger(failure, purgeable, monkeypatch, capsys):
    """The same command deletes the rest later, although some of the features are gone already."""
    (path, run), remove = purgeable, files.remove

    def fail(item):
        if item.name != "features":
            remove(item)
        elif failure == "refused":
            (item / "questions.jsonl").unlink()
            raise OSError(1, "Operation not permitted", "features.safetensors")

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", fail)
        assert command.main(["purge", str(path)]) == 2
    problem = "cannot be deleted (features.safetensors: Operation" if failure == "refused" else "is still there after"
    assert f"error: {run / 'features'} {problem}" in capsys.readouterr().err
    assert path.read_bytes() == before and (run / "features").exists()
    assert command.main(["purge", str(path), "1", "1"]) == 0 and not (run / "features").exists()
    assert path.read_text().count('"kind": "purge"') == 1
    assert command.main(["purge", str(path), "1"]) == 0  # nothing is left
    run.rename(run.with_name("old"))
    assert command.main(["purge", str(path), "1"]) == 0 and path.read_text().count('"kind": "purge"') == 1


def test_folders_of_the_user_beside_the_runs_are_kept(purgeable, capsys):
    path, run = purgeable
    others = [shutil.copytree(run, run.with_name(name)) for name in ("0001_old", "2026-12", "00011")]
    others += [shutil.copytree(run, run.parent / "naive" / "0002 of Ann")]
    assert command.main(["purge", str(path)]) == 0
    assert all((other / "answers").exists() for other in others) and not (run / "answers").exists()


def test_a_run_that_was_stopped_before_it_wrote_anything_is_purged(tmp_path, capsys):
    path, run = tmp_path / "LEDGER", tmp_path / "runs" / "0001"
    write(path, ("add", 1, {}), ("begin", 1, {"run": str(run)}), ("withdraw", 1, {}))
    assert command.main(["purge", str(path)]) == 2
    assert "or create an empty folder if you deleted it" in capsys.readouterr().err
    run.mkdir(parents=True)
    assert command.main(["purge", str(path)]) == 0 and Ledger.read(path).requests[0].purged


def test_a_ledger_whose_requests_are_run_is_only_added_to(tmp_path, capsys):
    path = tmp_path / "LEDGER"
    write(path, ("add", 1, {}))
    lock = locks.owner("vkd requests run LEDGER") | {"host": "elsewhere"}
    (tmp_path / ".LEDGER.lock").write_text(json.dumps(lock))
    for words in (["withdraw", path, "1"], ["purge", path]):
        assert command.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert f"{path} is used by process" in error and "(vkd requests run LEDGER). Wait until it ends" in error
    with pytest.raises(UserError, match="LEDGER is used by process"), ledger.hold(path, ""):
        raise AssertionError("both hold the lock")
    assert command.main(["add", str(path), "--forget=bob"]) == 0 and Ledger.read(path).lines == 2


def test_a_ledger_of_which_nothing_was_run_holds_nothing(tmp_path):
    write(tmp_path / "LEDGER", ("add", 1, {}), ("withdraw", 1, {}))
    assert requests.shown(tmp_path / "LEDGER").endswith("Nothing is held of these people, since no request was run.")


def test_a_folder_has_the_runs_of_one_ledger(tmp_path):
    for name, person in (("first", ANN), ("second", BOB)):
        write(tmp_path / name, ("add", 1, {"people": [person]}))
    workdir = tmp_path / "runs"
    workdir.mkdir()
    first, second = (Ledger.read(tmp_path / name) for name in ("first", "second"))
    ledger.claim_workdir(workdir, first)
    with pytest.raises(
        UserError, match="runs has the runs of another ledger than .*second; pass that ledger or folder"
    ):
        ledger.claim_workdir(workdir, second)
    (tmp_path / "first").rename(tmp_path / "moved")
    ledger.claim_workdir(workdir, Ledger.read(tmp_path / "moved"))
    (workdir / ledger.OWNER).unlink()
    (workdir / "0001").mkdir()  # which no line of the ledger names
    with pytest.raises(UserError, match="has the runs of another ledger"):
        ledger.claim_workdir(workdir, first)


def test_an_unknown_command_is_answered_with_all_of_them(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["shw", "LEDGER"])
    assert "(choose from 'add', 'withdraw', 'run', 'show', 'purge')" in capsys.readouterr().err


def test_a_line_has_the_documented_fields():
    page = ledger.__doc__
    for kind, fields in ledger.KINDS.items():
        assert f"    {kind} " in page and all(name in page for name in fields)
    assert all(f"    {name} " in page for name in ledger.COMMON)


def test_a_line_that_is_refused_before_it_is_written_has_no_number(tmp_path, capsys):
    write(tmp_path / "LEDGER", ("add", 1, {}), ("withdraw", 1, {}))
    assert command.main(["withdraw", str(tmp_path / "LEDGER"), "1"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'LEDGER'}: request 1 was already withdrawn.\n"


def test_the_command_that_adds_a_request_names_no_flag_that_it_lacks(tmp_path, request_folders, capsys):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "metadata.jsonl").symlink_to(request_folders / "forget" / "metadata.jsonl")
    assert command.main(["add", str(tmp_path / "LEDGER"), f"--forget={tmp_path / 'linked'}"]) == 2
    assert capsys.readouterr().err.endswith(f"link out of {tmp_path / 'linked'}; copy the file into the folder.\n")


def test_people_who_are_asked_to_be_forgotten_must_be_named(tmp_path, request_folders):
    folder = tmp_path / "forget"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"question": "Who?", "answer": "Ann", "person": "ann"}\n')
    assert requests.add(tmp_path / "a", str(folder)).people == (ANN,)
    (folder / "metadata.jsonl").write_text('{"question": "Who?", "answer": "Ann"}\n')
    with pytest.raises(UserError, match="line 1.*person.*is missing"):
        requests.add(tmp_path / "b", str(folder))
    assert requests.add(tmp_path / "c", str(request_folders / "forget")).forget == str(request_folders / "forget")


def test_a_linked_ledger_stays_a_link(tmp_path, capsys):
    write(tmp_path / "real", ("add", 1, {}))
    (tmp_path / "link").symlink_to("real")
    assert command.main(["withdraw", str(tmp_path / "link"), "1"]) == 0
    assert (tmp_path / "link").is_symlink() and Ledger.read(tmp_path / "real").lines == 2
