"""Fifty VKD steps here and in plain PyTorch with transformers give the same losses and weights.

    pytest -s -m slow tests/parity/test_trajectory.py

prints the differences. The PyTorch side is written in the usual way: a model from transformers, requires_grad_, AdamW,
clip_grad_norm_, a mask after the step. It shares only data with our side: batches, the target features of the forget
set, and the saliency mask.
"""

import math

import numpy as np
import pytest

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages, TiledImage
from vkd_jax.data.sampler import Sampler
from vkd_jax.methods.base import Context
from vkd_jax.methods.vkd import VKD
from vkd_jax.models.tiled import TiledConfig
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.training import loop, metric_writer
from vkd_jax.types import Example

torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
pytest.importorskip("transformers")

from trajectory_families import END, FAMILIES, IMAGE, START  # noqa: E402

CONFIG = TrainConfig(
    steps=50, batch_size=dict(forget=3, retain=3), learning_rate=3e-4, warmup_steps=5, weight_decay=0.1, log_every=1,
    checkpoint_every=1000,
)  # fmt: skip
VKD_FIELDS = dict(mask_keep=0.5, fisher_samples=4, fisher_chunk=2, augment_forget=1, weight_retain_distill=4.0)


def draw(config, rng, size):
    """Draws a random image of a size."""
    if not isinstance(config, TiledConfig):
        return rng.standard_normal((*size, 3)).astype(np.float32)
    sides = np.array(config.grids(*size)) * config.vision.image_size
    return TiledImage(tuple(rng.standard_normal((*side, 3)).astype(np.float32) for side in sides), size)


def encoded(config, sizes, seed):
    """Encodes two questions about each of four images, with answers of one to three tokens."""
    rng = np.random.default_rng(seed)
    images = [draw(config, rng, size) for size in sizes]
    rows = []
    for i in range(8):
        count = config.image_tokens(*sizes[i // 2])
        prompt = [1, START, *[IMAGE] * count, END, *rng.integers(10, 100, rng.integers(2, 6))]
        rows.append((prompt, rng.integers(10, 100, rng.integers(1, 4)).tolist()))
    t, a = max(len(p) + len(answer) for p, answer in rows), 3
    out = dict(
        tokens=np.full((8, t), 3, np.int32),
        mask=np.zeros((8, t), bool),
        target_positions=np.zeros((8, a), np.int32),
        targets=np.zeros((8, a), np.int32),
        target_mask=np.zeros((8, a), bool),
    )
    for i, (prompt, answer) in enumerate(rows):
        n, m = len(prompt), len(answer)
        out["tokens"][i, : n + m], out["mask"][i, : n + m] = prompt + answer, True
        out["target_positions"][i, :m], out["targets"][i, :m], out["target_mask"][i, :m] = (
            n - 1 + np.arange(m),
            answer,
            True,
        )
    return EncodedSet(
        examples=[Example(str(i), "", b"", str(i // 2), "", "") for i in range(8)],
        prompt_length=np.array([len(p) for p, _ in rows], np.int32),
        image_rows=np.arange(8, dtype=np.int32) // 2,
        images=PackedImages.of(images, config),
        **out,
    )


class Recorder:
    """Collects the metrics instead of writing them."""

    def __init__(self, folder, **options):
        Recorder.rows = []

    def overview(self, trainable):
        pass

    def tick(self, step):
        pass

    def write(self, step, scalars):
        Recorder.rows.append(scalars)

    def close(self):
        pass


def distance(feature, target, scale):
    """Returns the mean squared error over the real tokens of a row, divided by the teacher's mean square."""
    return (feature - target[: len(feature)]).square().mean() / scale


def losses_in_torch(family, method, name, batch):
    """Computes the forget or retain part of the objective as in vkd.py, row by row."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    mask = torch.tensor(batch.mask).long()
    features = family.encode_images(batch.images)
    logits = family.logits(tokens, mask, batch.images, features)
    rows = []
    for i in range(len(tokens)):
        real = batch.target_mask[i]
        positions, targets = (torch.tensor(x[i][real]).long() for x in (batch.target_positions, batch.targets))
        ce = torch.nn.functional.cross_entropy(logits[i, positions], targets)
        distances = sum(
            distance(
                features[tap][i], torch.tensor(batch.cached[f"target/{tap}"][i]), float(batch.cached[f"scale/{tap}"][i])
            )
            for tap in method.taps
        )
        if name == "forget":
            rows.append(-ce.clamp(max=method.cap) + method.weight_forget_distill * distances)
        else:
            rows.append(ce + method.weight_retain_distill * distances)
    return torch.stack(rows).mean()


def rate(step):
    """Returns the learning rate: linear warmup, then half a cosine; the first step is 0."""
    if step < CONFIG.warmup_steps:
        return CONFIG.learning_rate * step / CONFIG.warmup_steps
    done = (step - CONFIG.warmup_steps) / (CONFIG.steps - CONFIG.warmup_steps)
    return CONFIG.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train_in_torch(family, method, prepared, masks):
    """Trains the model in place and returns the loss of every step; `masks` are by parameter name."""
    trained = {name: p for name, p in family.model.named_parameters() if name in masks}
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(name in trained)
    decayed = [p for p in trained.values() if p.ndim > 1]
    rest = [p for p in trained.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=CONFIG.weight_decay), dict(params=rest, weight_decay=0.0)],
        betas=(0.9, CONFIG.b2),
        eps=1e-8,
    )
    streams = {
        name: Sampler(prepared.sets[name], CONFIG.batch_size[name], seed=0, name=name) for name in ("forget", "retain")
    }
    losses = []
    for step in range(CONFIG.steps):
        loss = sum(losses_in_torch(family, method, name, streams[name][step]) for name in streams)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), CONFIG.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(torch.where(masks[name], parameter, before[name]))
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_fifty_steps_agree_with_pytorch(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    family = FAMILIES[name](FAMILIES[name].create().eval())
    with torch.no_grad():  # at the initial scales images hardly change the logits
        for parameter in family.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    family.model.save_pretrained(tmp_path / "model")
    graphdef, params, config = hf.load(tmp_path / "model")
    method = VKD(**VKD_FIELDS)
    sets = {"forget": encoded(config, family.sizes, 1), "retain": encoded(config, family.sizes[::-1], 2)}
    prepared = method.prepare(Context(graphdef, params, None, config, sets, seed=0))

    with torch.no_grad():  # the teacher's features, the target of both sides, agree
        teacher = family.encode_images(prepared.sets["retain"].images.cached)
    for tap in method.taps:
        for in_torch, cached in zip(teacher[tap], prepared.sets["retain"].per_image[f"target/{tap}"], strict=True):
            np.testing.assert_allclose(cached[: len(in_torch)], in_torch, atol=1e-4)

    monkeypatch.setattr(metric_writer, "Progress", Recorder)
    trained = loop.fit(
        ModelBundle(graphdef, params, config, None, make_mesh()),
        method,
        prepared,
        CONFIG,
        seed=0,
        folder=tmp_path / "train",
    )
    ours = np.array([row["loss"] for row in Recorder.rows])

    module = models.module_for(name)
    slots = {key: hf.find_slot(module, config, key) for key, _ in family.model.named_parameters()}
    masks = {
        key: torch.tensor(slot.to_tensor(np.asarray(prepared.mask[slot.path])).copy())
        for key, slot in slots.items()
        if slot.path in trained
    }
    assert {slots[key].path for key in masks} == set(trained)
    theirs = train_in_torch(family, method, prepared, masks)

    distance_squared = change_squared = norm_squared = 0.0
    for key, parameter in family.model.named_parameters():
        if key in masks:
            want = slots[key].to_param(parameter.detach().numpy())
            distance_squared += np.square(trained[slots[key].path] - want).sum()
            change_squared += np.square(params[slots[key].path] - want).sum()
            norm_squared += np.square(want).sum()
    of_norm, of_change = np.sqrt(distance_squared / norm_squared), np.sqrt(distance_squared / change_squared)
    print(
        f"\n{name}: {CONFIG.steps} steps, {len(masks)} trained tensors; loss {ours[0]:.4f} -> {ours[-1]:.4f}; largest "
        f"difference of a loss {np.abs(ours - theirs).max():.1e}; distance of the weights {of_norm:.1e} of their norm, "
        f"{of_change:.1e} of their change in training"
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert of_norm <= 1e-3 and of_change <= 5e-4
    assert np.sqrt(change_squared / norm_squared) > 1e-2  # the weights did change
