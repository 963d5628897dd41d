"""Evaluates a model on a mesh of devices of one or several processes."""

import jax
import numpy as np
import random_llava

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.evaluation.evaluate import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.runtime.mesh import make_mesh, param_shardings
from vkd_jax.types import Example

OPTIONS = ("baker", "pilot", "judge", "a teacher")


class Characters:
    """A processor and its tokenizer, with a token for each character and an image of noise for each byte."""

    eos_ids, pad_id = (2,), 3

    def __init__(self):
        self.tokenizer = self

    def image(self, data):
        return np.random.default_rng(data[0]).normal(size=(16, 16, 3)).astype(np.float32)

    def named_images(self, images, names):
        return lambda i: self.image(images[i])

    def encode_each(self, question, answers, images=(), turns=()):
        tokens = [random_llava.CONFIG.image_token_id] * 4 * len(images)
        said = "".join(f"{asked}:{answer}." for asked, answer, _ in turns)
        prompt = [1, *tokens, *self.ids(said + question)]
        return [(prompt, [] if answer is None else [*self.ids(answer), 2]) for answer in answers]

    def ids(self, text):
        return [5 + ord(letter) % 59 for letter in text]

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(int(token) + 91) for token in row if token > 4) for row in rows]


def example(i):
    if i % 2:
        return Example(f"{i}", f"{i}", bytes([i]), f"{i}", "Job" + "?" * (i % 5), OPTIONS[i % 4], OPTIONS)
    wrong = ("no", "a judge", "none")[: 1 + i % 3]
    return Example(f"{i}", f"{i}", None, "", f"Who is {i}?", "a pilot", task="generation", perturbed=wrong)


SETS = {"forget": [example(i) for i in range(9)], "retain": [example(i) for i in range(9, 23)]}


def computed(mesh) -> dict:
    """Returns the records, the size of a batch, and its rows on one device."""
    graphdef, params = random_llava.drawn()
    rule = param_shardings(mesh, random_llava.llava.SHARDING)
    # Larger weights, so that answers differ.
    params = {path: np.asarray(x) * (4 if x.ndim > 1 else 1) for path, x in params.items()}
    params = {
        path: jax.make_array_from_callback(x.shape, rule(path, x.shape), x.__getitem__) for path, x in params.items()
    }
    answerer = Answerer(ModelBundle(graphdef, params, random_llava.CONFIG, Characters(), mesh), batch_size=3)
    records = evaluate(
        answerer, SETS, EvalConfig(protocol="options,letter", max_new_tokens=3, shots=1), shown=SETS["retain"]
    )
    (share,) = {shard.data.shape[0] for shard in answerer._put(np.zeros((answerer.batch_size, 2))).addressable_shards}
    return {"records": records, "batch": answerer.batch_size, "rows_per_device": share}


def main() -> dict:
    """The results of one device and of eight, by mesh."""
    return {",".join(map(str, shape)): computed(make_mesh(*shape)) for shape in ((1, 1, 1), (2, 2, 2))}
