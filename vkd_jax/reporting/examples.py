"""The examples of the reports: portraits with a question and the answers before and after unlearning."""

from collections.abc import Mapping, Sequence

from vkd_jax.evaluation.metrics.correctness import LETTERS, counted_option
from vkd_jax.reporting import plots
from vkd_jax.reporting.finished_run import Run
from vkd_jax.types import Role

CARDS = 6  # portraits in a row of the sheet


def cards(run: Run, images: Mapping[str, bytes]) -> dict[str, list[plots.Card]]:
    """The portraits of the sheet under their headings: one question for each of the first people of two sets."""
    unlearned = {(item["set"], item["id"], item["protocol"]): item for item in run.answers["unlearned"]}
    headings = {
        Role.FORGET: "Forget set: after unlearning, the answers should be wrong, or correct by chance",
        Role.RETAIN: "Retain set: after unlearning, the answers should still be correct",
    }
    sheet = {}
    for role, heading in headings.items():
        eval_set = run.set_of(role)
        sheet[heading] = []
        for number, item in enumerate(_examples(run.answers["vanilla"], eval_set.name) if eval_set else ()):
            other = unlearned[item["set"], item["id"], item["protocol"]]
            sheet[heading].append(
                plots.Card(
                    image=images.get(item["image_id"]),
                    title=f"person {item['person']}" if item["person"] else f"{role} {number + 1}",
                    question=item["question"],
                    truth=item["answer"],
                    vanilla=(answer_text(item), bool(item["correct"])),
                    unlearned=(answer_text(other), bool(other["correct"])),
                )
            )
    return sheet


def _examples(records: Sequence[Mapping], set_name: str) -> list[Mapping]:
    """One question for each of the first people of a set: the first of the first person, the second of the next."""
    records = [record for record in records if (record["set"], record["modality"]) == (set_name, "vqa")]
    # Multiple choice under the first protocol, or any question without one.
    records = [record for record in records if record["task"] == "classification"] or records
    people: dict[str, list[Mapping]] = {}
    for record in records:
        if record["protocol"] == records[0]["protocol"]:
            people.setdefault(record["person"] or record["image_id"], []).append(record)
    first = [people[name] for name in sorted(people)[:CARDS]]
    return [questions[number % len(questions)] for number, questions in enumerate(first)]


def answer_text(record: Mapping) -> str:
    """The answer of a model; a letter is followed by its option.

    Example:
        >>> answer_text({"prediction": "B", "options": ["baker", "pilot"]})
        'B, pilot'
    """
    if letter := counted_option(record):
        return f"{letter}, {record['options'][LETTERS.index(letter)]}"
    return record["prediction"] or "(nothing)"
