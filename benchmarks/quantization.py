"""What a quantised language model costs the training of the visual weights, on the tiny LLaVA and its people.

python benchmarks/quantization.py [--questions N] [--json FILE]      half a minute on a CPU

Against the same model in float32, over the answer tokens of questions about pictures:

cosine  of the gradients of the mean cross-entropy with respect to the visual weights
KL      mean KL(float32 || quantised) of the next-token distributions, in nats
top-1   share of tokens whose likeliest successor is the same
bytes   of the language model, 4-bit values two to a byte
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone need not be installed

from vkd_jax import convert, data, losses
from vkd_jax.data.processing import Batch, Processor, encode_set
from vkd_jax.methods import scope
from vkd_jax.models import quantize
from vkd_jax.models.base import VisualTokens, bind

MODEL = Path(__file__).parents[1] / "vkd_jax" / "assets" / "tiny_llava"
HOW = ("int8", "int8:64", "int4", "int4:64", "w8a8")
SEED = 0


def questions(folder: Path, config, count: int) -> Batch:
    """Some questions of the forget and the retain set, each with its picture and answer."""
    with tempfile.TemporaryDirectory() as cache:
        sets = data.read(data.create("mllmu", {}), cache)
    examples = [e for name in ("forget", "retain") for e in sets[name] if e.image is not None]
    chosen = np.random.default_rng(SEED).permutation(len(examples))[:count]
    encoded = encode_set(Processor(folder, config), [examples[i] for i in chosen], max_length=config.text.max_positions)
    return encoded.batch(np.arange(len(encoded)))


def visual_half(graphdef, params, paths, batch: Batch) -> tuple[VisualTokens, Callable]:
    """The features of the pictures, and the function from their gradient to that of the visual weights [n]."""

    @jax.jit
    def encode(trainable):
        features, _ = bind(graphdef, {**params, **trainable}).encode(batch.pictures)
        return features.values, features.where

    values, back, where = jax.vjp(encode, {path: params[path] for path in paths}, has_aux=True)
    to_weights = jax.jit(lambda gradient: jnp.concatenate([x.ravel() for x in back(gradient)[0].values()]))
    return VisualTokens(values, where), to_weights


def language_half(graphdef, params, features: VisualTokens, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [b, a, v] at the answer tokens, and the gradient of the mean cross-entropy [b, p, d]."""

    @jax.jit
    def run(values, params):
        def loss(values):
            seen = features._replace(values=values)
            logits, _ = bind(graphdef, params)(batch.tokens, batch.mask, features=seen, at=batch.at)
            return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask).mean(), logits

        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(values)
        return jax.nn.log_softmax(logits), gradient

    return run(features.values, params)


def language_bytes(params) -> int:
    """Bytes of the language model as an accelerator stores it."""
    leaves = jax.tree.leaves({path: x for path, x in params.items() if path.startswith("language_model/")})
    info = [jnp.iinfo(x.dtype) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype) for x in leaves]
    return sum(x.size * i.bits // 8 for x, i in zip(leaves, info, strict=True))


def measure(count: int) -> dict:
    """The table as plain values: {"model": ..., "rows": [{"quantize": "int8", "cosine": ...}, ...]}."""
    graphdef, params, config = convert.load(MODEL, dtype="float32")
    batch = questions(MODEL, config, count)
    # The visual half is the same for every row of the table.
    features, to_weights = visual_half(graphdef, params, scope.visual_paths(params, config, -1), batch)

    def ask(params):
        log_p, gradient = language_half(graphdef, params, features, batch)
        return np.asarray(log_p, np.float64)[batch.target_mask], np.asarray(to_weights(gradient), np.float64)

    log_p, gradient = ask(params)
    size = language_bytes(params)
    rows = [dict(quantize="", cosine=1.0, kl=0.0, top1=1.0, bytes=size, share=1.0)]
    for text in HOW:
        how = quantize.parse(text)
        small = {path: quantize.quantized(path, x, how) for path, x in params.items()}
        log_q, other = ask(small)
        rows.append(
            dict(
                quantize=text,
                cosine=float(gradient @ other / np.linalg.norm(gradient) / np.linalg.norm(other)),
                kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
                top1=float((log_p.argmax(-1) == log_q.argmax(-1)).mean()),
                bytes=language_bytes(small),
                share=language_bytes(small) / size,
            )
        )
    return dict(
        model=MODEL.name,
        questions=len(batch.tokens),
        answer_tokens=len(log_p),
        seed=SEED,
        device=jax.devices()[0].device_kind,
        rows=rows,
    )


def main() -> None:
    """Prints the table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=256, help="how many questions (default: 256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    with jax.default_matmul_precision("highest"):  # else an accelerator's float32 is no reference
        found = measure(args.questions)
    print(f"{found['model']}: {found['questions']} questions, {found['answer_tokens']} answer tokens")
    print(f"{'':8}{'cosine':>10}{'KL, nats':>12}{'top-1':>9}{'bytes':>11}{'share':>8}")
    for row in found["rows"]:
        print(
            f"{row['quantize'] or 'float32':8}{row['cosine']:10.5f}{row['kl']:12.2e}{row['top1']:9.4f}"
            f"{row['bytes']:11,}{row['share']:8.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
