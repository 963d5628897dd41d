"""The objectives of the methods: identities between them, cached arrays, masks, and the weights that train."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax import methods, registry
from vkd_jax.checkpoints import hf
from vkd_jax.methods import base, feature_targets, losses
from vkd_jax.methods.grad_diff import GradDiff
from vkd_jax.methods.scope import frozen_blocks, trainable_paths
from vkd_jax.methods.vkd import VKD
from vkd_jax.models import llava, lora
from vkd_jax.models.base import VisualTokens, abstract_model, bind
from vkd_jax.training import loop
from vkd_jax.types import UserError

SMALL = dict(fisher_samples=6, fisher_chunk=3)


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    return base.Context(
        tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0, encode=tiny_model.encode
    )


@pytest.fixture(scope="module")
def deep(context):
    """The context with a vision tower of three blocks, of which two are in use, instead of two and one."""
    vision = dataclasses.replace(context.model_config.vision, layers=3)
    config = dataclasses.replace(context.model_config, vision=vision)
    graphdef, params = hf.init_params(config, 0)
    return dataclasses.replace(context, graphdef=graphdef, params=params, model_config=config)


def gradients(context, method, prepared, stream, rows=(0, 1, 5)):
    batch = prepared.sets[stream].batch(np.array(rows))
    paths = set(method.trainable(context.params, context.model_config))
    trainable = {k: v for k, v in context.params.items() if k in paths}

    def loss(trainable):
        return method.losses()[stream](bind(context.graphdef, {**context.params, **trainable}), batch)[0]

    return jax.jit(jax.value_and_grad(loss))(trainable)


def assert_trees_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], err_msg=path, **tolerance)


def test_the_unused_vision_block_never_trains(deep):
    """Its gradient is zero, and weight decay would move it."""
    visual = VKD(blocks=1).trainable(deep.params, deep.model_config)
    blocks = {path.split("/")[2] for path in visual if path.startswith("vision_tower/blocks/")}
    assert blocks == {"1"}  # of blocks 0 to 2, of which 1 is the last one in use
    for method in (VKD(blocks=-1), GradDiff(train="all"), GradDiff(train="visual")):
        paths = method.trainable(deep.params, deep.model_config)
        assert not [p for p in paths if p.startswith(("vision_tower/blocks/2/", "vision_tower/post_norm"))]
    everything = GradDiff(train="all").trainable(deep.params, deep.model_config)
    unused = set(deep.params) - set(everything)
    assert all(p.startswith(("vision_tower/blocks/2/", "vision_tower/post_norm")) for p in unused)


def test_every_trainable_weight_gets_a_gradient(context):
    method = VKD(blocks=-1, mask_scope="none")
    _, grads = gradients(context, method, method.prepare(context), "retain")
    assert not [path for path, g in grads.items() if not np.any(g)]


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_visual_scope_contains_no_weight_of_the_language_model(deep, blocks):
    paths = trainable_paths(deep.params, deep.model_config, "visual", blocks)
    assert any(p.startswith("projector/") for p in paths)
    assert not any(p.startswith("language_model/") for p in paths)
    with pytest.raises(UserError, match="Give -1 to 2"):
        trainable_paths(deep.params, deep.model_config, "visual", 3)


def test_fine_tuning_with_adapters_trains_the_adapters_alone(tiny_config):
    _, shapes = abstract_model(lambda rngs: llava.Llava(tiny_config, rngs=rngs))
    params = jax.eval_shape(lambda params: lora.attach(params, rank=2, alpha=2.0, dropout=0.0, seed=0), shapes)
    method = methods.create("finetune", dict(train="lora"))
    assert set(method.trainable(params, tiny_config)) == set(params) - set(shapes)
    assert method.trainable(shapes, tiny_config) == []  # before the adapters are attached
    everything = methods.create("finetune", {}).trainable(shapes, tiny_config)
    assert any(path.startswith("language_model/") for path in everything)
    assert not [path for path in methods.create("finetune", dict(train="visual")).trainable(shapes, tiny_config)
                if path.startswith("language_model/")]  # fmt: skip
    assert set(method.losses()) == {"image", "text"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(train="visul"), r"method\.train: 'visul' is not allowed\. Give one of all, visual, lora, visual\+lora"),
        (dict(lora_rank=0), r"method\.lora_rank: 0 is not allowed\. Give a whole number of at least 1"),
        (dict(lora_rank=1.5), r"method\.lora_rank: 1\.5 is not allowed"),
        (dict(lora_alpha=0.0), r"method\.lora_alpha: 0\.0 is not allowed\. Give a number greater than 0"),
        (dict(lora_alpha=float("nan")), r"method\.lora_alpha: nan is not allowed"),
        (dict(lora_dropout=1.0), r"method\.lora_dropout: 1\.0 is not allowed"),
        (dict(lora_dropout=-0.1), r"method\.lora_dropout: -0\.1 is not allowed"),
    ],
)
def test_invalid_hyperparameters_of_fine_tuning_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        methods.create("finetune", fields)


@pytest.mark.parametrize("stream", ["forget", "retain"])
def test_vkd_without_distillation_and_mask_equals_visual_gradient_difference(context, stream):
    vkd = VKD(
        forget="ga",
        weight_forget_distill=0.0,
        weight_retain_distill=0.0,
        mask_scope="none",
        blocks=1,
        cap=9.0,
    )
    plain = GradDiff(train="visual", blocks=1, cap=9.0)
    a = gradients(context, vkd, vkd.prepare(context), stream)
    b = gradients(context, plain, plain.prepare(context), stream)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert_trees_close(a[1], b[1], rtol=1e-5, atol=1e-8)


def test_npo_at_the_reference_is_ascent_on_the_sequence_log_probability(context):
    vkd = VKD(forget="npo", target="none", weight_forget_distill=0.0, mask_scope="none", beta=0.4)
    prepared = vkd.prepare(context)
    value, grads = gradients(context, vkd, prepared, "forget")
    np.testing.assert_allclose(value, 2 / 0.4 * np.log(2), rtol=1e-5)
    batch = prepared.sets["forget"].batch(np.array((0, 1, 5)))

    def log_prob(trainable):
        logits, _ = base.answer_logits(bind(context.graphdef, {**context.params, **trainable}), batch)
        return jnp.mean(losses.sequence_log_prob(logits, batch.targets, batch.target_mask))

    want = jax.jit(jax.grad(log_prob))({k: context.params[k] for k in grads})
    assert_trees_close(grads, want, rtol=1e-4, atol=1e-7)


def test_the_retain_distillation_is_zero_at_the_teacher(context):
    vkd = VKD(weight_retain_ce=0.0, mask_scope="none")
    value, grads = gradients(context, vkd, vkd.prepare(context), "retain")
    np.testing.assert_allclose(value, 0.0, atol=1e-9)
    assert max(float(jnp.abs(g).max()) for g in grads.values()) < 1e-4


def test_without_output_terms_the_language_model_is_not_computed(context):
    """NaN in its weights would reach the loss."""
    params = {path: x + (np.nan if path.startswith("language_model/") else 0) for path, x in context.params.items()}
    broken = dataclasses.replace(context, params=params)
    for stream, fields in (("retain", dict(weight_retain_ce=0.0)), ("forget", dict(forget="none"))):
        vkd = VKD(mask_scope="none", **fields)
        value, _ = gradients(broken, vkd, vkd.prepare(broken), stream)
        assert np.isfinite(value)
        other = "forget" if stream == "retain" else "retain"
        assert np.isnan(gradients(broken, vkd, vkd.prepare(broken), other)[0])


@pytest.mark.parametrize("method", [VKD(blocks=1, mask_scope="none"), VKD(blocks=0, mask_scope="none"), GradDiff()])
@pytest.mark.parametrize("stream", ["forget", pytest.param("retain", marks=pytest.mark.slow)])
def test_a_cached_prefix_does_not_change_the_gradients(deep, method, stream):
    """Blocks 0 and 1 are in use; with train=all no block precedes every trainable weight."""
    prefix = frozen_blocks(method.trainable(deep.params, deep.model_config), deep.model_config)
    assert prefix == {1: 1, 0: 2, -1: 0}[method.blocks]
    plain = method.prepare(deep)
    cached = {name: loop.cache_prefix(deep.graphdef, deep.params, rows, prefix) for name, rows in plain.sets.items()}
    added = set(cached[stream].per_image) - set(plain.sets[stream].per_image)
    assert added == ({f"vision/{prefix - 1}"} if prefix else set())
    want = gradients(deep, method, plain, stream)
    got = gradients(deep, method, dataclasses.replace(plain, sets=cached), stream)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    # At the teacher the gradient of the distillation, 2 * 8 * (h - target) / scale, is rounding error of h alone, which
    # a cached prefix changes: by 1.4e-6 with JAX 0.12, where the largest gradient is about 2e-3.
    assert_trees_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    if prefix:  # the pixels are not used
        blank = {name: dataclasses.replace(rows, images=BlankImages(rows.images)) for name, rows in cached.items()}
        again = gradients(deep, method, dataclasses.replace(plain, sets=blank), stream)
        assert_trees_close(again[1], got[1])


class BlankImages:
    """Images of the same shapes that are all zeros."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, rows):
        return {name: np.zeros_like(x) for name, x in self.images[rows].items()}


def test_text_sets_and_sets_over_the_budget_are_not_cached(deep):
    encoded = deep.sets["retain"]
    assert loop.cache_prefix(deep.graphdef, deep.params, dataclasses.replace(encoded, images=None), 2).per_image == {}
    remade = copy.copy(encoded.images)
    remade.cached = None  # as with many images, which are made on request
    cached = loop.cache_prefix(deep.graphdef, deep.params, dataclasses.replace(encoded, images=remade), 2)
    assert len(cached.per_image["vision/1"]) == len(encoded.images)
    size = cached.per_image["vision/1"].nbytes
    for budget, fits in ((size, True), (size - 1, False)):
        same = loop.cache_prefix(deep.graphdef, deep.params, encoded, 2, budget) is encoded
        assert same is not fits


def test_taps_before_every_trainable_weight_are_refused(deep):
    vkd = VKD(blocks=1, taps=("vision/0", "projector"), mask_scope="none")
    with pytest.raises(UserError, match="method.taps: vision/0 precedes every trainable weight"):
        vkd.prepare(deep)
    VKD(blocks=1, taps=("vision/1", "projector"), mask_scope="none").prepare(deep)
    with pytest.raises(UserError, match="method.taps: unknown tap 'vision/2'. Available: vision/0, .*, projector"):
        VKD(taps=("vision/2",)).check_model(deep.params, deep.model_config)


def test_cached_targets_equal_the_features_of_the_teacher(context):
    vkd = VKD(mask_scope="none")
    retain = vkd.prepare(context).sets["retain"]
    rows = np.array([3, 0, 7])
    batch = retain.batch(rows)
    _, taps = bind(context.graphdef, context.params).encode(batch.images)
    for tap in vkd.taps:
        np.testing.assert_allclose(batch.cached[f"target/{tap}"], taps[tap].values, rtol=1e-5, atol=1e-6)


def test_forget_targets_are_the_features_of_retain_images(context):
    """The retain targets are the teacher's features of the same images."""
    vkd = VKD(target="swap", mask_scope="none", augment_forget=0)
    prepared = vkd.prepare(context)
    taps = feature_targets.record_taps(context.graphdef, context.params, context.sets["forget"].images, vkd.taps)
    others = prepared.sets["retain"].per_image["target/projector"]
    for target, feature in zip(
        prepared.sets["forget"].per_image["target/projector"], taps["projector"].values, strict=True
    ):
        assert not np.allclose(target, feature)
        assert any(np.array_equal(target, other) for other in others)


@pytest.mark.parametrize(
    ("forget", "target"),
    [("npo", "swap"), ("ga", "anchor"), ("none", "repel"), ("npo", "none"), ("none", "none")],
)
def test_every_combination_gives_finite_gradients(context, target, forget):
    vkd = VKD(target=target, forget=forget, mask_scope="none")
    value, grads = gradients(context, vkd, vkd.prepare(context), "forget")
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads.values())
    if (target, forget) == ("none", "none"):
        assert not any(np.any(g) for g in grads.values())


def grid(rows, columns, pad=0):
    """The token coordinates of one image, row by row, and padding."""
    coords = [[0, row, column] for row in range(rows) for column in range(columns)]
    return np.array(coords + [[-1, -1, -1]] * pad, np.int32)


def test_resampling_to_another_shape_preserves_relative_positions():
    small = VisualTokens(np.arange(5.0)[None, :, None], grid(2, 2, pad=1)[None])
    same = feature_targets.resample_features(small, [0], grid(2, 2)[None])
    np.testing.assert_array_equal(same[0, :, 0], [0, 1, 2, 3])
    wide = feature_targets.resample_features(small, [0], grid(2, 4, pad=2)[None])
    np.testing.assert_array_equal(wide[0, :8, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    class_token = np.array([[0, -1, -1]], np.int32)
    both = VisualTokens(np.arange(5.0)[None, :, None], np.concatenate([class_token, grid(2, 2)])[None])
    other = np.concatenate([class_token, grid(6, 6)])[None]
    resampled = feature_targets.resample_features(both, [0], other)[0, :, 0]
    assert resampled[0] == 0 and set(resampled[1:]) == {1, 2, 3, 4}


def test_resampling_matches_images_by_their_number():
    second = grid(2, 2) + np.array([1, 0, 0], np.int32)
    pair = VisualTokens(np.arange(8.0)[None, :, None], np.concatenate([grid(2, 2), second])[None])
    np.testing.assert_array_equal(
        feature_targets.resample_features(pair, [0], second[None, ::-1])[0, :, 0], [7, 6, 5, 4]
    )
    alone = VisualTokens(pair.values[:, :4], grid(2, 2)[None])
    np.testing.assert_array_equal(feature_targets.resample_features(alone, [0], second[None])[0, :, 0], [0, 1, 2, 3])


def test_mean_features_of_images_of_different_shapes_equal_the_values_by_hand():
    values = np.array([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 99.0, 99.0]])[..., None]
    tokens = VisualTokens(values, np.stack([grid(2, 2), grid(1, 2, pad=2)]))
    want = [(1 + 10) / 2, (2 + 20) / 2, (3 + 10) / 2, (4 + 20) / 2]
    got = feature_targets.mean_features(tokens, np.stack([grid(2, 2)] * 3))
    np.testing.assert_allclose(got[..., 0], [want] * 3)
    many = VisualTokens(np.ones((1000, 1, 1), jnp.bfloat16), np.stack([grid(1, 1)] * 1000))
    assert feature_targets.mean_features(many, grid(1, 1)[None]) == 1  # a sum in bfloat16 would stay at 256


def test_base_targets_need_the_base_model(context):
    with pytest.raises(UserError, match="config.model.base"):
        VKD(target="base", mask_scope="none").prepare(context)
    with_base = dataclasses.replace(context, load_base=lambda: context.params)
    forget = VKD(target="base", mask_scope="none").prepare(with_base).sets["forget"]
    want = feature_targets.record_taps(context.graphdef, context.params, forget.images, ("projector",))
    np.testing.assert_array_equal(forget.per_image["target/projector"], want["projector"].values)


def test_the_mask_covers_exactly_the_trainable_weights_and_selects_some(context):
    vkd = VKD(mask_keep=0.25, **SMALL)
    mask = vkd.prepare(context).mask
    assert mask.keys() == set(vkd.trainable(context.params, context.model_config))
    share = sum(int(m.sum()) for m in mask.values()) / sum(m.size for m in mask.values())
    assert 0.2 < share <= 0.2501
    for path, m in mask.items():
        assert m.shape == context.params[path].shape


def test_reference_log_probs_do_not_depend_on_the_batch_size(context):
    """The padding of the last batch is removed."""
    want = base.reference_log_probs(context, context.sets["forget"], batch_size=16)
    np.testing.assert_allclose(base.reference_log_probs(context, context.sets["forget"], batch_size=5), want, rtol=1e-5)
    assert want.shape == (len(context.sets["forget"]),) and (want < 0).all()


def test_unknown_names_are_refused_with_the_available_ones():
    with pytest.raises(UserError, match="method: unknown name 'vdk'. Available: finetune, grad_ascent, .*vkd"):
        methods.create("vdk", {})
    with pytest.raises(UserError, match="method vkd: unknown hyperparameter bta. Available: "):
        methods.create("vkd", {"bta": 1})
    with pytest.raises(UserError, match=r"method\.target: 'ankor' is not allowed\. Give one of"):
        methods.create("vkd", {"target": "ankor"})
    with pytest.raises(UserError, match=r"method\.taps: \(\) is not allowed\. Give a nonempty tuple"):
        methods.create("vkd", {"taps": ()})
    with pytest.raises(UserError, match="method.mask_keep: .*exactly one"):
        methods.create("vkd", {"mask_threshold": 1.0, "mask_keep": 0.5})


def test_an_unknown_tap_is_refused_with_the_available_ones(context):
    with pytest.raises(UserError, match=r"unknown tap 'vision/9'. Available: vision/0"):
        VKD(taps=("vision/9",), mask_scope="none").prepare(context)


# The contract.


@pytest.mark.parametrize("name", [name for name in registry.METHODS if name not in ("finetune", "manu")])
def test_prepare_caches_exactly_the_arrays_of_cache_spec(context, name):
    """The planner reads `cache_spec` instead of calling `prepare`."""
    fields = SMALL if name in ("vkd", "mmunlearner") else {}
    method = methods.create(name, fields)
    prepared = method.prepare(context)
    for stream in method.losses():
        encoded = prepared.sets[stream]
        spec = method.cache_spec(stream, base.tap_shapes(context, encoded), context.model_config)
        for arrays, entries in ((encoded.per_image, spec.per_image), (encoded.per_example, spec.per_example)):
            assert {k: (v.shape[1:], v.dtype) for k, v in arrays.items()} == {
                k: (v.shape, v.dtype) for k, v in entries.items()
            }


def test_cached_arrays_that_differ_from_cache_spec_are_an_error(tiny_sets):
    encoded = tiny_sets["forget"]
    spec = base.CacheSpec(per_example={"reference": jax.ShapeDtypeStruct((), jnp.float32)})
    good = np.zeros(len(encoded), np.float32)
    assert base.with_cache(encoded, spec, {"reference": good}).per_example["reference"] is good
    for values, message in (
        ({}, "disagree about reference"),
        ({"reference": good, "more": good}, "disagree about more"),
        ({"reference": good[:, None]}, r"rows of float32\[\], and prepare computed float32\[1\]"),
        ({"reference": good.astype(np.float16)}, r"prepare computed float16\[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            base.with_cache(encoded, spec, values)


def test_a_method_that_trains_has_no_edit(context):
    with pytest.raises(NotImplementedError, match="GradDiff trains"):
        GradDiff().edit(context)


@pytest.mark.parametrize("name", ["vkd", "grad_diff", "kl"])
def test_a_method_without_any_loss_is_refused(name):
    cls = registry.lookup("method", registry.METHODS, name)
    weights = [field.name for field in dataclasses.fields(cls) if field.name.startswith("weight_")]
    with pytest.raises(UserError, match="are all 0, so that no loss is left. Give one of them"):
        cls(**dict.fromkeys(weights, 0.0))
    cls(**dict.fromkeys(weights[1:], 0.0))
