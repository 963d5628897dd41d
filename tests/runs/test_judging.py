"""The stage that asks a judge: what it writes, and how it resumes."""

import json
import types

import pytest

from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.config.schema import RunConfig
from vkd_jax.evaluation import judge
from vkd_jax.runs import inputs, judging
from vkd_jax.runs.job import judge_folder
from vkd_jax.runs.workdir import Workdir
from vkd_jax.types import UserError

RECORD = dict(task="generation", modality="vqa", set="forget", person="Zoë", question="Who?", answer="a judge")
ANSWERS = {
    name: [RECORD | {"id": str(i), "prediction": f"{name} {i}", "correct": False} for i in range(70)]
    for name in ("vanilla", "unlearned")
}
URL = "http://localhost:1/v1"


@pytest.fixture
def job(tmp_path):
    config = RunConfig(eval=EvalConfig(judge=URL, judge_model="grader"))
    workdir = Workdir(tmp_path, config)
    for name, records in ANSWERS.items():
        workdir.write_lines(f"answers/{name}.jsonl", records)
    return types.SimpleNamespace(config=config, workdir=workdir)


def replies(monkeypatch, most=1000):
    """Lets the endpoint reply 7 to so many prompts; returns the list of the prompts that it is asked."""
    asked = []

    def reply(self, prompt):
        if len(asked) == most:
            raise UserError("the endpoint is down.")
        asked.append(prompt)
        return judge.Reply("7", 5, 1)

    monkeypatch.setattr(judge.Endpoint, "_reply", reply)
    return asked


def read(job, name):
    return [json.loads(line) for line in (job.workdir.path / name).read_text().splitlines()]


def test_every_answer_has_a_score_in_the_answers_of_the_run(job, monkeypatch):
    asked = replies(monkeypatch)
    answers = judging.ask_judge(job, ANSWERS)
    assert len(asked) == 140
    for name, records in answers.items():
        assert [record["judge"] for record in records] == [0.7] * 70 and read(job, f"answers/{name}.jsonl") == records
        assert job.workdir.has(f"answers/{name}.jsonl")
        assert {reply["prompt_tokens"] for reply in read(job, f"judge/{name}.jsonl")} == {5}
    assert judging.ask_judge(job, answers) is answers and len(asked) == 140


def test_an_interrupted_judge_is_not_asked_again_for_what_was_saved(job, monkeypatch):
    replies(monkeypatch, most=100)
    with pytest.raises(UserError, match=f"eval.judge={URL}: the endpoint is down"):
        judging.ask_judge(job, ANSWERS)
    answers = {name: read(job, f"answers/{name}.jsonl") for name in ANSWERS}
    assert all("judge" in record for record in answers["vanilla"]) and answers["unlearned"] == ANSWERS["unlearned"]
    asked = replies(monkeypatch)
    assert judging.ask_judge(job, answers)["unlearned"][0]["judge"] == 0.7 and len(asked) == 70


def test_replies_that_are_not_whole_are_counted_in_the_log(job, monkeypatch, caplog):
    cut = judge.Reply("1", problem="not finished (finish_reason 'length')")
    monkeypatch.setattr(judge.Endpoint, "_reply", lambda self, prompt: cut)
    answers = judging.ask_judge(job, ANSWERS)
    assert not any("judge" in record for records in answers.values() for record in records)
    problem = "replies of the judge are not finished (finish_reason 'length'), and give no score."
    assert [f"judge/{name}.jsonl: 70 {problem}" in caplog.text for name in ANSWERS] == [True, True]


def test_a_damaged_file_of_replies_is_asked_again(job, monkeypatch):
    replies(monkeypatch)
    judging.ask_judge(job, ANSWERS)
    file = job.workdir.path / "judge" / "vanilla.jsonl"
    file.write_text(file.read_text()[:100])
    asked = replies(monkeypatch)
    judging.ask_judge(job, ANSWERS)
    assert len(asked) == 70


def test_nothing_happens_without_a_judge(tmp_path):
    job = types.SimpleNamespace(config=RunConfig(), workdir=Workdir(tmp_path, RunConfig()))
    assert judging.ask_judge(job, ANSWERS) is ANSWERS and not (tmp_path / "judge").exists()
    assert judge_folder(RunConfig().eval) is None


def test_the_inputs_have_the_judge_and_its_prompts(tmp_path):
    (tmp_path / "judge.json").write_text("{}")
    (tmp_path / "model").mkdir()
    models, wordings = {"eval.judge": tmp_path / "model"}, {"judge_prompts": str(tmp_path / "judge.json")}
    (tmp_path / "model" / "model.safetensors").write_text("1")
    before = inputs.describe({}, models, wordings)
    (tmp_path / "judge.json").write_text("{} ")
    (tmp_path / "model" / "model.safetensors").write_text("2")
    assert list(inputs.differences(before, inputs.describe({}, models, wordings))) == [
        "the model of config.eval.judge changed in model.safetensors",
        "the file of config.eval.judge_prompts changed",
    ]
    older = {key: value for key, value in inputs.describe({}, {}).items() if key != "judge_prompts"}
    assert not list(inputs.differences(older, inputs.describe({}, {})))


def test_a_judge_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="--config.eval.judge=nowhere: "):
        judge_folder(EvalConfig(judge="nowhere"))
