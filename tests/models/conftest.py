"""What the tests of single families share."""

import pytest


@pytest.fixture(scope="module")
def config(folder):
    """The configuration of the model whose folder is the module's fixture `folder`."""
    from vkd_jax.checkpoints import hf

    module, hf_config = hf.read_config(folder)
    return module.Config.from_hf(hf_config)
