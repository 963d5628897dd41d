"""The logit lens and the probe of the decoder's inner states."""

import dataclasses

import jax
import numpy as np
import pytest

from vkd_jax import attacks
from vkd_jax.attacks import depth
from vkd_jax.attacks.depth import States
from vkd_jax.methods.base import hidden_states
from vkd_jax.models.base import bind


def test_the_lens_at_the_last_block_is_the_model(people):
    records = attacks.create("depth", {"depths": (0.5, 1.0)}).run(people)
    blocks = people.model.config.text.layers
    last = [r for r in records if r["variant"] == f"logit lens after {blocks} of {blocks} blocks"]
    plain = {(r["set"], r["id"]): r["prediction"] for r in people.answers}
    assert len(last) == 8 + 4 + 4 and {r["set"] for r in last} == {"forget", "test", "retain_test"}
    assert [r["prediction"] for r in last] == [plain[r["set"], r["id"]] for r in last]
    variants = list(dict.fromkeys(r["variant"] for r in records))
    assert variants[0] == f"logit lens after {blocks // 2} of {blocks} blocks"  # no retained person has their answers
    assert all(r["correct"] == (r["prediction"] == r["answer"]) for r in records)
    cells = attacks.create("depth", {}).summarize({"unlearned": records, "retain_only": records})
    assert {cell.people for cell in cells} == {2}


def test_states_are_those_of_the_prompts_last_token(people):
    encoded = people.model.encode(people.forgets[:2])
    states = depth.read_states(people, people.forgets[:2], (1, 2))

    @jax.jit
    def expected(params, batch):
        return hidden_states(bind(people.model.graphdef, params), batch, layers=1)

    hidden = expected(people.model.params, encoded.batch(np.arange(2)))
    for i in range(2):
        last = encoded.prompt_length[i] - 1
        np.testing.assert_allclose(states.last[i, 0], hidden[i, last], rtol=1e-3, atol=1e-4)
    assert states.log_probs.shape == (2, 2) and (states.log_probs < 0).all()


@pytest.mark.parametrize("known", [True, False])
def test_the_probe_learns_from_retained_people_only(people, monkeypatch, known):
    """The state tells the town of everybody: the probe reads it if a retained person lives there, too."""
    towns = {"0": "Rome", "1": "Oslo", "2": "Rome", "3": "Oslo" if known else "Lima"}
    options = ("Rome", "Oslo", "Lima")

    def move(e):
        return dataclasses.replace(e, answer=towns[e.person], options=options)

    asked = {name: [move(e) for e in rows if e.question == "Which town?"] for name, rows in people.asked.items()}
    reads = []

    def read(subject, examples, depths):
        reads.append({e.person for e in examples})
        codes = np.eye(3)[[options.index(towns[e.person]) for e in examples]]
        jitter = np.random.default_rng(0).normal(size=codes.shape) * 0.01
        return States(np.zeros((len(examples), 1)), (codes + jitter)[:, None])

    monkeypatch.setattr(depth, "read_states", read)
    records = attacks.create("depth", {"depths": (1.0,)}).run(dataclasses.replace(people, asked=asked))
    assert reads == [{"0", "1", "2", "3"}, {"2", "3"}]
    probed = [r for r in records if r["variant"].startswith("probe")]
    assert all(r["correct"] for r in probed)
    assert {r["person"] for r in probed} == ({"0", "1", "2", "3"} if known else {"0", "2", "3"})
