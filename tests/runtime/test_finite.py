"""The check for NaN and infinity, for every format of numbers, at the host and on devices."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from qwix import QArray

from vkd_jax.runtime import finite
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import NotFinite

FORMATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.complex64)


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda x: x.__name__)
def test_nan_and_infinity_of_both_signs_are_found_anywhere(dtype):
    limits = () if dtype is np.complex64 else (ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min)
    good = np.array([0.0, -0.0, 1.0, -1.5, *limits, 2.0, 3.0][:6]).astype(dtype).reshape(2, 3)
    assert finite.is_finite(good) and finite.is_finite(good.T) and finite.is_finite(good[:, 1:])
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for index in np.ndindex(good.shape):
            bad = good.copy()
            bad[index] = value
            assert not finite.is_finite(bad) and not finite.is_finite(bad.T)
            assert finite.is_finite(bad[:, 1:]) == (index[1] == 0)
    assert finite.is_finite(good[:0]) and not finite.is_finite(np.array(np.nan, dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("largest", [1024.0, 2.0**56])
def test_values_can_be_too_large_before_they_are_infinite(dtype, largest):
    with np.errstate(over="ignore"):
        limit = np.array(largest).astype(dtype)  # infinity in float16
    below = np.nextafter(limit, dtype(0)) if dtype is not ml_dtypes.bfloat16 else limit / dtype(2)
    for sign in (1, -1):
        assert finite.is_finite(np.array([0, sign * below, 1], dtype), largest)
        assert not finite.is_finite(np.array([0, sign * limit, 1], dtype), largest)
    assert not finite.is_finite(np.array([0, np.nan], dtype), largest)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, ml_dtypes.int4])
def test_integers_are_finite(dtype):
    assert finite.is_finite(np.array([0, 1, -1]).astype(dtype))


def test_arrays_that_are_not_finite_are_named_wherever_they_are():
    sharding = NamedSharding(make_mesh(), PartitionSpec())
    good, bad = jnp.ones((2, 2)), jnp.array([[1.0, jnp.nan], [0, 0]], jnp.bfloat16, device=sharding)
    quantized = QArray(jnp.ones((2, 2), jnp.int8), jnp.full((1, 2), jnp.inf), None)
    tree = {"a/kernel": good, "b/kernel": bad, "steps": jnp.int32(3), "c/kernel": quantized}
    assert finite.nonfinite_paths(tree) == ["b/kernel", "c/kernel/scale"]


def test_a_check_names_what_is_not_finite():
    finite.check({"x": np.ones(3), "y": np.arange(3)}, "The scores")
    with pytest.raises(NotFinite, match="^The scores are NaN or infinite, or .*, although the weights are finite"):
        finite.check({"x": np.ones(3), "y": np.array([-np.inf])}, "The scores")
