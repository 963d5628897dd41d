"""PPU-Bench: the published data set, or the synthetic people in the same layout.

Set    | configs                                  | questions about
forget | ppu_eval_{generation,cloze,classification} | the facts to forget, with the first image and in text
test   | cross_image_SCENARIO                     | the same facts with the second, third and fourth image
random_prefix, jailbreak_style_prompt, paraphrase | configs of these names | the same facts in adversarial wordings
retain | ppu_eval_*                               | the facts to retain
finetune_forget, finetune_retain | train_pair_MODEL, train_pair_MODEL_qa | the same facts, for unlearning

The people are real, so that the vanilla model is the published one, and the training answers are those that MODEL
gave. What is forgotten depends on the scenario, whose split file is in the benchmark's repository:

    complete    complete_split.json: {"forget5": [subject_id, ...], ...}; everything about these people
    selective   selective_split.json: [{"id": sample_id}, ...]; the sensitive facts of everybody
    persona     persona_split.json: {"delete_ids": [...], "keep_ids": [...]} of sample_ids; other facts for each person

A fact (sample_id) is asked with an image and in text: the two are a pair, of which AccF, AccR, RLF and RLR are
computed.

Reference: the repository and the data set closerG/ppu-bench (arXiv:2605.08800).
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.mllmu import cloze_prompt
from vkd_jax.benchmarks.names import plain_name
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.config.fields import setting
from vkd_jax.messages import listed
from vkd_jax.runtime import json_files
from vkd_jax.runtime.storage import SourceFolder
from vkd_jax.types import EvalSet, Example, Role, UserError

FORGET_RATIOS = (5, 10, 15, 30)
SCENARIOS = ("complete", "selective", "persona")
ANSWERS = ("qwen3", "gemma3")
TASKS = ("generation", "cloze", "classification")
CROSS_IMAGES = ("image_002", "image_003", "image_004")
ADVERSARIAL = ("random_prefix", "jailbreak_style_prompt", "paraphrase")
MODALITIES = {"text": False, "qa": False, "text_image": True, "vqa": True}  # whether the image is shown
_COLUMNS = ("sample_id", "subject_id", "modality", "question", "answer_text")
_OPTIONS = {letter: f"option_{letter.lower()}" for letter in "ABCD"}


@dataclasses.dataclass(frozen=True)
class Ppu(parquet.PublishedBenchmark):
    """PPU-Bench."""

    scenario: str = setting(
        "complete",
        "What is forgotten: 'complete' is everything about some people, 'selective' the sensitive facts of everybody, "
        "'persona' some facts of each person.",
        choices=SCENARIOS,
    )
    forget: int = setting(
        5, "Percent of the people in the forget set of the scenario 'complete'.", choices=FORGET_RATIOS
    )
    answers: str = setting("qwen3", "The model whose answers unlearning trains on.", choices=ANSWERS)
    adversarial: bool = setting(False, "Whether the adversarial wordings are asked, too; for forget=30 if 'complete'.")
    splits: str = setting("", "Folder of the split files, data/split of the benchmark's repository; '' is the source.")

    TITLE: ClassVar[str] = "PPU-Bench"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="finetune_forget", retain="finetune_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "facts to forget", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "facts to forget, other images", "test"),
        *(
            EvalSet(name, Role.FORGET_HOLDOUT, f"facts to forget, {words}", words)
            for name, words in zip(ADVERSARIAL, ("random prefix", "jailbreak prompt", "paraphrased"), strict=True)
        ),
        EvalSet("retain", Role.RETAIN, "facts to retain", "retain"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(  # nothing is fine-tuned as published; rate and rows of its unlearning
        lora_rank=16, lora_alpha=16.0, lora_dropout=0.05, learning_rate=2e-5, batch_size=2, epochs=2
    )

    @property
    def label(self) -> str:
        """The name of the benchmark with the scenario."""
        return f"ppu-{self._scenario('')}"

    @property
    def variant(self) -> str:
        """The scenario, for the title of the report."""
        return f", scenario {self._scenario(' ')}" + (" %" if self.scenario == "complete" else "")

    @property
    def shares_people(self) -> bool:
        """Whether some facts about a person are forgotten and others are retained."""
        return self.scenario != "complete"

    def check(self) -> None:
        """Also checks that the adversarial wordings were published for the forget set.

        Raises:
            UserError: they were not.
        """
        super().check()
        if self.adversarial and self.scenario == "complete" and self.forget != 30:
            raise UserError(
                f"data.adversarial: these wordings are published for forget=30, not {self.forget}. Give False, or "
                "forget=30."
            )

    def state(self, part: str) -> Any:
        """Name, size and modification time of the files of the source, and of the split file."""
        splits = SourceFolder(self.splits, links=self.symlinks).state([self._split_name()]) if self.splits else []
        return [super().state(part), splits]

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a config, shard, column or the split file is missing, a file or image is damaged, the forget set
                is empty, or a fact is to be both forgotten and retained, or is not in the data.
        """
        with self.open_snapshot(part) as files:
            asked, pairs = [f"ppu_eval_{task}/test" for task in TASKS], self._configs("finetune")[:2]
            forgets, retains = self._members(files, asked if part == "evaluation" else pairs[:1])
            self._check_training(files, asked, pairs)
            if part == "finetune":
                subjects = _subjects(files, pairs[0])
                yield {
                    "finetune_forget": _training(files, pairs, forgets, subjects),
                    "finetune_retain": _training(files, pairs, retains, subjects),
                }
                return
            sets = {"forget": _evaluation(files, asked, forgets), "retain": _evaluation(files, asked, retains)}
            if cross := self._cross_image():
                sets["test"] = _evaluation(files, [cross], forgets, CROSS_IMAGES)
            for name, config in self._adversarial().items():
                sets[name] = _evaluation(files, [config], forgets)
            yield {eval_set.name: sets[eval_set.name] for eval_set in self.EVAL_SETS if eval_set.name in sets}

    def _scenario(self, separator: str) -> str:
        return f"{self.scenario}{separator}{self.forget}" if self.scenario == "complete" else self.scenario

    def _cross_image(self) -> str:
        """The config of other images, "" if none is published."""
        if self.scenario != "complete":
            return f"cross_image_{self.scenario}/test"
        return f"cross_image_complete_r{self.forget}/test" if self.forget != 10 else ""

    def _adversarial(self) -> dict[str, str]:
        """The configs of adversarial wordings, by set."""
        return {name: f"{name}_{self._scenario('')}/test" for name in ADVERSARIAL} if self.adversarial else {}

    def _configs(self, part: str) -> tuple[str, ...]:
        asked = tuple(f"ppu_eval_{task}/test" for task in TASKS)
        if part == "finetune":  # training is compared with what is asked
            return f"train_pair_{self.answers}", f"train_pair_{self.answers}_qa", *(asked if self.source else ())
        cross = [self._cross_image()] if self._cross_image() else []
        return (*asked, *cross, *self._adversarial().values())

    def _files(self) -> tuple[str, ...]:
        return (f"*{self._split_name()}",)

    def _split_name(self) -> str:
        return f"{self.scenario}_split.json"

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import ppu_writer  # imports the names of columns from this module

        ppu_writer.write_snapshot(folder, configs, self.population)

    def _members(
        self, files: Snapshot, configs: Sequence[str]
    ) -> tuple[Callable[[str, str], bool], Callable[[str, str], bool]]:
        """Whether a fact is to be forgotten, and whether it is to be retained, by subject_id and sample_id.

        The configs are those with all facts of a part. Training has answers of another model, which may lack some.
        """
        split = self._split(files)
        complete = self.scenario == "complete"
        field = {"complete": f"forget{self.forget}", "selective": "samples", "persona": "delete_ids"}[self.scenario]
        chosen = set(_sample_ids(split, field))

        def forgets(subject: str, sample: str) -> bool:
            return (subject if complete else sample) in chosen

        if not chosen:
            raise UserError(f"The forget set is empty: {split.location} names nothing for it.")
        column = "subject_id" if complete else "sample_id"
        known = {row.identifier(column) for config in configs for row in files.rows(config, [column])}
        lacking = chosen if configs[0].startswith("train_") else set()
        parquet.check_known(split, field, chosen, known | lacking, f"the {column} of {listed(configs)}")
        if self.scenario != "persona":
            return forgets, lambda subject, sample: not forgets(subject, sample)
        kept = set(_sample_ids(split, "keep_ids"))
        if both := sorted(chosen & kept):
            raise UserError(
                f"{split.location}: {len(both)} facts are in both delete_ids and keep_ids: {listed(both)}; correct it."
            )
        parquet.check_known(split, "keep_ids", kept, known | (lacking and kept), f"the {column} of {listed(configs)}")
        return forgets, lambda subject, sample: sample in kept

    def _check_training(self, files: Snapshot, asked: Sequence[str], pairs: Sequence[str]) -> None:
        """Checks that training is about people or facts that are asked about, if the snapshot has both.

        Raises:
            UserError: it is not; a misspelled fact to forget would be retained.
        """
        if not {*asked, *pairs} <= set(files.configs):
            return
        column = "subject_id" if self.scenario == "complete" else "sample_id"
        known = {row.identifier(column) for config in asked for row in files.rows(config, [column])}
        for row in itertools.chain.from_iterable(files.rows(config, [], optional=[column]) for config in pairs):
            if row.has(column):
                parquet.check_member(row, column, row.identifier(column), known, listed(asked))

    def _split(self, files: Snapshot) -> Row:
        """The split file; the list of the scenario `selective` becomes the field `samples`."""
        name = self._split_name()
        folder = SourceFolder(self.splits, links=self.symlinks) if self.splits else files.folder
        places = [name] if self.splits else [name, f"split/{name}", f"data/split/{name}"]
        present = [place for place in places if self.splits or files.has_file(place)]
        if not present:
            raise UserError(
                f"There is no {name} in {files.folder.display()}; pass data/split of the benchmark's repository as "
                "--config.data.splits=DIR."
            )
        location = folder.display(present[0])
        value = json_files.parse_json(folder.read(present[0], json_files.MOST_BYTES), location)
        expected = list if self.scenario == "selective" else dict
        if not isinstance(value, expected):
            problem = f"it is {json_files.describe(value)}, not {'a list' if expected is list else 'an object'}"
            raise UserError(f"{location}: {problem}; get the file of the scenario {self.scenario}.")
        return Row({"samples": value} if expected is list else value, location, lenient=True)


def _sample_ids(split: Row, field: str) -> Iterator[str]:
    """The ids of a list, whose entries are texts or objects with `id` or `sample_id`."""
    if not split.has(field):
        raise split.error(field, "is missing")
    for entry in split.texts_or_rows(field):
        yield (
            plain_name(entry) if isinstance(entry, str) else entry.identifier("id" if entry.has("id") else "sample_id")
        )


def _subjects(files: Snapshot, config: str) -> dict[str, str]:
    """The subject_id of each sample_id."""
    rows = files.rows(config, ["sample_id", "subject_id"])
    return {row.identifier("sample_id"): row.identifier("subject_id") for row in rows}


def _evaluation(
    files: Snapshot, configs: Sequence[str], is_member: Callable[[str, str], bool], images: Sequence[str] = ("image",)
) -> Iterator[list[Example]]:
    """The questions of some configs about the selected facts, one for each image of a row that shows one."""
    for config in configs:
        optional = ["answer_label", "task_type", *_OPTIONS.values()]
        usual = config.removeprefix("ppu_eval_").partition("/")[0] if config.startswith("ppu_eval_") else "generation"
        for row in files.rows(config, list(_COLUMNS), either=images, optional=optional):
            subject, sample = row.identifier("subject_id"), row.identifier("sample_id")
            if not is_member(subject, sample):
                continue
            task = row.optional_text("task_type") or usual
            if task not in TASKS:
                raise row.error("task_type", f"is {task!a}, not one of {listed(TASKS)}")
            question, answer, options = _parsed(row, task)
            example = Example(f"{row.name}/text/0", subject, None, "", question, answer, options, task, pair=sample)
            if not _shows(row):
                yield [example]
                continue
            shown = {name: image for name in images if (image := row.image(name)) is not None}
            if not shown:
                raise row.error(images[0], "is missing, and the modality has an image")
            yield [
                dataclasses.replace(
                    example, id=f"{row.name}/image/{number}", image=image, image_id=_image_id(subject, image)
                )
                for number, image in enumerate(shown.values())
            ]


def _training(
    files: Snapshot, configs: Sequence[str], is_member: Callable[[str, str], bool], subjects: Mapping[str, str]
) -> Iterator[list[Example]]:
    """The questions of a training config with an image, and of one without, with the answers that a model gave."""
    for config in configs:
        text = config.endswith("_qa")
        optional = ["subject_id"] if text else ["subject_id", "image"]
        for row in files.rows(config, ["sample_id", "question", "generated_answer"], optional=optional):
            sample = row.identifier("sample_id")
            subject = row.identifier("subject_id") if row.has("subject_id") else subjects.get(sample)
            if subject is None:
                raise row.error("subject_id", "is missing, and no row with an image has this sample_id")
            if not is_member(subject, sample):
                continue
            image = None if text else row.image("image")
            if image is None and not text:
                raise row.error("image", "is missing")
            name, image_id = f"{row.name}/{'text' if text else 'image'}/0", image and _image_id(subject, image)
            question, answer = row.text("question"), row.text("generated_answer")
            yield [Example(name, subject, image, image_id or "", question, answer, task="chat", pair=sample)]


def _shows(row: Row) -> bool:
    modality = row.text("modality").strip().lower()
    if modality not in MODALITIES:
        raise row.error("modality", f"is {modality!a}, not one of {listed(MODALITIES)}")
    return MODALITIES[modality]


def _parsed(row: Row, task: str) -> tuple[str, str, tuple[str, ...]]:
    """Question, answer and options of a row."""
    question = row.text("question")
    answer = row.text("answer_text") if task == "classification" else row.words("answer_text")
    if task != "classification":
        return (cloze_prompt(question) if task == "cloze" else question), answer, ()
    options = {letter: row.text(column) for letter, column in _OPTIONS.items() if row.has(column)}
    letter = row.text("answer_label").strip()
    return question, row.option("answer_label", options, letter, answer), tuple(options.values())


def _image_id(subject: str, image: bytes) -> str:
    """Names an image, which many rows have, by its content."""
    return f"{subject}/{hashlib.sha256(image).hexdigest()[:16]}"
