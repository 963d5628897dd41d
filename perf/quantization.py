"""Measures how quantizing the frozen language model changes the gradients of the visual weights, on the tiny LLaVA.

python perf/quantization.py [--questions N] [--json FILE]      half a minute on a CPU

Compares each quantization with float32, over the answer tokens of questions about images:

cosine  cosine similarity of the gradients of the mean cross-entropy with respect to the visual weights
KL      mean KL(float32 || quantized) of the next-token distributions, in nats
top-1   share of tokens with the same most probable next token
bytes   size of the language model, with two 4-bit values per byte
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tables
from command import ROOT, run

from vkd_jax import benchmarks
from vkd_jax.checkpoints import hf
from vkd_jax.data.encoding import Batch, encode_set
from vkd_jax.data.processor import Processor
from vkd_jax.methods import losses, scope
from vkd_jax.models import quantize
from vkd_jax.models.base import VisualTokens, bind

MODEL = ROOT / "vkd_jax" / "assets" / "tiny_llava"
QUANTIZATIONS = ("int8", "int8:64", "int4", "int4:64", "w8a8")
SEED = 0


def draw_batch(folder: Path, config, count: int) -> Batch:
    """Draws questions of the forget set and the retain set, each with its image and answer."""
    with tempfile.TemporaryDirectory() as cache:
        sets = benchmarks.read(benchmarks.create("mllmu", {}), cache)
    examples = [e for name in ("forget", "retain") for e in sets[name] if e.image is not None]
    chosen = np.random.default_rng(SEED).permutation(len(examples))[:count]
    encoded = encode_set(Processor(folder, config), [examples[i] for i in chosen], max_length=config.text.max_positions)
    return encoded.batch(np.arange(len(encoded)))


def visual_half(graphdef, params, paths, batch: Batch) -> tuple[VisualTokens, Callable]:
    """Returns the features of the images, and a function from their gradient to that of the visual weights [n]."""

    @jax.jit
    def encode(trainable):
        features, _ = bind(graphdef, {**params, **trainable}).encode(batch.images)
        return features.values, features.coords

    values, pull_back, coords = jax.vjp(encode, {path: params[path] for path in paths}, has_aux=True)
    to_weights = jax.jit(lambda gradient: jnp.concatenate([x.ravel() for x in pull_back(gradient)[0].values()]))
    return VisualTokens(values, coords), to_weights


def language_half(graphdef, params, features: VisualTokens, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities of the answer tokens [b, a, v], and the gradient of the cross-entropy [b, p, d]."""

    @jax.jit
    def run(values, params):
        def loss(values):
            inputs = features._replace(values=values)
            logits, _ = bind(graphdef, params)(
                batch.tokens, batch.mask, features=inputs, query_positions=batch.target_positions
            )
            return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask).mean(), logits

        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(values)
        return jax.nn.log_softmax(logits), gradient

    return run(features.values, params)


def language_bytes(params) -> int:
    """Returns the bytes of the language model as an accelerator stores it."""
    leaves = jax.tree.leaves({path: x for path, x in params.items() if path.startswith("language_model/")})
    info = [jnp.iinfo(x.dtype) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype) for x in leaves]
    return sum(x.size * i.bits // 8 for x, i in zip(leaves, info, strict=True))


@jax.default_matmul_precision("highest")  # accelerators multiply float32 in lower precision by default
def measure(questions: int) -> dict:
    """Returns the results as JSON values: {"model": ..., "rows": [{"quantize": "int8", "cosine": ...}, ...]}."""
    graphdef, params, config = hf.load(MODEL, dtype="float32")
    batch = draw_batch(MODEL, config, questions)
    # The visual half is the same for every row of the table.
    features, to_weights = visual_half(graphdef, params, scope.visual_paths(params, config, -1), batch)

    def compute(params):
        log_p, gradient = language_half(graphdef, params, features, batch)
        return np.asarray(log_p, np.float64)[batch.target_mask], np.asarray(to_weights(gradient), np.float64)

    log_p, gradient = compute(params)
    size = language_bytes(params)
    rows = [dict(quantize="", cosine=1.0, kl=0.0, top1=1.0, bytes=size, share=1.0)]
    for text in QUANTIZATIONS:
        quantization = quantize.parse(text)
        quantized = {path: quantize.quantize_param(path, x, quantization) for path, x in params.items()}
        log_q, quantized_gradient = compute(quantized)
        cosine = gradient @ quantized_gradient / np.linalg.norm(gradient) / np.linalg.norm(quantized_gradient)
        rows.append(
            dict(
                quantize=text,
                cosine=float(cosine),
                kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
                top1=float((log_p.argmax(-1) == log_q.argmax(-1)).mean()),
                bytes=language_bytes(quantized),
                share=language_bytes(quantized) / size,
            )
        )
    return dict(
        model=MODEL.name,
        questions=len(batch.tokens),
        answer_tokens=len(log_p),
        seed=SEED,
        rows=rows,
    )


if __name__ == "__main__":
    run(__doc__, measure, tables.quantization, questions=(256, "the number of questions"))
