"""Batched inference with a model and its processor, on any number of devices.

An image passes through the vision tower once, independent of the number of questions about it. Prefix caching: the
tokens up to the last image of a prompt pass through the language model once for all prompts of a batch that share them,
since an image is hundreds of tokens and a question a few. The rows of a batch are sharded over the mesh's data and fsdp
axes. Every process prepares all rows and gets all answers.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.data.batching import check_rows, in_batches, padded_rows
from vkd_jax.data.images import PackedImages
from vkd_jax.evaluation.encoded_images import EncodedImages, check_features, check_sight, with_soft_tokens
from vkd_jax.models import generate
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.models.generate import Prompts, SharedPrefixes
from vkd_jax.runtime import finite, memory
from vkd_jax.runtime.mesh import replicated, shard_rows
from vkd_jax.types import UserError, located

Turns = Sequence[tuple[str, str, int]]  # earlier turns of the conversation: question, answer, number of images

TAPS = ("features", "projector")  # the input of the projector, and its output
IN_FLIGHT = 2  # batches that were dispatched to the device and not yet fetched
TEXT_BYTES = 2**30  # of the scores of a batch's texts, and of their attention in a layer; more texts are divided


class Scores(NamedTuple):
    """Scores of several texts after each question; a missing text has the score -inf and no tokens."""

    log_probs: np.ndarray  # [n, o]: log p(text and end of sequence | question), in nats
    counts: np.ndarray  # int [n, o]: number of tokens, end of sequence included

    @property
    def nll(self) -> np.ndarray:
        """Mean negative log-likelihood per token, [n, o]."""
        return -self.log_probs / np.maximum(self.counts, 1)


class TokenScores(NamedTuple):
    """Scores of the tokens of one text, end of sequence included: float [tokens] each, in nats."""

    log_probs: np.ndarray  # log p(token | question and preceding tokens)
    means: np.ndarray  # mean of log p over the vocabulary, weighted by p
    deviations: np.ndarray  # standard deviation of log p, weighted by p


class _Programs(NamedTuple):
    """The jitted functions for models of every architecture on one mesh."""

    encode: Callable
    means: Callable
    score: Callable
    score_tokens: Callable
    greedy: Callable


@functools.cache
def programs(mesh: jax.sharding.Mesh | None) -> _Programs:
    """Jits the functions of (graphdef, params, ...) for a mesh; their results are replicated over its devices."""

    def encode(graphdef, params, images):
        return bind(graphdef, params).encode(images)[0]

    def means(graphdef, params, images):
        _, taps = bind(graphdef, params).encode(images)
        return {name: _mean(tokens) for name, tokens in taps.items() if name in TAPS}

    def score(graphdef, params, tokens, mask, features, options, options_mask, prefixes):
        prompts = Prompts(tokens, mask, features, prefixes)
        return generate.option_log_probs(bind(graphdef, params), prompts, options, options_mask)

    def score_tokens(graphdef, params, tokens, mask, features, options, options_mask, prefixes):
        prompts = Prompts(tokens, mask, features, prefixes)
        return generate.token_log_probs(bind(graphdef, params), prompts, options, options_mask)

    def greedy_tokens(graphdef, params, tokens, mask, features, shared, max_new_tokens, eos_ids, pad_id):
        model = bind(graphdef, params)
        options = dict(max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)
        return generate.greedy(model, Prompts(tokens, mask, features, shared), **options)

    jit = functools.partial(jax.jit, **({} if mesh is None else {"out_shardings": replicated(mesh)}))
    return _Programs(
        *(jit(function, static_argnums=0) for function in (encode, means, score, score_tokens)),
        jit(greedy_tokens, static_argnums=(0, 6, 7, 8)),
    )


def _mean(tokens: VisualTokens) -> jax.Array:
    """The mean of the valid tokens, float32 [b, c]."""
    weights = tokens.valid[..., None].astype(jnp.float32)
    return (tokens.values * weights).sum(1) / weights.sum(1)


class Answerer:
    """Answers questions in batches with a model. Models of one architecture share compiled programs.

    Args:
        bundle: the model.
        batch_size: rows per batch; rounded up to a multiple of the mesh's data * fsdp.
        soft_tokens: embeddings [k, width] that are put before the features of each image; None for none.

    Example:
        >>> answerer = Answerer(bundle)  # doctest: +SKIP
        >>> answerer.generate(["Who is this?"], answerer.encode_images([png]))  # doctest: +SKIP
        ['Mara Lindt']
    """

    def __init__(self, bundle: ModelBundle, *, batch_size: int = 32, soft_tokens: np.ndarray | None = None):
        mesh = bundle.mesh
        self.shards = shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.bundle, self.config, self.processor, self.mesh = bundle, bundle.config, bundle.processor, mesh
        self.batch_size = -(-batch_size // shards) * shards
        self._programs, self._soft_tokens = programs(mesh), soft_tokens
        self._sees = False  # whether the features of a single image were checked
        if soft_tokens is not None:
            self.processor = bundle.processor.with_soft_tokens(len(soft_tokens))

    def encode_images(
        self, prompts: Sequence[bytes | Image.Image | Sequence[bytes | Image.Image]], names: Sequence[str] = ()
    ) -> EncodedImages:
        """Encodes the image, or the images, of each prompt. An image that several prompts share is encoded once.

        Args:
            prompts: an image or several for each prompt.
            names: names of the images for messages, if each prompt has an image of its own.

        Raises:
            UserError: an image cannot be read.
            NotFinite: the features are NaN or too large, or those of different images are the same; for one image,
                the first one is compared with its negative.
        """
        rows = [[row] if isinstance(row, bytes | Image.Image) else list(row) for row in prompts]
        unique = {id(image): image for row in rows for image in row}
        numbers = {key: i for i, key in enumerate(unique)}
        name_of = dict(zip((id(row[0]) for row in rows), names, strict=False))
        names = [name_of[key] for key in unique] if names else ()
        images, features = self._encode(self._programs.encode, list(unique.values()), names)
        check_features(images, features.values)
        if len(images) == 1 and not self._sees:
            run = functools.partial(self._programs.encode, self.bundle.graphdef, self.bundle.params)
            check_sight(
                images, features.values, lambda packed: in_batches(lambda x: run(self._put(x)), packed, self.batch_size)
            )
            self._sees = True
        if self._soft_tokens is not None:
            features = jax.tree.map(np.asarray, with_soft_tokens(features, self._soft_tokens))
        return EncodedImages(images.shapes, features, tuple(tuple(numbers[id(x)] for x in row) for row in rows))

    def means(self, files: Sequence[bytes | Image.Image]) -> dict[str, np.ndarray]:
        """The mean over the tokens of each image at each of `TAPS`: {tap: [n, c]}.

        Raises:
            UserError: an image cannot be read.
            NotFinite: a mean is NaN or infinite, or the means of different images are the same.
        """
        images, means = self._encode(self._programs.means, files)
        for values in means.values():
            check_features(images, values)
        return means

    def generate(
        self,
        questions: Sequence[str],
        encoded_images: EncodedImages | None = None,
        *,
        max_new_tokens: int = 50,
        turns: Sequence[Turns] | None = None,
        names: Sequence[str] = (),
    ) -> list[str]:
        """Answers questions by greedy decoding.

        Args:
            questions: one per prompt.
            encoded_images: the images of each prompt, those of its earlier turns first; None for text-only prompts.
            max_new_tokens: maximum number of tokens of an answer.
            turns: the earlier turns of each prompt; None for none.
            names: names of the questions for messages; () to number them.

        Raises:
            UserError: a prompt with `max_new_tokens` is too long for the model.
            NotFinite: the model's scores of the next token are NaN or infinite, or the same for all tokens.
        """
        answers = self.generate_with_ends(
            questions, encoded_images, max_new_tokens=max_new_tokens, turns=turns, names=names
        )
        return [text for text, _ in answers]

    def generate_with_ends(
        self,
        questions: Sequence[str],
        encoded_images: EncodedImages | None = None,
        *,
        max_new_tokens: int = 50,
        turns: Sequence[Turns] | None = None,
        names: Sequence[str] = (),
    ) -> list[tuple[str, bool]]:
        """Returns what `generate` returns, each answer with whether it ended before `max_new_tokens` cut it off."""
        names = names or _numbered(questions)
        encoded = self._encoded(questions, [[None]] * len(questions), encoded_images, turns, names)
        prompts = [row[0][0] for row in encoded]
        self._check_length(prompts, names, max_new_tokens)
        options = max_new_tokens, tuple(self.processor.eos_ids), self.processor.pad_id
        out = self._run(
            self._programs.greedy,
            lambda _, *batch: (*self._put(batch), *options),
            prompts,
            max_new_tokens,
            encoded_images,
        )
        if (out == generate.NOT_FINITE).any():
            raise finite.error("The model's scores of the next token")
        texts = self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)
        ended = np.isin(out, list(self.processor.eos_ids)).any(axis=1)
        return [(text.strip(), bool(end)) for text, end in zip(texts, ended, strict=True)]

    def score(
        self,
        questions: Sequence[str],
        texts: Sequence[Sequence[str]],
        encoded_images: EncodedImages | None = None,
        *,
        turns: Sequence[Turns] | None = None,
        names: Sequence[str] = (),
    ) -> Scores:
        """Log-probabilities of several texts after each question.

        A prompt passes through the model once, unless it has so many texts that they exceed `TEXT_BYTES`.

        Args:
            questions: one per prompt.
            texts: at least one for each question; their number may differ.
            encoded_images: see `generate`.
            turns: see `generate`.
            names: see `generate`.

        Raises:
            UserError: a prompt with its longest text is too long for the model.
            NotFinite: a score is NaN or infinite, or the scores of the next token are the same for all tokens.
        """
        chunks, scores, valid = self._score_texts(self._programs.score, questions, texts, encoded_images, turns, names)
        self._check_scores(scores[valid.any(-1)], valid.sum(-1)[valid.any(-1)], "The model's scores of texts")
        log_probs = np.full((len(texts), max(map(len, texts))), -np.inf, np.float32)
        counts = np.zeros(log_probs.shape, int)
        for (row, part), row_scores, row_valid in zip(chunks, scores, valid, strict=True):
            size = part.stop - part.start
            log_probs[row, part], counts[row, part] = row_scores[:size], row_valid.sum(-1)[:size]
        return Scores(log_probs, counts)

    def score_tokens(
        self,
        questions: Sequence[str],
        texts: Sequence[str],
        encoded_images: EncodedImages | None = None,
        *,
        names: Sequence[str] = (),
    ) -> list[TokenScores]:
        """Scores of each token of one text after each question.

        Args:
            questions: one per prompt.
            texts: one for each question.
            encoded_images: see `generate`.
            names: see `generate`.

        Raises:
            UserError: a prompt with its text is too long for the model.
            NotFinite: a score is NaN or infinite.
        """
        _, scores, valid = self._score_texts(
            self._programs.score_tokens, questions, [[text] for text in texts], encoded_images, names=names
        )
        finite.check(scores[valid], "The model's scores of tokens")
        self._check_scores(scores[valid][:, 0], 1, "The model's scores of tokens")
        return [TokenScores(*row[0, mask].T) for row, mask in zip(scores, valid[:, 0], strict=True)]

    def _check_scores(self, log_probs: np.ndarray, counts: Any, what: str) -> None:
        """Checks that log-probabilities of texts of `counts` tokens are finite, and not those of equal tokens."""
        finite.check(log_probs, what)
        if log_probs.size and np.allclose(log_probs, -math.log(self.config.text.vocab) * counts, rtol=2e-6, atol=0):
            raise finite.error(what)

    def _score_texts(
        self, program: Callable, questions, texts, encoded_images, turns=None, names=()
    ) -> tuple[list[tuple[int, slice]], np.ndarray, np.ndarray]:
        """Runs a scoring program on the texts of each question, in chunks of at most `_texts_per_row`.

        Returns:
            The question and the texts of each of n chunks, the program's output, and the mask of valid tokens, bool
            [n, o, a].
        """
        names = names or _numbered(questions)
        encoded = self._encoded(questions, texts, encoded_images, turns, names)
        length, longest = max((len(ids), name) for row, name in zip(encoded, names, strict=True) for _, ids in row)
        self._check_length([row[0][0] for row in encoded], names, length, longest)
        prompt = max(len(row[0][0]) for row in encoded)
        length = min(_round_up(length, 4), self.config.text.max_positions - prompt)
        most = self._texts_per_row(prompt, length)
        chunks = [
            (i, slice(first, min(first + most, len(row))))
            for i, row in enumerate(encoded)
            for first in range(0, len(row), most)
        ]
        ids = np.full((len(chunks), max(x.stop - x.start for _, x in chunks), length), self.processor.pad_id, np.int32)
        valid = np.zeros(ids.shape, bool)
        for number, (i, part) in enumerate(chunks):
            for j, (_, text) in enumerate(encoded[i][part]):
                ids[number, j, : len(text)], valid[number, j, : len(text)] = text, True
        rows = [i for i, _ in chunks]

        def arguments(rows, tokens, mask, features, shared):
            return self._put((tokens, mask, features, ids[rows], valid[rows], shared))

        out = self._run(
            program,
            arguments,
            [encoded[i][0][0] for i in rows],
            length,
            encoded_images and encoded_images.select(rows),
        )
        return chunks, out, valid

    def _texts_per_row(self, prompt: int, length: int) -> int:
        """The number of texts of `length` tokens after a prompt of `prompt` tokens that are scored in one pass.

        k tokens of texts have a score for each entry of the vocabulary, and each head's attention to the prompt and to
        themselves: k * vocab + heads * k * (prompt + k) float32 values, which are at most `TEXT_BYTES` per batch.
        """
        vocab, heads = self.config.text.vocab, self.config.text.heads
        most = TEXT_BYTES / (self.batch_size * np.dtype(np.float32).itemsize)
        linear = vocab + heads * prompt
        return max(int((math.sqrt(linear**2 + 4 * heads * most) - linear) / (2 * heads)) // length, 1)

    def _encode(
        self, program: Callable, files: Sequence[bytes | Image.Image], names: Sequence[str] = ()
    ) -> tuple[PackedImages, Any]:
        """Runs a program of the vision tower; returns the images and its output (NumPy, one row per image)."""
        make = self.processor.named_images(files, names or [f"image {number}" for number in range(1, len(files) + 1)])
        images = PackedImages.measured(make, len(files), self.config)
        bundle, checked = self.bundle, False

        def encode(batch):
            nonlocal checked
            if not checked:  # all batches have one shape
                self._check_memory(program, [self._put(batch)], "images")
                checked = True
            return program(bundle.graphdef, bundle.params, self._put(batch))

        return images, in_batches(encode, images, self.batch_size)

    def _check_memory(self, program: Callable, arguments: Sequence[Any], subject: str) -> None:
        """Checks that a batch fits in the memory of the devices."""
        memory.check_program(
            program,
            self.bundle.graphdef,
            self.bundle.params,
            *arguments,
            devices=[jax.devices()[0]] if self.mesh is None else self.mesh.devices.flat,
            subject=f"the model and batches of {self.batch_size:,} {subject}",
            remedy="decrease eval.batch_size, or use shorter texts and smaller images",
        )

    def _run(
        self,
        program: Callable,
        make_arguments: Callable,
        prompts: Sequence[Sequence[int]],
        room: int,
        encoded_images: EncodedImages | None,
    ) -> np.ndarray:
        """Runs a program with `make_arguments(rows, *batch)` for all batches, as `_batches` yields them.

        The next batch is prepared while one runs.
        """
        waiting, done, order = collections.deque(), [], []
        for rows, *batch in self._batches(prompts, room, encoded_images):
            if len(waiting) == IN_FLIGHT:
                done.append(np.asarray(waiting.popleft()))
            arguments = make_arguments(rows, *batch)
            if not order:  # all batches have one shape
                self._check_memory(program, arguments, "questions")
            waiting.append(program(self.bundle.graphdef, self.bundle.params, *arguments))
            order.append(rows)
        out = np.concatenate([*done, *map(np.asarray, waiting)])
        return out[np.unique(np.concatenate(order), return_index=True)[1]]  # the last batch repeats its last row

    def _batches(
        self,
        prompts: Sequence[Sequence[int]],
        room: int,
        encoded_images: EncodedImages | None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, VisualTokens | None, SharedPrefixes | None]]:
        """Yields (rows, tokens, mask, image features, shared prefixes) for each batch.

        Prompts with the same prefix (the tokens up to the last image, and the images) are sorted next to each other.
        If it makes the batches smaller, each prefix is then a row of its own, which passes through the model once.
        """
        longest = max(map(len, prompts))
        length = min(_round_up(longest), self.config.text.max_positions - room)
        check_rows(self.batch_size, length * (np.dtype(np.int32).itemsize + np.dtype(bool).itemsize))
        ends = [
            0 if encoded_images is None else _prefix_length(prompt, self.config.image_token_id) for prompt in prompts
        ]
        prefixes = [(encoded_images and encoded_images.rows[i], tuple(prompts[i][:end])) for i, end in enumerate(ends)]
        first_rows = {prefix: i for i, prefix in reversed([*enumerate(prefixes)])}  # the first row with each prefix
        groups = np.array([first_rows[prefix] for prefix in prefixes])
        order = np.argsort(groups, kind="stable")
        batches = [order[rows] for rows in padded_rows(len(prompts), self.batch_size)]
        count = max(len(set(groups[shard])) for rows in batches for shard in rows.reshape(self.shards, -1))
        prefix_length = _round_up(max(ends))
        rest_length = _round_up(max(len(prompt) - end for prompt, end in zip(prompts, ends, strict=True)))
        shard_size = self.batch_size // self.shards
        if not prefix_length or count * prefix_length + shard_size * rest_length >= shard_size * length:
            for rows in batches:
                features = None if encoded_images is None else encoded_images.select(rows).tokens()
                yield rows, *self._padded([prompts[i] for i in rows], length), features, None
            return
        for rows in batches:
            shards = [np.unique(groups[shard], return_inverse=True) for shard in rows.reshape(self.shards, -1)]
            which = np.stack([inverse.astype(np.int32) for _, inverse in shards])
            owners = np.concatenate([np.pad(unique, (0, count - len(unique)), mode="edge") for unique, _ in shards])
            shared = SharedPrefixes(*self._padded([prompts[i][: ends[i]] for i in owners], prefix_length), which)
            rest = self._padded([prompts[i][ends[i] :] for i in rows], rest_length)
            yield rows, *rest, encoded_images.select(owners).tokens(), shared

    def _put(self, arrays: Any) -> Any:
        """Shards the rows of arrays, which are the same on every process, over the mesh if there is one."""
        return arrays if self.mesh is None else shard_rows(self.mesh, arrays)

    def _encoded(self, questions, texts, encoded_images, turns, names) -> list[list[tuple[list[int], list[int]]]]:
        """Tokens of each prompt, and of each text after it."""
        encoded = []
        for i, (question, row, name) in enumerate(zip(questions, texts, names, strict=True)):
            images = () if encoded_images is None else encoded_images.blank_images(i)
            with located(name):
                encoded.append(self.processor.encode_each(question, row, images, () if turns is None else turns[i]))
        return encoded

    def _check_length(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], room: int, of_room: str = ""
    ) -> None:
        """Checks that the longest prompt fits with the tokens after a prompt, for which every question has room.

        Args:
            prompts: the tokens of each prompt.
            names: the name of each question, for messages.
            room: the number of tokens after a prompt.
            of_room: the name of the question whose answer needs them; "" if they are new tokens.

        Raises:
            UserError: they do not fit.
        """
        longest, name = max(zip(map(len, prompts), names, strict=True))
        if longest + room <= (limit := self.config.text.max_positions):
            return
        if of_room in ("", name):
            problem = f"{name}: its {longest} tokens and {room} for the answer"
        elif longest < room:
            problem = f"{of_room}: its answer of {room} tokens, beside the longest prompt of {longest} tokens ({name}),"
        else:
            problem = f"{name}: its prompt of {longest} tokens, beside the longest answer of {room} tokens ({of_room}),"
        raise UserError(
            f"{problem} exceed the model's {limit}; shorten it, ask without worked examples, or allow fewer new tokens."
        )

    def _padded(self, prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded tokens, and the mask of valid ones."""
        tokens = np.full((len(prompts), length), self.processor.pad_id, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for i, row in enumerate(prompts):
            tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        return tokens, mask


def _numbered(questions: Sequence[str]) -> list[str]:
    """Names of questions for messages."""
    return [f"question {number}" for number in range(1, len(questions) + 1)] if len(questions) > 1 else ["the question"]


def _prefix_length(prompt: Sequence[int], image_token: int) -> int:
    """Number of tokens up to the last image of a prompt; at least one token follows them."""
    return min(max((i + 1 for i, token in enumerate(prompt) if token == image_token), default=0), len(prompt) - 1)


def _round_up(length: int, step: int = 8) -> int:
    """Rounds up to a multiple of `step`, so that few lengths are compiled."""
    return -(-length // step) * step
