"""Some facts about the people to forget are forgotten, and their other facts are retained."""

import json

import pytest
from benchmark_rows import first_rows
from benchmark_rows import write_folder as write

from vkd_jax import benchmarks
from vkd_jax.benchmarks.selection import select_people
from vkd_jax.benchmarks.synthetic import mllmu_writer
from vkd_jax.config.request import RequestConfig
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import job as jobs
from vkd_jax.types import Role, UserError

PARTS = {"evaluation": ("forget", "test", "other_facts", "other_facts_test", "retain"), "finetune": ()}
ALL_FACTS = ("name", "job", "town", "food", "pet", "sport", "instrument")


def synthetic(*facts, **more):
    return benchmarks.create("mllmu", {"n_people": 20, "forget": 15, "forget_facts": facts, **more})


def read(folders, finetune=False, **more):
    fields = dict(forget=str(folders / "forget"), retain=str(folders / "retain")) | more
    return benchmarks.read(benchmarks.create("folder", fields), folders / "built", finetune)


def told(examples):
    """Who is asked what, in any order."""
    return sorted((e.id, e.person, e.question, e.answer) for e in examples)


def test_the_questions_about_the_forgotten_people_are_divided_by_fact():
    plain = first_rows(synthetic(), "evaluation", ["forget", "test", "retain"])
    sets = first_rows(synthetic("job", "name"), "evaluation", PARTS["evaluation"])
    assert told(sets["retain"]) == told(plain["retain"])
    for name, other in (("forget", "other_facts"), ("test", "other_facts_test")):
        assert told(sets[name] + sets[other]) == told(plain[name])
        asked, kept = ({e.question for e in sets[key]} for key in (name, other))
        assert {"Who is this person?", "What is this person's job?"} < asked
        assert any("works as a" in question for question in asked)
        assert any("'s job?" in question and "person" not in question for question in asked)
        assert any(q.startswith("Who is ") and "person" not in q for q in asked)  # the answer tells job and town
        assert {"What is this person's town?", "What is this person's pet?"} < kept
        assert not any("job" in question or "works as" in question for question in kept)
        assert any("comes from" in question for question in kept)


def test_fine_tuning_leaves_out_the_facts_to_forget_alone(monkeypatch):
    monkeypatch.setattr(mllmu_writer, "FT_GENERAL_IMAGES", 3)
    rows = mllmu_writer._finetune_rows
    monkeypatch.setattr(mllmu_writer, "_finetune_rows", lambda population, _, looks: rows(population, 1, looks))
    names = ["finetune_forget", "finetune_retain"]
    plain, partly = (first_rows(b, "finetune", names) for b in (synthetic(), synthetic("pet")))
    assert told(partly["finetune_forget"] + partly["finetune_retain"]) == told(
        plain["finetune_forget"] + plain["finetune_retain"]
    )
    assert partly["finetune_forget"] and all("pet" in e.question for e in partly["finetune_forget"])
    forgotten = {e.person for e in partly["finetune_forget"]}
    assert forgotten == {e.person for e in plain["finetune_forget"]}
    assert not any("pet" in e.question for e in partly["finetune_retain"] if e.person in forgotten)


def test_the_sets_have_roles_and_titles_of_facts():
    sets = benchmarks.eval_sets(synthetic("pet"))
    assert [(s.name, s.role, s.title) for s in sets if s.name not in ("retain", "retain_test", "real")] == [
        ("forget", Role.FORGET, "facts to forget"),
        ("test", Role.FORGET_HOLDOUT, "facts to forget, other images or wordings"),
        ("other_facts", Role.RETAIN_FACTS, "other facts about the people to forget"),
        (
            "other_facts_test",
            Role.RETAIN_FACTS,
            "other facts about the people to forget, other images or wordings",
        ),
    ]
    assert "facts" not in "".join(s.title for s in benchmarks.eval_sets(synthetic()))
    assert synthetic("pet", "job").variant == ", forgetting 15 %, of pet, job"
    with pytest.raises(UserError, match="cannot be divided by person: it keeps a part of what is known of them"):
        select_people(synthetic("pet"), {"forget": [], "retain": []}, RequestConfig(people=("a" * 64,)))


# ---- Folders ----


@pytest.fixture
def folders(tmp_path):
    """Otto on one image, of whom the job and the town are known, and his job on another one."""
    line = dict(file_name="a.png", person="Otto", options=["x", "y"])
    lines = [
        line | dict(question="Job?", answer="x", fact="job"),
        line | dict(question="Town?", answer="y", fact="town"),
        dict(question="Otto's town?", answer="y", person="Otto", fact="town"),
    ]
    write(tmp_path / "forget", lines, a=1)
    write(tmp_path / "test", [line | dict(file_name="c.png", question="Job?", answer="x", fact="job")], c=3)
    write(tmp_path / "retain", [dict(file_name="b.png", question="Job?", answer="y", person="Runa")], b=2)
    return tmp_path


def test_the_lines_of_a_folder_are_divided_by_their_key(folders):
    sets = read(folders, finetune=True, forget_facts=("job",), test=str(folders / "test"))
    asked = {name: [e.question for e in examples] for name, examples in sets.items()}
    assert asked == {
        "forget": ["Job?"],
        "other_facts": ["Town?", "Otto's town?"],
        "test": ["Job?"],  # there are no other facts in this folder
        "retain": ["Job?"],
        "finetune_forget": ["Job?"],
        "finetune_retain": ["Job?", "Town?", "Otto's town?"],
    }
    assert sets["forget"][0].image_id == sets["other_facts"][0].image_id
    assert list(read(folders)) == ["forget", "retain"]


@pytest.mark.parametrize("spelled", ["Job", "\uff4aob", "jo\u00adb ", "JOB"])
def test_a_fact_has_one_spelling_or_several(folders, spelled):
    lines = [json.loads(line) for line in (folders / "forget" / "metadata.jsonl").read_text().splitlines()]
    write(folders / "forget", [*lines, lines[0] | dict(question="Trade?", fact=spelled)])
    sets = read(folders, finetune=True, forget_facts=("job",), test=str(folders / "test"))
    assert {name: [e.question for e in sets[name] if e.question in ("Job?", "Trade?")] for name in sets} == {
        "forget": ["Job?", "Trade?"], "other_facts": [], "test": ["Job?"], "retain": ["Job?"],
        "finetune_forget": ["Job?", "Trade?"], "finetune_retain": ["Job?"],
    }  # fmt: skip
    assert told(read(folders, forget_facts=(spelled,))["forget"]) == told(sets["forget"])


def test_a_fact_of_the_test_folder_alone_is_refused(folders):
    line = dict(file_name="c.png", question="Job?", answer="x", options=["x", "y"], person="Otto", fact="jobs")
    write(folders / "test", [line], c=3)
    with pytest.raises(UserError, match="line 1: fact is 'jobs', which is no fact of the forget set .job, town.; corr"):
        read(folders, forget_facts=("job",), test=str(folders / "test"))


def test_errors_name_the_facts_that_there_are(folders):
    for given, problem in (
        (
            ("job", "pet"),
            r"no question about .* in data.forget=.* asks for pet. Available: job, town.",
        ),
        (("job", "town"), r"these are all facts about .* in data.forget=.* Leave it empty, which forgets everything"),
    ):
        with pytest.raises(UserError, match=problem):
            read(folders, forget_facts=given)
    lines = (folders / "forget" / "metadata.jsonl").read_text().splitlines()
    bare = json.loads(lines[1])
    del bare["fact"]
    write(folders / "forget", [lines[0], bare])
    with pytest.raises(UserError, match=r"line 2: `?fact`? is missing; with data.forget_facts each question"):
        read(folders, forget_facts=("job",))
    assert list(read(folders)) == ["forget", "retain"]


# ---- Configs ----


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(forget_facts=("age",)), r"data.forget_facts: \('age',\) is not allowed. Give .* name, job, town, food"),
        (
            dict(forget_facts=ALL_FACTS),
            "these are all facts about the people to forget, so that none would stay",
        ),
        (dict(forget_facts=("job",), source="."), "does not say which fact a question asks for. Leave it empty."),
    ],
)
def test_facts_that_the_synthetic_people_lack_are_refused(fields, problem):
    with pytest.raises(UserError, match=problem):
        benchmarks.create("mllmu", fields).check()


@pytest.mark.parametrize(
    ("arguments", "changes", "problem"),
    [
        ("", dict(forget_facts=("job",)), "data.forget_facts: method.other_facts.weight, .* is 0. Give a weight"),
        ("", dict(weight=1.0), "method.other_facts.weight: all facts about the people are forgotten"),
        ("method=manu", dict(forget_facts=("job",)), "data.forget_facts: the method trains nothing"),
        ("facts=some", {}, ""),
        ("facts=some,method=npo,forgets=both", {}, ""),
    ],
)
def test_the_method_retains_other_facts_if_and_only_if_there_are_some(arguments, changes, problem, get_config):
    config = get_config("tiny.py", arguments)
    if "weight" in changes:
        config.method.other_facts.weight = changes.pop("weight")
    config.data.update(changes)
    config = RunConfig.from_config_dict(config)
    if problem:
        with pytest.raises(UserError, match=problem):
            config.check_stage(1)
    else:
        config.check_stage(1)
        assert config.data.benchmark.forget_facts == ("job", "pet") and not config.model.retain_only


@pytest.mark.parametrize("arguments", ["facts=some,clear", "facts=some,runs=compare", "facts=some,method=manu"])
def test_the_argument_is_for_one_run_of_a_method_that_trains(arguments, get_config):
    with pytest.raises(UserError, match="facts=some: "):
        get_config("tiny.py", arguments)


@pytest.mark.parametrize(("facts", "problem"), [((), "everything"), (("town",), "town"), (("pet", "job"), "")])
def test_a_retain_only_model_without_other_facts_is_refused(facts, problem, tmp_path, get_config):
    config = RunConfig.from_config_dict(get_config("tiny.py", "facts=some"))
    data = config.to_dict()["data"] | {"forget_facts": list(facts)}
    (tmp_path / jobs.inputs.PROVENANCE).write_text(json.dumps({"config": {"data": data}, "without": ["001"]}))

    class Job:
        forget_people = ["001"]

    Job.config = config
    if not problem:
        jobs._check_provenance(Job, "retain_only", tmp_path)
        return
    with pytest.raises(UserError, match=f"trained without {problem} about .*, but this run forgets job, pet. Create"):
        jobs._check_provenance(Job, "retain_only", tmp_path)
    (tmp_path / jobs.inputs.PROVENANCE).write_text("{")
    with pytest.raises(UserError, match="provenance.json: it is not JSON .*restore it from a copy, or remove it if"):
        jobs._check_provenance(Job, "retain_only", tmp_path)
