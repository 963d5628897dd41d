"""From `Example`s to arrays of fixed shape, with the tokenizer and image processor of a Hugging Face folder.

    prompt   = chat template(question, with or without a picture); the image token repeated once per feature
    sequence = prompt ++ answer ++ </s>, right-padded to the longest of the set, rounded up

Only answer tokens (and the end-of-sequence token) are targets: `at[j]` is the position whose logits predict
`targets[j]`, so the model computes logits nowhere else. Nothing is ever cut: a row that does not fit is an error.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from vkd_jax.types import Example, UserError

MAX_PIXELS = 256 * 28 * 28  # of a picture, where models leave a choice: 256 image tokens of Qwen's


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "at", "targets", "target_mask", "pictures", "cached"],
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
    pictures: (
        Mapping[str, jax.Array | np.ndarray] | None
    )  # as the model packs them, a row each; None for text-only rows
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
    image: np.ndarray  # [n] int32, row of `pictures`; -1 without a picture
    pictures: Mapping[str, np.ndarray] | None  # [m, ...] each, as the model packs them; None for text-only sets
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
            pictures=None if self.pictures is None else {k: v[images] for k, v in self.pictures.items()},
            cached=cached,
        )


class Processor:
    """The tokenizer, image processor and chat template that came with a model, as transformers has them.

    The image processor is the one that needs neither PyTorch nor torchvision, and the image tokens are put in here,
    since transformers' joint processors of some families need both.

    Args:
        folder: of the model.
        config: the model's configuration, which knows how its pictures are laid out.
        max_pixels: a smaller budget of pixels a picture than the image processor's own, where pictures differ in
            size; 0 keeps its.

    Raises:
        UserError: the folder lacks something, or the budget is not to be had.
    """

    def __init__(self, folder: str | Path, config: Any, *, max_pixels: int = 0):
        from transformers import AutoImageProcessor, AutoTokenizer  # slow to import, and not needed for an EncodedSet

        options = dict(local_files_only=True)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
            self.image_processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
        except (OSError, ValueError, TypeError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{folder}: no usable tokenizer and image processor ({first_line}); "
                "copy tokenizer.json, tokenizer_config.json and preprocessor_config.json of the model there."
            ) from error
        self.folder = folder
        if max_pixels:
            self.limit(max_pixels)
        self.config = config
        self.image_token_id = config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.eos_ids = _end_ids(Path(folder), self.tokenizer)
        self.pad_id = int(self.eos_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)
        self.chat_template = _chat_template(Path(folder), self.tokenizer)

    @property
    def budget(self) -> int | None:
        """How many pixels a picture may have; None where all have one size."""
        size = self.image_processor.size
        return size.longest_edge if size.shortest_edge else None

    def limit(self, max_pixels: int) -> None:
        """Shrinks larger pictures to at most so many pixels.

        Raises:
            UserError: the model's pictures have one size, or more pixels at least.
        """
        size = self.image_processor.size
        if self.budget is None:
            raise UserError(f"{self.folder}: its pictures have one size; leave model.max_pixels at 0.")
        if max_pixels < size.shortest_edge:
            raise UserError(f"model.max_pixels={max_pixels}: the model's pictures have at least {size.shortest_edge}.")
        size.longest_edge = min(max_pixels, size.longest_edge)

    def image(self, picture: bytes | Image.Image) -> np.ndarray:
        """[height, width, 3] float32: resized, cropped and normalised as the model expects.

        Raises:
            UserError: the picture cannot be read, or is of a shape that the image processor refuses.
        """
        try:
            if isinstance(picture, bytes):
                picture = open_image(picture)
            return self.config.images(self.image_processor(images=[picture], return_tensors="np"))[0]
        except (ValueError, OSError) as error:  # broken, of a shape that is refused, or cut for another model
            size = "" if isinstance(picture, bytes) else f" of {picture.width} x {picture.height} pixels"
            raise UserError(f"a picture{size} is refused: {error}.") from error

    def prompt(self, question: str, images: int) -> str:
        """The text up to where the answer begins; one image token stands for each picture."""
        if self.chat_template is None and self.image_token != "<image>":
            raise UserError("the model has no chat template; copy its chat_template.json or .jinja into the folder.")
        if self.chat_template is None:  # LLaVA-1.5's, which its first releases left out
            return "USER: " + f"{self.image_token}\n" * images + f"{question} ASSISTANT:"
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def encode(
        self, question: str, answer: str | None, images: Sequence[np.ndarray] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer with its end-of-sequence token ([] without an answer).

        Both are cut out of one tokenisation, at the character where the answer begins, since a tokenizer may
        join characters across a cut. Each picture's image token is repeated as often as the picture needs.
        """
        prompt = self.prompt(question, len(images))
        answer_text = "" if answer is None else answer if prompt[-1:].isspace() else " " + answer
        out = self.tokenizer(prompt + answer_text, return_offsets_mapping=True)
        ids, begins = out["input_ids"], [begin for begin, _ in out["offset_mapping"]]
        cut = next((i for i, (begin, end) in enumerate(out["offset_mapping"]) if end > len(prompt)), len(ids))
        if cut < len(ids) and begins[cut] < len(prompt):
            raise UserError(
                f"the tokenizer joins the end of the prompt with the answer {answer!r}; change the chat template."
            )
        prompt_ids, answer_ids = ids[:cut], ids[cut:]
        if (found := prompt_ids.count(self.image_token_id)) != len(images):
            raise UserError(
                f"the prompt holds {self.image_token} {found} times for {len(images)} pictures: take it out of the "
                "question, or use the model's own chat template."
            )
        if answer is not None and (not answer_ids or answer_ids[-1] not in self.eos_ids):
            answer_ids = [*answer_ids, self.eos_ids[0]]
        if answer is None and prompt_ids and prompt_ids[-1] in self.eos_ids:
            prompt_ids = prompt_ids[:-1]
        expanded: list[int] = []
        sizes = iter(images)
        for token in prompt_ids:
            count = self.config.image_tokens(*next(sizes).shape[:2]) if token == self.image_token_id else 1
            expanded.extend([token] * count)
        return expanded, answer_ids


def _end_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's first, then those that the model's generation stops at."""
    more = _json(folder / "generation_config.json").get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    ids = tuple(dict.fromkeys(int(i) for i in ids if i is not None))
    if not ids:
        raise UserError(f"{folder}: neither its tokenizer nor its generation_config.json has an eos_token_id.")
    return ids


def _json(path: Path) -> dict[str, Any]:
    """What the file says; {} without one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again.") from error


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    """Of the tokenizer, or of the joint processor, which keeps it in a file of its own."""
    template = tokenizer.chat_template  # chat_template.jinja is among what the tokenizer reads itself
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template or _json(folder / "chat_template.json").get("chat_template")


def open_image(data: bytes) -> Image.Image:
    """Decodes a picture upright (EXIF rotation applied); the caller converts the mode."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def encode_set(
    processor: Processor,
    examples: Sequence[Example],
    *,
    max_length: int,
    multiple: int = 4,
) -> EncodedSet:
    """Encodes examples of one modality into arrays of one shape.

    Raises:
        UserError: a question contains the image token, or a row is longer than `max_length` tokens.
    """
    images: dict[str, np.ndarray] = {}
    rows = []
    for example in examples:
        if example.image is not None and example.image_id not in images:
            images[example.image_id] = processor.image(example.image)
        shown = [] if example.image is None else [images[example.image_id]]
        if processor.image_token in example.question + example.answer:
            raise UserError(f"row {example.id}: the text contains {processor.image_token}; remove it.")
        rows.append(processor.encode(example.question, example.answer, shown))
    longest = max(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]), default=0)
    length = len(rows[longest][0]) + len(rows[longest][1]) if rows else 0
    if length > max_length:
        raise UserError(
            f"row {examples[longest].id} is {length} tokens long, the model takes {max_length}: shorten or drop it."
        )
    t = min(-(-length // multiple) * multiple, max_length)
    a = -(-max((len(answer) for _, answer in rows), default=0) // 2) * 2
    n, order = len(rows), {image_id: i for i, image_id in enumerate(images)}
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
        image=np.array([-1 if e.image is None else order[e.image_id] for e in examples], np.int32),
        pictures=processor.config.pack([[x] for x in images.values()]) if images else None,
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
