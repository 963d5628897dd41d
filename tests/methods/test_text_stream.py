"""The text stream: its losses by hand, and that every method has it."""

import dataclasses

import jax
import numpy as np
import pytest

from vkd_jax import methods, registry
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.training import TrainConfig
from vkd_jax.methods import base, losses
from vkd_jax.methods.grad_diff import GradDiff
from vkd_jax.methods.text_stream import TextStream
from vkd_jax.methods.vkd import VKD
from vkd_jax.methods.worst_case import WorstCase
from vkd_jax.models import lora
from vkd_jax.models.base import bind
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.training import loop
from vkd_jax.types import UserError

UNLEARNING = [name for name in registry.METHODS if name not in ("finetune", "manu")]


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    questions = [dataclasses.replace(e, image=None, image_id="") for e in tiny_sets["retain"].examples[:6]]
    sets = {**tiny_sets, "text": tiny_model.encode(questions)}
    return base.Context(
        tiny_model.graphdef, tiny_model.params, None, tiny_model.config, sets, seed=0, encode=tiny_model.encode
    )


@pytest.mark.parametrize("name", UNLEARNING)
def test_every_method_that_trains_on_a_forget_set_has_the_stream(context, name):
    assert "text" not in methods.create(name, {}).losses()
    method = methods.create(name, dict(train="all", text=TextStream(weight=2.0, loss="kl")))
    assert set(method.losses()) == set(method.image_losses()) | {"text"}
    assert "text" in method.teachers()
    assert not methods.create(name, dict(train="all", text=TextStream(weight=2.0))).teachers().get("text")
    assert method.cache_spec("text", {}, context.model_config) == base.CacheSpec()


def test_the_losses_are_cross_entropy_and_kl_times_the_weight(context):
    params = {path: x * (1.1 if path.startswith("language_model/blocks/") else 1) for path, x in context.params.items()}
    batch = context.sets["text"].batch(np.arange(4))
    model, vanilla = bind(context.graphdef, params), bind(context.graphdef, context.params)
    batch = dataclasses.replace(batch, cached=base.vanilla_logits(vanilla, batch))
    ce, _ = TextStream(weight=3.0).losses()["text"](model, batch)
    np.testing.assert_allclose(ce, 3 * base.cross_entropy(model, batch).mean(), rtol=1e-5)
    kl, metrics = TextStream(weight=3.0, loss="kl").losses()["text"](model, batch)
    each = losses.kl_divergence(batch.cached["vanilla"], base.answer_logits(model, batch)[0], batch.target_mask)
    np.testing.assert_allclose(kl, 3 * each.mean(), rtol=1e-5)
    assert kl > 1e-4 and metrics.keys() == {"text_ce", "text_kl"}
    assert TextStream(weight=3.0, loss="kl").losses()["text"](vanilla, batch)[0] == pytest.approx(0, abs=1e-5)


def test_training_with_everything_changes_tower_projector_and_adapters_alone(context):
    """Worst-case forgetting, the KL text stream and the scope visual+lora in one step, with a mask of the tower."""
    sharding = replicated(make_mesh())
    params = lora.attach(context.params, rank=2, alpha=2.0, dropout=0.1, seed=0, sharding=sharding)
    context = dataclasses.replace(context, params=params)
    method = VKD(
        train="visual+lora", augment_forget=0, fisher_samples=4, fisher_chunk=4, mask_keep=0.5,
        text=TextStream(weight=1.0, loss="kl"), worst_case=WorstCase(radius=1e-3),
    )  # fmt: skip
    config = TrainConfig(
        steps=2, batch_size=dict(forget=2, retain=2, text=2), learning_rate=0.01, warmup_steps=0, weight_decay=0.0
    )
    prepared = method.prepare(context)
    bundle = ModelBundle(context.graphdef, params, context.model_config, None, make_mesh())
    after = loop.fit(bundle, method, prepared, config, seed=0, folder=None)
    changed = {path: np.asarray(value) != np.asarray(params[path]) for path, value in after.items()}
    adapters = [path for path in changed if lora.is_adapter(path)]
    assert all(path.split("/")[0] in ("vision_tower", "projector") for path in changed.keys() - set(adapters))
    assert adapters and all(changed[path].any() for path in adapters)
    for path in changed.keys() - set(adapters):  # the mask covers the update of the worst case as well
        assert not (changed[path] & ~np.asarray(prepared.mask[path])).any(), path
    assert 0 < sum(x.sum() for path, x in changed.items() if path.startswith("vision_tower/"))
    shapes = {path: method.mask_shape(path, x.shape, context.model_config) for path, x in after.items()}
    assert {path: x.shape for path, x in jax.tree.map(np.asarray, prepared.mask).items()} == shapes


def test_a_text_stream_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match=r"method\.text\.weight: train=visual trains no weight that text reaches"):
        GradDiff(train="visual", text=TextStream(weight=1.0))
    with pytest.raises(UserError, match=r"method\.text\.loss: 'mse' is not allowed\. Give one of ce, kl"):
        TextStream(loss="mse")
