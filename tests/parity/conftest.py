"""What every comparison with PyTorch needs."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Full float32 products, as PyTorch computes them on a CPU."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", None)
