"""Fixtures of the tests of the training loop: the toy model, and one whole training of it."""

import pytest
from toy_training import config, fit, restored, split_toy

from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.training import loop


@pytest.fixture(scope="module")
def toy():
    return split_toy()


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """A run of eight steps: its folder, trained weights, last saved state and initial state."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    params = fit(toy, folder)
    tx = loop.optimizer.create(config())
    like = loop.init_state(tx, {path: toy[1][path] for path in params}, make_mesh())
    return folder, params, restored(folder, like), like


@pytest.fixture
def states(monkeypatch):
    """The initial state of each `fit`, which is donated to its first step."""
    states, init_state = [], loop.init_state
    monkeypatch.setattr(loop, "init_state", lambda *args: states.append(init_state(*args)) or states[-1])
    return states
