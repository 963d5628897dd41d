"""The rows and shapes of each step, and images that are made on request instead of cached."""

import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax.data import augment, images
from vkd_jax.data.batching import in_batches
from vkd_jax.data.encoding import EncodedSet, bucket_lengths, encode_set
from vkd_jax.data.images import PackedImages
from vkd_jax.data.sampler import Sampler
from vkd_jax.methods import base
from vkd_jax.runtime import memory
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import Example, UserError


@pytest.mark.parametrize(
    ("lengths", "most", "edges"),
    [
        ([4, 8, 20], 1, [20]),
        ([4, 4, 4, 8, 8, 20], 2, [8, 20]),  # five rows of 8 and one of 20 are 60 tokens; lengths 4 and 20 give 72
        ([4, 4, 4, 4, 8, 20, 20], 2, [4, 20]),  # 76 tokens; lengths 8 and 20 give 80
        ([4, 8], 5, [4, 8]),
        ([], 3, []),
    ],
)
def test_bucket_lengths_by_hand(lengths, most, edges):
    assert bucket_lengths(np.array(lengths, int), most) == edges


def test_more_buckets_never_add_padding():
    lengths = np.random.default_rng(0).integers(1, 60, 200) * 4
    costs = []
    for most in range(1, 6):
        edges = np.array(bucket_lengths(lengths, most))
        assert len(edges) == most and edges[-1] == lengths.max()
        costs.append(edges[np.searchsorted(edges, lengths)].sum())
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


@pytest.fixture
def encoded():
    """Five short rows and three long ones; the first of a row's `tokens` is the row number."""
    lengths = np.array([3, 4, 4, 3, 4, 7, 8, 8])
    tokens = np.tile(np.arange(8, dtype=np.int32)[:, None], (1, 8))
    answers = np.tile(np.array([1, 2], np.int32), (8, 1))
    return EncodedSet(
        examples=[Example(str(i), "", None, "", "", "") for i in range(8)],
        tokens=tokens,
        mask=np.arange(8) < lengths[:, None],
        target_positions=answers,
        targets=answers,
        target_mask=np.arange(2) < np.where(lengths > 4, 2, 1)[:, None],
        prompt_length=lengths - 1,
        image_rows=np.full(8, -1, np.int32),
        images=None,
        bucket_shapes=np.where(lengths[:, None] > 4, [8, 2], [4, 1]).astype(np.int32),
    )


def test_a_batch_has_rows_of_one_bucket_with_all_their_tokens(encoded):
    stream = Sampler(encoded, 3, seed=0, name="x")
    shapes = set()
    for step in range(16):
        rows, batch = stream.rows(step), stream[step]
        shapes.add((batch.tokens.shape, batch.targets.shape))
        np.testing.assert_array_equal(batch.mask.sum(1), encoded.mask[rows].sum(1))
        np.testing.assert_array_equal(batch.target_mask.sum(1), encoded.target_mask[rows].sum(1))
    assert shapes == {((3, 4), (3, 1)), ((3, 8), (3, 2))}


def test_every_row_is_drawn_equally_often_and_buckets_alternate(encoded):
    stream = Sampler(encoded, 3, seed=0, name="x")
    cycle = [stream.rows(step) for step in range(8)]  # three epochs of eight rows
    np.testing.assert_array_equal(np.bincount(np.concatenate(cycle)), np.full(8, 3))
    long = [bool(rows[0] >= 5) for rows in cycle]
    assert sum(long) == 3 and long not in ([True] * 3 + [False] * 5, [False] * 5 + [True] * 3)
    again = [stream.rows(step) for step in range(8, 16)]
    assert not all(np.array_equal(a, b) for a, b in zip(cycle, again, strict=True))


def test_without_buckets_each_epoch_has_every_row_once(encoded):
    one = Sampler(EncodedSet(**{**vars(encoded), "bucket_shapes": None}), 4, seed=1, name="x")
    for epoch in range(6):
        rows = np.concatenate([one.rows(2 * epoch), one.rows(2 * epoch + 1)])
        assert sorted(rows) == list(range(8))


def test_batches_are_prefetched_in_order_by_other_threads_from_any_step(encoded):
    stream, threads = Sampler(encoded, 3, seed=0, name="x"), set()

    def put(batch):
        threads.add(threading.get_ident())
        return batch

    batches = list(stream.batches(5, 19, put))
    assert len(batches) == 14 and threading.get_ident() not in threads
    for step, batch in enumerate(batches, 5):
        np.testing.assert_array_equal(batch.tokens, stream[step].tokens)


def test_images_that_are_not_cached_are_made_on_request(tiny_config, monkeypatch):
    pixels = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype(np.float32)
    requests = []

    def make(i):
        requests.append(i)
        return pixels[i]

    cached = PackedImages.measured(make, 5, tiny_config)
    assert sorted(requests) == list(range(5)) and cached.cached is not None
    monkeypatch.setattr(images, "MAX_CACHED_BYTES", 3 * pixels[0].nbytes)
    lazy = PackedImages.measured(make, 5, tiny_config)
    assert lazy.cached is None and len(lazy) == 5
    requests.clear()
    rows = np.array([4, 0, 4])
    np.testing.assert_array_equal(lazy[rows]["pixels"], cached[rows]["pixels"])
    assert requests == [4, 0, 4]


def test_encode_set_pads_texts_to_the_length_of_their_bucket(tiny_model):
    texts = ["Who?", "What is the name of the person in this picture, and where do they come from?"]
    rows = [Example(str(i), "", None, "", texts[i % 2], "Bob" if i % 2 else "nobody") for i in range(6)]
    whole = encode_set(tiny_model.processor, rows, max_length=96)
    bucketed = encode_set(tiny_model.processor, rows, max_length=96, buckets=2)
    assert len(np.unique(bucketed.bucket_shapes, axis=0)) == 2 and len(np.unique(whole.bucket_shapes, axis=0)) == 1
    short, long = bucketed.batch(np.array([0, 2])), bucketed.batch(np.array([0, 1]))
    assert short.tokens.shape[1] < long.tokens.shape[1] == whole.tokens.shape[1]
    np.testing.assert_array_equal(short.mask.sum(1), whole.mask[[0, 2]].sum(1))


# Memory.


@pytest.mark.parametrize(
    ("allocate", "message"),
    [
        (lambda encoded: sampler_of(encoded, 10**9).check_memory(make_mesh()), "batches of 1,000,000,000 examples of"),
        (lambda encoded: in_batches(lambda x: x, encoded.tokens, 10**9), "batches of 1,000,000,000 rows"),
        (lambda encoded: augment.augment_set(encoded, 10**6, None), "1,000,000 augmented copies of"),
        (lambda encoded: base.cache_allocator(encoded, huge_cache(encoded), 2**50), "cached values of"),
    ],
    ids=["training", "inference", "copies", "cached values"],
)
def test_sizes_that_do_not_fit_are_refused_before_they_are_allocated(encoded, monkeypatch, allocate, message):
    monkeypatch.setattr(memory, "host_bytes", lambda: 2**28)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"{message}.* need [\\d,.]+ GiB of memory, and there are 0.2 GiB; "):
            allocate(encoded)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def sampler_of(encoded, batch_size):
    return Sampler(encoded, batch_size, seed=0, name="forget")


def huge_cache(encoded):
    return base.CacheSpec(per_example={"logits": jax.ShapeDtypeStruct((2**30,), jnp.float32)})


def test_sizes_that_fit_are_allowed(encoded):
    sampler_of(encoded, 4).check_memory(make_mesh())
    base.cache_allocator(encoded, base.CacheSpec(), 0)
