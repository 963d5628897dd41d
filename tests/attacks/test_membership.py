"""Membership inference: scores and AUC by hand, held-out people, and an attack on a model."""

import dataclasses
import io
import math
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import attacks, benchmarks
from vkd_jax.attacks.base import Subject
from vkd_jax.attacks.membership import Membership, gradient_norms, lowest, scores
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.benchmarks.synthetic import people
from vkd_jax.config.schema import EvalConfig, RunConfig
from vkd_jax.evaluation import inference
from vkd_jax.evaluation.inference import Answerer, TokenScores
from vkd_jax.methods.base import cross_entropy
from vkd_jax.models import generate
from vkd_jax.models.base import bind
from vkd_jax.types import Example, UserError

LN2 = math.log(2)


def tokens(log_probs, means=None, deviations=None):
    nothing = [0.0] * len(log_probs)
    return TokenScores(*(np.array(x, np.float32) for x in (log_probs, means or nothing, deviations or nothing)))


class ThreeWords:
    """A model of three words that always gives the first twice the probability of each of the others."""

    language_model = types.SimpleNamespace(empty_cache=lambda batch, slots: None)

    def __call__(self, tokens, mask, *, features, query_positions, cache):
        return jnp.log(jnp.array([0.5, 0.25, 0.25])) + jnp.zeros((len(tokens), 1, 3)), None


def test_token_scores_match_values_by_hand():
    # log p is -ln 2 and -2 ln 2, each with probability 1/2: mean -1.5 ln 2, deviation 0.5 ln 2.
    ids = jnp.array([[[0], [2]]])
    prompts = generate.Prompts(jnp.ones((1, 4), int), jnp.ones((1, 4), bool))
    args = ThreeWords(), prompts, ids, jnp.ones((1, 2, 1), bool)
    got = generate.token_log_probs(*args)[0, :, 0]
    np.testing.assert_allclose(got, [[-LN2, -1.5 * LN2, 0.5 * LN2], [-2 * LN2, -1.5 * LN2, 0.5 * LN2]], rtol=1e-6)
    np.testing.assert_allclose(generate.option_log_probs(*args), [[-LN2, -2 * LN2]], rtol=1e-6)
    # The likely word is one deviation above the mean, and an unlikely one below it.
    for row, expected in zip(got, (1.0, -1.0), strict=True):
        assert scores(tokens(*([float(x)] for x in row)), "x", 1.0)["min_k++"] == pytest.approx(expected)


def test_scores_by_hand():
    log_probs = [-1.0, -4.0, -2.0, 0.0, -8.0, -3.0]  # six tokens: a fifth of them, rounded up, are two
    means, deviations = [-2.0] * 6, [1.0, 4.0, 1.0, 1.0, 0.5, 1.0]
    text = "Mara Lindt"
    got = scores(tokens(log_probs, means, deviations), text, 0.2)
    assert list(got) == ["loss", "zlib", "min_k", "min_k++"]
    assert got["loss"] == pytest.approx(-18 / 6)
    assert got["zlib"] == pytest.approx(-3 / len(zlib.compress(text.encode())))
    assert got["min_k"] == pytest.approx((-8 - 4) / 2)
    # Standardized: 1, -0.5, 0, 2, -12, -1. The two lowest are not those of min_k.
    assert got["min_k++"] == pytest.approx((-12 - 1) / 2)


@pytest.mark.parametrize(("count", "share", "taken"), [(1, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2), (3, 0.01, 1), (4, 1, 4)])
def test_the_number_of_lowest_values_is_rounded_up(count, share, taken):
    values = np.arange(count, dtype=np.float32)[::-1]
    assert lowest(values, share) == (taken - 1) / 2


def test_scores_of_a_certain_model_are_finite():
    sure = scores(tokens([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), "x", 0.5)
    assert sure == {"loss": 0, "zlib": 0, "min_k": 0, "min_k++": 0}
    assert math.isfinite(scores(tokens([-90.0], [0.0], [0.0]), "x", 0.5)["min_k++"])


def record(variant, member, score, person, name=0):
    return {"variant": variant, "set": "", "member": member, "score": score, "person": person, "id": str(name)}


def loss(records):
    """The cell of the score `loss` of the unlearned model."""
    cells = Membership().summarize(records)
    return next(cell for cell in cells if (cell.variant, cell.model) == ("loss", "unlearned"))


def test_summary_by_hand():
    # Members 3 and 1 against 2 and 1: won, won, lost, half: 2.5 of 4.
    items = [record("loss", m, s, p) for m, s, p in ((True, 3, "a"), (True, 1, "b"), (False, 2, "c"), (False, 1, "d"))]
    better = [record("loss", m, s, "") for m, s in ((True, 3), (False, 1))]
    vanilla, unlearned = Membership().summarize({"vanilla": better, "unlearned": items, "retain_only": []})
    assert (unlearned.model, unlearned.mean, unlearned.n, unlearned.people) == ("unlearned", 2.5 / 4, 4, 4)
    assert unlearned.score == pytest.approx(1 - 2 * 0.125)
    assert (vanilla.mean, vanilla.score) == (1, 0)
    worse = [i | {"member": not i["member"]} for i in better]
    got = loss({"unlearned": worse})
    assert (got.mean, got.score) == (0, 0)  # avoided answers reveal a member, too


def test_intervals_resample_people_not_questions():
    """Two people with many questions each, of whom one is known well, are only two observations."""
    known = [record("loss", True, 2.0 if p == "a" else 0.0, p, i) for p in "ab" for i in range(50)]
    others = [record("loss", False, 1.0, p, i) for p in "cd" for i in range(50)]
    got = loss({"unlearned": known + others})
    assert (got.mean, got.low, got.high, got.n) == (0.5, 0, 1, 200)
    nameless = [i | {"person": "", "id": f"{i['person']}{i['id']}"} for i in known + others]
    got = loss({"unlearned": nameless})
    assert 0.35 < got.low < 0.5 < got.high < 0.65


# ---- Held-out people ----


def test_held_out_people_are_generated_and_unknown_to_all_models(monkeypatch):
    asked = []

    def read(benchmark, folder, finetune=False):
        asked.append((benchmark.people, benchmark.forget, finetune))
        one = Example("a/0", "1", b"picture", "a", "Who?", "Bob")
        return {name: [one, dataclasses.replace(one, id="a/1"), dataclasses.replace(one, image=None, image_id="")]
                for name in ("forget", "finetune_forget")}  # fmt: skip

    monkeypatch.setattr(benchmarks, "read", read)
    found = benchmarks.held_out(benchmarks.create("mllmu", {"people": 3, "forget": 5}), "here")
    assert [e.id for e in found] == ["a/1"]  # once, and with an image
    assert len(benchmarks.held_out(benchmarks.create("clear", {}), "here")) == 1
    assert asked == [(1003, 5, False), (1000, 10, True)]  # for CLEAR, the rows that models are fine-tuned on
    assert benchmarks.held_out(benchmarks.create("mllmu", {"source": "org/name"}), "here") == []
    assert benchmarks.held_out(benchmarks.create("folder", {}), "here") == [] and len(asked) == 2
    for attribute in ("name", "look"):
        known, held_out = (
            {getattr(p, attribute) for p in people.Population(seed).people()} for seed in (0, benchmarks.STRANGERS)
        )
        assert not known & held_out


def test_held_out_people_are_read_from_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    line = '{"file_name": "a.png", "question": "Who?", "answer": "Bob", "person": "Bob"}\n'
    (tmp_path / "metadata.jsonl").write_text(line * 2 + '{"question": "What?", "answer": "A pear"}\n')
    (found,) = benchmarks.held_out(benchmarks.create("mllmu", {}), "nowhere", str(tmp_path))
    assert (found.person, found.answer, found.image) == ("Bob", "Bob", png(0))
    with pytest.raises(UserError, match="metadata.jsonl"):
        benchmarks.held_out(benchmarks.create("mllmu", {}), "nowhere", str(tmp_path / "other"))


# ---- A model ----


def png(seed):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(stream, "png")
    return stream.getvalue()


def example(i, seed):
    return Example(
        f"{i}", f"{i // 2:03d}", png(seed), f"{i // 2}", f"Question {i}: whose job is it?", "a baker " * (1 + i % 3)
    )


@pytest.fixture(scope="module")
def subject(tiny_model):
    config = RunConfig(eval=EvalConfig(batch_size=7))
    forgets, held_out = [example(i, i // 2) for i in range(6)], [example(i, 9 - i // 2) for i in range(5)]
    return Subject("unlearned", tiny_model, {}, Mllmu.EVAL_SETS, [], forgets, held_out, config, tiny_model.mesh, None)


def test_token_scores_match_the_full_distribution(tiny_model, subject):
    asked = Answerer(tiny_model, batch_size=4)
    questions, texts = ([getattr(e, key) for e in subject.forgets] for key in ("question", "answer"))
    encoded_images = asked.encode_images([e.image for e in subject.forgets])
    got = asked.score_tokens(questions, texts, encoded_images)
    whole = asked.score(questions, [[text] for text in texts], encoded_images)
    np.testing.assert_allclose([t.log_probs.sum() for t in got], whole.log_probs[:, 0], atol=1e-4)
    assert [len(t.log_probs) for t in got] == whole.counts[:, 0].tolist() and len(set(whole.counts[:, 0])) == 3

    @jax.jit
    def distribution(params, batch):
        model = bind(tiny_model.graphdef, params)
        features, _ = model.encode(batch.images)
        logits, _ = model(batch.tokens, batch.mask, features=features, query_positions=batch.target_positions)
        return jax.nn.log_softmax(logits)

    encoded = tiny_model.encode(subject.forgets)
    log_p = np.asarray(distribution(tiny_model.params, encoded.batch(np.arange(len(encoded)))), np.float64)
    p = np.exp(log_p)
    mean = (p * log_p).sum(-1)
    deviation = np.sqrt((p * log_p**2).sum(-1) - mean**2)
    for i, mine in enumerate(got):
        own = encoded.target_mask[i]
        np.testing.assert_allclose(mine.means, mean[i, own], atol=1e-4)
        np.testing.assert_allclose(mine.deviations, deviation[i, own], atol=1e-4)
        picked = np.take_along_axis(log_p[i], encoded.targets[i][:, None], axis=-1)[own, 0]
        np.testing.assert_allclose(mine.log_probs, picked, atol=1e-4)


def test_every_question_is_scored_with_its_own_image(subject):
    """Held-out people may have the same image ids, as synthetic people do."""
    got = attacks.create("membership", {}).run(subject)
    assert [(r["set"], r["id"], r["person"], r["member"]) for r in got[::5]] == [
        *(("forget", str(i), f"{i // 2:03d}", True) for i in range(6)),
        *(("held_out", str(i), f"{i // 2:03d}", False) for i in range(5)),
    ]
    assert [r["variant"] for r in got[:5]] == ["loss", "zlib", "min_k", "min_k++", "grad_norm"]
    swapped = dataclasses.replace(subject, forgets=subject.held_out, held_out=subject.forgets)
    again = Membership().run(swapped)
    for member in (True, False):
        assert [r["score"] for r in got if r["member"] == member] == pytest.approx(
            [r["score"] for r in again if r["member"] != member], abs=1e-5
        )
    alike = [r["score"] for r in got[::5]]
    assert np.abs(np.subtract(alike[:5], alike[6:])).min() > 1e-6
    cells = Membership().summarize({"unlearned": got})
    assert [cell.variant for cell in cells] == ["loss", "zlib", "min_k", "min_k++", "grad_norm"]
    assert all(0 <= cell.low <= cell.mean <= 1 for cell in cells)


def test_gradient_norms_are_means_over_tensors(tiny_model, subject):
    """Of each row's own gradient, in evaluation batches; the score is minus the norm."""
    encoded = tiny_model.encode(subject.forgets)
    paths = [path for path in tiny_model.params if path.startswith("projector/")]
    weights = {path: tiny_model.params[path] for path in paths}
    frozen = {path: value for path, value in tiny_model.params.items() if path not in paths}
    norms = gradient_norms(tiny_model.graphdef, weights, frozen, encoded.batch(np.arange(3)))

    @jax.jit
    def gradient(batch):
        return jax.grad(lambda w: cross_entropy(bind(tiny_model.graphdef, {**frozen, **w}), batch).sum())(weights)

    for i, norm in enumerate(norms):
        grads = gradient(encoded.batch(np.array([i])))
        assert norm == pytest.approx(np.mean([np.sqrt(np.square(g).sum()) for g in grads.values()]), rel=1e-4)
    assert len({round(float(norm), 6) for norm in norms}) == 3


def test_a_learned_answer_has_a_small_gradient_and_a_large_score():
    """Members, whose loss was minimized, have norms 0.1 and 0.2, others 0.3 and 0.15: the AUC is 3/4, not 1/4."""
    norms = ((True, 0.1), (True, 0.2), (False, 0.3), (False, 0.15))
    items = [record("grad_norm", member, -norm, str(i)) for i, (member, norm) in enumerate(norms)]
    (cell,) = Membership().summarize({"unlearned": items})
    assert cell.mean == 0.75


def test_a_model_is_no_better_than_itself_as_reference(subject, tiny_folder, tiny_model):
    alone = dataclasses.replace(subject, forgets=subject.forgets[:2], held_out=subject.held_out[:2])
    attack = Membership(reference=str(tiny_folder), gradients="")
    attack.check(subject.config)
    same = {r["score"] for r in attack.run(alone) if r["variant"] == "reference"}
    assert max(map(abs, same)) < 1e-4
    params = {path: value * (1 + path.startswith("projector")) for path, value in tiny_model.params.items()}
    other = dataclasses.replace(alone, model=dataclasses.replace(tiny_model, params=params))
    got = attack.run(other)
    values = {v: [r["score"] for r in got if r["variant"] == v] for v in ("loss", "reference")}
    losses = [r["score"] for r in attack.run(alone) if r["variant"] == "loss"]
    np.testing.assert_allclose(values["reference"], np.subtract(values["loss"], losses), atol=1e-4)


def test_gradients_of_quantized_weights_and_missing_references_are_rejected(subject):
    with pytest.raises(UserError, match="attacks.membership.gradients: model.quantize"):
        Membership(gradients="all").check(subject.config.override("model.quantize=int8"))
    with pytest.raises(UserError, match="nowhere"):
        Membership(reference="/nowhere/at/all").check(subject.config)


def test_one_compilation_serves_two_models(tiny_model, subject):
    def compiled():
        return inference.programs(tiny_model.mesh).score_tokens._cache_size()

    got, before = Membership().run(subject), compiled()
    other = {path: value * (1 + path.startswith("projector")) for path, value in tiny_model.params.items()}
    again = Membership().run(dataclasses.replace(subject, model=dataclasses.replace(tiny_model, params=other)))
    assert compiled() == before > 0 and [r["score"] for r in got] != [r["score"] for r in again]


def test_without_held_out_people_there_are_no_scores(subject):
    nobody = dataclasses.replace(subject, held_out=[])
    assert Membership().run(nobody) == [] and Membership().summarize({"unlearned": [], "vanilla": []}) == []


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_an_invalid_share_is_rejected(share):
    with pytest.raises(UserError, match="attacks.membership.share"):
        Membership(share=share).check(None)
    Membership().check(None)
