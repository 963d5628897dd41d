"""From `Example`s to arrays of fixed shape, with the tokenizer and image processor of a Hugging Face folder.

    prompt   = chat template(question, with or without a picture); the image token repeated once per feature
    sequence = prompt ++ answer ++ </s>, right-padded to the longest of its bucket

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

from vkd_jax.data.pictures import Pictures
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
    pictures: Pictures | None  # m of them; None for text-only sets
    cut: np.ndarray | None = None  # [n, 2] int32: t and a of the row's bucket; None: those of the arrays
    per_image: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [m, ...]
    per_example: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [n, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: np.ndarray) -> Batch:
        """Gathers some rows, with their pictures and whatever a method has cached for them.

        All are as long as the largest of their buckets, which is one shape where they share a bucket.
        """
        images = self.image[rows]
        t, a = (self.tokens.shape[1], self.at.shape[1]) if self.cut is None else self.cut[rows].max(0)
        cached = {k: v[images] for k, v in self.per_image.items()} | {k: v[rows] for k, v in self.per_example.items()}
        return Batch(
            tokens=self.tokens[rows, :t],
            mask=self.mask[rows, :t],
            at=self.at[rows, :a],
            targets=self.targets[rows, :a],
            target_mask=self.target_mask[rows, :a],
            pictures=None if self.pictures is None else self.pictures[images],
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

    def prompt(self, question: str, images: int, turns: Sequence[tuple[str, str, int]] = ()) -> str:
        """The text up to where the answer begins; one image token stands for each picture.

        Args:
            question: the question.
            images: how many pictures it shows.
            turns: what was said before it, as worked examples: question, answer, how many pictures.
        """
        if self.chat_template is None and self.image_token != "<image>":
            raise UserError("the model has no chat template; copy its chat_template.json or .jinja into the folder.")
        if self.chat_template is None:  # LLaVA-1.5's, which its first releases left out
            said = [(asked, f" {answer}{self.tokenizer.eos_token}", count) for asked, answer, count in turns]
            return "".join(
                "USER: " + f"{self.image_token}\n" * count + f"{asked} ASSISTANT:{answer}"
                for asked, answer, count in [*said, (question, "", images)]
            )
        messages = []
        for asked, answer, count in [*turns, (question, None, images)]:
            content = [{"type": "image"}] * count + [{"type": "text", "text": asked}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def encode(
        self,
        question: str,
        answer: str | None,
        images: Sequence[np.ndarray] = (),
        turns: Sequence[tuple[str, str, int]] = (),
    ) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer with its end-of-sequence token ([] without an answer).

        Both are cut out of one tokenisation, at the character where the answer begins, since a tokenizer may
        join characters across a cut. Each picture's image token is repeated as often as the picture needs.

        Args:
            question: the question.
            answer: None for the prompt alone.
            images: the pictures in order, those of `turns` first; only their shapes count.
            turns: worked examples before the question, see `prompt`.
        """
        return self.encode_each(question, [answer], images, turns)[0]

    def encode_each(
        self,
        question: str,
        answers: Sequence[str | None],
        images: Sequence[np.ndarray] = (),
        turns: Sequence[tuple[str, str, int]] = (),
    ) -> list[tuple[list[int], list[int]]]:
        """`encode` of one question with each of several answers."""
        prompt = self.prompt(question, len(images) - sum(count for *_, count in turns), turns)
        space = "" if prompt[-1:].isspace() else " "
        texts = [prompt if answer is None else f"{prompt}{space}{answer}" for answer in answers]
        out = self.tokenizer(texts, return_offsets_mapping=True)
        counts = [self.config.image_tokens(*image.shape[:2]) for image in images]
        return [
            self._split(len(prompt), answer, ids, offsets, counts)
            for answer, ids, offsets in zip(answers, out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def _split(
        self, end: int, answer: str | None, ids: list[int], offsets: list[tuple[int, int]], counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Tokens of a prompt of `end` characters with its answer, cut; `counts`: image tokens of each picture."""
        cut = next((i for i, (_, last) in enumerate(offsets) if last > end), len(ids))
        if cut < len(ids) and offsets[cut][0] < end:
            raise UserError(
                f"the tokenizer joins the end of the prompt with the answer {answer!r}; change the chat template."
            )
        prompt_ids, answer_ids = ids[:cut], ids[cut:]
        if (found := prompt_ids.count(self.image_token_id)) != len(counts):
            raise UserError(
                f"the prompt holds {self.image_token} {found} times for {len(counts)} pictures: take it out of the "
                "question, or use the model's own chat template."
            )
        if answer is not None and (not answer_ids or answer_ids[-1] not in self.eos_ids):
            answer_ids = [*answer_ids, self.eos_ids[0]]
        if answer is None and prompt_ids and prompt_ids[-1] in self.eos_ids:
            prompt_ids = prompt_ids[:-1]
        expanded: list[int] = []
        each = iter(counts)
        for token in prompt_ids:
            expanded.extend([token] * (next(each) if token == self.image_token_id else 1))
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
    """Decodes a picture upright (EXIF rotation applied), 16 bits a pixel as 8; the caller converts the mode."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):  # PIL's own conversion would cut off all that is brighter than 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def encode_set(
    processor: Processor,
    examples: Sequence[Example],
    *,
    max_length: int,
    buckets: int = 1,
    multiple: int = 4,
) -> EncodedSet:
    """Encodes examples of one modality into arrays of few shapes.

    Args:
        processor: of the model.
        examples: all with a picture, or all without.
        max_length: of the model.
        buckets: at most so many lengths that rows are padded to; a batch has one of them, and each is compiled.
        multiple: lengths are multiples of this.

    Raises:
        UserError: a question contains the image token, or a row is longer than `max_length` tokens.
    """
    encoded = {e.image_id: e.image for e in examples if e.image is not None}
    order = {image_id: i for i, image_id in enumerate(encoded)}
    files = list(encoded.values())
    pictures = Pictures.measured(lambda i: processor.image(files[i]), len(files), processor.config) if files else None
    rows = []
    for example in examples:
        # Of a picture only its shape counts here.
        shown = [] if example.image is None else [np.broadcast_to(0.0, pictures.shapes[order[example.image_id]])]
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
        image=np.array([-1 if e.image is None else order[e.image_id] for e in examples], np.int32),
        pictures=pictures,
        cut=_cut(rows, buckets, multiple, (t, a)),
    )


def _cut(rows: Sequence[tuple[list[int], list[int]]], most: int, multiple: int, longest: tuple[int, int]) -> np.ndarray:
    """[n, 2]: how many tokens, and answer tokens among them, a batch of each row's bucket has."""
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in rows], np.int32).reshape(-1)
    answers = np.array([len(answer) for _, answer in rows], np.int32).reshape(-1)
    edges = bucket_lengths(-(-lengths // multiple) * multiple, most)
    bucket = np.searchsorted(edges, lengths)
    cut = np.zeros((len(rows), 2), np.int32)
    for i, edge in enumerate(edges):
        mine = bucket == i
        cut[mine] = edge, -(-answers[mine].max(initial=0) // 2) * 2
    return np.minimum(cut, longest)


def bucket_lengths(lengths: np.ndarray, most: int) -> list[int]:
    """At most `most` lengths, ascending, such that padding each row to the next one up costs the fewest tokens."""
    values, counts = np.unique(lengths, return_counts=True)
    # best[j] = (tokens, edges) of the values before j in i buckets; one more bucket each round.
    best = [(0, [])] + [(np.inf, [])] * len(values)
    for _ in range(max(most, 1)):
        longer = [
            min(
                ((best[i][0] + values[j - 1] * counts[i:j].sum(), [*best[i][1], int(values[j - 1])]) for i in range(j)),
                key=lambda found: found[0],
            )
            for j in range(1, len(values) + 1)
        ]
        best = [(0, []), *(min(pair, key=lambda found: found[0]) for pair in zip(longer, best[1:], strict=True))]
    return best[-1][1]


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
