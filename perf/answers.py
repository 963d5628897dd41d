"""Times the answering of questions about images against PyTorch + transformers.

python perf/answers.py [--size small|large] [--rounds N] [--json FILE]

Model: a LLaVA with random weights in float32. Data: random images with several questions each. Device: the GPU, or else
all cores. Both libraries use the same images, texts, tokenizer and image processor, whose time is included. The two
tasks of an evaluation are timed:

- writing: greedy answers of NEW_TOKENS tokens (random weights rarely produce the end token earlier);
- choosing: log p(option | question, image) for four options of each question.

PyTorch answers with `processor` and `generate`, left padding, SDPA attention and a key/value cache. It scores each
option with a forward pass of the whole prompt and the option, with right padding and logits of all positions. Batches
have the same size in both libraries.

Both run alternately in one process, so that other load on the machine affects both alike; the table shows medians and
ratios. The answers must be equal and the scores must agree, or the script stops without timing.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tables
import tokenizers
import torch
import transformers
from command import run, time_interleaved
from PIL import Image
from step_time import DEVICE, IMAGE_TOKEN_ID, SIZES, build_model, check_same_device

from vkd_jax import ask
from vkd_jax.data.processor import LLAVA_CHAT_TEMPLATE
from vkd_jax.evaluation.inference import Answerer

NEW_TOKENS = 32  # of each answer
N_OPTIONS = 4
# Tokens that are no words of the questions; the package checks that "Who" and "Why" are different tokens.
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:", "Who", "Why")
# question_words and option_words: the maximum number of words.
WORKLOADS: Mapping[str, dict[str, int]] = {
    "tiny": dict(images=3, questions_per_image=2, batch_size=2, question_words=8, option_words=3),
    "small": dict(images=8, questions_per_image=4, batch_size=16, question_words=32, option_words=6),
    "large": dict(images=4, questions_per_image=4, batch_size=8, question_words=64, option_words=6),
}


class Questions(NamedTuple):
    """Questions, each with its image and its options."""

    images: list[Image.Image]
    questions: list[str]
    options: list[list[str]]

    def slice(self, begin: int, count: int) -> "Questions":
        """Returns `count` questions from index `begin` on."""
        return Questions(*(rows[begin : begin + count] for rows in self))


def random_questions(workload: Mapping[str, int], vocabulary: int, side: int) -> Questions:
    """Returns random images and words; the questions about an image are adjacent."""
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        count = rng.integers(most // 4 + 1, most + 1)
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL), vocabulary, count))

    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(workload["images"])]
    repeated = [image for image in images for _ in range(workload["questions_per_image"])]
    return Questions(
        repeated,
        [words(workload["question_words"]) for _ in repeated],
        [[words(workload["option_words"]) for _ in range(N_OPTIONS)] for _ in repeated],
    )


def save(folder: str, model: transformers.LlavaForConditionalGeneration, sizes: Mapping[str, Any]) -> None:
    """Saves a model with a processor whose tokens are words, so that equal texts have equal tokens."""
    names = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), sizes["text"][-1]))]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, **special, extra_special_tokens={"image_token": "<image>"}, padding_side="left"
    )
    side, patch = sizes["image"]
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    options = dict(patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = transformers.LlavaProcessor(image_processor, tokenizer, chat_template=LLAVA_CHAT_TEMPLATE, **options)
    processor.save_pretrained(folder)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 3
    model.save_pretrained(folder)


def prompts(processor: Any, questions: Sequence[str]) -> list[str]:
    """Formats questions with the chat template of the model."""
    contents = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    chats = [[{"role": "user", "content": content}] for content in contents]
    return [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]


def generate_in_torch(model: Any, processor: Any, batch: Questions) -> list[str]:
    """Returns greedy answers to a batch of questions."""
    texts = prompts(processor, batch.questions)
    inputs = processor(images=batch.images, text=texts, padding=True, return_tensors="pt").to(DEVICE)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def score_in_torch(model: Any, processor: Any, batch: Questions) -> np.ndarray:
    """Returns log p of each option of a batch of questions, [n, N_OPTIONS]."""
    questions = prompts(processor, batch.questions)
    scores = []
    for options in zip(*batch.options, strict=True):
        texts = [f"{question} {option}</s>" for question, option in zip(questions, options, strict=True)]
        inputs = processor(images=batch.images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        inputs = inputs.to(DEVICE)
        with torch.no_grad():
            log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
        token_log_p = log_p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        ends = inputs["attention_mask"].sum(1)
        lengths = torch.tensor([len(option.split()) + 1 for option in options], device=DEVICE)
        positions = torch.arange(1, log_p.shape[1] + 1, device=DEVICE)
        is_option = (positions >= (ends - lengths)[:, None]) & (positions < ends[:, None])
        scores.append((token_log_p * is_option).sum(1))
    return torch.stack(scores, 1).cpu().numpy()


def in_batches(function: Callable, model: Any, folder: str, questions: Questions, size: int) -> Callable[[], list]:
    """Returns a function that applies `function` to all questions in batches."""
    processor = transformers.LlavaProcessor.from_pretrained(folder, backend="pil")
    begins = range(0, len(questions.questions), size)
    return lambda: [row for i in begins for row in function(model, processor, questions.slice(i, size))]


def jax_functions(
    folder: str, questions: Questions, batch_size: int
) -> tuple[Callable[[], list[str]], Callable[[], np.ndarray]]:
    """Returns functions that compute the answers and the log-probabilities of the options."""
    answerer = Answerer(ask.load(folder).bundle, batch_size=batch_size)

    def write() -> list[str]:
        return answerer.generate(
            questions.questions, answerer.encode_images(questions.images), max_new_tokens=NEW_TOKENS
        )

    def choose() -> np.ndarray:
        return answerer.score(
            questions.questions, questions.options, answerer.encode_images(questions.images)
        ).log_probs

    return write, choose


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each task in each library."""
    check_same_device()
    sizes, workload = SIZES[size], WORKLOADS[size]
    side, patch = sizes["image"]
    model, batch_size = build_model(sizes), workload["batch_size"]
    questions = random_questions(workload, sizes["text"][-1], side)
    functions = {}
    with tempfile.TemporaryDirectory() as folder:
        save(folder, model, sizes)
        write, choose = jax_functions(folder, questions, batch_size)
        model.to(DEVICE)
        functions["writing"] = write
        functions["writing in PyTorch"] = in_batches(generate_in_torch, model, folder, questions, batch_size)
        functions["choosing"] = choose
        functions["choosing in PyTorch"] = in_batches(score_in_torch, model, folder, questions, batch_size)
    outputs = {name: function() for name, function in functions.items()}  # the first call also compiles
    if outputs["writing"] != outputs["writing in PyTorch"]:
        raise SystemExit(f"the answers differ: {outputs['writing']} {outputs['writing in PyTorch']}")
    if not np.allclose(outputs["choosing"], outputs["choosing in PyTorch"], atol=2e-3):
        raise SystemExit(f"the scores differ: {outputs['choosing']} {outputs['choosing in PyTorch']}")
    seconds = time_interleaved(functions, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = sum(len(answer.split()) for answer in outputs["writing"])
    return {
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tokens": (side // patch) ** 2,
        "image_token_id": IMAGE_TOKEN_ID,
        "questions": len(questions.questions),
        "pictures": workload["images"],
        "batch": batch_size,
        "options": N_OPTIONS,
        "new_tokens": tokens,
        "seconds": seconds,
        "median": medians,
        "new_tokens_a_second": {name: tokens / medians[name] for name in ("writing", "writing in PyTorch")},
        "questions_a_second": {name: len(questions.questions) / time for name, time in medians.items()},
        "ratio_to_pytorch": {name: medians[name] / medians[f"{name} in PyTorch"] for name in ("writing", "choosing")},
    }


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        tables.answers,
        size=("small", "the size of the model", WORKLOADS),
        rounds=(5, "runs of each task"),
    )
