"""VKD on retain sets whose teacher features do not fit in memory: they go to files, or are recomputed at each step."""

import dataclasses
import mmap
import shutil
import tempfile
import types

import jax
import numpy as np
import pytest

from vkd_jax.config.training import TrainConfig
from vkd_jax.methods import base, feature_targets, vkd
from vkd_jax.methods.vkd import VKD
from vkd_jax.models.base import bind
from vkd_jax.runtime import memory
from vkd_jax.training import loop
from vkd_jax.types import UserError

SETTINGS = dict(blocks=0, augment_forget=1, mask_scope="none")
CACHED, RECOMPUTED = (VKD(teacher_features=value, **SETTINGS) for value in vkd.TEACHER_FEATURES)


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    return base.Context(
        tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0, encode=tiny_model.encode
    )


@pytest.fixture(scope="module")
def prepared(context):
    return {method: method.prepare(context) for method in (CACHED, RECOMPUTED)}


def test_the_teacher_computes_the_features_that_are_cached_otherwise(context, prepared):
    cached, recomputed = (prepared[m].sets["retain"].batch(np.array([3, 0, 7])) for m in (CACHED, RECOMPUTED))
    targets = RECOMPUTED.teachers()["retain"](bind(context.graphdef, context.params), recomputed)
    assert {**targets, **recomputed.cached}.keys() == cached.cached.keys()
    for name, value in {**targets, **recomputed.cached}.items():
        np.testing.assert_allclose(value, cached.cached[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_training_is_the_same_either_way(tiny_model, prepared):
    config = TrainConfig(steps=2, learning_rate=1e-2, warmup_steps=0, batch_size=dict(forget=2, retain=2))
    cached, recomputed = (
        loop.fit(tiny_model, method, prepared[method], config, seed=0, folder=None) for method in (CACHED, RECOMPUTED)
    )
    moved = [path for path in cached if not np.array_equal(cached[path], tiny_model.params[path])]
    assert moved and cached.keys() == recomputed.keys()
    for path in cached:
        np.testing.assert_allclose(cached[path], recomputed[path], rtol=1e-3, atol=1e-5, err_msg=path)


def test_a_later_request_is_held_to_the_vanilla_model_either_way(tiny_model, context, prepared):
    """Training starts from `params`, and the features of the teacher are those of `vanilla`."""
    config = TrainConfig(steps=2, learning_rate=1e-2, warmup_steps=0, batch_size=dict(forget=2, retain=2))
    paths = CACHED.trainable(context.params, context.model_config)
    vanilla = {**context.params, **{path: context.params[path] * 1.1 for path in paths}}
    sets = {m: m.prepare(dataclasses.replace(context, vanilla=vanilla)) for m in (CACHED, RECOMPUTED)}
    before, after = (x[CACHED].sets["retain"].per_image["target/projector"] for x in (prepared, sets))
    assert np.abs(after - before).max() > 0.01
    cached, recomputed = (
        loop.fit(tiny_model, m, sets[m], config, seed=0, folder=None, teacher=vanilla) for m in (CACHED, RECOMPUTED)
    )
    own = loop.fit(tiny_model, RECOMPUTED, sets[RECOMPUTED], config, seed=0, folder=None)
    for path in cached:
        np.testing.assert_allclose(cached[path], recomputed[path], rtol=1e-3, atol=1e-5, err_msg=path)
    assert any(np.abs(own[path] - recomputed[path]).max() > 1e-3 for path in own)


@pytest.mark.parametrize("target", vkd.TARGETS)
def test_only_the_images_that_targets_and_scales_need_are_recorded(context, monkeypatch, target):
    """The forget targets are the features of the retain images that cached features would have given."""
    monkeypatch.setattr(vkd, "SCALE_IMAGES", 3)
    recorded, record_taps = [], feature_targets.record_taps

    def counting(graphdef, params, images, names, **options):
        recorded.append(len(images))
        return record_taps(graphdef, params, images, names, **options)

    monkeypatch.setattr(feature_targets, "record_taps", counting)
    context = dataclasses.replace(context, load_base=lambda: context.params)
    sets = {}
    for method in (CACHED, RECOMPUTED):
        method = dataclasses.replace(method, target=target)
        sets[method.teacher_features] = method.prepare(context).sets["forget"]
    everything, few = recorded[0], recorded[len(recorded) // 2]
    sources = len(sets["cached"].images) if target in ("swap", "look_alike") else 0
    assert 3 <= few <= 3 + sources and few < everything == len(context.sets["retain"].images)
    if target in ("swap", "look_alike"):
        for tap in CACHED.taps:
            cached, recomputed = (x.per_image[f"target/{tap}"] for x in sets.values())
            np.testing.assert_allclose(cached, recomputed, rtol=1e-5, atol=1e-6)


def is_mapped(array):
    while array is not None:
        if isinstance(array, mmap.mmap):
            return True
        array = getattr(array, "base", None)
    return False


@pytest.mark.parametrize("target", vkd.TARGETS)
def test_features_past_the_budget_are_mapped_from_files_and_have_the_same_bits(
    context, tmp_path, monkeypatch, cached_targets, target
):
    """The rule of docs/methods.md: in memory up to the budget, and in files past it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cached = cached_targets[target]
    size = sum(x.nbytes for x in cached.sets["retain"].per_image.values())
    method = dataclasses.replace(CACHED, target=target, cache_gib=(size - 1) / memory.GIB)
    context = dataclasses.replace(context, load_base=lambda: context.params)
    mapped = method.prepare(context)
    for name in ("forget", "retain"):
        both = cached.sets[name].per_image, mapped.sets[name].per_image
        large = sum(x.nbytes for x in both[0].values()) >= size
        for key, values in both[0].items():
            assert not is_mapped(values) and values.tobytes() == both[1][key].tobytes()
            assert is_mapped(both[1][key]) == (large and key.startswith("target/")), (name, key)
    assert is_mapped(mapped.sets["retain"].per_image["target/features"])
    assert not list(tmp_path.iterdir())  # files without a name: nothing is left of a process that is killed
    batch = mapped.sets["retain"].batch(np.array([3, 0]))
    assert not is_mapped(batch.cached["target/features"])


@pytest.fixture(scope="module")
def cached_targets(context):
    context = dataclasses.replace(context, load_base=lambda: context.params)
    return {target: dataclasses.replace(CACHED, target=target).prepare(context) for target in vkd.TARGETS}


def test_features_that_fit_nowhere_are_refused_with_the_setting_that_fits(context, prepared, monkeypatch):
    retain = context.sets["retain"]
    taps = base.tap_shapes(context, retain)
    cached, recomputed = (m.cache_spec("retain", taps, context.model_config) for m in (CACHED, RECOMPUTED))
    most = sum(x.nbytes for x in prepared[CACHED].sets["retain"].per_image.values()) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=most))
    with pytest.raises(UserError, match="cached values of .* 0.0 GiB free; set method.teacher_features=recomputed"):
        base.cache_allocator(retain, cached, budget=most)
    base.cache_allocator(retain, recomputed, budget=most)


def test_a_budget_of_two_megabytes_decides_what_is_mapped():
    """Of 200,000 bytes for each image, ten fit and eleven do not."""
    spec = base.CacheSpec({"target/features": jax.ShapeDtypeStruct((50_000,), np.float32)})
    for count, expected in ((10, False), (11, True)):
        few = types.SimpleNamespace(images=range(count), examples=())
        allocate = base.cache_allocator(few, spec, VKD(cache_gib=2e6 / memory.GIB).cache_bytes)
        assert is_mapped(allocate((count, 50_000), np.float32)) is expected


def test_a_teacher_that_no_step_has_is_refused():
    with pytest.raises(UserError, match="teacher_features: a step has the weights of the vanilla model"):
        VKD(teacher_features="recomputed", teacher="base")


def test_mean_squares_are_those_of_all_images_however_many_are_squared_at_once(context):
    images = context.sets["retain"].images
    tokens = feature_targets.record_taps(context.graphdef, context.params, images, ["projector"])["projector"]
    whole = np.mean(np.square(tokens.values), where=tokens.valid[..., None], dtype=np.float32)
    assert feature_targets.mean_squares({"projector": tokens})["projector"] == whole
    np.testing.assert_allclose(feature_targets._mean_square(tokens, chunk=2), whole, rtol=1e-6)


def test_a_subset_of_images_is_packed_as_the_whole_set(context):
    images, rows = context.sets["retain"].images, np.array([1, 4])
    for name, array in images.subset(rows)[np.arange(2)].items():
        np.testing.assert_array_equal(array, images[rows][name])
    jax.tree.map(np.testing.assert_array_equal, images.subset(rows)._pack(map(images.make, rows)), dict(images[rows]))
