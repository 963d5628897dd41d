"""Compares a model with PyTorch, one library after the other."""

import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vkd_jax.checkpoints.bundle import ModelBundle, read_family
from vkd_jax.config import command_line
from vkd_jax.data.processor import Processor
from vkd_jax.runtime.memory import GIB
from vkd_jax.types import UserError
from vkd_jax.verify import comparison, jax_answers, pytorch
from vkd_jax.verify.answers import Answer
from vkd_jax.verify.questions import Question


def verify(
    folder: Path, questions: Sequence[Question], *, dtype: str, max_new_tokens: int = 16, max_pixels: int = 0
) -> int:
    """Compares the answers of both libraries, and prints a table and a verdict.

    PyTorch's answers are written to temporary files before this library reads the weights, so only one model is in
    memory at a time.

    Args:
        folder: folder of the model.
        questions: the questions.
        dtype: "float32" or "bfloat16", of weights and computation.
        max_new_tokens: number of tokens of an answer.
        max_pixels: largest number of pixels of an image; 0 keeps the limit of the image processor.

    Returns:
        The exit status: 0 if the model is the same, 1 if not.

    Raises:
        UserError: PyTorch is not installed, or one of the libraries cannot read the model.
    """
    pytorch.check_installed()
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={max_new_tokens}: give at least 1.")
    _, config = read_family(folder)
    if max_new_tokens >= (most := config.text.max_positions):  # PyTorch would write on until its memory is full
        raise UserError(f"--max_new_tokens={max_new_tokens}: the model takes {most:,} tokens in all; give fewer.")
    processor = Processor(folder, config, max_pixels=max_pixels)
    with tempfile.TemporaryDirectory(prefix="vkd_jax_verify_") as name:
        theirs, exact = Path(name, dtype), Path(name, "exact")
        theirs.mkdir()
        notes = pytorch.save_answers(folder, questions, processor, dtype, theirs, max_new_tokens=max_new_tokens)
        if dtype != "float32":
            exact.mkdir()
            pytorch.save_answers(folder, questions, processor, "float32", exact, forced=theirs)
        differences = _compare(folder, questions, dtype, theirs, exact if exact.exists() else theirs, max_pixels)
    same, sentence = comparison.verdict(differences, dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    command_line.show(
        "\n".join(
            [
                comparison.table(differences),
                *notes,
                f"Peak memory {peak:.1f} GiB, with one library's model in memory at a time.",
                f"{folder} is {sentence}",
            ]
        )
    )
    return 0 if same else 1


def _compare(
    folder: Path, questions: Sequence[Question], dtype: str, theirs: Path, exact: Path, max_pixels: int
) -> list[comparison.Difference]:
    """Compares the answers of this library with those that PyTorch wrote to two folders."""
    expected = [pytorch.read_answer(theirs, number) for number in range(len(questions))]
    asked = [number for number, answer in enumerate(expected) if len(answer.tokens)]
    for number in asked:
        comparison.check(expected[number])
    ours: dict[int, Answer] = {}
    if asked:
        bundle = ModelBundle.load(folder, dtype=dtype, max_pixels=max_pixels)
        answers = jax_answers.answers(bundle, [questions[i] for i in asked], [expected[i] for i in asked])
        ours = dict(zip(asked, answers, strict=True))
    references, limits = expected, dict[int, tuple[float, float]]()
    if exact != theirs:
        references = [pytorch.read_answer(exact, number) for number in range(len(questions))]
        for has_image in (True, False):
            numbers = [i for i in asked if (questions[i].image is not None) == has_image]
            if numbers:
                of_all = comparison.limits([expected[i] for i in numbers], [references[i] for i in numbers])
                limits |= dict.fromkeys(numbers, of_all)
    return [
        comparison.compare(q.size, ours.get(i), expected[i], references[i], limits.get(i, comparison.EXACT))
        for i, q in enumerate(questions)
    ]
