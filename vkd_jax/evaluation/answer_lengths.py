"""True answers that a model cannot write in full, because `eval.max_new_tokens` ends its own before."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from vkd_jax.messages import listed
from vkd_jax.types import Example

WRITTEN = ("generation", "cloze")  # tasks whose answer has the true words; suites have rules of their own


def warn_of_long_answers(questions: Mapping[str, Sequence[Example]], max_new_tokens: int, tokenizer: Any) -> None:
    """Warns of open questions whose true answer has more tokens than a model may write.

    Args:
        questions: the questions of each set.
        max_new_tokens: the largest number of tokens of a written answer.
        tokenizer: the tokenizer of the model.
    """
    written = {name: [e.answer for e in examples if e.task in WRITTEN] for name, examples in questions.items()}
    answers = {answer for of_set in written.values() for answer in of_set}
    counts = _token_counts((x for x in answers if len(x.encode(errors="replace")) > max_new_tokens), tokenizer)
    too_long = {answer: count for answer, count in counts.items() if count > max_new_tokens}
    if not too_long:
        return
    found = {name: sum(answer in too_long for answer in of_set) for name, of_set in written.items()}
    longest = max(sorted(too_long), key=too_long.__getitem__)
    hopeless = [name for name, of_set in written.items() if of_set and found[name] == len(of_set)]
    problem = f" All those of the set {listed(hopeless)} do: their accuracy can only be 0." if hopeless else ""
    logging.warning(
        "%d of %d true answers of open questions have more tokens than config.eval.max_new_tokens=%d, so that no model "
        "can write them in full; the longest has %d: %.60r.%s Give a larger number of tokens.",
        *(sum(found.values()), sum(map(len, written.values())), max_new_tokens, too_long[longest], longest, problem),
    )


def _token_counts(texts: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """The number of tokens of each text at the beginning of a line or after a space, whichever is less."""
    texts = list(texts)
    if not texts:
        return {}
    alone, inside = (
        tokenizer([prefix + text for text in texts], add_special_tokens=False)["input_ids"] for prefix in ("", " ")
    )
    return {text: min(len(a), len(b)) for text, a, b in zip(texts, alone, inside, strict=True)}
