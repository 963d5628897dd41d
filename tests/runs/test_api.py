"""Runs from Python: the public names, and docs/python_api.md as it is written; and the report of such a run again."""

import importlib
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from short_run import state_of

import vkd_jax
from vkd_jax.methods.vkd import VKD
from vkd_jax.reporting import report
from vkd_jax.runs import api, pipeline, rebuild_report
from vkd_jax.runtime import hub, records
from vkd_jax.training import loop
from vkd_jax.types import UserError

PAGE = (Path(__file__).parents[2] / "docs" / "python_api.md").read_text("utf-8")


def trained(method, model):
    return method.trainable(model.params, model.config)


def fit(model, method, *_, folder, **__):
    """Trains nothing, and logs one step."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "forget_loss": 0.5}\n')
    return {path: model.params[path] for path in trained(method, model)}


@pytest.fixture(scope="module")
def page(few, tiny_folder, tmp_path_factory):
    """What the blocks of the page define and print; the runs are of a smaller model, on three people, without training.

    Training is compiled and tested elsewhere.
    """
    folder, shipped, printed, configs = tmp_path_factory.mktemp("python"), tmp_path_factory.mktemp("shipped"), [], []
    (shipped / "tiny_llava").symlink_to(tiny_folder)
    run = pipeline.run

    def short(config, workdir, command):
        configs.append(config.copy_and_resolve_references())
        config.data.source = str(few)
        config.model.retain_only = ""  # trained without other people than these
        config.eval.update(max_items=2, batch_size=16)
        return run(config, workdir, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pipeline, "run", short)
        patch.setattr(hub, "SHIPPED", shipped)
        patch.setattr(VKD, "prepare", lambda method, context: "prepared")
        patch.setattr(loop, "fit", fit)
        values = {"print": lambda *words: printed.append(" ".join(map(str, words)))}
        for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
            exec(compile(code, "docs/python_api.md", "exec"), values)
    return types.SimpleNamespace(values=values, printed=printed, configs=configs, folder=folder, shipped=shipped)


def test_the_page_runs_as_written(page):
    assert " -> " in page.printed[0]
    assert re.fullmatch(r"[\d.]+ % of 2 questions, 95 % interval 0\.\d{3} to [01]\.\d{3}", page.printed[1])
    assert any(re.fullmatch(r"unlearned leak qa [\d.]+", line) for line in page.printed[2:])
    assert (page.folder / "OUT" / "report.html").is_file() and (page.folder / "ATTACKED" / "report.html").is_file()
    assert page.values["config"].model.quantize == "int4:64" and page.values["config"].train.learning_rate == 1e-5


def test_arguments_are_fields_of_the_config(page):
    unlearn, attack = page.configs
    assert (unlearn.stage, unlearn.model.path, unlearn.model.retain_only) == (
        "unlearn", "tiny_llava", "tiny_retain_only",
    )  # fmt: skip
    assert (unlearn.method.augment_retain, unlearn.train.steps, unlearn.data.forget) == (2, 300, 10)
    assert (attack.stage, attack.model.unlearned, attack.attacks.names) == ("audit", "OUT/unlearned", "leak")
    assert page.values["results"].meta.command == "called from Python: vkd_jax.attack"


def test_the_page_explains_every_public_name():
    rows = "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))
    assert {name for name in vkd_jax.__all__ if not re.search(rf"`{name}\b", rows)} == set()
    assert sorted(vkd_jax._MODULES) == sorted(vkd_jax.__all__) and set(vkd_jax.__all__) <= set(dir(vkd_jax))
    for name, module in vkd_jax._MODULES.items():
        assert getattr(vkd_jax, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'relearn'"):
        getattr(vkd_jax, "relearn")  # noqa: B009


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (dict(benchmark="mmlu"), "unknown name 'mmlu'"),
        (dict(method="magic"), "unknown name 'magic'"),
        (dict(settings={"train.stpes": 1}), "train.stpes: unknown field 'stpes'. Did you mean 'steps'"),
        (dict(settings={"train.steps ": 1}), "train.steps : unknown field 'steps '. Did you mean 'steps'"),
        (dict(settings={"train.steps": "many"}), "train.steps: 'many' is of type str. Give a value of type int."),
        (dict(settings={"train.steps": 4.0}), "train.steps: 4.0 is of type float. Give a value of type int."),
        (dict(settings={"train": {"steps": 4}}), "train: {'steps': 4} is a section. Give its fields one by one"),
        (dict(settings={"model.path": "tiny_base"}), "settings: model.path is what another argument says; leave it"),
        (dict(settings={"stage": "audit"}), "settings: stage is what another argument says"),
        (dict(settings={"method.name": "npo"}), "settings: method.name is what another argument says"),
        (dict(settings={"data.benchmark": "clear"}), "settings: data.benchmark is what another argument says"),
        (dict(settings={"train.steps": -1}), "train.steps: -1"),
        (dict(settings=[("train.steps", 1)]), "settings: .* of type list is not allowed. Give a mapping of fields"),
        (dict(settings={5: 1}), "settings: 5 of type int is not allowed. Give the fields' names as texts"),
        (dict(benchmark=["mllmu"]), "benchmark: unknown name"),
        (dict(method=3), "method: unknown name 3"),
        (dict(model=None), "model: None is not allowed. Give the folder or the name of a model"),
        (dict(retain_only=5), "retain_only: 5 of type int is not allowed"),
        (dict(workdir=None), "workdir: None is not allowed. Give the path of a folder"),
        (dict(workdir=5), "workdir: 5 of type int is not allowed"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else None,
)
def test_wrong_arguments_are_refused_before_a_folder_is_written(tmp_path, call, problem):
    with pytest.raises(UserError, match=problem):
        api.unlearn(**{"model": "tiny_llava", "workdir": tmp_path / "run", **call})
    assert list(tmp_path.iterdir()) == []


CONFIG_NEEDED = r"config: .* is not allowed. Give an ml_collections.ConfigDict"


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: vkd_jax.load(None), "folder: None is not allowed. Give the folder or the name of a model"),
        (lambda: vkd_jax.load(7), "folder: 7 of type int"),
        (lambda: vkd_jax.load("tiny_llava", dtype=float), "dtype: <class 'float'> of type type is not allowed"),
        (lambda: vkd_jax.load("tiny_llava", max_pixels="9"), "max_pixels: '9' of type str"),
        (lambda: vkd_jax.answer("tiny_llava", "Who?"), "model: 'tiny_llava' .* Give what vkd_jax.load returns"),
        (lambda: vkd_jax.attack("tiny_llava", None, workdir="w"), "attacks: None is not allowed"),
        (lambda: vkd_jax.attack("tiny_llava", "", workdir="w"), "attacks: no attack is named"),
        (lambda: vkd_jax.attack("tiny_llava", [], workdir="w"), "attacks: no attack is named"),
        (lambda: vkd_jax.attack("tiny_llava", ["leak", 5], workdir="w"), "attacks: 5 of type int"),
        (lambda: vkd_jax.run({"stage": "audit"}, "w"), CONFIG_NEEDED),
        (lambda: vkd_jax.run(None, "w"), CONFIG_NEEDED),
        (lambda: vkd_jax.run("configs/tiny.py", "w"), CONFIG_NEEDED),
        (lambda: vkd_jax.RunConfig.from_config_dict(None), CONFIG_NEEDED),
        (lambda: vkd_jax.RunConfig.from_config_dict({}), CONFIG_NEEDED),
        (lambda: vkd_jax.RunConfig.from_dict(None), "config: None is not allowed"),
        (lambda: vkd_jax.RunConfig().override(None), "settings: None is not allowed"),
        (lambda: vkd_jax.RunResults.read(None), "workdir: None is not allowed"),
        (lambda: vkd_jax.RunResults.read(3), "workdir: 3 of type int"),
    ],
)
def test_arguments_of_other_types_are_refused(call, problem):
    with pytest.raises(UserError, match=problem):
        call()


def test_none_means_that_nothing_is_given_and_attacks_may_be_a_list(monkeypatch):
    configs = []
    monkeypatch.setattr(pipeline, "run", lambda config, *_: configs.append(config))
    api.attack("m", ["leak", "probe"], workdir="w", settings=None, retain_only=None, unlearned=None)
    api.attack("m", "leak,probe", workdir="w", settings={}, retain_only="", unlearned="")
    assert configs[0].to_dict() == configs[1].to_dict() and configs[0].attacks.names == "leak,probe"


def test_rows_are_flat_and_complete(page):
    results = vkd_jax.RunResults.read(page.folder / "ATTACKED")
    rows = results.rows()
    summary = results.summary("vanilla", "forget", "vqa")
    (row,) = [
        row for row in rows
        if (row["model"], row["set"], row["kind"], row["metric"]) == ("vanilla", "forget", "vqa", "accuracy")
    ]  # fmt: skip
    assert row["mean"] == summary.accuracy and (row["low"], row["high"], row["n"]) == (summary.low, summary.high, 2)
    metrics = 1 + len(summary.metrics)
    assert len([x for x in rows if (x["model"], x["set"], x["kind"]) == ("vanilla", "forget", "vqa")]) == metrics
    assert len(results.rows("attacks")) == len(results.attacks["leak"].cells)
    with pytest.raises(UserError, match="part='people': unknown part of the results"):
        results.rows("people")


def test_a_table_is_a_data_frame_of_the_rows(page, monkeypatch):
    results = page.values["results"]
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))
    assert results.table("attacks") == ("frame", results.rows("attacks"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="need pandas: pip install pandas"):
        results.table()


# ---- vkd report, on the run of the page ----


def report_command(monkeypatch, capsys, workdir):
    monkeypatch.setattr(sys, "argv", ["vkd report", str(workdir)])
    status = rebuild_report.main()
    return status, *capsys.readouterr()


@pytest.fixture
def finished(page, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHIPPED", page.shipped)
    return Path(shutil.copytree(page.folder / "OUT", tmp_path / "run"))


def test_the_report_of_a_finished_run_is_written_again(finished, page, monkeypatch, capsys):
    before = dict(state_of(finished))
    for name in ("report.md", "report.html", "report/losses.png"):
        (finished / name).unlink(missing_ok=True)
    status, shown, _ = report_command(monkeypatch, capsys, finished)
    assert status == 0 and f"{finished}/report.html" in shown
    for name, digest in state_of(finished):
        assert name == "records.json" or before[name] == digest, name
    monkeypatch.setattr(report, "write", lambda *_: pytest.fail("the report is recorded, so the run is still finished"))
    assert pipeline.execute(
        vkd_jax.RunConfig.from_dict(json.loads((finished / "config.json").read_text())), finished, "again"
    )


def test_without_the_data_the_report_has_no_images(finished, monkeypatch, capsys, caplog):
    shutil.rmtree(finished / "data")
    config = json.loads((finished / "config.json").read_text())
    config["data"]["source"] = "nowhere"
    (finished / "config.json").write_text(json.dumps(config))
    records.Records(finished).add("config.json")
    assert report_command(monkeypatch, capsys, finished)[0] == 0
    assert "the report has no images" in caplog.text and "data:image/webp" not in (finished / "report.html").read_text()


def test_the_config_of_an_older_version_may_lack_fields(finished, monkeypatch, capsys):
    config = json.loads((finished / "config.json").read_text())
    del config["train"]["b2"], config["data"]["symlinks"]
    (finished / "config.json").write_text(json.dumps(config))
    records.Records(finished).add("config.json")
    assert report_command(monkeypatch, capsys, finished)[0] == 0
    assert "data:image/webp" in (finished / "report.html").read_text()


@pytest.mark.parametrize("name", ["results.json", "answers/unlearned.jsonl"])
def test_a_damaged_file_of_a_run_is_named(finished, monkeypatch, capsys, name):
    file = finished / name
    file.write_bytes(file.read_bytes() + b"\n")
    status, shown, err = report_command(monkeypatch, capsys, finished)
    assert (status, shown, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {file} is damaged or was changed")
    assert err.endswith("; run its command again, which computes it again.\n")
    entries = json.loads((finished / "records.json").read_text())
    without = {other: entry for other, entry in entries.items() if other != name}
    (finished / "records.json").write_text(json.dumps(without))
    assert "error" in (err := report_command(monkeypatch, capsys, finished)[2])
    assert "has no entry in records.json; remove it if that run did not" in err or name == "results.json"
    (finished / "records.json").write_text(json.dumps(entries))
    file.unlink()
    if name != "results.json":
        assert report_command(monkeypatch, capsys, finished)[2].startswith(f"error: {file} is missing; ")


def test_missing_answers_of_an_attack_are_named(finished, monkeypatch, capsys):
    results = json.loads((finished / "results.json").read_text())
    cells = [dict(model=model, set="forget", mean=0.5, n=2) for model in ("vanilla", "unlearned")]
    results["attacks"] = {"leak": dict(title="Leak", about="About.", cells=cells)}
    (finished / "results.json").write_text(json.dumps(results))
    (finished / "attacks" / "leak").mkdir(parents=True)
    (finished / "attacks" / "leak" / "vanilla.jsonl").write_text("")
    for name in ("results.json", "attacks/leak/vanilla.jsonl"):
        records.Records(finished).add(name)
    missing = finished / "attacks" / "leak" / "unlearned.jsonl"
    expected = f"error: {missing} is missing; run its command again, which computes it again.\n"
    assert report_command(monkeypatch, capsys, finished) == (2, "", expected)


def test_results_of_another_run_are_refused_beside_a_certificate(finished, monkeypatch, capsys):
    (finished / rebuild_report.CERTIFICATE).write_text("{}\n")  # of the run that was here before
    status, shown, err = report_command(monkeypatch, capsys, finished)
    assert (status, shown) == (2, "") and f"{rebuild_report.CERTIFICATE} is damaged or was changed" in err
    assert err.endswith("; run the command of this run again, or restore its files from a copy.\n")


def test_an_unfinished_run_has_no_report(finished, monkeypatch, capsys):
    (finished / "results.json").unlink()
    status, shown, err = report_command(monkeypatch, capsys, finished)
    assert (status, shown) == (2, "") and err.endswith(
        "a run that is not finished; run its command again, which resumes it.\n"
    )


def test_a_folder_without_a_run_is_refused_and_not_created(monkeypatch, capsys, tmp_path):
    status, _, err = report_command(monkeypatch, capsys, tmp_path / "nowhere")
    assert status == 2 and "nowhere has no run; give the --workdir of a finished one." in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "config.json is a named pipe; pass a regular file."),
        (os.mkdir, "config.json is a folder; pass a regular file."),
        (
            lambda path: (path.write_text("{}"), (path.parent / "m.safetensors").touch()),
            "is the folder of a model; give",
        ),
        (lambda path: path.write_text("{"), "config.json: it is not JSON"),
    ],
)
def test_what_is_no_run_is_said(monkeypatch, capsys, tmp_path, make, words):
    make(tmp_path / "config.json")
    before = sorted(tmp_path.iterdir())
    status, _, err = report_command(monkeypatch, capsys, tmp_path)
    assert status == 2 and words in err and sorted(tmp_path.iterdir()) == before


DAMAGE = {
    "train/metrics.jsonl": lambda file: file.write_text('{"step": 1, "loss": NaN}\n'),
    "train/metrics.jsonl, missing": lambda file: file.unlink(),
    "config.json": lambda file: file.write_text(file.read_text().replace('"seed": 0', '"seed": 1')),
    "inputs.json": lambda file: file.write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_whose_files_are_damaged_has_no_new_report(finished, monkeypatch, capsys, name):
    file = finished / name.partition(",")[0]
    DAMAGE[name](file)
    before = (finished / "report.md").read_bytes()
    status, _, err = report_command(monkeypatch, capsys, finished)
    assert status == 2 and str(file) in err and "restore it from a copy" in err
    assert (finished / "report.md").read_bytes() == before


def test_without_the_folder_of_the_training_the_report_says_that_it_has_no_losses(
    finished, monkeypatch, capsys, caplog
):
    shutil.rmtree(finished / "train")
    assert report_command(monkeypatch, capsys, finished)[0] == 0
    assert f"the report has no losses of training: {finished / 'train'} was removed" in caplog.text
