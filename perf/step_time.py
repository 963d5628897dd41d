"""The VKD step here against the same step in plain PyTorch + transformers, and against GradDiff on all weights.

python perf/step_time.py [--size small|large|7b] [--rounds N] [--json FILE]

A LLaVA with random weights, batches of random pictures and questions, on the GPU if there is one, else on all cores.
The steps take turns in one process, so that whatever else the machine does falls on all of them; what is printed are
medians and ratios. PyTorch's is written the way its users write it: SDPA attention, requires_grad_(False) on the
language model, logits of every position, AdamW, clipping, a mask. Once it is given the teacher's features, as they are
cached here, and once it asks the teacher, a frozen copy of the visual part, at each step. On a GPU torch.compile stands
beside it. The losses of the first three steps must agree, else nothing is measured.

In float32 (on a GPU both multiply in TensorFloat-32), but for `7b`: there what trains is float32, the rest and the
computation bfloat16. It is meant for a GPU of 141 GB; GradDiff on all weights needs more, and is left out. The last
vision block, whose output nothing reads, runs in transformers alone.
"""

import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables
import torch
import transformers
from command import by_turns, run

from vkd_jax import methods
from vkd_jax.checkpoints import hf
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import Batch
from vkd_jax.methods import feature_targets
from vkd_jax.models import llava
from vkd_jax.training import loop, optimizer
from vkd_jax.training.step import TrainState, make_step

IMAGE = 4  # the image token
ANSWER = 8  # tokens
RATE = 1e-4
# (width, MLP, layers, heads) of the vision tower, its picture and patch; (width, MLP, layers, heads, vocabulary) of the
# language model; rows of each stream, and tokens of a question.
SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": dict(vision=(32, 64, 3, 4), picture=(28, 14), text=(48, 80, 2, 4, 100), rows=2, question=8),
    "small": dict(vision=(384, 1536, 8, 6), picture=(112, 14), text=(512, 1408, 8, 8, 8192), rows=4, question=32),
    "large": dict(vision=(768, 3072, 12, 12), picture=(168, 14), text=(1024, 2816, 12, 16, 32064), rows=4, question=64),
    "7b": dict(vision=(1024, 4096, 24, 16), picture=(336, 14), text=(4096, 11008, 32, 32, 32064), rows=4, question=127),
}
HALF = ("7b",)  # computed in bfloat16
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PYTORCH, ASKING, COMPILED = (f"vkd in PyTorch{how}" for how in ("", ", teacher asked", ", compiled"))
USUAL = "grad_diff, all weights"
torch.set_float32_matmul_precision("high")


def model(size: Mapping[str, Any]) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA with random weights."""
    width, mlp, layers, heads = size["vision"]
    side, patch = size["picture"]
    vision = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    vision |= dict(model_type="clip_vision_model", image_size=side, patch_size=patch, projection_dim=width)
    width, mlp, layers, heads, vocabulary = size["text"]
    text = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(model_type="llama", num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=2048)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config).eval()


def batch(size: Mapping[str, Any], config: Any, seed: int) -> Batch:
    """Questions on a picture each, all equally long."""
    rng = np.random.default_rng(seed)
    side, rows = size["picture"][0], size["rows"]
    picture = [1, *[IMAGE] * config.image_tokens(side, side)]
    words = rng.integers(10, size["text"][-1], (rows, size["question"]))
    tokens = np.concatenate([np.tile(np.int32(picture), (rows, 1)), words.astype(np.int32)], axis=1)
    at = np.tile(np.arange(ANSWER, dtype=np.int32) + tokens.shape[1] - ANSWER - 1, (rows, 1))
    pixels = rng.standard_normal((rows, side, side, 3)).astype(np.float32)
    return Batch(
        tokens=tokens,
        mask=np.ones(tokens.shape, bool),
        target_positions=at,
        targets=tokens[:, -ANSWER:],
        target_mask=np.ones((rows, ANSWER), bool),
        images={"pixels": pixels},
        cached={},
    )


def need_same_device() -> None:
    """Stops where JAX and PyTorch would be compared on different chips."""
    if jax.default_backend() != ("gpu" if CUDA else "cpu"):
        raise SystemExit(
            f"JAX computes on the {jax.default_backend()} and PyTorch on the {DEVICE}: install jax[cuda12] and PyTorch "
            "with CUDA for a GPU, or set JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES= for the CPU."
        )


def settings() -> TrainConfig:
    """Returns the settings of both optimizers."""
    return TrainConfig(weight_decay=0.0)


def in_jax(
    folder: Path, dtype: str, method: Any, batches: Mapping[str, Batch], mask: Any
) -> tuple[Callable[[], float], int]:
    """(a step that gives its loss, the bytes it holds)."""
    graphdef, params, config = hf.load(folder, dtype=dtype, masters=method.trainable)
    trainable = {path: jnp.array(params[path]) for path in method.trainable(params, config)}
    frozen = {path: value for path, value in params.items() if path not in trainable}
    tx, mask = optimizer.create(settings()), jax.device_put(mask)
    step = jax.jit(make_step(graphdef, method.losses(), tx, method.mask_scope), donate_argnums=0)
    box = [TrainState(trainable, tx.init(trainable), jnp.int32(0))]
    batches = jax.device_put(batches)
    compiled = step.lower(box[0], frozen, mask, batches, None, RATE).compile()

    def once() -> float:
        box[0], metrics = step(box[0], frozen, mask, batches, None, RATE)
        jax.block_until_ready(box[0])
        return float(metrics["loss"])

    return once, loop.step_bytes(compiled)


def in_torch(
    net: Any, method: Any, batches: Mapping[str, Batch], masks: Mapping[str, np.ndarray], teacher: Any, dtype: str
) -> Callable[[], torch.Tensor]:
    """A VKD step that gives its loss.

    Args:
        net: the model; what trains is changed in place.
        method: VKD with its settings.
        batches: the teacher's features in them.
        masks: of the weights that train, by parameter name.
        teacher: a model that is asked for the features at each step, or None.
        dtype: of the computation.
    """
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in masks)
    trained = {name: p for name, p in net.named_parameters() if name in masks}
    masks = {name: torch.tensor(mask, device=DEVICE) for name, mask in masks.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    clip_norm = settings().clip_norm
    inputs = {name: as_torch(b) for name, b in batches.items()}

    def seen(net: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = net.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return {"features": features, "projector": net.model.multi_modal_projector(features)}

    @torch.no_grad()
    def asked(name: str) -> dict[str, torch.Tensor]:
        taps = {tap: x.float() for tap, x in seen(teacher, inputs[name]["pixels"]).items()}
        targets = {f"target/{tap}": x.roll(1, 0) if name == "forget" else x for tap, x in taps.items()}
        return targets | {f"scale/{tap}": x.square().mean().expand(len(x)) for tap, x in taps.items()}

    def loss_of(name: str) -> torch.Tensor:
        given = inputs[name] | (asked(name) if teacher is not None else {})
        taps = seen(net, given["pixels"])
        embedded = net.get_input_embeddings()(given["tokens"])
        embedded = embedded.masked_scatter((given["tokens"] == IMAGE)[..., None], taps["projector"].to(embedded.dtype))
        logits = net(inputs_embeds=embedded, attention_mask=given["mask"], use_cache=False).logits
        answers = logits[:, -ANSWER - 1 : -1].flatten(0, 1).float()
        ce = torch.nn.functional.cross_entropy(answers, given["targets"].flatten(), reduction="none")
        ce = ce.view(len(logits), -1).mean(1)
        apart = sum(
            (taps[tap].float() - given[f"target/{tap}"]).square().mean((1, 2)) / given[f"scale/{tap}"] for tap in taps
        )
        if name == "forget":
            output = -ce.clamp(max=method.cap)
            return (method.weight_forget_ce * output + method.weight_forget_distill * apart).mean()
        return (method.weight_retain_ce * ce + method.weight_retain_distill * apart).mean()

    def once() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = sum(loss_of(name) for name in inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), clip_norm)
        for name, parameter in trained.items():  # without decay as good as masking the update
            parameter.grad.mul_(masks[name])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return once


def as_torch(given: Batch) -> dict[str, torch.Tensor]:
    """A batch in PyTorch."""
    found = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in given.cached.items()}
    found |= dict(
        tokens=torch.tensor(given.tokens).long(),
        mask=torch.tensor(given.mask).long(),
        targets=torch.tensor(given.targets).long(),
        pixels=torch.tensor(given.images["pixels"]).permute(0, 3, 1, 2).contiguous(),
    )
    return {name: x.to(DEVICE) for name, x in found.items()}


def with_targets(folder: Path, dtype: str, batches: Mapping[str, Batch], taps: tuple[str, ...]) -> dict[str, Batch]:
    """The batches with what VKD caches: pictures are pulled to themselves, or to their neighbours."""
    graphdef, params, _ = hf.load(folder, dtype=dtype)
    found = {}
    for name, given in batches.items():
        cached = {}
        for tap, tokens in feature_targets.record_taps(graphdef, params, given.images, taps).items():
            values = tokens.values.astype(np.float32)
            cached[f"target/{tap}"] = np.roll(values, 1, axis=0) if name == "forget" else values
            cached[f"scale/{tap}"] = np.full(len(values), np.square(values).mean())
        found[name] = dataclasses.replace(given, cached=cached)
    return found


def selected(net: Any, method: Any, config: Any, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """A random mask of what VKD trains, by path here and by name in PyTorch."""
    rng, share = np.random.default_rng(0), method.mask_keep
    mask = {path: rng.random(params[path].shape) < share for path in method.trainable(params, config)}
    slots = {name: hf.find_slot(llava, config, name) for name, _ in net.named_parameters()}
    return mask, {name: slot.to_tensor(mask[slot.path]).copy() for name, slot in slots.items() if slot.path in mask}


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Seconds of each step, by turns, and what our steps hold."""
    need_same_device()
    name, size, dtype = size, SIZES[size], "bfloat16" if size in HALF else "float32"
    vkd, usual = methods.create("vkd", {"cap": 100.0}), methods.create("grad_diff", {"train": "all"})
    net = model(size)
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        folder = Path(folder)
        _, params, config = hf.load(folder, dtype=dtype)
        plain = {stream: batch(size, config, seed) for seed, stream in enumerate(vkd.losses())}
        batches = with_targets(folder, dtype, plain, vkd.taps)
        mask, masks = selected(net, vkd, config, params)
        del params
        ours, held = in_jax(folder, dtype, vkd, batches, mask)
        steps, held = {"vkd": ours}, {"vkd": held}
        if name not in HALF:
            steps[USUAL], held[USUAL] = in_jax(folder, dtype, usual, batches, None)
    language = net.to(DEVICE).model.language_model, net.lm_head
    for weight in (weight for part in language for weight in part.parameters()):  # and no table of positions
        weight.data = weight.data.to(getattr(torch, dtype))
    shared = {id(part): part for part in language}  # none of them trains it

    def fresh() -> Any:
        return copy.deepcopy(net, dict(shared))

    theirs = {PYTORCH: in_torch(fresh(), vkd, batches, masks, None, dtype)}
    theirs[ASKING] = in_torch(fresh(), vkd, batches, masks, net.requires_grad_(False), dtype)
    if CUDA:
        compiled = fresh()
        compiled.forward = torch.compile(compiled.forward)
        compiled.model.vision_tower.forward = torch.compile(compiled.model.vision_tower.forward)
        theirs[COMPILED] = in_torch(compiled, vkd, batches, masks, None, dtype)
    steps |= theirs
    losses = {step: [once() for _ in range(3)] for step, once in steps.items()}  # which compiles, too
    for step in theirs:
        if not np.allclose(losses["vkd"], losses[step], rtol=3e-2 if CUDA or dtype == "bfloat16" else 1e-3):
            raise SystemExit(f"the losses differ: {losses}")
    seconds = by_turns(steps, rounds)
    return {
        "size": name,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(mask.size for mask in masks.values()),
        "rows": {stream: len(given.tokens) for stream, given in batches.items()},
        "tokens": batches["retain"].tokens.shape[1],
        "losses": losses,
        "seconds": seconds,
        "median": {step: statistics.median(times) for step, times in seconds.items()},
        "bytes": held,
    }


if __name__ == "__main__":
    run(__doc__, measure, tables.steps, size=("small", "of the model", SIZES), rounds=(7, "how often each step runs"))
