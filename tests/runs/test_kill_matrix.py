"""A selection of the kill matrix: `tests/programs/kill_matrix.py` and `kill_comparisons.py` run all of it.

training/test_kills.py has the part of the default suite.
"""

import kill_comparisons
import pytest
from kill_matrix import DAMAGE, FILES, FULL, LAST, LOCKS, PLACES, TRAINING, Matrix

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix(fork_server, tmp_path_factory):
    return Matrix(fork_server, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ("data: the third row", FULL),
        ("fine-tuning: first step", FULL),
        ("attack relearn: in training", "SIGINT"),
        (TRAINING, "SIGKILL"),
        ("export of unlearned", FULL),
        ("results: complete, not recorded", "SIGTERM"),
        (LAST, "SIGINT"),
    ],
)
def test_a_run_that_ends_anywhere_is_finished_with_the_same_bits(matrix, row, column):
    cell = matrix.stopped(row, column)
    assert not cell.problems, cell.log


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ("config.json", "emptied"),
        ("answers/vanilla.jsonl", "truncated"),
        ("train/checkpoints/2/state/d/*", "a bit flipped"),
        ("results.json", "deleted"),
        ("report/losses.png, finished", "truncated"),
        ("unlearned/model.safetensors, finished", "a bit flipped"),
        ("train/metrics.jsonl, finished", "deleted"),
    ],
)
def test_a_run_with_a_damaged_file_is_finished_with_the_same_bits_or_names_it(matrix, row, column):
    assert row in FILES and column in DAMAGE
    cell = matrix.damaged(row, column)
    assert not cell.problems, cell.log


@pytest.mark.parametrize("row", LOCKS)
def test_of_two_runs_the_second_is_refused_while_the_first_runs(matrix, row):
    cell = matrix.locked(row, PLACES[0])
    assert not cell.problems, cell.log


@pytest.fixture(scope="module")
def comparisons(fork_server, tmp_path_factory):
    return kill_comparisons.Comparisons(fork_server, tmp_path_factory.mktemp("comparisons"))


@pytest.mark.parametrize(
    ("row", "column"),
    [("a worker has started", "SIGTERM"), ("between two entrants", "SIGKILL"), ("comparison.json not complete", FULL)],
)
def test_a_comparison_that_ends_anywhere_is_finished_with_the_same_bits(comparisons, row, column):
    cell = comparisons.stopped(row, column)
    assert not cell.problems, cell.log


@pytest.mark.parametrize("column", ["truncated", "a folder"])
def test_a_damaged_table_of_a_comparison_is_written_again_or_named(comparisons, column):
    cell = comparisons.damaged(kill_comparisons.FILE, column)
    assert not cell.problems, cell.log


def test_of_two_comparisons_the_second_is_refused(comparisons):
    cell = comparisons.locked(kill_comparisons.LOCKED, PLACES[0])
    assert not cell.problems, cell.log
