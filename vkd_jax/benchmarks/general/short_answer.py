"""Suites of questions that are answered in a few words: GQA, VQAv2, VizWiz, TextVQA; and MM-Vet, in sentences."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks.general.suite import SHORT, Suite, general
from vkd_jax.benchmarks.names import has_words, plain_name
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.types import EvalSet, Example

MOST_PEOPLE = 10  # whom the published data asked each question; with more, 4 equal answers are a minority
PEOPLE = 4  # the fewest answers of people with which an answer can have a VQA accuracy of 1
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@dataclasses.dataclass(frozen=True)
class Gqa(Suite):
    """GQA: questions about the objects of a scene and their relations, the balanced test-dev split.

    Reference: Hudson and Manning (2019), GQA: a new dataset for real-world visual reasoning (arXiv:1902.09506).
    """

    HUB: ClassVar[str] = "lmms-lab/GQA"
    CONFIG: ClassVar[str] = "testdev_balanced_instructions"
    IMAGES: ClassVar[str] = "testdev_balanced_images"
    MORE_CONFIGS: ClassVar[tuple[str, ...]] = (IMAGES,)
    SPLIT: ClassVar[str] = "testdev"
    ROWS: ClassVar[int] = 12578
    TITLE: ClassVar[str] = "GQA"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (general("gqa", "GQA, balanced test-dev split", "GQA"),)
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ("imageId",)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answer")

    def question(self, row: Row) -> Mapping[str, Any]:
        """A question with one answer."""
        return dict(question=f"{row.text('question')}\n{SHORT}", answer=row.words("answer"))

    def examples(self, files: Snapshot, chosen: Collection[int]) -> Iterator[list[Example]]:
        """The questions of the rows with these numbers, image by image.

        Raises:
            UserError: an image of a question is missing, or an id has two different images.
        """
        pixels: dict[str, bytes] = {}
        asked: dict[str, list[Row]] = {}
        for row in files.rows(self.CONFIG, [*self.GROUP_COLUMNS, *self.COLUMNS], only=chosen):
            asked.setdefault(row.identifier("imageId"), []).append(row)
        numbers = {
            number for number, row in enumerate(files.rows(self.IMAGES, ["id"])) if row.identifier("id") in asked
        }
        for image_row in files.rows(self.IMAGES, ["id", "image"], only=numbers):
            image = image_row.image("image")
            if image is None:
                raise image_row.error("image", "is missing")
            name = image_row.identifier("id")
            if pixels.setdefault(name, image.pixels) != image.pixels:
                raise image_row.error("id", f"is {name!r}, and another row has this id and another image")
            yield [self.example(row, image) for row in asked.pop(name, ())]
        for rows in asked.values():
            name = rows[0].identifier("imageId")
            raise rows[0].error("imageId", f"is {name!r}, which is no id in {files.folder.display(self.IMAGES)}")


class _SeveralAnswers(Suite):
    """A suite whose questions several people have answered."""

    INSTRUCTION: ClassVar[str] = SHORT
    CATEGORY: ClassVar[str] = ""  # column with the category

    def references(self, row: Row) -> list[str]:
        """The answers of the people."""
        return row.texts("answers")

    def has_truth(self, row: Row) -> bool:
        """Whether at least half of the people answered, or nobody did, which `question` refuses."""
        references = self.references(row)
        given = sum(map(bool, map(plain_name, references)))
        return not given or 2 * given >= len(references)

    def question(self, row: Row) -> Mapping[str, Any]:
        """A question; its answer is the most frequent one, the first of several."""
        references = self.references(row)
        given = [reference for reference in references if plain_name(reference)]
        if not given:
            raise row.error("answers", "has no answer, as in a test split whose answers are secret. Use another split")
        if len(references) < PEOPLE:
            raise row.error(
                "answers", f"has {len(references)}, and VQA accuracy compares with at least {PEOPLE} people"
            )
        if len(references) > MOST_PEOPLE:
            raise row.error("answers", f"has {len(references)}, and VQA accuracy is defined for {MOST_PEOPLE} people")
        answer = Counter(given).most_common(1)[0][0]
        return dict(
            question=f"{row.text('question')}\n{self.INSTRUCTION}",
            answer=answer,
            references=tuple(references),
            category=row.optional_text(self.CATEGORY) if self.CATEGORY else "",
        )


@dataclasses.dataclass(frozen=True)
class VQAv2(_SeveralAnswers):
    """VQAv2: questions about photographs that ten people answered, the validation split.

    Reference: Goyal et al. (2017), Making the V in VQA matter (arXiv:1612.00837).
    """

    HUB: ClassVar[str] = "lmms-lab/VQAv2"
    SPLIT: ClassVar[str] = "validation"
    ROWS: ClassVar[int] = 214354
    TITLE: ClassVar[str] = "VQAv2"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (general("vqav2", "VQAv2, validation split", "VQAv2"),)
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ("image_id",)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answers")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("answer_type",)
    CATEGORY: ClassVar[str] = "answer_type"

    def references(self, row: Row) -> list[str]:
        """The answers of the people, each in an object."""
        return [item.optional_text("answer") for item in row.rows("answers")]


@dataclasses.dataclass(frozen=True)
class VizWiz(_SeveralAnswers):
    """VizWiz-VQA: questions that blind people asked about their photographs, many unanswerable; the validation split.

    Reference: Gurari et al. (2018), VizWiz grand challenge: answering visual questions from blind people
    (arXiv:1802.08218).
    """

    HUB: ClassVar[str] = "lmms-lab/VizWiz-VQA"
    SPLIT: ClassVar[str] = "val"
    ROWS: ClassVar[int] = 4319
    TITLE: ClassVar[str] = "VizWiz-VQA"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (general("vizwiz", "VizWiz-VQA, validation split", "VizWiz"),)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answers")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("category",)
    INSTRUCTION: ClassVar[str] = f"{UNANSWERABLE}\n{SHORT}"
    CATEGORY: ClassVar[str] = "category"


@dataclasses.dataclass(frozen=True)
class TextVQA(_SeveralAnswers):
    """TextVQA: questions about text in photographs, without the text that OCR reads; the validation split.

    Reference: Singh et al. (2019), Towards VQA models that can read (arXiv:1904.08920).
    """

    HUB: ClassVar[str] = "lmms-lab/textvqa"
    SPLIT: ClassVar[str] = "validation"
    ROWS: ClassVar[int] = 5000
    TITLE: ClassVar[str] = "TextVQA"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (general("textvqa", "TextVQA, validation split", "TextVQA"),)
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ("image_id",)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answers")


def true_words(truth: str) -> list[list[str]]:
    """The alternatives of an answer of MM-Vet (<OR>), each with its elements (<AND>).

    Elements without a letter or a digit are in almost any text. They are left out, as are alternatives of no others.

    Example:
        >>> true_words("cat <AND> dog <OR> . <OR> fox <AND>")
        [['cat', 'dog'], ['fox']]
    """
    alternatives = ([part.strip() for part in each.split("<AND>") if has_words(part)] for each in truth.split("<OR>"))
    return list(filter(None, alternatives))


@dataclasses.dataclass(frozen=True)
class MMVet(Suite):
    """MM-Vet: open questions that need several abilities at once.

    Its score is given by a language model, which this package does not have; see `metrics.suites.MMVET_MATCH`.

    Reference: Yu et al. (2023), MM-Vet: evaluating large multimodal models for integrated capabilities
    (arXiv:2308.02490).
    """

    HUB: ClassVar[str] = "lmms-lab/MMVet"
    ROWS: ClassVar[int] = 218
    TITLE: ClassVar[str] = "MM-Vet"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        general("mmvet", "MM-Vet, by words instead of a judge", "MM-Vet words"),
    )
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answer")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("capability",)

    def question(self, row: Row) -> Mapping[str, Any]:
        """An open question; `answer` joins elements by <AND> and alternatives by <OR>."""
        answer = row.text("answer")
        if not true_words(answer):
            raise row.error("answer", f"is {answer!r}, which has no words")
        return dict(question=row.text("question"), answer=answer, category=row.optional_text("capability"))
