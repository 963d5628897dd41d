"""A model with its processor, ready to be asked: prompts in batches, over as many devices as there are.

Images pass through the vision tower once, however many questions show them, and what stands before the question is
read once by the language model where questions of a batch share it: a picture is hundreds of tokens, a question a few.
Rows of a batch lie over the mesh's data and fsdp axes; every process prepares all rows, and every process gets all
answers.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.data.batching import in_batches, padded_rows
from vkd_jax.data.images import PackedImages
from vkd_jax.models import generate
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.models.generate import Prompts, SharedPrefixes
from vkd_jax.runtime.mesh import replicated, shard_rows
from vkd_jax.types import UserError

Turns = Sequence[tuple[str, str, int]]  # worked examples before a question: question, answer, how many pictures

TAPS = ("features", "projector")  # what feeds the projector, and what it gives to the language model
IN_FLIGHT = 2  # batches that the device has been given and that were not fetched


class Scores(NamedTuple):
    """What several texts after each question score; a missing text scores -inf and has no tokens."""

    log_probs: np.ndarray  # [n, o]: log p(text and end of sequence | question), in nats
    counts: np.ndarray  # int [n, o]: tokens, the end of sequence among them

    @property
    def nll(self) -> np.ndarray:
        """[n, o]: mean negative log-likelihood a token."""
        return -self.log_probs / np.maximum(self.counts, 1)


class TokenScores(NamedTuple):
    """What the tokens of one text score, its end of sequence among them: float [tokens] each, in nats."""

    log_probs: np.ndarray  # log p(token | question and what stands before it)
    means: np.ndarray  # of log p over the vocabulary, weighed by p
    deviations: np.ndarray  # standard deviation of the same


@dataclasses.dataclass(frozen=True)
class Seen:
    """Images as the language model sees them, and which of them each prompt shows. Each picture is held once."""

    shapes: Sequence[tuple[int, ...]]  # (height, width, 3) of each picture, as the model's processor made it
    features: VisualTokens  # NumPy arrays, a row a picture
    rows: tuple[tuple[int, ...], ...]  # the pictures of each prompt, in order

    def of(self, rows: Sequence[int]) -> "Seen":
        """Some of the prompts, in this order, repeated as asked."""
        return dataclasses.replace(self, rows=tuple(self.rows[i] for i in rows))

    def show(self, rows: Sequence[Sequence[int]]) -> "Seen":
        """Other prompts, which show these of the pictures."""
        return dataclasses.replace(self, rows=tuple(map(tuple, rows)))

    def images(self, row: int) -> list[np.ndarray]:
        """What stands for the pictures of a prompt where only their shapes count."""
        return [np.broadcast_to(np.float32(0), self.shapes[i]) for i in self.rows[row]]

    def tokens(self) -> VisualTokens:
        """The features of each prompt: those of its pictures one after another, padding last.

        Images of a prompt do not see each other in the vision tower, so that this is what it would have made of them
        together.
        """
        most = max(map(len, self.rows))
        which = np.array([[*row, *[-1] * (most - len(row))] for row in self.rows])
        if most == 1:
            return jax.tree.map(lambda x: x[which[:, 0]], self.features)
        values, where = (x[which] for x in self.features)
        valid = (where[..., 0] >= 0) & (which >= 0)[..., None]
        where[..., 0] = np.where(valid, np.arange(most)[:, None], -1)
        order = np.argsort(~valid.reshape(len(which), -1), axis=1, kind="stable")[..., None]
        return VisualTokens(
            *(np.take_along_axis(x.reshape(len(x), -1, x.shape[-1]), order, axis=1) for x in (values, where))
        )


class _Programs(NamedTuple):
    """What is compiled, for models of every architecture on one mesh."""

    encode: Callable
    means: Callable
    score: Callable
    score_tokens: Callable
    greedy: Callable


@functools.cache
def programs(mesh: jax.sharding.Mesh | None) -> _Programs:
    """Jitted functions of (graphdef, params, ...); on a mesh every device gets the whole result."""

    def encode(graphdef, params, pictures):
        return bind(graphdef, params).encode(pictures)[0]

    def means(graphdef, params, pictures):
        _, taps = bind(graphdef, params).encode(pictures)
        return {name: _mean(tokens) for name, tokens in taps.items() if name in TAPS}

    def score(graphdef, params, tokens, mask, features, options, options_mask, prefixes):
        prompts = Prompts(tokens, mask, features, prefixes)
        return generate.option_log_probs(bind(graphdef, params), prompts, options, options_mask)

    def score_tokens(graphdef, params, tokens, mask, features, options, options_mask, prefixes):
        prompts = Prompts(tokens, mask, features, prefixes)
        return generate.token_log_probs(bind(graphdef, params), prompts, options, options_mask)

    def greedy(graphdef, params, tokens, mask, features, shared, max_new_tokens, eos_ids, pad_id):
        model = bind(graphdef, params)
        options = dict(max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)
        return generate.greedy(model, Prompts(tokens, mask, features, shared), **options)

    jit = functools.partial(jax.jit, **({} if mesh is None else {"out_shardings": replicated(mesh)}))
    return _Programs(
        *(jit(function, static_argnums=0) for function in (encode, means, score, score_tokens)),
        jit(greedy, static_argnums=(0, 6, 7, 8)),
    )


def _mean(tokens: VisualTokens) -> jax.Array:
    """The mean of the real tokens, float32 [b, c]."""
    weights = tokens.valid[..., None].astype(jnp.float32)
    return (tokens.values * weights).sum(1) / weights.sum(1)


class Answerer:
    """A model with its processor, ready to be asked; two models of one architecture share what is compiled.

    Args:
        bundle: the model.
        batch_size: rows asked at once; rounded up to a multiple of the mesh's data * fsdp.
    """

    def __init__(self, bundle: ModelBundle, *, batch_size: int = 32):
        mesh = bundle.mesh
        self.shards = shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.bundle, self.config, self.processor, self.mesh = bundle, bundle.config, bundle.processor, mesh
        self.batch_size = -(-batch_size // shards) * shards
        self._programs = programs(mesh)

    def look(self, prompts: Sequence[bytes | Image.Image | Sequence[bytes | Image.Image]]) -> Seen:
        """The picture, or the pictures, of each prompt; a picture that several prompts show is encoded once.

        Raises:
            UserError: a picture cannot be read.
        """
        rows = [[row] if isinstance(row, bytes | Image.Image) else list(row) for row in prompts]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(id(picture) for row in rows for picture in row))}
        files = list({id(picture): picture for row in rows for picture in row}.values())
        pictures, features = self._read(self._programs.encode, files)
        return Seen(pictures.shapes, features, tuple(tuple(numbers[id(x)] for x in row) for row in rows))

    def means(self, files: Sequence[bytes | Image.Image]) -> dict[str, np.ndarray]:
        """Of each picture and each of `TAPS`, the mean over its tokens: {tap: [n, c]}.

        Raises:
            UserError: a picture cannot be read.
        """
        return self._read(self._programs.means, files)[1]

    def generate(
        self,
        questions: Sequence[str],
        seen: Seen | None = None,
        *,
        max_new_tokens: int = 50,
        turns: Sequence[Turns] | None = None,
    ) -> list[str]:
        """Greedy answers.

        Args:
            questions: one a prompt.
            seen: the pictures of each prompt, those of its worked examples first; None for text alone.
            max_new_tokens: at most so many tokens an answer.
            turns: the worked examples before each question; None for none.

        Raises:
            UserError: a prompt with so many tokens is too long for the model.
        """
        prompts = [row[0][0] for row in self._encoded(questions, [[None]] * len(questions), seen, turns)]
        options = max_new_tokens, tuple(self.processor.eos_ids), self.processor.pad_id
        out = self._run(
            lambda _, *batch: self._programs.greedy(
                self.bundle.graphdef, self.bundle.params, *self._put(batch), *options
            ),
            prompts,
            max_new_tokens,
            seen,
        )
        return [text.strip() for text in self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def score(
        self,
        questions: Sequence[str],
        texts: Sequence[Sequence[str]],
        seen: Seen | None = None,
        *,
        turns: Sequence[Turns] | None = None,
    ) -> Scores:
        """How probable each of several texts is after its question; each prompt is read once.

        Args:
            questions: one a prompt.
            texts: for each question, at least one; rows may have different numbers of them.
            seen: see `generate`, as for `turns`.

        Raises:
            UserError: a prompt with its longest text is too long for the model.
        """
        scores, valid = self._after(self._programs.score, questions, texts, seen, turns)
        return Scores(np.where(valid.any(-1), scores, -np.inf), valid.sum(-1))

    def score_tokens(
        self, questions: Sequence[str], texts: Sequence[str], seen: Seen | None = None
    ) -> list[TokenScores]:
        """What each token of one text after each question scores.

        Args:
            questions: one a prompt.
            texts: one for each question.
            seen: see `generate`.

        Raises:
            UserError: a prompt with its text is too long for the model.
        """
        scores, valid = self._after(self._programs.score_tokens, questions, [[text] for text in texts], seen)
        return [TokenScores(*row[0, own].T) for row, own in zip(scores, valid[:, 0], strict=True)]

    def _after(self, program: Callable, questions, texts, seen, turns=None) -> tuple[np.ndarray, np.ndarray]:
        """What a program makes of prompts and the texts after them, and which tokens of these are real: [n, o, a]."""
        encoded = self._encoded(questions, texts, seen, turns)
        count = max(len(row) for row in encoded)
        length = max(len(ids) for row in encoded for _, ids in row)
        ids = np.full((len(encoded), count, length), self.processor.pad_id, np.int32)
        valid = np.zeros(ids.shape, bool)
        for i, row in enumerate(encoded):
            for j, (_, text) in enumerate(row):
                ids[i, j, : len(text)], valid[i, j, : len(text)] = text, True

        def launch(rows, tokens, mask, features, shared):
            return program(
                self.bundle.graphdef,
                self.bundle.params,
                *self._put((tokens, mask, features, ids[rows], valid[rows], shared)),
            )

        return self._run(launch, [row[0][0] for row in encoded], length, seen), valid

    def _read(self, program: Callable, files: Sequence[bytes | Image.Image]) -> tuple[PackedImages, Any]:
        """The pictures, and what a program of the vision tower makes of them: a row each, in NumPy."""
        pictures = PackedImages.measured(lambda i: self.processor.image(files[i]), len(files), self.config)
        read = functools.partial(program, self.bundle.graphdef, self.bundle.params)
        return pictures, in_batches(lambda part: read(self._put(part)), pictures, self.batch_size)

    def _run(self, launch: Callable, prompts: Sequence[Sequence[int]], room: int, seen: Seen | None) -> np.ndarray:
        """`launch(rows, *batch)` of all prompts; the next batch is prepared while one is computed. See `_batches`."""
        waiting, done, order = collections.deque(), [], []
        for rows, *batch in self._batches(prompts, room, seen):
            if len(waiting) == IN_FLIGHT:
                done.append(np.asarray(waiting.popleft()))
            waiting.append(launch(rows, *batch))
            order.append(rows)
        out = np.concatenate([*done, *map(np.asarray, waiting)])
        return out[np.unique(np.concatenate(order), return_index=True)[1]]  # the last batch repeats its last row

    def _batches(
        self, prompts: Sequence[Sequence[int]], room: int, seen: Seen | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, VisualTokens | None, SharedPrefixes | None]]:
        """Of each batch: its rows, tokens and mask of the prompts, the pictures' features, and what prompts share.

        Prompts that show the same pictures and say the same up to the last of them stand beside each other. That much
        is then read once for all of them, if this makes the batches smaller.
        """
        length = self._length(prompts, room)
        cuts = [0 if seen is None else _after_pictures(prompt, self.config.image_token_id) for prompt in prompts]
        begins = [(seen and seen.rows[i], tuple(prompts[i][:cut])) for i, cut in enumerate(cuts)]
        first = {begin: i for i, begin in reversed([*enumerate(begins)])}  # the first row of each
        number = np.array([first[begin] for begin in begins])
        order = np.argsort(number, kind="stable")
        batches = [order[rows] for rows in padded_rows(len(prompts), self.batch_size)]
        most = max(len(set(number[part])) for rows in batches for part in rows.reshape(self.shards, -1))
        before = _multiple(max(cuts))
        after = _multiple(max(len(prompt) - cut for prompt, cut in zip(prompts, cuts, strict=True)))
        each = self.batch_size // self.shards
        if not before or most * before + each * after >= each * length:
            for rows in batches:
                features = None if seen is None else seen.of(rows).tokens()
                yield rows, *self._padded([prompts[i] for i in rows], length), features, None
            return
        for rows in batches:
            parts = [np.unique(number[part], return_inverse=True) for part in rows.reshape(self.shards, -1)]
            which = np.stack([place.astype(np.int32) for _, place in parts])
            own = np.concatenate([np.pad(found, (0, most - len(found)), mode="edge") for found, _ in parts])
            shared = SharedPrefixes(*self._padded([prompts[i][: cuts[i]] for i in own], before), which)
            yield rows, *self._padded([prompts[i][cuts[i] :] for i in rows], after), seen.of(own).tokens(), shared

    def _put(self, arrays: Any) -> Any:
        """Rows of the same arrays on every process, spread over the mesh if there is one."""
        return arrays if self.mesh is None else shard_rows(self.mesh, arrays)

    def _encoded(self, questions, texts, seen, turns) -> list[list[tuple[list[int], list[int]]]]:
        """Tokens of each prompt and of each text after it."""
        return [
            self.processor.encode_each(
                question, row, () if seen is None else seen.images(i), () if turns is None else turns[i]
            )
            for i, (question, row) in enumerate(zip(questions, texts, strict=True))
        ]

    def _length(self, prompts: Sequence[Sequence[int]], room: int) -> int:
        """What prompts are padded to, with `room` for what follows them."""
        longest, limit = max(map(len, prompts)), self.config.text.max_positions
        if longest + room > limit:
            raise UserError(
                f"a question of {longest} tokens and {room} for the answer exceed the model's {limit}; "
                "shorten it, ask without worked examples, or allow fewer new tokens."
            )
        return min(_multiple(longest), limit - room)

    def _padded(self, prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded tokens, and which are real."""
        tokens = np.full((len(prompts), length), self.processor.pad_id, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for i, row in enumerate(prompts):
            tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        return tokens, mask


def _after_pictures(prompt: Sequence[int], image_token: int) -> int:
    """Where a prompt goes on after its last picture; at least one token is left."""
    return min(max((i + 1 for i, token in enumerate(prompt) if token == image_token), default=0), len(prompt) - 1)


def _multiple(length: int) -> int:
    """Few lengths are compiled."""
    return -(-length // 8) * 8
