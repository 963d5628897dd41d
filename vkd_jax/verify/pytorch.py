"""The answers of transformers on PyTorch, which are saved to files, so that its model can be freed."""

import contextlib
import functools
import gc
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkd_jax.checkpoints.safetensors_files import Checkpoint
from vkd_jax.data.processor import Processor
from vkd_jax.runtime import memory, storage
from vkd_jax.types import UserError
from vkd_jax.verify.answers import Answer
from vkd_jax.verify.questions import Question

MOST_POSITIONS = 64  # of a prompt, at its end, whose logits are compared


def check_installed() -> None:
    """Checks that PyTorch is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            "The comparison needs PyTorch: install it with `pip install torch`, or pass --certificate to compare the "
            "model with its certificate instead."
        ) from error


def save_answers(
    model_folder: Path,
    questions: Sequence[Question],
    processor: Processor,
    dtype: str,
    out: Path,
    *,
    max_new_tokens: int = 0,
    forced: Path | None = None,
) -> list[str]:
    """Writes the answer of PyTorch to each question to a file, and frees the model.

    The model is not run on a prompt that this library would write in another way.

    Args:
        model_folder: folder of the model.
        questions: the questions.
        processor: the processor of this library, for its prompts and its limit of pixels.
        dtype: dtype of weights and computation.
        out: the folder to write to.
        max_new_tokens: number of tokens of an answer, which may continue after an end-of-sequence token.
        forced: folder of answers whose tokens are to be read instead of the model's own ones.

    Returns:
        What was not compared, in sentences.

    Raises:
        UserError: transformers cannot read the model, it does not fit in memory, or a prompt leaves no room for an
            answer.
    """
    import torch

    prompts, context = [_own_tokens(processor, question) for question in questions], processor.config.text.max_positions
    for question, prompt in zip(questions, prompts, strict=True):
        if len(prompt) >= context:
            raise UserError(
                f"--questions: the prompt of {question.text[:40]!r} has {len(prompt):,} tokens with {question.size}, "
                f"and the model takes {context:,} in all; ask something shorter."
            )
    count = sum(math.prod(tensor.shape) for tensor in Checkpoint(model_folder).tensors.values())
    needed = count * getattr(torch, dtype).itemsize
    memory.check(needed, memory.host_bytes(), "the weights in PyTorch", "use a machine with more memory")
    with _silent():
        inputs, notes = _processor(model_folder, processor)
        model = _load(model_folder, getattr(torch, dtype))
        for number, question in enumerate(questions):
            ours, given = prompts[number], inputs(question)
            if given["input_ids"][0].tolist() != ours:
                answer = Answer(given["input_ids"][0].numpy(), *(np.zeros(0, np.float32),) * 2, np.zeros(0, int))
            else:
                tokens = None if forced is None else read_answer(forced, number).tokens
                most = max_new_tokens if tokens is None else len(tokens)
                most = min(most, context - len(ours))
                answer = _answer(model, given, processor.image_token_id, most, tokens)
            np.savez(out / f"{number}.npz", **answer._asdict())
        del model
    gc.collect()
    return notes


def read_answer(folder: Path, number: int) -> Answer:
    """Reads the answer to a question that `save_answers` wrote."""
    with np.load(folder / f"{number}.npz") as arrays:
        return Answer(**arrays)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides the log lines and progress bars of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            os.fspath(folder), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many types of errors here
        raise UserError(f"{folder} cannot be read by transformers: {storage.first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder}: transformers finds no weights for {len(missing)} tensors, such as {missing[0]}, and leaves "
            "them random; use the version of transformers that the model is made for."
        )
    return model.eval()


def _processor(folder: Path, ours: Processor) -> tuple[Callable[[Question], Mapping[str, Any]], list[str]]:
    """Returns a function from a question to the inputs of the model, and notes."""
    from transformers import AutoProcessor

    try:
        joint = AutoProcessor.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # of a processor for videos, which needs torchvision, and others
        reason = storage.first_line(error).rstrip(".")
        note = f"Prompts are those of vkd_jax: the processor of transformers cannot be loaded ({reason})."
        return functools.partial(_own_inputs, ours), [note]
    # The PIL backend of transformers, since the pixels of its torchvision backend differ by up to two gray levels.
    joint.image_processor = ours.image_processor
    return functools.partial(_joint_inputs, joint, ours), []


def _joint_inputs(joint: Any, ours: Processor, question: Question) -> Mapping[str, Any]:
    """The inputs of the model from the processor of transformers."""
    images = [] if question.image is None else [question.image]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.text}]
    if joint.chat_template is None:
        text = ours.prompt(question.text, len(images))
    else:
        text = joint.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = joint.tokenizer.bos_token  # as in transformers' own `apply_chat_template(tokenize=True)`
    special = not (bos and text.startswith(bos))
    try:
        return joint(images=images or None, text=[text], return_tensors="pt", add_special_tokens=special)
    except Exception as error:  # of settings and texts that its processors check in their own ways
        raise UserError(
            f"the processor of transformers cannot process {question.text!r} ({storage.first_line(error)}); ask "
            "something else, or get the processor's files again."
        ) from error


def _own_tokens(ours: Processor, question: Question) -> list[int]:
    images = [] if question.image is None else [ours.image(question.image)]
    return ours.encode(question.text, None, images)[0]


def _own_inputs(ours: Processor, question: Question) -> Mapping[str, Any]:
    """The inputs of the model from the prompt of this library and the image processor of transformers."""
    import torch

    ids, pixels = torch.tensor([_own_tokens(ours, question)]), {}
    if question.image is not None:
        options = dict(ours.config.image_processor_options) | dict(do_convert_rgb=True, return_tensors="pt")
        pixels = dict(ours.image_processor(images=[question.image], **options))
    kinds = (ids == ours.image_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **pixels}


def _answer(
    model: Any, inputs: Mapping[str, Any], image_token: int, max_new_tokens: int, forced: np.ndarray | None
) -> Answer:
    """Computes one answer; reads the tokens `forced` instead of the most probable ones if they are given."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    accepted = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    prompt, embedded = inputs["input_ids"][0], []

    def keep(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        embedded.append(kwargs["inputs_embeds"][0])

    def force(ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor(forced[ids.shape[1] - len(prompt)]), 0)

    # Without the settings of the model, which would end answers or change the probabilities.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    with torch.inference_mode():
        hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
        read = model(**inputs, logits_to_keep=compared_positions(prompt.numpy(), image_token)).logits[0]
        hook.remove()
        out = model.generate(**inputs, logits_processor=LogitsProcessorList([] if forced is None else [force]))
    return Answer(
        prompt=prompt.numpy(),
        features=embedded[0][prompt == image_token].float().numpy(),
        logits=torch.cat([read, *out.logits[1:]]).float().numpy(),
        tokens=out.sequences[0, len(prompt) :].numpy(),
    )


def compared_positions(prompt: np.ndarray, image_token: int) -> int:
    """Number of tokens at the end of a prompt whose logits are compared: those after the image, or the last ones."""
    after_image = np.argmax(prompt[::-1] == image_token) if (prompt == image_token).any() else len(prompt)
    return int(min(after_image, MOST_POSITIONS))
