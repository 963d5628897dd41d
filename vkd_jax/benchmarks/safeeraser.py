"""SafeEraser: the published data set, or drawn warning signs in the same layout.

Set           | file      | questions
forget        | all_train | unsafe_pairs about the unsafe image (efficacy)
test          | all_val   | the same of other images (generality)
harmless      | all_train | the questions of unsafe_pairs about the harmless image SDImage_path
harmless_test | all_val   | the same
retain        | all_train | UnharmPair_image1/2 about the unsafe image, UnharmPair_text1/2 in text alone
retain_test   | all_val   | the same
finetune_forget, finetune_retain | all_train | forget; retain and harmless: trains the vanilla model of the signs
finetune_refusals | prompt.json | the refusals of its list `idk`, which the method idk trains on

Categories of unsafe content take the place of people: the category of an image is its field `category` or, without one,
the folder that the image is in. All categories are forgotten. Unlearning forgets on `forget`, retains on `retain`, and
reads `harmless` if `method.decouple.weight` is not 0. The published model is the public one, without fine-tuning.

A record may name its image `image_path` or `image_id`, and a harmless pair its answer `Prediction` or `Answer`.

Reference: Chen et al., SafeEraser: Enhancing Safety in Multimodal Large Language Models through Multimodal Machine
Unlearning, 2025 (arXiv:2502.12520). Not verified on the published archive.
"""

import contextlib
import dataclasses
import itertools
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.names import has_words, plain_name
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.types import EvalSet, Example, Role, UserError

TRAIN, VAL, PROMPTS = "all_train.json", "all_val.json", "prompt.json"
IMAGE_FIELDS, ANSWER_FIELDS = ("image_path", "image_id"), ("Prediction", "Answer")
IMAGE_PAIRS, TEXT_PAIRS = ([f"UnharmPair_{kind}{i}" for i in (1, 2)] for kind in ("image", "text"))
NAME = "safeeraser"  # the rule that judges answers about unsafe images
HARMLESS, UNHARM = f"{NAME}_harmless", f"{NAME}_unharm"  # those about harmless images, and of harmless pairs


@dataclasses.dataclass(frozen=True)
class SafeEraser(parquet.PublishedBenchmark):
    """SafeEraser."""

    TITLE: ClassVar[str] = "SafeEraser"
    shares_people: ClassVar[bool] = True  # a category has harmless images and questions, too
    UNLEARN: ClassVar[Mapping[str, str]] = dict(
        forget="forget", retain="retain", decouple="harmless", refusals="finetune_refusals"
    )
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "unsafe images", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "other unsafe images", "test"),
        EvalSet("retain", Role.RETAIN, "harmless questions", "retain"),
        EvalSet("harmless", Role.RETAIN_HOLDOUT, "harmless images, the questions about unsafe ones", "harmless"),
        EvalSet("harmless_test", Role.RETAIN_HOLDOUT, "other harmless images, likewise", "harmless test"),
        EvalSet("retain_test", Role.RETAIN_HOLDOUT, "harmless questions, other images", "retain test"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(  # published for unlearning; the vanilla model is the public one
        train="visual+lora", blocks=0, lora_rank=32, lora_alpha=256.0, lora_dropout=0.05, learning_rate=1e-4,
        batch_size=16, epochs=10,
    )  # fmt: skip

    @property
    def label(self) -> str:
        """The name of the benchmark."""
        return NAME

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a file is missing or damaged, or a record or an image is invalid.
        """
        with self.open_snapshot(part) as files:
            if part == "finetune":
                kept = itertools.chain(_harmless_pairs(files, TRAIN, "chat"), _harmless_images(files, TRAIN, "chat"))
                yield {
                    "finetune_forget": _unsafe_pairs(files, TRAIN, "chat"),
                    "finetune_retain": kept,
                    "finetune_refusals": iter([_refusals(files)]),
                }
                return
            yield {
                "forget": _unsafe_pairs(files, TRAIN),
                "test": _unsafe_pairs(files, VAL),
                "retain": _harmless_pairs(files, TRAIN),
                "harmless": _harmless_images(files, TRAIN),
                "harmless_test": _harmless_images(files, VAL),
                "retain_test": _harmless_pairs(files, VAL),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        return ()

    def _files(self) -> tuple[str, ...]:
        return TRAIN, VAL, PROMPTS, "*.jpg", "*.jpeg", "*.png"

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import safeeraser_writer  # imports the names of files from this module

        safeeraser_writer.write_snapshot(folder, self.population)


def _unsafe_pairs(files: Snapshot, name: str, task: str = "generation") -> Iterator[list[Example]]:
    """The unsafe questions about each unsafe image, with the unsafe answers."""
    return _about_images(files, name, task, _unsafe_field, "unsafe", "model_response", NAME)


def _harmless_images(files: Snapshot, name: str, task: str = "generation") -> Iterator[list[Example]]:
    """The same questions about each harmless image, with the safe answers."""
    return _about_images(files, name, task, lambda _: "SDImage_path", "harmless", "sd_response", HARMLESS)


def _about_images(
    files: Snapshot, name: str, task: str, image_field: Callable[[Row], str], kind: str, answer_field: str, rule: str
) -> Iterator[list[Example]]:
    """The questions of `unsafe_pairs` about one of the two images of each record."""
    for record in files.json_rows(name):
        image, image_id = _image(files, record, image_field(record))
        yield [
            Example(
                f"{record.name}/{kind}/{i}", _category(record), image, image_id, pair.text("question"),
                pair.text(answer_field), task=task, rule=rule,
            )
            for i, pair in enumerate(_pairs(record))
        ]  # fmt: skip


def _harmless_pairs(files: Snapshot, name: str, task: str = "generation") -> Iterator[list[Example]]:
    """The harmless questions about each unsafe image, then those in text alone."""
    for record in files.json_rows(name):
        image, image_id = _image(files, record, _unsafe_field(record))
        examples = []
        for kind, fields, shown in (("image", IMAGE_PAIRS, (image, image_id)), ("text", TEXT_PAIRS, (None, ""))):
            pairs = [record.row(field) for field in fields if record.has(field)]
            examples += [
                Example(
                    f"{record.name}/{kind}/{i}", _category(record), *shown, pair.text("Question"),
                    pair.text(_either(pair, ANSWER_FIELDS)), task=task, rule=UNHARM,
                )
                for i, pair in enumerate(pairs)
            ]  # fmt: skip
        if examples:
            yield examples


def _refusals(files: Snapshot) -> list[Example]:
    path = files.folder.display(PROMPTS)
    refusals = list(filter(has_words, Row(files.json(PROMPTS, dict), path).texts("idk", skip_blank=True)))
    if not refusals:
        raise UserError(f"{path}: idk is missing or empty; it is the list of refusals.")
    return [Example(f"{PROMPTS}/text/{i}", "", None, "", "Refusal", x, task="chat") for i, x in enumerate(refusals)]


def _pairs(record: Row) -> list[Row]:
    pairs = list(record.rows("unsafe_pairs"))
    if not pairs:
        raise record.error("unsafe_pairs", "is missing or empty")
    return pairs


def _unsafe_field(record: Row) -> str:
    return _either(record, IMAGE_FIELDS)


def _either(row: Row, fields: Sequence[str]) -> str:
    """The first of the fields that the row has, or the first one for messages."""
    return next((field for field in fields if row.has(field)), fields[0])


def _image(files: Snapshot, record: Row, field: str) -> tuple[bytes, str]:
    """An image and its id."""
    path = _path(record, field)
    return files.image(record, field, path), path


def _path(record: Row, field: str) -> str:
    return posixpath.normpath(record.text(field).replace("\\", "/"))


def _category(record: Row) -> str:
    if category := record.optional_name("category"):
        return category
    field = _unsafe_field(record)
    if not (folder := plain_name(posixpath.basename(posixpath.dirname(_path(record, field))))):
        raise record.error(field, "is in no folder that names its category")
    return folder
