"""From `Example`s to arrays of fixed shape, with the tokenizer and image processor of a Hugging Face folder.

    prompt   = chat template(question, with or without a picture); the image token repeated once per feature
    sequence = prompt ++ answer ++ </s>, right-padded to the longest of the set, rounded up

Only answer tokens (and the end-of-sequence token) are targets: `at[j]` is the position whose logits predict
`targets[j]`, so the model computes logits nowhere else. Nothing is ever cut: a row that does not fit is an error.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from vkd_jax.types import Example, UserError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "at", "targets", "target_mask", "pixels", "cached"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """b rows of t tokens, with up to a answer tokens each."""

    tokens: jax.Array | np.ndarray  # [b, t] int32
    mask: jax.Array | np.ndarray  # [b, t] bool, False at padding
    at: jax.Array | np.ndarray  # [b, a] int32, the positions that predict the answer tokens
    targets: jax.Array | np.ndarray  # [b, a] int32
    target_mask: jax.Array | np.ndarray  # [b, a] bool
    pixels: jax.Array | np.ndarray | None  # [b, height, width, 3] float32; None for text-only rows
    cached: Mapping[str, jax.Array | np.ndarray]  # what a method prepared, a row each


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """Encoded examples of one modality; pictures are stored once, however many questions they carry."""

    examples: Sequence[Example]
    tokens: np.ndarray  # [n, t] int32
    mask: np.ndarray  # [n, t] bool
    at: np.ndarray  # [n, a] int32
    targets: np.ndarray  # [n, a] int32
    target_mask: np.ndarray  # [n, a] bool
    prompt_length: np.ndarray  # [n] int32
    image: np.ndarray  # [n] int32, row of `pixels`; -1 without a picture
    pixels: np.ndarray  # [m, height, width, 3] float32
    per_image: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [m, ...]
    per_example: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [n, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: np.ndarray) -> Batch:
        """Gathers some rows, with their pictures and whatever a method has cached for them."""
        images = self.image[rows]
        cached = {k: v[images] for k, v in self.per_image.items()} | {k: v[rows] for k, v in self.per_example.items()}
        return Batch(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            at=self.at[rows],
            targets=self.targets[rows],
            target_mask=self.target_mask[rows],
            pixels=self.pixels[images] if len(self.pixels) else None,
            cached=cached,
        )


class Processor:
    """The tokenizer, image processor and chat template that came with a model."""

    def __init__(self, folder: str | Path):
        from transformers import AutoProcessor  # slow to import, and not needed to read an EncodedSet

        try:
            self.hf = AutoProcessor.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{folder}: no usable tokenizer and image processor ({first_line}); "
                "copy tokenizer.json, tokenizer_config.json and preprocessor_config.json of the model there."
            ) from error
        self.tokenizer = self.hf.tokenizer
        self.image_token = self.hf.image_token
        self.image_token_id = int(self.tokenizer.convert_tokens_to_ids(self.image_token))
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.pad_id = int(self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)
        self.chat_template = self.hf.chat_template or self.tokenizer.chat_template

    def pixels(self, picture: bytes | Image.Image) -> np.ndarray:
        """[height, width, 3] float32: resized, cropped and normalised as the model expects."""
        if isinstance(picture, bytes):
            picture = open_image(picture)
        values = self.hf.image_processor(images=[picture.convert("RGB")], return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(np.asarray(values, np.float32).transpose(1, 2, 0))

    def prompt(self, question: str, with_image: bool) -> str:
        """The text up to where the answer begins; one image token stands for the picture."""
        if self.chat_template is None:
            return f"USER: {self.image_token}\n{question} ASSISTANT:" if with_image else f"USER: {question} ASSISTANT:"
        content = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": question})
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def encode(self, question: str, answer: str | None, image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer with its end-of-sequence token ([] without an answer).

        Both are cut out of one tokenisation, at the character where the answer begins, since a tokenizer may
        join characters across a cut. `image_tokens` is 0 for a text-only question.
        """
        prompt = self.prompt(question, image_tokens > 0)
        answer_text = "" if answer is None else answer if prompt[-1:].isspace() else " " + answer
        out = self.tokenizer(prompt + answer_text, return_offsets_mapping=True)
        ids, begins = out["input_ids"], [begin for begin, _ in out["offset_mapping"]]
        cut = next((i for i, (begin, end) in enumerate(out["offset_mapping"]) if end > len(prompt)), len(ids))
        if cut < len(ids) and begins[cut] < len(prompt):
            raise UserError(
                f"the tokenizer joins the end of the prompt with the answer {answer!r}; change the chat template."
            )
        prompt_ids, answer_ids = ids[:cut], ids[cut:]
        if answer is not None and (not answer_ids or answer_ids[-1] != self.eos_id):
            answer_ids = [*answer_ids, self.eos_id]
        if answer is None and prompt_ids and prompt_ids[-1] == self.eos_id:
            prompt_ids = prompt_ids[:-1]
        expanded: list[int] = []
        for token in prompt_ids:
            expanded.extend([token] * image_tokens if token == self.image_token_id else [token])
        return expanded, answer_ids


def open_image(data: bytes) -> Image.Image:
    """Decodes a picture upright (EXIF rotation applied); the caller converts the mode."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def encode_set(
    processor: Processor,
    examples: Sequence[Example],
    *,
    image_tokens: int,
    max_length: int,
    multiple: int = 4,
) -> EncodedSet:
    """Encodes examples of one modality into arrays of one shape.

    Raises:
        UserError: a question contains the image token, or a row is longer than `max_length` tokens.
    """
    images: dict[str, int] = {}
    pixels: list[np.ndarray] = []
    rows = []
    for example in examples:
        if example.image is not None and example.image_id not in images:
            images[example.image_id] = len(pixels)
            pixels.append(processor.pixels(example.image))
        tokens = image_tokens if example.image is not None else 0
        if processor.image_token in example.question + example.answer:
            raise UserError(f"row {example.id}: the text contains {processor.image_token}; remove it.")
        rows.append(processor.encode(example.question, example.answer, tokens))
    longest = max(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]), default=0)
    length = len(rows[longest][0]) + len(rows[longest][1]) if rows else 0
    if length > max_length:
        raise UserError(
            f"row {examples[longest].id} is {length} tokens long, the model takes {max_length}: shorten or drop it."
        )
    t = min(-(-length // multiple) * multiple, max_length)
    a = -(-max((len(answer) for _, answer in rows), default=0) // 2) * 2
    n = len(rows)
    tokens = np.full((n, t), processor.pad_id, np.int32)
    mask, target_mask = np.zeros((n, t), bool), np.zeros((n, a), bool)
    at, targets = np.zeros((n, a), np.int32), np.zeros((n, a), np.int32)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = prompt + answer
        mask[i, : len(prompt) + len(answer)] = True
        at[i, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
        targets[i, : len(answer)] = answer
        target_mask[i, : len(answer)] = True
    return EncodedSet(
        examples=tuple(examples),
        tokens=tokens,
        mask=mask,
        at=at,
        targets=targets,
        target_mask=target_mask,
        prompt_length=np.array([len(prompt) for prompt, _ in rows], np.int32),
        image=np.array([images.get(e.image_id, -1) if e.image is not None else -1 for e in examples], np.int32),
        pixels=np.stack(pixels) if pixels else np.zeros((0,), np.float32),
    )


TEMPLATE = (  # LLaVA-1.5's own
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def create_processor(folder: str | Path, corpus: Sequence[str], *, vocab_size: int, image_size: int, patch_size: int):
    """Trains a byte-level BPE tokenizer on `corpus` and saves it as a LLaVA processor; returns the tokenizer.

    The vocabulary keeps at most `vocab_size` tokens, the bytes and special tokens among them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(str(folder))
    return tokenizer
