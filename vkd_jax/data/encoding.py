"""Examples encoded as arrays of fixed shapes: `EncodedSet` is a whole set, `Batch` is what one step reads.

    sequence = prompt ++ answer ++ </s>, right-padded to the longest sequence of its length bucket

Only answer tokens and the end-of-sequence token are targets: `target_positions[j]` is the position whose logits predict
`targets[j]`, so the model computes logits at no other position. Nothing is ever truncated: a row that does not fit is
an error.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from vkd_jax.data.images import PackedImages
from vkd_jax.data.processor import Processor
from vkd_jax.types import Example, UserError, located


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "target_positions", "targets", "target_mask", "images", "cached"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of b rows with t tokens each, of which up to a are answer tokens.

    Attributes:
        tokens: int32 [b, t].
        mask: bool [b, t], False at padding.
        target_positions: int32 [b, a], the positions whose logits predict the answer tokens.
        targets: int32 [b, a], the answer tokens.
        target_mask: bool [b, a], False at padding.
        images: the arrays that the model's `pack` returns, one row per row of the batch; None for text-only rows.
        cached: arrays that a method prepared, one row per row of the batch.
    """

    tokens: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    target_positions: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    target_mask: jax.Array | np.ndarray
    images: Mapping[str, jax.Array | np.ndarray] | None
    cached: Mapping[str, jax.Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """A set of n encoded examples, either all with an image or all without. Each of the m images is stored once.

    Attributes:
        examples: the n examples.
        tokens: int32 [n, t].
        mask: bool [n, t], False at padding.
        target_positions: int32 [n, a], the positions whose logits predict the answer tokens.
        targets: int32 [n, a], the answer tokens.
        target_mask: bool [n, a], False at padding.
        prompt_length: int32 [n], in tokens.
        image_rows: int32 [n], the row of `images` that each example shows; -1 without an image.
        images: the m images; None for text-only sets.
        bucket_shapes: int32 [n, 2], t and a of each row's length bucket; None if all rows are in one bucket.
        per_image: arrays [m, ...] that a method prepared.
        per_example: arrays [n, ...] that a method prepared.
    """

    examples: Sequence[Example]
    tokens: np.ndarray
    mask: np.ndarray
    target_positions: np.ndarray
    targets: np.ndarray
    target_mask: np.ndarray
    prompt_length: np.ndarray
    image_rows: np.ndarray
    images: PackedImages | None
    bucket_shapes: np.ndarray | None = None
    per_image: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    per_example: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: np.ndarray) -> Batch:
        """Gathers rows with their images and the arrays that a method cached for them.

        Args:
            rows: int [b].

        Returns:
            A batch that is as long as the longest bucket of its rows, which is one shape if all share a bucket.
        """
        image_rows = self.image_rows[rows]
        t, a = self.tokens.shape[1], self.targets.shape[1]
        if self.bucket_shapes is not None:
            t, a = self.bucket_shapes[rows].max(0)
        cached = {name: array[image_rows] for name, array in self.per_image.items()}
        cached |= {name: array[rows] for name, array in self.per_example.items()}
        return Batch(
            tokens=self.tokens[rows, :t],
            mask=self.mask[rows, :t],
            target_positions=self.target_positions[rows, :a],
            targets=self.targets[rows, :a],
            target_mask=self.target_mask[rows, :a],
            images=None if self.images is None else self.images[image_rows],
            cached=cached,
        )


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
        processor: the model's processor.
        examples: either all with an image or all without.
        max_length: the largest number of tokens that the model takes.
        buckets: the largest number of lengths that rows are padded to. A batch has one length, and each is compiled.
        multiple: lengths are multiples of this.

    Raises:
        UserError: a question contains the image token, or a row is longer than `max_length` tokens.

    Example:
        >>> encoded = encode_set(processor, examples, max_length=256)
        >>> batch = encoded.batch(np.arange(4))
        >>> batch.tokens.shape
        (4, 52)
    """
    files = {example.image_id: example.image for example in examples if example.image is not None}
    image_rows = {image_id: row for row, image_id in enumerate(files)}
    images = None
    if files:
        make = processor.named_images(list(files.values()), list(files))
        images = PackedImages.measured(make, len(files), processor.config)
    rows = []
    for example in examples:
        # Only the shape of an image matters here.
        shown = [] if example.image is None else [np.broadcast_to(0.0, images.shapes[image_rows[example.image_id]])]
        with located(example.label):
            rows.append(processor.encode(example.question, example.answer, shown))
    longest = max(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]), default=0)
    length = len(rows[longest][0]) + len(rows[longest][1]) if rows else 0
    if length > max_length:
        raise UserError(
            f"{examples[longest].label} has {length} tokens, but the model takes at most {max_length}: shorten or "
            "remove the row."
        )
    t = min(_round_up(length, multiple), max_length)
    a = _round_up(max((len(answer) for _, answer in rows), default=0), 2)
    return EncodedSet(
        examples=tuple(examples),
        **_padded(rows, t, a, processor.pad_id),
        prompt_length=np.array([len(prompt) for prompt, _ in rows], np.int32),
        image_rows=np.array([-1 if e.image is None else image_rows[e.image_id] for e in examples], np.int32),
        images=images,
        bucket_shapes=_bucket_shapes(rows, buckets, multiple, (t, a)),
    )


def _round_up(length: int | np.ndarray, multiple: int) -> int | np.ndarray:
    return -(-length // multiple) * multiple


def _padded(rows: Sequence[tuple[list[int], list[int]]], t: int, a: int, pad_id: int) -> dict[str, np.ndarray]:
    """The fields of an `EncodedSet` that hold the prompts and answers, padded to t tokens and a answer tokens."""
    n = len(rows)
    tokens = np.full((n, t), pad_id, np.int32)
    mask, target_mask = np.zeros((n, t), bool), np.zeros((n, a), bool)
    positions, targets = np.zeros((n, a), np.int32), np.zeros((n, a), np.int32)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = prompt + answer
        mask[i, : len(prompt) + len(answer)] = True
        positions[i, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
        targets[i, : len(answer)] = answer
        target_mask[i, : len(answer)] = True
    return dict(tokens=tokens, mask=mask, target_positions=positions, targets=targets, target_mask=target_mask)


def _bucket_shapes(
    rows: Sequence[tuple[list[int], list[int]]], buckets: int, multiple: int, largest: tuple[int, int]
) -> np.ndarray:
    """The numbers of tokens and of answer tokens of each row's length bucket, [n, 2]."""
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in rows], np.int32).reshape(-1)
    answers = np.array([len(answer) for _, answer in rows], np.int32).reshape(-1)
    edges = bucket_lengths(_round_up(lengths, multiple), buckets)
    bucket = np.searchsorted(edges, lengths)
    shapes = np.zeros((len(rows), 2), np.int32)
    for i, edge in enumerate(edges):
        members = bucket == i
        shapes[members] = edge, _round_up(answers[members].max(initial=0), 2)
    return np.minimum(shapes, largest)


def bucket_lengths(lengths: np.ndarray, most: int) -> list[int]:
    """At most `most` lengths, ascending, such that padding each row to the next larger one adds the fewest tokens.

    Args:
        lengths: int [n], the number of tokens of each row.
        most: the largest number of buckets.

    Example:
        >>> bucket_lengths(np.array([4, 4, 4, 12]), 2)
        [4, 12]
    """
    values, counts = np.unique(lengths, return_counts=True)
    # Dynamic programming: best[j] = (tokens, edges) of the first j values in i buckets; each round adds a bucket.
    best = [(0, [])] + [(np.inf, [])] * len(values)
    for _ in range(max(most, 1)):
        longer = [
            min(
                ((best[i][0] + values[j - 1] * counts[i:j].sum(), [*best[i][1], int(values[j - 1])]) for i in range(j)),
                key=lambda candidate: candidate[0],
            )
            for j in range(1, len(values) + 1)
        ]
        pairs = zip(longer, best[1:], strict=True)
        best = [(0, []), *(min(pair, key=lambda candidate: candidate[0]) for pair in pairs)]
    return best[-1][1]
