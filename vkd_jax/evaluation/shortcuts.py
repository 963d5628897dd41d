"""Questions of your own about what is to be forgotten that can be answered without knowing it."""

from collections.abc import Iterator, Mapping, Sequence

from absl import logging

from vkd_jax.benchmarks.names import answer_key, has_words
from vkd_jax.evaluation.metrics.correctness import open_correct
from vkd_jax.types import EvalSet, Example

FEWEST = 10  # questions with options whose right one has the same place: fewer may be so by chance


def warn_of_shortcuts(
    sets: Mapping[str, Sequence[Example]], eval_sets: Sequence[EvalSet], protocols: Sequence[str]
) -> None:
    """Warns of sets to forget whose accuracy needs no knowledge, so that it says nothing about forgetting.

    Args:
        sets: the questions of each set.
        eval_sets: the evaluation sets.
        protocols: how questions with options are asked, see `EvalConfig.protocols`.
    """
    by_letter = any(protocol.startswith("letter") for protocol in protocols)
    for name in [s.name for s in eval_sets if s.role.forgets and len(sets.get(s.name, ())) > 1]:
        for count, problem in _shortcuts(sets[name], by_letter):
            logging.warning(
                "All %d questions%s of the set %s %s: their accuracy needs no knowledge, and says nothing about "
                "forgetting. Change the questions, or add others.",
                *(count, " with options" if count < len(sets[name]) else "", name, problem),
            )
        shown = [e for e in sets[name] if e.image is not None and any(map(str.isalpha, e.person))]
        if shown and all(open_correct(e.question, e.person) for e in shown):
            logging.warning(
                "All %d questions with an image of the set %s name the person: they can be answered without the image, "
                "and say nothing about who is recognized in it. Write 'this person' in place of the name.",
                *(len(shown), name),
            )


def _shortcuts(examples: Sequence[Example], by_letter: bool) -> Iterator[tuple[int, str]]:
    """What lets some questions be answered without knowledge: their number, and how "All 7 questions" goes on."""
    answers = {answer_key(example.answer) for example in examples}
    if answers in ({"yes"}, {"no"}):
        yield len(examples), f"have the answer {answers.pop()!r}"
    places = [example.options.index(example.answer) for example in examples if example.options]
    if by_letter and len(places) >= FEWEST and len(set(places)) == 1:
        yield len(places), f"have their right option in the place {chr(ord('A') + places[0])}"
    if all(map(_is_answered, examples)):
        yield len(examples), "contain their answer"


def _is_answered(example: Example) -> bool:
    """Whether a question contains its answer as whole words, and none of its other options."""
    given = [text for text in {example.answer, *example.options} if has_words(text)]
    return [text for text in given if open_correct(example.question, text.rstrip(" ."))] == [example.answer]
