"""How fast questions about pictures are answered here, and by PyTorch + transformers.

python perf/answers.py [--size small|large] [--rounds N] [--json FILE]

A LLaVA with random weights, random pictures with several questions each, float32, all cores. Both get the same pictures
and texts, and pass them through the same tokenizer and image processor; that is part of the time. Two halves of an
evaluation are timed:

- writing: greedy answers, of NEW tokens, for random weights hardly ever end one;
- choosing: log p(option | question, picture) of the four options of each question.

PyTorch's is written the way its users write it, as many questions at a time: `processor` and `generate`, left padding,
SDPA attention, a key/value cache; and for the options one forward pass each, of the whole prompt with the option after
it, right padding, logits of every position. The two take turns in one process, so that whatever else the machine does
falls on both; what is printed are medians and ratios. The answers must be the same tokens, and the scores agree, else
nothing is measured.
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
from command import by_turns, run
from PIL import Image
from step_time import DEVICE, IMAGE, SIZES, model, need_same_device

from vkd_jax import ask
from vkd_jax.data.processor import LLAVA_CHAT_TEMPLATE
from vkd_jax.evaluation.inference import Answerer

NEW = 32  # tokens an answer
OPTIONS = 4
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:")
# Pictures, questions about each, questions a batch, and the most words of a question and of an option.
WORK: Mapping[str, dict[str, int]] = {
    "tiny": dict(pictures=3, about_each=2, batch=2, words=8, option=3),
    "small": dict(pictures=8, about_each=4, batch=16, words=32, option=6),
    "large": dict(pictures=4, about_each=4, batch=8, words=64, option=6),
}


class Asked(NamedTuple):
    """Questions, each with its picture and its options."""

    pictures: list[Image.Image]
    questions: list[str]
    options: list[list[str]]

    def part(self, begin: int, count: int) -> "Asked":
        """Some that follow each other."""
        return Asked(*(rows[begin : begin + count] for rows in self))


def asked(work: Mapping[str, int], vocabulary: int, side: int) -> Asked:
    """Random pictures and words; the questions about a picture follow each other."""
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        count = rng.integers(most // 4 + 1, most + 1)
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL), vocabulary, count))

    files = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(work["pictures"])]
    shown = [file for file in files for _ in range(work["about_each"])]
    return Asked(
        shown,
        [words(work["words"]) for _ in shown],
        [[words(work["option"]) for _ in range(OPTIONS)] for _ in shown],
    )


def save(folder: str, net: transformers.LlavaForConditionalGeneration, size: Mapping[str, Any]) -> None:
    """The model with a processor, in which every token is a word: then texts are equal if their tokens are."""
    names = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), size["text"][-1]))]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, **special, extra_special_tokens={"image_token": "<image>"}, padding_side="left"
    )
    side, patch = size["picture"]
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    options = dict(patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    transformers.LlavaProcessor(images, tokenizer, chat_template=LLAVA_CHAT_TEMPLATE, **options).save_pretrained(folder)
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = 2, 3
    net.save_pretrained(folder)


def prompts(processor: Any, questions: Sequence[str]) -> list[str]:
    """By the model's template."""
    content = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    turns = [[{"role": "user", "content": each}] for each in content]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def written_in_torch(net: Any, processor: Any, given: Asked) -> list[str]:
    """Greedy answers to a batch."""
    inputs = processor(
        images=given.pictures, text=prompts(processor, given.questions), padding=True, return_tensors="pt"
    ).to(DEVICE)
    out = net.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=True)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def chosen_in_torch(net: Any, processor: Any, given: Asked) -> np.ndarray:
    """log p of each option of a batch: [n, OPTIONS]."""
    before = prompts(processor, given.questions)
    found = []
    for texts in zip(*given.options, strict=True):
        whole = [f"{prompt} {text}</s>" for prompt, text in zip(before, texts, strict=True)]
        inputs = processor(images=given.pictures, text=whole, padding=True, padding_side="right", return_tensors="pt")
        inputs = inputs.to(DEVICE)
        with torch.no_grad():
            log_p = net(**inputs).logits[:, :-1].log_softmax(-1)
        own = log_p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        ends = inputs["attention_mask"].sum(1)
        counts = torch.tensor([len(text.split()) + 1 for text in texts], device=DEVICE)
        at = torch.arange(1, log_p.shape[1] + 1, device=DEVICE)
        answer = (at >= (ends - counts)[:, None]) & (at < ends[:, None])
        found.append((own * answer).sum(1))
    return torch.stack(found, 1).cpu().numpy()


def in_torch(function: Callable, net: Any, folder: str, given: Asked, batch: int) -> Callable[[], list]:
    """`function` of all, a batch at a time."""
    processor = transformers.LlavaProcessor.from_pretrained(folder, backend="pil")
    begins = range(0, len(given.questions), batch)
    return lambda: [row for i in begins for row in function(net, processor, given.part(i, batch))]


def in_jax(folder: str, given: Asked, batch: int) -> tuple[Callable[[], list[str]], Callable[[], np.ndarray]]:
    """(answers, log-probabilities of the options) of all."""
    answerer = Answerer(ask.load(folder).bundle, batch_size=batch)

    def write() -> list[str]:
        return answerer.generate(given.questions, answerer.look(given.pictures), max_new_tokens=NEW)

    def choose() -> np.ndarray:
        return answerer.score(given.questions, given.options, answerer.look(given.pictures)).log_probs

    return write, choose


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Seconds of both, by turns."""
    need_same_device()
    name, size, work = size, SIZES[size], WORK[size]
    net = model(size)
    given = asked(work, size["text"][-1], size["picture"][0])
    with tempfile.TemporaryDirectory() as folder:
        save(folder, net, size)
        write, choose = in_jax(folder, given, work["batch"])
        net.to(DEVICE)
        theirs = [in_torch(f, net, folder, given, work["batch"]) for f in (written_in_torch, chosen_in_torch)]
    runs = {"writing": write, "writing in PyTorch": theirs[0], "choosing": choose, "choosing in PyTorch": theirs[1]}
    outputs = {name: run() for name, run in runs.items()}  # which compiles, too
    if outputs["writing"] != outputs["writing in PyTorch"]:
        raise SystemExit(f"the answers differ: {outputs['writing']} {outputs['writing in PyTorch']}")
    if not np.allclose(outputs["choosing"], outputs["choosing in PyTorch"], atol=2e-3):
        raise SystemExit(f"the scores differ: {outputs['choosing']} {outputs['choosing in PyTorch']}")
    seconds = by_turns(runs, rounds)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = sum(len(text.split()) for text in outputs["writing"])
    return {
        "size": name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "image_tokens": (size["picture"][0] // size["picture"][1]) ** 2,
        "image_token_id": IMAGE,
        "questions": len(given.questions),
        "pictures": work["pictures"],
        "batch": work["batch"],
        "options": OPTIONS,
        "new_tokens": tokens,
        "seconds": seconds,
        "median": middle,
        "new_tokens_a_second": {name: tokens / middle[name] for name in ("writing", "writing in PyTorch")},
        "questions_a_second": {name: len(given.questions) / time for name, time in middle.items()},
        "ratio_to_pytorch": {name: middle[name] / middle[f"{name} in PyTorch"] for name in ("writing", "choosing")},
    }


if __name__ == "__main__":
    run(__doc__, measure, tables.answers, size=("small", "of the model", WORK), rounds=(5, "how often each runs"))
