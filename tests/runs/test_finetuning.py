"""Stages that train the models which are given to the others: their data, provenance and weights."""

import contextlib
import json
import shutil
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inspected import answers, files, forbid, read

from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import job, pipeline
from vkd_jax.training import loop
from vkd_jax.types import UserError

SHARD = "train-00000-of-00001.parquet"
SUMMARY = {"accuracy", "correct", "n", "low", "high"}


@pytest.fixture(scope="module")
def school(two_forgotten, tmp_path_factory):
    """`two_forgotten` with a small ft_Data: every eighth question that the evaluation asks."""
    folder = Path(shutil.copytree(two_forgotten, tmp_path_factory.mktemp("school") / "data"))
    rows, sets = [], read(two_forgotten)
    for e in sum((sets[name][::8] for name in ("forget", "retain", "real")), []):
        row_id, picture = e.person or "R001", e.image and {"bytes": e.image, "path": "x.png"}
        pairs = [{"Question": e.question, "Answer": e.answer, "ID": row_id}]
        rows.append({"image": picture, "ID": row_id, "metadata": json.dumps(pairs)})
    (folder / "ft_Data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "ft_Data" / SHARD)
    return folder


SMALL = {
    "model.path": "",
    "model.create": dict(
        vocab_size=400,
        vision=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=16,
        ),
        text=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=160,
        ),
    ),
    "finetune.train.steps": 2,
    "eval.max_items": 2,
}


def test_finetuning_creates_a_model_with_random_weights(make_config, school, tmp_path, monkeypatch):
    config = make_config("finetune", **SMALL, **{"data.source": str(school)})
    results = pipeline.run(config, tmp_path / "run").to_json()
    assert set(results["models"]) == {"vanilla"} and SUMMARY <= set(results["models"]["vanilla"]["forget"]["vqa"])
    manifest = compare_tensors(tmp_path / "run" / "base", tmp_path / "run" / "vanilla")
    assert any("language_model" in name for name in manifest["changed"])
    assert any("vision_tower" in name for name in manifest["changed"])
    assert json.loads((tmp_path / "run" / "vanilla" / "config.json").read_text())["text_config"]["hidden_size"] == 16

    before = files(tmp_path / "run")
    forbid(monkeypatch, "evaluate.evaluate", "loop.fit", "hf.load")
    assert pipeline.run(config, tmp_path / "run").to_json() == results
    assert files(tmp_path / "run") == before


@pytest.fixture(scope="module")
def everything(make_config, school, tmp_path_factory):
    """A finished run of all stages."""
    workdir = tmp_path_factory.mktemp("runs") / "all"
    config = make_config("all", **SMALL, **{"data.source": str(school), "method.fisher_samples": 8})
    return types.SimpleNamespace(config=config, path=workdir, results=pipeline.run(config, workdir).to_json())


@pytest.mark.slow
def test_one_command_goes_from_the_base_to_the_report(everything):
    path, results = everything.path, everything.results
    assert list(results["models"]) == ["vanilla", "retain_only", "unlearned"]
    questions = [[(a["set"], a["id"]) for a in answers(path, name)] for name in results["models"]]
    assert questions[0] == questions[1] == questions[2]
    base, vanilla, unlearned = (path / name for name in ("base", "vanilla", "unlearned"))
    assert any("language_model" in name for name in compare_tensors(base, vanilla)["changed"])
    manifest = compare_tensors(vanilla, unlearned)
    assert manifest["changed"] and not any("language_model" in name for name in manifest["changed"])
    assert set(results["forget_quality"]) == {"vanilla", "unlearned"}
    for figures in results["forget_quality"].values():
        assert (
            0 <= figures["vqa"]["p"] <= 1 and figures["vqa"]["n"] == results["models"]["vanilla"]["forget"]["vqa"]["n"]
        )
    assert all(0 <= figures["value"] <= 1 for figures in results["utility"].values())
    text = (path / "report.md").read_text("utf-8")
    for words in ("retain-only model", "Forget quality", "MLLMU-Bench", results["meta"]["commit"]):
        assert words in text
    for name, without in (("vanilla", []), ("retain_only", ["001", "005"]), ("unlearned", [])):
        provenance = json.loads((path / name / "provenance.json").read_text())
        assert provenance["model"] == name and len(provenance["without"]) == len(without)


def test_a_retain_only_model_of_other_people_is_refused(make_config, tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "reference"))
    provenance = {"model": "retain_only", "without": ["059"], "config": {"data": {"source": "elsewhere"}}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(UserError, match="was trained without 1 person, but the forget set of this run has 2 people"):
        pipeline.run(make_config(**{"model.retain_only": str(folder)}), tmp_path / "run")
    assert not (tmp_path / "run" / "answers").exists()


@pytest.mark.parametrize(
    ("name", "stage", "people", "message"),
    [
        ("path", "unlearn", dict(people=1), "of people=0 and n_people=60, not on those of .*.people=1 and n_people=60"),
        ("path", "unlearn", dict(n_people=80), "of people=0 and n_people=60, not on those of .*=0 and n_people=80"),
        (
            "base",
            "finetune",
            {},
            "was already trained on the synthetic people of config.data .people=0 and n_people=60",
        ),
    ],
)
def test_models_trained_on_the_wrong_people_are_refused(
    get_config, tiny_folder, tmp_path, name, stage, people, message
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    made = {"model": "vanilla", "without": [], "config": {"data": {"source": "", "people": 0, "n_people": 60}}}
    (folder / "provenance.json").write_text(json.dumps(made))
    config = get_config("tiny.py", stage)
    config.data.update(people)
    config.model.update(path="", base="", retain_only="")
    config.model[name] = str(folder)
    config = RunConfig.from_config_dict(config)
    fake = types.SimpleNamespace(config=config, forget_people=[])
    with pytest.raises(UserError, match=message):
        job._check_provenance(fake, name, folder)
    (folder / "provenance.json").write_text('{"by": "another program"}')
    job._check_provenance(fake, name, folder)
    (folder / "provenance.json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object.* or remove it if no run of vkd_jax wrote it"):
        job._check_provenance(fake, name, folder)


@pytest.mark.parametrize(
    ("data", "changes", "without", "learned"),
    [
        ({"source": ""}, {}, [], "2 people of the forget set: 001, 005"),
        ({"source": ""}, {}, ["001"], "1 person of the forget set: 005"),
        ({"source": ""}, {}, ["001", "005"], ""),
        ({"source": ""}, {"people": 1}, [], ""),
        ({"source": "here"}, {}, [], "2 people of the forget set"),
        ({"source": "here"}, {"source": "there"}, [], ""),
        ({"source": "here"}, {"benchmark": "clear"}, [], ""),
    ],
)
def test_a_reference_model_that_was_trained_on_the_forget_set_is_refused(
    get_config, tiny_folder, tmp_path, data, changes, without, learned
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = get_config("tiny.py")
    config.data.update(data)
    config.attacks.names, config.attacks.membership.reference = "membership", str(folder)
    config = RunConfig.from_config_dict(config)
    made = {"without": without, "config": {"data": config.to_dict()["data"] | changes}}
    (folder / "provenance.json").write_text(json.dumps(made))
    fake = types.SimpleNamespace(config=config, forget_people=["001", "005"])
    assert job.reference_folder(config) == folder
    refused = pytest.raises(UserError, match=f"membership.reference=.* was trained on {learned}")
    with refused if learned else contextlib.nullcontext():
        job._check_reference(fake, folder)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (
            [f"{number:03}" for number in range(61)],
            "config.attacks.membership.reference has the same weights as config.model.path",
        ),
        ([], "config.attacks.membership.reference=.* was trained on 2 people of the forget set"),
    ],
)
def test_a_run_checks_the_reference_model(make_config, tiny_folder, tmp_path, without, message):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = make_config(**{"attacks.names": "membership", "attacks.membership.reference": str(folder)})
    made = {"without": without, "config": {"data": RunConfig.from_config_dict(config).to_dict()["data"]}}
    (folder / "provenance.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=message):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "answers").exists()


def test_retain_only_is_not_trained_on_the_forget_set(make_config, school, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def fit(bundle, method, prepared, config, **_):
        met.extend(e.person for encoded in prepared.sets.values() for e in encoded.examples)
        raise Enough

    forgotten, retained = ({e.person for e in read(school)[name]} for name in ("forget", "retain"))
    monkeypatch.setattr(loop, "fit", fit)
    for arg, expected in (("retain_only", retained), ("finetune", retained | forgotten)):
        met = []
        with pytest.raises(Enough):
            pipeline.run(make_config(arg, **SMALL, **{"data.source": str(school)}), tmp_path / arg)
        assert set(met) == expected | {""}
