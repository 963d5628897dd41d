"""Suites of questions that are answered by yes or no: POPE and MME."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks.general.suite import SHORT, Suite, general, yes_or_no
from vkd_jax.benchmarks.names import text_key
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.types import EvalSet, UserError

POPE_SPLITS = ("random", "popular", "adversarial")
MME_TASKS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pope(Suite):
    """POPE: whether an object is in the image. Its three samplings of absent objects are one set each.

    Reference: Li et al. (2023), Evaluating object hallucination in large vision-language models (arXiv:2305.10355).
    """

    HUB: ClassVar[str] = "lmms-lab/POPE"
    ROWS: ClassVar[int] = 9000
    TITLE: ClassVar[str] = "POPE"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = tuple(
        general(f"pope_{name}", f"POPE, {name} objects", f"POPE {name}") for name in POPE_SPLITS
    )
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ("image_source",)
    SET_COLUMNS: ClassVar[tuple[str, ...]] = ("category",)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answer")

    def set_of(self, row: Row) -> str:
        """The sampling of the absent objects."""
        category = row.text("category").strip()
        if category not in POPE_SPLITS:
            raise row.error("category", f"is {category!r:.40}, none of {', '.join(POPE_SPLITS)}")
        return f"pope_{category}"

    def question(self, row: Row) -> Mapping[str, Any]:
        """A question that is answered by yes or no."""
        question = f"{row.text('question').strip()}\n{SHORT}"
        return dict(question=question, answer=yes_or_no(row), category=row.text("category").strip())

    def check_groups(self, files: Snapshot) -> None:
        """Checks that each sampling has both answers, and one answer to each question about an image.

        Raises:
            UserError: an answer is always right, or a question has both.
        """
        answers: dict[str, dict[tuple[str, str], str]] = {}
        for row in files.rows(self.CONFIG, [*self.GROUP_COLUMNS, *self.SET_COLUMNS, *self.COLUMNS]):
            key, answer = (self.group(row), text_key(row.text("question"))), yes_or_no(row)
            if answers.setdefault(self.set_of(row), {}).setdefault(key, answer) != answer:
                raise row.error(
                    "answer", f"is {answer!r}, and another row has the same question and image and the other"
                )
        for name, given in answers.items():
            if len(set(given.values())) < 2:
                [answer] = set(given.values())
                where = f"{files.folder.display(self.CONFIG)}, {name}"
                raise UserError(
                    f"POPE: every answer in {where} is {answer!r}, which needs no image. Get the files again."
                )


@dataclasses.dataclass(frozen=True)
class Mme(Suite):
    """MME: two questions about each image, one of which is answered by yes; perception and cognition are one set each.

    Reference: Fu et al. (2023), MME: a comprehensive evaluation benchmark for multimodal large language models
    (arXiv:2306.13394).
    """

    HUB: ClassVar[str] = "lmms-lab/MME"
    ROWS: ClassVar[int] = 2374
    TITLE: ClassVar[str] = "MME"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = tuple(
        general(f"mme_{name}", f"MME, {name}", f"MME {name}") for name in MME_TASKS
    )
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ("category", "question_id")
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answer")

    def set_of(self, row: Row) -> str:
        """Perception or cognition."""
        category = row.text("category").strip()
        for name, categories in MME_TASKS.items():
            if category in categories:
                return f"mme_{name}"
        raise row.error("category", f"is {category!r:.40}, which is no subtask of MME")

    def group(self, row: Row) -> str:
        """The image within its subtask."""
        return f"{row.text('category').strip()}/{row.identifier('question_id')}"

    def question(self, row: Row) -> Mapping[str, Any]:
        """A question that is answered by yes or no; it says so itself."""
        question, category = row.text("question").strip(), row.text("category").strip()
        return dict(question=question, answer=yes_or_no(row), category=category)

    def check_groups(self, files: Snapshot) -> None:
        """Checks that each image has two different questions, one of which is answered by yes.

        Raises:
            UserError: an image has others.
        """
        answers: dict[str, list[tuple[str, str]]] = {}
        for row in files.rows(self.CONFIG, [*self.GROUP_COLUMNS, *self.COLUMNS]):
            answers.setdefault(self.group(row), []).append((yes_or_no(row), text_key(row.text("question"))))
        for group, given in answers.items():
            said, asked = (set(values) for values in zip(*given, strict=True))
            problem = f"has {len(given)} questions" if len(given) != 2 else ""
            if not problem and len(asked) < 2:
                problem = "has one question twice"
            if not problem and len(said) < 2:
                problem = f"has two questions whose answer is {said.pop()!r}"
            if problem:
                raise UserError(
                    f"MME: {group} in {files.folder.display(self.CONFIG)} {problem}, and accuracy+ needs two for each "
                    "image, one of which is answered by yes. Get the files again."
                )
