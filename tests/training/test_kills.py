"""A training that is killed, stopped or has a full disk at any point ends with the same bits when it runs again.

The trainings are forks of one process, so that they can be killed; `test_stopping` has what a process survives.
`tests/programs/kill_matrix.py` does this with every stage of a run.
"""

import dataclasses

import pytest
from faults import Point
from fork_server import ROOT
from kill_matrix import LIST, SAVE, TICK
from toy_training import ToyMethod, assert_same_bits, config, logged, restored

from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.training import loop

PROGRAM = str(ROOT / "tests" / "programs" / "toy_training.py")
POINTS = {
    "first step": Point(TICK, argument=1),
    "while a checkpoint is written": Point(SAVE, argument=2, after=True),
    "checkpoint without its list": Point(LIST),
    "after a checkpoint": Point(TICK, argument=3),
}
STATUS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "limit": 2}


@pytest.fixture(scope="module")
def whole(fork_server, toy, tmp_path_factory):
    """A training that nothing disturbed: its folder, last state, and a state of the same shapes."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = fork_server.run(PROGRAM, [], folder)
    assert outcome.status == 0, outcome.stderr
    trainable = {path: toy[1][path] for path in ToyMethod().trainable(toy[1], None)}
    like = loop.init_state(loop.optimizer.create(config()), trainable, make_mesh())
    return folder / "run", restored(folder / "run", like), like


# Another act at the same point is a slow test.
DEFAULT = [(name, "SIGKILL") for name in POINTS] + [("while a checkpoint is written", "limit")]


@pytest.mark.parametrize(
    ("name", "act"),
    [
        pytest.param(name, act, marks=[] if (name, act) in DEFAULT else pytest.mark.slow)
        for name in POINTS
        for act in STATUS
    ],
)
def test_a_training_ends_with_the_same_bits(fork_server, whole, tmp_path, name, act):
    folder, state, like = whole
    points = {name: dataclasses.asdict(POINTS[name])}
    disturbed = fork_server.run(PROGRAM, [], tmp_path, prepare=["install", points, act])
    assert disturbed.status == STATUS[act], disturbed.stderr
    if act == "limit":  # threads of the checkpointing library may print tracebacks of their own around the sentence
        assert "error: cannot write: File too large; free some space or pass another --workdir." in disturbed.stderr
    else:
        assert "Traceback" not in disturbed.stderr, disturbed.stderr
    again = fork_server.run(PROGRAM, [], tmp_path)
    assert again.status == 0, again.stderr
    assert_same_bits(restored(tmp_path / "run", like), state)
    assert logged(tmp_path / "run") == logged(folder)
