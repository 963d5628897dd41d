"""Summaries of the answers: accuracy and mean metrics for each set and kind of question."""

from collections.abc import Iterable, Mapping, Sequence

from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.results import Summary
from vkd_jax.types import EvalSet, Role


def by_kind(records: Iterable[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Groups records by set and kind of question, in their order.

    The kind is "vqa" or "qa" for questions with options, and "cloze_vqa", "generation_qa", ... for others. If questions
    with options were asked under several protocols, kinds of all but the first have their name: "vqa_letter".
    """
    records = list(records)
    first = first_protocol(records)
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for record in records:
        kind = record["modality"]
        if record["task"] != "classification":
            kind = f"{record['task']}_{kind}"
        elif record.get("protocol") != first:
            kind = f"{kind}_{record['protocol']}"
        groups.setdefault((record["set"], kind), []).append(record)
    return groups


def first_protocol(records: Iterable[Mapping]) -> str | None:
    """The first protocol, whose kinds have no suffix; None without questions with options."""
    return next((r.get("protocol") for r in records if r["task"] == "classification"), None)


def summarize(items: Iterable[Mapping], role: Role | None = None) -> Summary:
    """Computes the accuracy, and the mean of every registered metric that applies.

    Args:
        items: records of the answers.
        role: role of the set; None if it is unknown.

    Raises:
        ValueError: there are no items.
    """
    items = list(items)
    if not items:
        raise ValueError("no items to summarize: a set without questions has no accuracy")
    people = [intervals.cluster_of(item) for item in items]
    share = intervals.proportion([bool(item["correct"]) for item in items], people)
    figures = {}
    for name in metrics.METRICS:
        metric = metrics.get(name)
        if name == "accuracy" or metric.item is None or (role and metric.roles and role not in metric.roles):
            continue
        scored = [
            (value, person)
            for item, person in zip(items, people, strict=True)
            if (value := metric.value(item)) is not None
        ]
        if scored:
            figures[name] = metric.aggregate(*map(list, zip(*scored, strict=True)))
    correct = sum(bool(item["correct"]) for item in items)
    return Summary(share.mean, correct, len(items), share.low, share.high, share.people, figures)


def summaries(records: Sequence[Mapping], sets: Sequence[EvalSet] = ()) -> dict[str, dict[str, Summary]]:
    """Summarizes all answers of a model: {set: {kind: summary}}; see `by_kind`.

    Args:
        records: answers of the model.
        sets: the evaluation sets. Metrics of other roles than a set has are left out of its summaries; those of all
            sets that are not given are kept.
    """
    roles = {eval_set.name: eval_set.role for eval_set in sets}
    if any(eval_set.role_of("qa").forgets for eval_set in sets):
        records = with_aligned(records)
    results: dict[str, dict[str, Summary]] = {}
    for (name, kind), items in by_kind(with_partners(records)).items():
        results.setdefault(name, {})[kind] = summarize(items, roles.get(name))
    return results


def with_partners(records: Iterable[Mapping]) -> list[Mapping]:
    """The records, in which an answer about an image has that to the same fact in text alone as its "partner".

    Two answers are partners if set, task, protocol and pair agree and each is the only one of its modality.
    """
    records = list(records)
    groups: dict[tuple, dict[str, list[Mapping]]] = {}
    for record in records:
        if record.get("pair"):
            key = record["set"], record["task"], record.get("protocol"), record["pair"]
            groups.setdefault(key, {}).setdefault(record["modality"], []).append(record)
    partners = {
        id(group["vqa"][0]): group["qa"][0]
        for group in groups.values()
        if [len(group.get(modality, ())) for modality in ("vqa", "qa")] == [1, 1]
    }
    return [r if id(r) not in partners else {**r, "partner": partners[id(r)]} for r in records]


def with_aligned(records: Iterable[Mapping]) -> list[Mapping]:
    """The records, in which an answer about an image lists whether those to the same fact in text alone are correct.

    The list is "aligned". A fact is a person, a task and an answer, for questions without a published pair.
    """
    records = list(records)
    texts: dict[tuple, list[bool]] = {}
    for record in records:
        if record["modality"] == "qa" and (fact := _fact(record)):
            texts.setdefault(fact, []).append(bool(record["correct"]))
    return [
        {**record, "aligned": texts[fact]}
        if record["modality"] == "vqa" and (fact := _fact(record)) in texts
        else record
        for record in records
    ]


def _fact(record: Mapping) -> tuple | None:
    """What an answer is about; None if the data names no person or publishes pairs."""
    if record.get("pair") or not record["person"]:
        return None
    answer = record["answer"].strip().casefold()
    return record["set"], record["task"], record.get("protocol"), record["person"], answer
