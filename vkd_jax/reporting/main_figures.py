"""The accuracies that stand for a run: each set by its main kind of question, with and without an image."""

import dataclasses

from vkd_jax.reporting.names import MODALITIES, MODELS
from vkd_jax.results import RunResults, Summary, main_kind


@dataclasses.dataclass(frozen=True)
class Row:
    """The accuracies on one set: title of the row, number of questions, and one summary for each model."""

    title: str
    n: int
    summaries: tuple[Summary | None, ...]


def rows(results: RunResults) -> tuple[list[str], list[Row]]:
    """Names of the evaluated models, in the order of the report, and the rows."""
    models = [name for name in MODELS if name in results.models]
    made = []
    for eval_set in results.sets:
        for modality, words in MODALITIES.items():
            kind = main_kind(results.models[models[0]].get(eval_set.name, {}), modality)
            summaries = tuple(results.summary(name, eval_set.name, kind or "") for name in models)
            if known := [summary for summary in summaries if summary]:
                made.append(Row(f"{eval_set.title}, {words}", known[0].n, summaries))
    return models, made
