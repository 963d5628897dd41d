"""Floating-point operations of a step: by parts, from the sizes of the model; and as JAX traced it, in one number.

A product [m, k] [k, n] is 2 m k n, whatever it is computed in. Matrix products alone are counted; the rest is less than
a hundredth. Of each part, with F its forward pass, A the attention and M the products with weights in it (F = M + A):

    forward              F
    backward             M + 2 A, for the gradient of its input, if any weight before it or in it trains
    weights              M of those products whose weight trains
    recomputed           of a part that has a backward pass, by how it is rematerialised: F but for the last product of
                         the MLP ("full"); A, or A / 2 where the projection behind it is frozen ("dots"); nothing

So a frozen language model between trained pictures and the loss costs 2 F and not 3: the gradient passes through it.
Where nothing is rematerialised, its last block makes keys and values of all tokens, and the rest at the answers alone.

Reference: Kaplan et al., "Scaling Laws for Neural Language Models", arXiv 2001.08361, appendix B; attention is
counted in full, causal or not, since that is what is computed.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from vkd_jax.methods.scope import frozen_blocks
from vkd_jax.models.quantize import Integers

KERNEL = r".*/kernel(/lora_[ab])?|.*/patch_embedding"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a row of a batch consists of."""

    patches: int  # slots of patches that go through the vision tower, class token included
    image_tokens: int  # that the projector makes
    tokens: int  # of the row
    answers: int  # positions with logits


@dataclasses.dataclass
class Part:
    """FLOPs of a row."""

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0
    recomputed: float = 0.0
    integers: float = 0.0  # of all these, those of products of 8-bit integers (`models.quantize.Integers`)
    integers_forward: float = 0.0  # and of these, the forward ones

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.forward + self.backward + self.weights + self.recomputed

    def __add__(self, other: "Part") -> "Part":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Part(*(a + b for a, b in pairs))


class _Link(NamedTuple):
    """What is computed one after the other."""

    name: str  # of the part that it counts for
    weights: str  # a pattern of their paths
    positions: int  # that are multiplied with them
    attention: float = 0.0  # FLOPs
    remat: str = ""  # a key of `layers.REMAT`
    last: str = ""  # the product whose value the backward pass never needs
    blocks: int = 0  # of the language model's, whose weights are one stack


def row(
    config: Any,
    shapes: Mapping[str, Any],
    trainable: Collection[str],
    sizes: Sizes,
    depth: tuple[int, bool],
) -> dict[str, Part]:
    """FLOPs of a row by part: vision_tower, projector, language_model, head.

    Vision blocks before everything that trains are not computed: their output is cached (`train.cached_prefix`).

    Args:
        config: of the model.
        shapes: of all its parameters, those of adapters among them.
        trainable: paths of what trains.
        sizes: of the row.
        depth: how many blocks of the language model run, and whether its head does.
    """
    vision, text = config.vision, config.text
    blocks, logits = depth
    trainable = set(trainable)
    start = frozen_blocks(trainable, config)
    patches, tokens, remat = sizes.patches, sizes.tokens, config.remat
    chain = []
    if not start:
        chain.append(_Link("vision_tower", r"vision_tower/[^/]+(/(scale|bias))?", patches))
    attention = 4.0 * patches * patches * vision.width
    chain += [
        _Link("vision_tower", rf"vision_tower/blocks/{i}/.*", patches, attention, remat, "mlp/(?:fc2|down)")
        for i in range(start, config.used_blocks)
    ]
    chain.append(_Link("projector", r"projector/.*", sizes.image_tokens))
    name, every = "language_model", r"language_model/blocks"
    attention = 4.0 * tokens * text.heads * text.head_width  # of a position that asks, in a block
    short = logits and not remat  # the last block is asked at the answers alone
    whole = blocks - short
    chain.append(_Link(name, rf"{every}/.*", tokens, attention * tokens * whole, remat, "mlp/down", whole))
    if short:
        seen, asks = r"(norm1|attn/[kv])/", attention * sizes.answers
        chain.append(_Link(name, rf"{every}/{seen}.*", tokens, blocks=1))
        chain.append(_Link(name, rf"{every}/(?!{seen}).*", sizes.answers, asks, blocks=1))
    if logits:
        chain.append(_Link("head", r"language_model/(norm|head)/.*", sizes.answers))
    parts: dict[str, Part] = {}
    before = False
    for name, pattern, tokens, a, remat, last, count in chain:
        paths = [path for path in shapes if re.fullmatch(pattern, path) and "post_norm" not in path]
        products = {path: _product(path, shapes[path], tokens, config) for path in paths if re.fullmatch(KERNEL, path)}
        if name == "vision_tower" and not a:  # patches alone are multiplied, not the class token
            products = {path: flops / tokens * _patches(vision, tokens) for path, flops in products.items()}
        if name == "language_model":  # one stack of all blocks
            products = {path: flops * count / text.layers for path, flops in products.items()}
        if name == "head" and text.tie_embeddings:
            table = "language_model/embed/embedding"
            products[table] = 2.0 * tokens * math.prod(shapes[table].shape)
        m = sum(products.values())
        trains = [path for path in (*paths, *products) if path in trainable]
        # The input of a part whose first operation is a product has no gradient if that alone trains.
        first = {path for path in products if _leads(path, paths)}
        part, again = Part(forward=m + a), {}
        if before or trains:
            lost = 0.0 if before else sum(products[path] for path in first)
            part.backward = m - lost + 2 * a
            part.weights = sum(flops for path, flops in products.items() if path in trainable)
            if remat == "dots":  # what attends to what; and to what avail, where the next product's weight trains
                part.recomputed = a if any("/attn/o" in path for path in trains) else a / 2
            elif remat:
                ends = re.compile(rf"{last}/kernel(/lora_b)?$") if last else None  # whose value nobody needs again
                again = {path: flops for path, flops in products.items() if not (ends and ends.search(path))}
                part.recomputed = a + sum(again.values())
        passes = [products, products, again] if part.backward else [products]
        integers = [sum(f for path, f in p.items() if isinstance(shapes[path], Integers)) for p in passes]
        part.integers, part.integers_forward = sum(integers), integers[0]
        before = before or bool(trains) or (name == "projector" and "language_model/embed/embedding" in trainable)
        parts[name] = parts.get(name, Part()) + part
    return parts


def _patches(vision: Any, tokens: int) -> int:
    return getattr(vision, "patches", tokens)


def _leads(path: str, paths: Collection[str]) -> bool:
    """Whether a product takes the input of its part as it is: the patches, and a projector without a norm."""
    if path.startswith("projector/"):
        return path == "projector/fc1/kernel" and not any(p.startswith("projector/norm") for p in paths)
    return path.endswith("patch_embedding")


def _product(path: str, x: Any, tokens: int, config: Any) -> float:
    """FLOPs of the product with one weight."""
    size = math.prod(x.shape)
    if path.endswith("patch_embedding"):
        size //= getattr(config.vision, "frames", 1)  # the kernels of a still picture's frames are added first
    return 2.0 * tokens * size


def traced(function: Any, *inputs: Any) -> float:
    """FLOPs of all matrix products in a function as JAX traces it, the bodies of scans as often as they run."""
    return _count(jax.make_jaxpr(function)(*inputs).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        for x in inner:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                total += times * _count(x)
    return total
