"""CoVUBench: the published data set, or the synthetic people in the same layout.

Set    | files           | questions about
forget | data/forgetN-*  | the concepts to forget
test   | data/test-*     | the same concepts, with visual variations
retain | data/retain-*   | all other concepts
finetune_forget, finetune_retain | data/finetune-* | the same concepts; trains the vanilla model

A concept is a copyrighted character, logo or the like, whose name is the `person` of an example. Unlearning forgets on
the set `forget` and retains on `finetune_retain`. A row shows its image if its question_type is multi_modal or
caption. `keywords` is JSON, a list or a mapping whose values are phrases or lists of them.

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
from vkd_jax.config.fields import setting
from vkd_jax.types import EvalSet, Example, Role

FORGET_RATIOS = (5, 10, 15, 20)
WITH_IMAGE = ("multi_modal", "caption")  # types of questions that show the image
NAME = "covubench"
_COLUMNS = ("image", "question", "answer", "name", "question_type")


@dataclasses.dataclass(frozen=True)
class CovuBench(parquet.PublishedBenchmark):
    """CoVUBench."""

    forget: int = setting(5, "Percent of the concepts in the forget set.", choices=FORGET_RATIOS)

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

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a file or column is missing, a file, cell or image is damaged, or the forget set is empty.
        """
        forget = f"data/forget{self.forget}"
        with self.open_snapshot(part) as files:
            forgotten = {row.identifier("name") for row in files.rows(forget, ["name"])}
            parquet.check_people(self.source, (forget, forgotten), ("data/retain", frozenset()))
            if part == "finetune":
                yield {
                    "finetune_forget": _questions(files, "data/finetune", forgotten.__contains__, "chat"),
                    "finetune_retain": _questions(files, "data/finetune", lambda name: name not in forgotten, "chat"),
                }
                return
            yield {
                "forget": _questions(files, forget, forgotten.__contains__),
                "test": _questions(files, "data/test", forgotten.__contains__),
                "retain": _questions(files, "data/retain", lambda name: name not in forgotten),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        forget = f"data/forget{self.forget}"
        return (forget, "data/finetune") if part == "finetune" else (forget, "data/test", "data/retain")

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import covubench_writer  # imports the types of questions from this module

        covubench_writer.write_snapshot(folder, configs, self.population)


def _questions(
    files: Snapshot, config: str, is_member: Callable[[str], bool], task: str = "generation"
) -> Iterator[list[Example]]:
    """The questions of a config about the selected concepts."""
    for row in files.rows(config, list(_COLUMNS), optional=["keywords"]):
        name = row.identifier("name")
        if not is_member(name):
            continue
        image = row.image("image") if row.text("question_type").strip() in WITH_IMAGE else None
        if image is None and row.text("question_type").strip() in WITH_IMAGE:
            raise row.error("image", "is missing, and the question is about one")
        image_id = f"{name}/{hashlib.sha256(image).hexdigest()[:16]}" if image else ""
        example = Example(
            f"{row.name}/{'image' if image else 'text'}/0", name, image, image_id, row.text("question"),
            row.text("answer"), task=task, keywords=tuple(row.phrases("keywords")), rule=NAME,
        )  # fmt: skip
        yield [example]
