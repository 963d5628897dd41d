"""Decoder depth: do the inner layers of the language model still know what its output no longer says?

Let h_n be the state of the last prompt token after n of the decoder's N blocks. Two readers of h_n, for some n:

    logit lens   the model's own final norm and head on the states after n blocks; the option with the largest
                 log-probability is the answer. Nothing is trained; n = N is the model itself.
    probe        a linear head in place of the other blocks: one ridge regression per answer, in closed form,
                 trained on the questions about retained people alone; the option with the largest score is the answer

The probe learns how answers are written in h_n from retained people only, so that a correct answer about a forgotten
person was in the state. Options that are no retained person's answer have no score, and a question whose true answer
is one of them is left out. On other images of retained people, the probe shows that it works.

References: nostalgebraist (2020), interpreting GPT: the logit lens; Alain and Bengio, arXiv 1610.01644. Open-MMU cuts
the decoder and trains a new head on the forget set itself, where every model, also a retain-only one, gets 99 %.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.attacks.probe import ridge_scores
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.batching import in_batches, rng
from vkd_jax.data.encoding import Batch
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.methods import losses
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.results import AttackCell
from vkd_jax.runtime import finite
from vkd_jax.runtime.mesh import shard_rows
from vkd_jax.types import Example, Params, Role


class States(NamedTuple):
    """What the layers say about n rows at each of k depths."""

    log_probs: np.ndarray  # [n, k]: log p(answer | prompt) by the logit lens
    last: np.ndarray  # [n, k, width]: the state of the last prompt token


@dataclasses.dataclass(frozen=True)
class Depth(Section):
    """Reads the answer from the states after some of the decoder's blocks."""

    SECTION: ClassVar[str] = "attacks.depth"
    depths: tuple[float, ...] = setting(
        (0.25, 0.5, 0.75, 1.0), "Shares of the decoder's blocks that are computed.", above=0, maximum=1, nonempty=True
    )
    ridge: float = setting(0.01, "Ridge penalty of the probe per channel.", above=0, maximum=1e6)
    most: int = setting(2000, "Largest number of questions that the probe trains on.", minimum=2, maximum=20000)

    TITLE: ClassVar[str] = "Decoder depth: what the inner layers still know"
    ABOUT: ClassVar[str] = (
        "The answer is read from the state after some of the language model's blocks: by the model's own head "
        "(logit lens), or by a linear head that was trained on the people to *retain* only (probe). A method that "
        "hides knowledge in the last blocks leaves it readable before them. Compare the accuracy with that of the "
        "retain-only model, and with the probe's on other images of retained people."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def run(self, subject: Subject) -> Records:
        """One record per question, depth and reader."""
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT, Role.RETAIN_HOLDOUT)
        test = [(name, e) for name, examples in sets.items() for e in examples if e.options]
        if not test:
            return []
        blocks = subject.model.config.text.layers
        depths = tuple(sorted({math.ceil(depth * blocks) for depth in self.depths}))
        options = [dataclasses.replace(e, answer=option) for _, e in test for option in e.options]
        states = read_states(subject, options, depths)
        ends = np.cumsum([len(e.options) for _, e in test])
        first = ends - [len(e.options) for _, e in test]  # the states of a prompt are the same for all options
        train = self._training(subject)
        known = read_states(subject, train, depths).last if train else None
        records = []
        for k, depth in enumerate(depths):
            place = f"after {depth} of {blocks} blocks"
            lens = [states.log_probs[a:b, k] for a, b in zip(first, ends, strict=True)]
            records += _chosen(f"logit lens {place}", test, lens)
            if known is not None:
                labels = np.array([e.answer for e in train])
                names, scores = ridge_scores(known[:, k], labels, states.last[first, k], self.ridge)
                index = {name: i for i, name in enumerate(names.tolist())}
                asked = [i for i, (_, e) in enumerate(test) if e.answer in index]
                of_options = [
                    np.array([scores[i, index[o]] if o in index else -np.inf for o in test[i][1].options])
                    for i in asked
                ]
                records += _chosen(f"probe {place}", [test[i] for i in asked], of_options)
        return records

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy of each reader at each depth."""
        return base.accuracy(records)

    def _training(self, subject: Subject) -> list[Example]:
        """The questions that the probe trains on, in random order."""
        examples = [e for rows in base.questions(subject, Role.RETAIN).values() for e in rows if e.options]
        if len({e.answer for e in examples}) < 2:
            return []
        return [examples[i] for i in rng(subject.seed, "attacks/depth").permutation(len(examples))[: self.most]]


def _chosen(variant: str, items: Sequence[tuple[str, Example]], scores: Sequence[np.ndarray]) -> Records:
    """Records of the option with the largest score of each question."""
    records = []
    for (name, e), row in zip(items, scores, strict=True):
        prediction = e.options[int(np.argmax(row))]
        fields = dict(set=name, id=e.id, person=e.person, question=e.question, answer=e.answer)
        verdict = dict(prediction=prediction, correct=prediction == e.answer)
        records.append(base.attack_record(variant, fields | verdict))
    return records


def read_states(subject: Subject, examples: Sequence[Example], depths: tuple[int, ...]) -> States:
    """Reads the states after some numbers of blocks, for questions with an image and an answer.

    Raises:
        NotFinite: a state is NaN or infinite.
    """
    model = subject.model
    answerer = Answerer(model, batch_size=subject.config.eval.batch_size)
    encoded = model.encode(examples)
    images = {e.image_id: e.image for e in examples}  # in the order of `encoded.images`
    features = answerer.encode_images(list(images.values()), list(images)).features

    def read(rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        batch = dataclasses.replace(encoded.batch(rows), images=None)
        visual = jax.tree.map(lambda x: x[encoded.image_rows[rows]], features)
        arrays = (batch, visual) if model.mesh is None else shard_rows(model.mesh, (batch, visual))
        return states_at(model.graphdef, model.params, *arrays, depths)

    states = States(*in_batches(read, np.arange(len(encoded)), answerer.batch_size))
    finite.check(tuple(states), "The model's inner states")
    return states


@functools.partial(jax.jit, static_argnums=(0, 4))
def states_at(
    graphdef: Any, params: Params, batch: Batch, features: VisualTokens, depths: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The arrays of `States` for the rows of a batch."""
    model = bind(graphdef, params)
    decoder = model.language_model
    embedded = model.embed(batch.tokens, batch.mask, features)
    log_probs, last = [], []
    for depth in depths:
        hidden, _ = decoder.read(embedded, batch.mask, layers=depth)
        at = jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)
        logits = decoder.logits(decoder.norm(at))
        log_probs.append(losses.sequence_log_prob(logits, batch.targets, batch.target_mask))
        last.append(at[:, 0].astype(jnp.float32))
    return jnp.stack(log_probs, 1), jnp.stack(last, 1)
