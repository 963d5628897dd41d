"""FIUBench: the published data set, or the synthetic people in the same layout.

Set    | people            | questions about
forget | split forgetN     | the image of a person to forget: `question` of the 20 in its qa_list
ape    | split forgetN     | the same, in each wording of `paraphrased_question`
retain | split retain5     | the image of a person to retain
finetune_forget, finetune_retain | forgetN, all other people | the same questions; trains the vanilla model
finetune_train_retain | all people in no forget split | the same; unlearning retains on them, as published

full.json is an array or JSON Lines; its first 400 records are the people. split.json lists their `unique_id`s; its
splits are separate draws, not nested ones. An answer has keywords, a paraphrase and wrong answers; equal keywords and
equal wrong answers count once.

With `rules=upstream`, texts are read and answers judged as by the benchmark's own code: `str.capitalize` is applied to
questions and answers, but not to wrong answers, so all letters except the first one are lower-case, even in names. An
answer is cut after its first period, and one without a period counts as empty. Equal keywords count each time. By
default texts and answers are not changed.

Reference: Ma et al., Benchmarking Vision Language Model Unlearning via Fictitious Facial Identity Dataset, 2024
(arXiv:2411.03554).
"""

import contextlib
import dataclasses
import functools
import itertools
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from absl import logging

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.names import plain_name
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.config.fields import setting
from vkd_jax.types import EvalSet, Example, Role, UserError

FULL, SPLIT = "full.json", "split.json"
FORGET_RATIOS = (1, 5, 10)
RETAIN_RATIOS = (5, 15)
PEOPLE = 400  # of full.json; the benchmark ignores further ones
SPLITS = {"forget1": 4, "forget5": 20, "forget10": 40, "retain5": 20, "retain15": 60}  # people, as published
NAME = "fiubench"


@dataclasses.dataclass(frozen=True)
class FiuBench(parquet.PublishedBenchmark):
    """FIUBench."""

    forget: int = setting(5, "Percent of the people in the forget set.", choices=FORGET_RATIOS)
    retain: int = setting(5, "Percent of the people in the evaluated retain set.", choices=RETAIN_RATIOS)
    rules: str = setting(
        parquet.OURS, "'upstream' reads texts and cuts answers as the benchmark's code does.", choices=parquet.RULES
    )

    TITLE: ClassVar[str] = "FIUBench"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="finetune_forget", retain="finetune_train_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("ape", Role.FORGET_HOLDOUT, "people to forget, paraphrased questions", "paraphrased"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(  # published: projector and all of the language model, without adapters
        train="visual+lora", blocks=0, lora_rank=128, lora_alpha=256.0, lora_dropout=0.05, learning_rate=2e-5,
        batch_size=8, epochs=10,
    )  # fmt: skip

    @property
    def label(self) -> str:
        """The name of the benchmark with the forget ratio."""
        return f"fiubench-forget{self.forget}"

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a file is missing or damaged, a record or an image is invalid, a split names somebody who is not
                in full.json, or the forget set is empty or shares people with a retain set.
        """
        with self.open_snapshot(part) as files:
            splits = _splits(files, {_person(record) for record in _records(files)}, check_sizes=bool(self.source))
            forget, retain = f"forget{self.forget}", f"retain{self.retain}"
            parquet.check_people(self.source, (forget, splits[forget]), (retain, splits[retain]))
            ever_forgotten = set().union(*(splits[name] for name in splits if name.startswith("forget")))
            read = functools.partial(_questions, files, upstream=self.rules == parquet.UPSTREAM)
            if part == "finetune":
                yield {
                    "finetune_forget": read(lambda person: person in splits[forget], task="chat"),
                    "finetune_retain": read(lambda person: person not in splits[forget], task="chat"),
                    "finetune_train_retain": read(lambda person: person not in ever_forgotten, task="chat"),
                }
                return
            yield {
                "forget": read(lambda person: person in splits[forget]),
                "ape": read(lambda person: person in splits[forget], paraphrased=True),
                "retain": read(lambda person: person in splits[retain]),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        return ()

    def _files(self) -> tuple[str, ...]:
        return FULL, SPLIT, "*.jpg", "*.jpeg", "*.png"

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import fiubench_writer  # imports the names of files from this module

        fiubench_writer.write_snapshot(folder, self.population)


def _records(files: Snapshot) -> Iterator[Row]:
    return itertools.islice(files.json_rows(FULL), PEOPLE)


def _person(record: Row) -> str:
    return record.identifier("unique_id")


def _splits(files: Snapshot, everybody: set[str], check_sizes: bool) -> dict[str, set[str]]:
    """The people of each split."""
    path, row = files.folder.display(SPLIT), Row(files.json(SPLIT, dict), files.folder.display(SPLIT))
    splits = {}
    for name, published in SPLITS.items():
        if not row.has(name):
            raise row.error(name, "is missing")
        splits[name] = set(map(plain_name, row.texts(name)))
        parquet.check_known(row, name, splits[name], everybody, f"the first {PEOPLE} people of {FULL}")
        if check_sizes and len(splits[name]) != published:
            logging.warning("%s of %s has %d people; as published it has %d.", name, path, len(splits[name]), published)
    return splits


def _questions(
    files: Snapshot,
    is_member: Callable[[str], bool],
    *,
    upstream: bool,
    task: str = "generation",
    paraphrased: bool = False,
) -> Iterator[list[Example]]:
    """The questions about the selected people, person by person."""
    seen: set[str] = set()
    for record in _records(files):
        if not is_member(person := _person(record)):
            continue
        if person in seen:
            raise UserError(f"{record.location}: unique_id {person!a} is there twice; remove one of the records.")
        seen.add(person)
        image = files.image(record, "image_path", _image_name(record))
        examples = []
        for number, item in enumerate(record.rows("qa_list")):
            wordings = item.text_or_texts("paraphrased_question") if paraphrased else [item.text("question")]
            for wording, question in enumerate(wordings):
                name = f"{record.name}/image/{number}" + (f".{wording}" if paraphrased else "")
                example = Example(
                    name, person, image, f"{person}/0", question, item.words("answer"),
                    task=task,
                    paraphrase="" if paraphrased else _given_text(item, "paraphrased_answer"),
                    perturbed=() if paraphrased else tuple(item.text_or_texts("perturbed_answer")),
                    keywords=item.keywords("keywords"),
                    rule=f"{NAME}:{parquet.UPSTREAM}" if upstream else NAME,
                )  # fmt: skip
                examples.append(_capitalized(example) if upstream else example)
        yield examples


def _given_text(item: Row, field: str) -> str:
    """A text that may be missing, but not blank."""
    return item.text(field) if item.has(field) else ""


def _image_name(record: Row) -> str:
    """The path in the snapshot of an `image_path`, which starts with the folder of the benchmark's repository."""
    path = posixpath.normpath(record.text("image_path").replace("\\", "/"))
    return path.removeprefix("dataset/")


def _capitalized(example: Example) -> Example:
    texts = {name: getattr(example, name).capitalize() for name in ("question", "answer", "paraphrase")}
    return dataclasses.replace(example, **texts)
