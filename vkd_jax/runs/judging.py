"""The stage that asks a judge to grade the open answers of all models; see `vkd_jax.evaluation.judge`."""

import collections
import functools

from absl import logging

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.evaluation import judge
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics.judge import is_graded
from vkd_jax.runs.job import Job, judge_folder, load_options
from vkd_jax.runtime import multihost

Answers = dict[str, list[dict]]  # the records of each model


def ask_judge(job: Job, answers: Answers) -> Answers:
    """Returns the records with the judge's scores: answers/NAME.jsonl. judge/NAME.jsonl has each reply, with its cost.

    Every model is judged after all have answered, when none is in memory.
    """
    options, workdir = job.config.eval, job.workdir
    waiting = [name for name, records in answers.items() if not all(map(judge.is_judged, records))]
    if not options.judge or not waiting:
        return answers
    rules, grader, answers = judge.read_rules(options.judge_prompts), _grader(job), dict(answers)
    for name in waiting:
        path = f"judge/{name}.jsonl"
        with workdir.stage(f"judge {name}"):
            known = workdir.read_lines(path) if workdir.has(path) else []
            save = functools.partial(workdir.write_lines, path)
            answers[name] = judge.judged(grader, rules, answers[name], known, save)
            workdir.write_lines(f"answers/{name}.jsonl", answers[name])
        replies = [record for record in answers[name] if "judge_reply" in record]
        saved = workdir.read_lines(path)
        tokens = [sum(reply[key] for reply in saved) for key in ("prompt_tokens", "reply_tokens")]
        logging.info(
            "%s: the judge graded %d of %d open answers; %d tokens of prompts and %d of replies",
            *(name, sum(map(is_graded, replies)), len(replies), *tokens),
        )
        for problem, count in collections.Counter(reply.get("problem") for reply in saved).items():
            if problem:
                logging.warning("%s: %d replies of the judge are %s, and give no score.", path, count, problem)
    return answers


class _OnProcess0:
    """A judge that process 0 asks for all processes."""

    def __init__(self, grader: judge.Judge):
        self._grader = grader

    def replies(self, prompts: list[str]) -> list[judge.Reply]:
        """The replies, in every process."""
        return multihost.run_on_process_0(lambda: self._grader.replies(prompts))


def _grader(job: Job) -> judge.Judge:
    """The judge that the config gives."""
    options = job.config.eval
    if options.judge_at_endpoint:
        return _OnProcess0(judge.Endpoint(options.judge, options.judge_model))
    with job.workdir.stage("load the judge"):
        folder = judge_folder(options)
        model = ModelBundle.load(folder, mesh=job.mesh, **load_options(job.config.model))
        job.workdir.check_source(folder)
    return judge.LoadedJudge(Answerer(model, batch_size=options.batch_size))
