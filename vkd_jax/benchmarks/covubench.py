"""CoVUBench: the published data set, or the synthetic people in the same layout.

Set    | files           | questions about
forget | data/forgetN-*  | the concepts to forget
test   | data/test-*     | the same concepts, with visual variations
retain | data/retain-*   | all other concepts
finetune_forget, finetune_retain | data/finetune-* | the same concepts; trains the vanilla model

A concept is a copyrighted character, logo or the like, whose name is the `person` of an example. Unlearning forgets on
the set `forget` and retains on `finetune_retain`. A row shows its image if its question_type is multi_modal or
caption, and is asked in text alone if `text_types` names it; a row of another type is refused. `keywords` is JSON, a
list or a mapping whose values are phrases or lists of them.

Reference: Kwon et al., Erase Persona, Forget Lore: Benchmarking Multimodal Copyright Unlearning in Large Vision
Language Models, 2026 (arXiv:2605.03547).
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.config.fields import setting
from vkd_jax.messages import listed
from vkd_jax.types import EvalSet, Example, Role

FORGET_RATIOS = (5, 10, 15, 20)
WITH_IMAGE = ("multi_modal", "caption")  # types of questions that show the image
NAME = "covubench"
_COLUMNS = ("image", "question", "answer", "name", "question_type")


@dataclasses.dataclass(frozen=True)
class CovuBench(parquet.PublishedBenchmark):
    """CoVUBench."""

    forget: int = setting(5, "Percent of the concepts in the forget set.", choices=FORGET_RATIOS)
    text_types: tuple[str, ...] = setting(("text",), "Values of `question_type` that are asked without an image.")

    TITLE: ClassVar[str] = "CoVUBench"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="forget", retain="finetune_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "concepts to forget", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "concepts to forget, visual variations", "test"),
        EvalSet("retain", Role.RETAIN, "concepts to retain", "retain"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(  # of Open-MMUnlearning; the dropout is ours
        lora_rank=64, lora_alpha=128.0, lora_dropout=0.05, learning_rate=5e-4, batch_size=4, epochs=7
    )

    @property
    def label(self) -> str:
        """The name of the benchmark with the forget ratio."""
        return f"covubench-forget{self.forget}"

    def validate(self) -> None:
        """Checks each field, and that no type of questions both shows its image and is asked without one.

        Raises:
            FieldError: one of these is not the case.
        """
        super().validate()
        if both := sorted(set(self.text_types) & set(WITH_IMAGE)):
            raise self.error("text_types", f"{both[0]!r} shows the image; leave it out.")

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a file or column is missing, a file, cell or image is damaged, the forget set is empty, or a
                concept to forget may be in another file under another spelling, or a row of the tests or for training
                is about one that no other file has.
        """
        forget = f"data/forget{self.forget}"
        with self.open_snapshot(part) as files:
            forgotten, *others = ({row.identifier("name") for row in files.rows(c, ["name"])} for c in files.configs)
            for config, names in zip(files.configs[1:], others, strict=True):
                parquet.check_people(self.source, (forget, forgotten), (config, names - forgotten))
            if self.source:
                _check_concepts(files, part, dict(zip(files.configs, (forgotten, *others), strict=True)))
            if part == "finetune":
                yield {
                    name: self._questions(files, "data/finetune", is_member, "chat")
                    for name, is_member in (
                        ("finetune_forget", forgotten.__contains__),
                        ("finetune_retain", lambda name: name not in forgotten),
                    )
                }
                return
            yield {
                "forget": self._questions(files, forget, forgotten.__contains__),
                "test": self._questions(files, "data/test", forgotten.__contains__),
                "retain": self._questions(files, "data/retain", lambda name: name not in forgotten),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        forget = f"data/forget{self.forget}"
        if self.source:  # each file is compared with the others
            return forget, "data/test", "data/retain", "data/finetune"
        return (forget, "data/finetune") if part == "finetune" else (forget, "data/test", "data/retain")

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import covubench_writer  # imports the types of questions from this module

        covubench_writer.write_snapshot(folder, configs, self.population)

    def _questions(
        self, files: Snapshot, config: str, is_member: Callable[[str], bool], task: str = "generation"
    ) -> Iterator[list[Example]]:
        """The questions of a config about the selected concepts."""
        for row in files.rows(config, list(_COLUMNS), optional=["keywords"]):
            name = row.identifier("name")
            if not is_member(name):
                continue
            shows = self._shows(row)
            image = row.image("image") if shows else None
            if shows and image is None:
                raise row.error("image", "is missing, and the question is about one")
            image_id = f"{name}/{hashlib.sha256(image).hexdigest()[:16]}" if image else ""
            example = Example(
                f"{row.name}/{'image' if image else 'text'}/0", name, image, image_id, row.text("question"),
                row.words("answer"), task=task, keywords=row.keywords("keywords"), rule=NAME,
            )  # fmt: skip
            yield [example]

    def _shows(self, row: Row) -> bool:
        """Whether a row shows its image."""
        kind = row.text("question_type").strip()
        if kind not in (*WITH_IMAGE, *self.text_types):
            known = f"{', '.join(WITH_IMAGE)} (with the image) or {listed(self.text_types)} (in text alone"
            raise row.error("question_type", f"is {kind!a}, not {known}; further ones: --config.data.text_types)")
        return kind in WITH_IMAGE


def _check_concepts(files: Snapshot, part: str, names: Mapping[str, set[str]]) -> None:
    """Checks that the tests, or the rows for training, are about concepts that another file has, too."""
    checked = "data/finetune" if part == "finetune" else "data/test"
    others = {config: found for config, found in names.items() if config != checked}
    known, place = set().union(*others.values()), listed(others)
    for row in files.rows(checked, ["name"]):
        parquet.check_member(row, "name", row.identifier("name"), known, place)
