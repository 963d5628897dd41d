"""Times a VKD training step against the same step in PyTorch + transformers, and against GradDiff on all weights.

python perf/step_time.py [--size small|large|7b] [--rounds N] [--json FILE]

Model: a LLaVA with random weights. Data: batches of random images and questions. Device: the GPU, or else all cores.

The PyTorch step uses SDPA attention, `requires_grad_(False)` on the language model, logits of all positions, AdamW,
gradient clipping and a mask. It is timed with cached features of the teacher, as in the JAX step, and with a teacher (a
frozen copy of the visual part) that runs in every step; on a GPU also with `torch.compile`. The last vision block,
whose output is not used, runs only in transformers.

All steps run alternately in one process, so that other load on the machine affects all of them alike; the table shows
medians and ratios. The losses of the first three steps must agree, or the script stops without timing.

Everything is float32 (on a GPU both libraries multiply in TensorFloat-32) except for `7b`, which has float32 trainable
weights, and bfloat16 frozen weights and computation. `7b` needs a GPU with 141 GB, and omits GradDiff on all weights,
which needs more.
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
from command import run, time_interleaved

from vkd_jax import methods
from vkd_jax.checkpoints import hf
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import Batch
from vkd_jax.methods import feature_targets
from vkd_jax.models import llava
from vkd_jax.runtime.memory import program_bytes
from vkd_jax.training import optimizer
from vkd_jax.training.step import TrainState, make_step

IMAGE_TOKEN_ID = 4
ANSWER_TOKENS = 8
LEARNING_RATE = 1e-4
# vision: (width, MLP width, layers, heads); image: (side, patch side) in pixels; text: (width, MLP width, layers,
# heads, vocabulary); rows: the number of examples of each stream; question: the tokens of each.
SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": dict(vision=(32, 64, 3, 4), image=(28, 14), text=(48, 80, 2, 4, 100), rows=2, question=8),
    "small": dict(vision=(384, 1536, 8, 6), image=(112, 14), text=(512, 1408, 8, 8, 8192), rows=4, question=32),
    "large": dict(vision=(768, 3072, 12, 12), image=(168, 14), text=(1024, 2816, 12, 16, 32064), rows=4, question=64),
    "7b": dict(vision=(1024, 4096, 24, 16), image=(336, 14), text=(4096, 11008, 32, 32, 32064), rows=4, question=127),
}
BFLOAT16_SIZES = ("7b",)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Keys of the results, and the rows of the table.
PYTORCH, PYTORCH_TEACHER, PYTORCH_COMPILED = (f"vkd in PyTorch{x}" for x in ("", ", teacher asked", ", compiled"))
GRAD_DIFF = "grad_diff, all weights"
torch.set_float32_matmul_precision("high")


def build_model(size: Mapping[str, Any]) -> transformers.LlavaForConditionalGeneration:
    """Builds a LLaVA with random weights in PyTorch."""
    width, mlp, layers, heads = size["vision"]
    side, patch = size["image"]
    vision = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    vision |= dict(model_type="clip_vision_model", image_size=side, patch_size=patch, projection_dim=width)
    width, mlp, layers, heads, vocabulary = size["text"]
    text = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(model_type="llama", num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=2048)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID)
    return transformers.LlavaForConditionalGeneration(config).eval()


def random_batch(size: Mapping[str, Any], config: Any, seed: int) -> Batch:
    """Returns a batch of random images, each with a random question of the same length."""
    rng = np.random.default_rng(seed)
    side, rows = size["image"][0], size["rows"]
    prefix = [1, *[IMAGE_TOKEN_ID] * config.image_tokens(side, side)]
    words = rng.integers(10, size["text"][-1], (rows, size["question"]))
    tokens = np.concatenate([np.tile(np.int32(prefix), (rows, 1)), words.astype(np.int32)], axis=1)
    positions = np.arange(ANSWER_TOKENS, dtype=np.int32) + tokens.shape[1] - ANSWER_TOKENS - 1
    pixels = rng.standard_normal((rows, side, side, 3)).astype(np.float32)
    return Batch(
        tokens=tokens,
        mask=np.ones(tokens.shape, bool),
        target_positions=np.tile(positions, (rows, 1)),
        targets=tokens[:, -ANSWER_TOKENS:],
        target_mask=np.ones((rows, ANSWER_TOKENS), bool),
        images={"pixels": pixels},
        cached={},
    )


def check_same_device() -> None:
    """Checks that JAX and PyTorch compute on the same kind of device.

    Raises:
        SystemExit: they do not.
    """
    if jax.default_backend() != ("gpu" if CUDA else "cpu"):
        raise SystemExit(
            f"JAX uses the {jax.default_backend()} and PyTorch the {DEVICE}. Install jax[cuda12] and PyTorch "
            "with CUDA for a GPU, or set JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES= for the CPU."
        )


def train_config() -> TrainConfig:
    """Returns the hyperparameters of both optimizers."""
    return TrainConfig(weight_decay=0.0)


def jax_step(
    folder: Path, dtype: str, method: Any, batches: Mapping[str, Batch], mask: Any
) -> tuple[Callable[[], float], int]:
    """Returns a function that makes one training step in JAX and returns its loss, and the bytes that a step uses."""
    graphdef, params, config = hf.load(folder, dtype=dtype, masters=method.trainable)
    trainable = {path: jnp.array(params[path]) for path in method.trainable(params, config)}
    frozen = {path: value for path, value in params.items() if path not in trainable}
    tx, mask = optimizer.create(train_config()), jax.device_put(mask)
    step = jax.jit(make_step(graphdef, method.losses(), tx, method.mask_scope), donate_argnums=0)
    states = [TrainState(trainable, tx.init(trainable), jnp.int32(0))]
    batches = jax.device_put(batches)
    compiled = step.lower(states[0], frozen, mask, batches, None, LEARNING_RATE).compile()

    def step_once() -> float:
        states[0], metrics = step(states[0], frozen, mask, batches, None, LEARNING_RATE)
        jax.block_until_ready(states[0])
        return float(metrics["loss"])

    return step_once, program_bytes(compiled)


def torch_step(
    model: Any, method: Any, batches: Mapping[str, Batch], masks: Mapping[str, np.ndarray], teacher: Any, dtype: str
) -> Callable[[], float]:
    """Returns a function that makes one VKD step in PyTorch and returns its loss.

    Args:
        model: the model; its trainable parameters are changed in place.
        method: VKD with its hyperparameters.
        batches: the batch of each stream, with the cached features of the teacher.
        masks: the masks of the trainable parameters, by name.
        teacher: a model that computes the features in every step; None to use the cached ones.
        dtype: the dtype of the computation.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in masks)
    trainable = {name: p for name, p in model.named_parameters() if name in masks}
    masks = {name: torch.tensor(mask, device=DEVICE) for name, mask in masks.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, weight_decay=0.0)
    clip_norm = train_config().clip_norm
    inputs = {name: to_torch(b) for name, b in batches.items()}

    def encode(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return {"features": features, "projector": model.model.multi_modal_projector(features)}

    @torch.no_grad()
    def teacher_targets(name: str) -> dict[str, torch.Tensor]:
        taps = {tap: x.float() for tap, x in encode(teacher, inputs[name]["pixels"]).items()}
        targets = {f"target/{tap}": x.roll(1, 0) if name == "forget" else x for tap, x in taps.items()}
        return targets | {f"scale/{tap}": x.square().mean().expand(len(x)) for tap, x in taps.items()}

    def loss_of(name: str) -> torch.Tensor:
        batch = inputs[name] | (teacher_targets(name) if teacher is not None else {})
        taps = encode(model, batch["pixels"])
        embedded = model.get_input_embeddings()(batch["tokens"])
        is_image = (batch["tokens"] == IMAGE_TOKEN_ID)[..., None]
        embedded = embedded.masked_scatter(is_image, taps["projector"].to(embedded.dtype))
        logits = model(inputs_embeds=embedded, attention_mask=batch["mask"], use_cache=False).logits
        answers = logits[:, -ANSWER_TOKENS - 1 : -1].flatten(0, 1).float()
        ce = torch.nn.functional.cross_entropy(answers, batch["targets"].flatten(), reduction="none")
        ce = ce.view(len(logits), -1).mean(1)
        distill = sum(
            (taps[tap].float() - batch[f"target/{tap}"]).square().mean((1, 2)) / batch[f"scale/{tap}"] for tap in taps
        )
        if name == "forget":
            output = -ce.clamp(max=method.cap)
            return (method.weight_forget_ce * output + method.weight_forget_distill * distill).mean()
        return (method.weight_retain_ce * ce + method.weight_retain_distill * distill).mean()

    def step_once() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = sum(loss_of(name) for name in inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), clip_norm)
        for name, parameter in trainable.items():  # without weight decay, equal to masking the update
            parameter.grad.mul_(masks[name])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step_once


def to_torch(batch: Batch) -> dict[str, torch.Tensor]:
    """Converts a batch to PyTorch tensors on the device."""
    tensors = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in batch.cached.items()}
    tensors |= dict(
        tokens=torch.tensor(batch.tokens).long(),
        mask=torch.tensor(batch.mask).long(),
        targets=torch.tensor(batch.targets).long(),
        pixels=torch.tensor(batch.images["pixels"]).permute(0, 3, 1, 2).contiguous(),
    )
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def add_targets(folder: Path, dtype: str, batches: Mapping[str, Batch], taps: tuple[str, ...]) -> dict[str, Batch]:
    """Returns the batches with the features that VKD caches; the target of a forget image is that of the one before."""
    graphdef, params, _ = hf.load(folder, dtype=dtype)
    with_targets = {}
    for name, batch in batches.items():
        cached = {}
        for tap, tokens in feature_targets.record_taps(graphdef, params, batch.images, taps).items():
            values = tokens.values.astype(np.float32)
            cached[f"target/{tap}"] = np.roll(values, 1, axis=0) if name == "forget" else values
            cached[f"scale/{tap}"] = np.full(len(values), np.square(values).mean())
        with_targets[name] = dataclasses.replace(batch, cached=cached)
    return with_targets


def random_masks(model: Any, method: Any, config: Any, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """Returns random masks of the weights that VKD trains, by path in JAX and by name in PyTorch."""
    rng, share = np.random.default_rng(0), method.mask_keep
    mask = {path: rng.random(params[path].shape) < share for path in method.trainable(params, config)}
    slots = {name: hf.find_slot(llava, config, name) for name, _ in model.named_parameters()}
    return mask, {name: slot.to_tensor(mask[slot.path]).copy() for name, slot in slots.items() if slot.path in mask}


def build_torch_steps(
    model: Any, method: Any, batches: Mapping[str, Batch], masks: Mapping[str, np.ndarray], dtype: str
) -> dict[str, Callable[[], float]]:
    """Returns the variants of the step in PyTorch, by name; they share the frozen language model."""
    language_model = model.to(DEVICE).model.language_model, model.lm_head
    for weight in (weight for module in language_model for weight in module.parameters()):  # rotary tables stay float32
        weight.data = weight.data.to(getattr(torch, dtype))
    shared = {id(module): module for module in language_model}

    def copy_model() -> Any:
        return copy.deepcopy(model, dict(shared))

    steps = {PYTORCH: torch_step(copy_model(), method, batches, masks, None, dtype)}
    steps[PYTORCH_TEACHER] = torch_step(copy_model(), method, batches, masks, model.requires_grad_(False), dtype)
    if CUDA:
        compiled = copy_model()
        compiled.forward = torch.compile(compiled.forward)
        compiled.model.vision_tower.forward = torch.compile(compiled.model.vision_tower.forward)
        steps[PYTORCH_COMPILED] = torch_step(compiled, method, batches, masks, None, dtype)
    return steps


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each step, and the memory of the JAX steps."""
    check_same_device()
    sizes, dtype = SIZES[size], "bfloat16" if size in BFLOAT16_SIZES else "float32"
    vkd, grad_diff = methods.create("vkd", {"cap": 100.0}), methods.create("grad_diff", {"train": "all"})
    model = build_model(sizes)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        folder = Path(folder)
        _, params, config = hf.load(folder, dtype=dtype)
        batches = {stream: random_batch(sizes, config, seed) for seed, stream in enumerate(vkd.losses())}
        batches = add_targets(folder, dtype, batches, vkd.taps)
        mask, torch_masks = random_masks(model, vkd, config, params)
        del params
        steps, step_bytes = {}, {}
        steps["vkd"], step_bytes["vkd"] = jax_step(folder, dtype, vkd, batches, mask)
        if size not in BFLOAT16_SIZES:
            steps[GRAD_DIFF], step_bytes[GRAD_DIFF] = jax_step(folder, dtype, grad_diff, batches, None)
    torch_steps = build_torch_steps(model, vkd, batches, torch_masks, dtype)
    steps |= torch_steps
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}  # the first call also compiles
    for name in torch_steps:
        if not np.allclose(losses["vkd"], losses[name], rtol=3e-2 if CUDA or dtype == "bfloat16" else 1e-3):
            raise SystemExit(f"the losses differ: {losses}")
    seconds = time_interleaved(steps, rounds)
    return {
        "size": size,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(mask.size for mask in torch_masks.values()),
        "rows": {stream: len(batch.tokens) for stream, batch in batches.items()},
        "tokens": batches["retain"].tokens.shape[1],
        "losses": losses,
        "seconds": seconds,
        "median": {name: statistics.median(times) for name, times in seconds.items()},
        "bytes": step_bytes,
    }


if __name__ == "__main__":
    run(__doc__, measure, tables.steps, size=("small", "the size of the model", SIZES), rounds=(7, "runs of each step"))
