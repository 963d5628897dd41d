"""Settings of the comparisons with PyTorch."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Computes products in float32, as PyTorch does on a CPU."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", None)
