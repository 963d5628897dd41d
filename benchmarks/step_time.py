"""The VKD step here against the same step in plain PyTorch + transformers, and against GradDiff on all weights.

python benchmarks/step_time.py [--size small|large] [--rounds N] [--json FILE]

A LLaVA with random weights, batches of random pictures and questions, float32, all cores. The steps take turns in one
process, so that whatever else the machine does falls on all of them; what is printed are medians and ratios. The
PyTorch step is written the way its users write it: SDPA attention, requires_grad_(False) on the language model,
logits of every position, AdamW, clipping, a mask. Teacher features and the mask are given to both. The losses of the
first three steps must agree, else nothing is measured.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone need not be installed

from vkd_jax import convert, defaults, methods, optim, train
from vkd_jax.data.processing import Batch
from vkd_jax.models import llava
from vkd_jax.models.base import bind

IMAGE = 4  # the image token
ANSWER = 8  # tokens
RATE = 1e-4
# (width, MLP, layers, heads) of the vision tower, its picture and patch; (width, MLP, layers, heads, vocabulary) of the
# language model; rows of each stream, and tokens of a question.
SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": dict(vision=(32, 64, 3, 4), picture=(28, 14), text=(48, 80, 2, 4, 100), rows=2, question=8),
    "small": dict(vision=(384, 1536, 8, 6), picture=(112, 14), text=(512, 1408, 8, 8, 8192), rows=4, question=32),
    "large": dict(vision=(768, 3072, 12, 12), picture=(168, 14), text=(1024, 2816, 12, 16, 32064), rows=4, question=64),
}


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
        at=at,
        targets=tokens[:, -ANSWER:],
        target_mask=np.ones((rows, ANSWER), bool),
        pictures={"pixels": pixels},
        cached={},
    )


def settings() -> Any:
    """Of both optimizers."""
    section = defaults.base().train
    section.weight_decay = 0.0
    return section


def in_jax(folder: Path, method: Any, batches: Mapping[str, Batch], mask: Any) -> tuple[Callable[[], float], int]:
    """(a step that gives its loss, the bytes it holds)."""
    graphdef, params, config = convert.load(folder)
    trainable = {path: jnp.array(params[path]) for path in method.trainable(params, config)}
    frozen = {path: value for path, value in params.items() if path not in trainable}
    tx, mask = optim.create(settings()), jax.device_put(mask)
    step = jax.jit(train.make_step(graphdef, method.losses(), tx, method.mask_scope), donate_argnums=0)
    box = [train.TrainState(trainable, tx.init(trainable), jnp.int32(0))]
    batches = jax.device_put(batches)
    compiled = step.lower(box[0], frozen, mask, batches, None, RATE).compile()

    def once() -> float:
        box[0], metrics = step(box[0], frozen, mask, batches, None, RATE)
        jax.block_until_ready(box[0])
        return float(metrics["loss"])

    return once, train.step_bytes(compiled)


def in_torch(net: Any, method: Any, batches: Mapping[str, Batch], masks: Mapping[str, np.ndarray]) -> Callable:
    """A VKD step that gives its loss; `masks` are by parameter name."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in masks)
    trained = {name: p for name, p in net.named_parameters() if name in masks}
    masks = {name: torch.tensor(mask, dtype=torch.float32) for name, mask in masks.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    clip_norm = settings().clip_norm
    inputs = {name: as_torch(b) for name, b in batches.items()}

    def loss_of(name: str) -> torch.Tensor:
        given = inputs[name]
        seen = net.model.vision_tower(given["pixels"], output_hidden_states=True).hidden_states[-2][:, 1:]
        taps = {"features": seen, "projector": net.model.multi_modal_projector(seen)}
        embedded = net.get_input_embeddings()(given["tokens"])
        embedded = embedded.masked_scatter((given["tokens"] == IMAGE)[..., None], taps["projector"])
        logits = net(inputs_embeds=embedded, attention_mask=given["mask"], use_cache=False).logits
        answers = logits[:, -ANSWER - 1 : -1].flatten(0, 1)
        ce = torch.nn.functional.cross_entropy(answers, given["targets"].flatten(), reduction="none")
        ce = ce.view(len(logits), -1).mean(1)
        apart = sum((taps[tap] - given[f"target/{tap}"]).square().mean((1, 2)) / given[f"scale/{tap}"] for tap in taps)
        if name == "forget":
            output = -ce.clamp(max=method.cap)
            return (method.weight_forget_ce * output + method.weight_forget_distill * apart).mean()
        return (method.weight_retain_ce * ce + method.weight_retain_distill * apart).mean()

    def once() -> float:
        optimizer.zero_grad()
        loss = sum(loss_of(name) for name in inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), clip_norm)
        for (
            name,
            parameter,
        ) in trained.items():  # without decay as good as masking the update
            parameter.grad.mul_(masks[name])
        optimizer.step()
        return loss.item()

    return once


def as_torch(given: Batch) -> dict[str, torch.Tensor]:
    """A batch in PyTorch."""
    found = {name: torch.tensor(np.asarray(value)) for name, value in given.cached.items()}
    return found | dict(
        tokens=torch.tensor(given.tokens).long(),
        mask=torch.tensor(given.mask).long(),
        targets=torch.tensor(given.targets).long(),
        pixels=torch.tensor(given.pictures["pixels"]).permute(0, 3, 1, 2).contiguous(),
    )


def with_targets(folder: Path, batches: Mapping[str, Batch], taps: tuple[str, ...]) -> dict[str, Batch]:
    """The batches with what VKD caches: pictures are pulled to themselves, or to their neighbours."""
    graphdef, params, _ = convert.load(folder)
    found = {}
    for name, given in batches.items():
        _, seen = jax.jit(lambda pictures: bind(graphdef, params).encode(pictures))(given.pictures)
        cached = {}
        for tap in taps:
            values = np.asarray(seen[tap].values)
            cached[f"target/{tap}"] = np.roll(values, 1, axis=0) if name == "forget" else values
            cached[f"scale/{tap}"] = np.full(len(values), np.square(values).mean())
        found[name] = Batch(**{**vars(given), "cached": cached})
    return found


def selected(net: Any, method: Any, config: Any, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """A random mask of what VKD trains, by path here and by name in PyTorch."""
    rng, share = np.random.default_rng(0), method.mask_keep
    mask = {path: rng.random(params[path].shape) < share for path in method.trainable(params, config)}
    slots = {name: convert.find_slot(llava, config, name) for name, _ in net.named_parameters()}
    return mask, {name: slot.to_tensor(mask[slot.path]).copy() for name, slot in slots.items() if slot.path in mask}


def measure(size_name: str, rounds: int) -> dict[str, Any]:
    """Seconds of each step, by turns, and what our steps hold."""
    size, vkd, usual = (
        SIZES[size_name],
        methods.create("vkd", {"cap": 100.0}),
        methods.create("grad_diff", {"train": "all"}),
    )
    net = model(size)
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        folder = Path(folder)
        _, params, config = convert.load(folder)
        plain = {name: batch(size, config, seed) for seed, name in enumerate(vkd.losses())}
        batches = with_targets(folder, plain, vkd.taps)
        mask, masks = selected(net, vkd, config, params)
        del params
        ours, held = in_jax(folder, vkd, batches, mask)
        full, held_full = in_jax(folder, usual, batches, None)
        theirs = in_torch(net, vkd, batches, masks)
    steps = {"vkd": ours, "vkd in PyTorch": theirs, "grad_diff, all weights": full}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}  # which compiles, too
    if not np.allclose(losses["vkd"], losses["vkd in PyTorch"], rtol=1e-3):
        raise SystemExit(f"the losses differ: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - before)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "size": size_name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "rows": {name: len(given.tokens) for name, given in batches.items()},
        "tokens": batches["retain"].tokens.shape[1],
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "losses": losses,
        "seconds": seconds,
        "median": middle,
        "bytes": {"vkd": held, "grad_diff, all weights": held_full},
        "ratio_to_pytorch": middle["vkd"] / middle["vkd in PyTorch"],
        "ratio_to_grad_diff": middle["vkd"] / middle["grad_diff, all weights"],
        "bytes_to_grad_diff": held / held_full,
    }


def main() -> None:
    """Prints the table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model (default: small)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each step runs (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    found = measure(args.size, args.rounds)
    print(
        f"LLaVA of {found['parameters'] / 1e6:.0f} M parameters, of which VKD trains {found['trainable'] / 1e6:.0f} M; "
        f"{' + '.join(f'{rows} {name}' for name, rows in found['rows'].items())} rows of {found['tokens']} tokens"
    )
    print(f"{'':24}{'seconds':>10}{'(least':>10}{'most)':>10}{'MiB':>10}")
    for name, times in found["seconds"].items():
        held = f"{found['bytes'][name] / 2**20:10.0f}" if name in found["bytes"] else ""
        print(f"{name:24}{found['median'][name]:10.3f}{min(times):10.3f}{max(times):10.3f}{held}")
    print(f"vkd / vkd in PyTorch: {found['ratio_to_pytorch']:.2f} of the time")
    print(
        f"vkd / grad_diff, all weights: {found['ratio_to_grad_diff']:.2f} of the time, "
        f"{found['bytes_to_grad_diff']:.2f} of the memory"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
