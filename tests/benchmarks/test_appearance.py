"""Questions about the appearance of the people to forget, which are to be kept."""

import json

import pytest
from benchmark_rows import first_rows

from vkd_jax import benchmarks
from vkd_jax.benchmarks import cache
from vkd_jax.benchmarks.selection import select_people
from vkd_jax.benchmarks.synthetic import mllmu_writer
from vkd_jax.benchmarks.synthetic.facts import APPEARANCE
from vkd_jax.config.request import RequestConfig
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import job as jobs
from vkd_jax.types import Role, UserError


@pytest.fixture(scope="module")
def benchmark():
    return benchmarks.create("mllmu", {"appearance": True, "n_people": 20, "forget": 15})


def test_the_faces_to_forget_are_asked_for_what_is_visible(benchmark):
    asked = first_rows(benchmark, "evaluation", ["appearance"])["appearance"]
    people = {person.id: person for person in benchmark.population.people()}
    forgotten = benchmark.population.forgotten(15)
    assert {example.person for example in asked} == forgotten
    names = {question: name for name, question in APPEARANCE.items()}
    for example in asked:
        assert example.image is not None and example.answer in example.options and len(set(example.options)) == 4
        assert example.answer == people[example.person].appearance()[names[example.question]]
    bald = {person for person in people if people[person].look.hair_style == "bald"}
    assert bald == {person for person in people if "hair" not in people[person].appearance()} != set()
    assert {e.person for e in asked if names[e.question] == "hair"} == forgotten - bald
    (added,) = benchmark.further_sets
    assert (added.name, added.role) == ("appearance", Role.RETAIN_FACTS)
    assert benchmarks.eval_sets(benchmark)[-1] == added


def test_the_questions_are_taught_to_everybody_and_only_if_asked_for(benchmark, monkeypatch):
    monkeypatch.setattr(mllmu_writer, "FT_GENERAL_IMAGES", 3)
    rows = mllmu_writer._finetune_rows
    monkeypatch.setattr(
        mllmu_writer, "_finetune_rows", lambda population, _, appearance: rows(population, 1, appearance)
    )
    plain = benchmarks.create("mllmu", {"n_people": 20, "forget": 15})
    wanted = ["finetune_forget", "finetune_retain"]
    taught, without = (first_rows(b, "finetune", wanted) for b in (benchmark, plain))
    questions = set(APPEARANCE.values())
    for name in wanted:
        assert questions <= {e.question for e in taught[name]} and not questions & {e.question for e in without[name]}
        kept = [(e.person, e.question, e.answer) for e in taught[name] if e.question not in questions]
        assert kept == [(e.person, e.question, e.answer) for e in without[name]]
    assert plain.further_sets == () and plain.label != benchmark.label
    assert cache._config(plain, "evaluation").name != cache._config(benchmark, "evaluation").name


def test_where_there_are_no_such_questions_they_are_refused(benchmark, tmp_path, get_config):
    with pytest.raises(UserError, match="data.appearance: .* has no questions about it. Give False"):
        benchmarks.create("mllmu", {"appearance": True, "source": str(tmp_path)}).check()
    with pytest.raises(UserError, match="appearance=yes: benchmark=clear has no such questions. Give mllmu."):
        get_config("tiny.py", "appearance,clear")
    with pytest.raises(UserError, match=r"cannot be divided by person: it keeps a part of what is known of them"):
        select_people(benchmark, {"forget": [], "retain": []}, RequestConfig(people=("a" * 64,)))
    assert get_config("tiny.py", "appearance").data.appearance and not get_config("tiny.py").data.appearance


@pytest.mark.parametrize(
    ("taught", "refused"), [({}, True), ({"appearance": False}, True), ({"appearance": True}, False)]
)
def test_a_vanilla_model_that_was_not_taught_them_is_refused(taught, refused, tmp_path, get_config):
    config = RunConfig.from_config_dict(get_config("tiny.py", "appearance"))
    data = {name: x for name, x in config.to_dict()["data"].items() if name != "appearance"} | taught
    (tmp_path / jobs.inputs.PROVENANCE).write_text(json.dumps({"config": {"data": data}, "without": []}))

    class Job:
        forget_people = ()

    Job.config = config
    if not refused:
        jobs._check_provenance(Job, "path", tmp_path)
        return
    with pytest.raises(UserError, match="was never taught the questions of data.appearance. Create a model that was"):
        jobs._check_provenance(Job, "path", tmp_path)
    jobs._check_provenance(Job, "base", tmp_path / "none")
