"""Attacks on what the model reads: worked examples, soft tokens, pixel noise and typeset questions."""

import dataclasses
import io
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import attacks
from vkd_jax.attacks import pixel_noise, soft_tokens
from vkd_jax.attacks.finetuning import rows_of
from vkd_jax.attacks.in_context import worked_examples
from vkd_jax.attacks.lessons import attacker_rows
from vkd_jax.attacks.typographic import typeset
from vkd_jax.config.schema import RunConfig
from vkd_jax.evaluation.encoded_images import with_soft_tokens
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.models.base import VisualTokens
from vkd_jax.models.qwen2_vl import mrope_positions
from vkd_jax.runtime.mesh import shard_rows
from vkd_jax.types import Example, UserError


def accuracies(attack, records):
    """The summary is JSON, and counts no question whose answer the attacker had."""
    assert json.loads(json.dumps(records)) == records
    cells = attack.summarize({"vanilla": records, "unlearned": records})
    assert all(cell.low <= cell.mean <= cell.high for cell in cells)
    for cell in (cell for cell in cells if cell.model == "unlearned" and cell.share):
        same = [r for r in records if (r["variant"], r["set"], r.get("unit")) == (cell.variant, cell.set, cell.unit)]
        assert cell.n == sum(not r["trained_on"] and r["taught"] == cell.taught for r in same)
    return cells


# Worked examples.


def fact(person, question, answer, picture="a"):
    return Example(f"{person}{question}", person, picture.encode(), picture, question, answer)


def test_worked_examples_tell_other_facts_about_the_person_with_the_same_image():
    known = [fact("x", "Job?", "baker"), fact("y", "Town?", "Oslo"), fact("x", "Town?", "Rome", "b")]
    known += [fact("x", "Town?", "Rome", "c"), fact("x", "Alias?", "Rome"), fact("x", "Pet?", "cat")]
    asked = fact("x", "Town?", "Rome", "d")
    chosen = worked_examples(asked, known, 5)
    assert [(e.question, e.answer, e.image, e.image_id) for e in chosen] == [
        ("Job?", "baker", b"d", "d"), ("Pet?", "cat", b"d", "d"),
    ]  # fmt: skip
    assert [e.question for e in worked_examples(fact("x", "Food?", "rice"), known, 2)] == ["Job?", "Town?"]
    assert worked_examples(fact("z", "Town?", "Rome"), known, 5) == worked_examples(fact("", "?", "?"), known, 5) == []


def test_a_conversation_shows_the_image_once(people, monkeypatch):
    """The prompts are those of the chat template with the worked examples as earlier turns."""
    calls = []
    score = Answerer.score

    def spy(self, questions, texts, encoded_images=None, *, turns=None, **options):
        calls.append((questions, encoded_images.rows, turns))
        return score(self, questions, texts, encoded_images, turns=turns, **options)

    attack = attacks.create("in_context", {"share": 0.5, "examples": (1,)})
    unchanged = people.unattacked({"forget": people.asked["forget"]})
    monkeypatch.setattr(Answerer, "score", spy)
    records = attack.run(people)
    ((questions, rows, turns),) = calls
    assert all(len(row) == 1 for row in rows)
    known = [people.forgets[i] for i in attacker_rows(0.5, 8, 0)]
    for question, row in zip(questions, turns, strict=True):
        ((other, answer, images),) = row
        assert images == 1 and other != question and (other, answer) in {(e.question, e.answer) for e in known}
    assert {r["variant"] for r in records} == {"unchanged", "1 worked example"}
    assert [r for r in records if r["set"] == "forget"][: len(unchanged)][0]["prediction"] == unchanged[0]["prediction"]
    cells = accuracies(attack, records)
    assert {(c.share, c.unit) for c in cells} == {(None, None), (0.5, "questions")}


def test_too_many_worked_examples_are_named(people):
    long = [dataclasses.replace(e, answer="a " * 60, options=()) for e in people.forgets]
    attack = attacks.create("in_context", {"share": 0.9, "examples": (1,)})
    with pytest.raises(UserError, match="attacks.in_context.examples: 1 may be too many: .*exceed the model's 128"):
        attack.run(dataclasses.replace(people, forgets=long))


# Soft tokens.


def test_soft_tokens_come_first_at_the_place_of_the_first_feature():
    coords = np.array([[[0, 0, 0], [0, 0, 1]], [[0, 2, 0], [-1, 0, 0]]], np.int32)
    features = VisualTokens(np.arange(8, dtype=np.float32).reshape(2, 2, 2), coords)
    values, places = with_soft_tokens(features, np.array([[9.0, 9.0]]))
    assert values.tolist() == [[[9, 9], [0, 1], [2, 3]], [[9, 9], [4, 5], [6, 7]]]
    assert places[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]] and places[1, 2].tolist() == [-1, 0, 0]


def test_soft_tokens_do_not_move_the_positions_after_an_image():
    """In M-RoPE, an image advances the position by its larger side, here 2, with or without soft tokens."""
    coords = jnp.array([[[0, 0, 0], [0, 0, 1]]])
    soft = jnp.concatenate([coords[:, :1], coords], axis=1)
    plain = mrope_positions(jnp.array([[0, 1, 1, 0]], bool), jnp.ones((1, 4), bool), coords)
    with_soft = mrope_positions(jnp.array([[0, 1, 1, 1, 0]], bool), jnp.ones((1, 5), bool), soft)
    assert plain[0].tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 2], [3, 3, 3]]
    assert with_soft[0].tolist() == [plain[0, 0].tolist(), plain[0, 1].tolist(), *plain[0, 1:].tolist()]


@pytest.fixture(scope="module")
def learned(people):
    attack = attacks.create("soft_tokens", dict(tokens=3, steps=12, batch_size=4, learning_rate=0.05))
    return attack, attack.learn(people, rows_of(attack.encode(people), np.arange(4)))


def test_what_is_learned_is_what_is_asked(people, learned):
    """The training loss of the embeddings is the mean likelihood that the answerer gives with them, and it falls."""
    attack, embeddings = learned
    examples, model = people.forgets[:4], people.model
    encoded = attack.encode(people)
    batch = dataclasses.replace(encoded.batch(np.arange(4)), images=None)
    values = []
    for tokens in (np.zeros_like(embeddings), embeddings):
        answerer = Answerer(model, batch_size=4, soft_tokens=tokens)
        questions, texts = [e.question for e in examples], [[e.answer] for e in examples]
        scores = answerer.score(questions, texts, answerer.encode_images([e.image for e in examples]))
        values.append(float(soft_tokens.loss(tokens, model.graphdef, model.params, batch)))
        assert values[-1] == pytest.approx(scores.nll.mean(), rel=1e-4)
    assert values[1] < values[0] - 0.01
    assert model.processor.soft_tokens == 0  # the copy is another one


def test_soft_tokens_that_learned_nothing_are_no_attack(people):
    attack = attacks.create("soft_tokens", dict(tokens=3, steps=1, batch_size=4, learning_rate=1e-30))
    with pytest.raises(UserError, match="soft_tokens.learning_rate: 1 steps at 1e-30 changed no embedding"):
        attack.learn(people, rows_of(attack.encode(people), np.arange(4)))


def test_soft_tokens_change_no_weight_and_are_asked_about_other_questions(people, learned, monkeypatch):
    attack, embeddings = learned
    assert embeddings.shape == (3, people.model.config.text.width) and embeddings.dtype == np.float32
    monkeypatch.setattr(type(attack), "learn", lambda self, subject, encoded: embeddings)
    attack = dataclasses.replace(attack, shares=(0.25,))
    records = attack.run(people)
    assert {(r["variant"], r.get("attacker"), r.get("unit")) for r in records} == {
        ("unchanged", None, None), ("", "soft_tokens", "questions"), ("", "soft_tokens", "people"),
    }  # fmt: skip
    assert sum(r.get("trained_on", False) for r in records) == 2 + 4  # a quarter of eight questions, one of two people
    accuracies(attack, records)


# Pixel noise.


def test_a_signed_step_stays_within_the_radius():
    deltas, gradient = jnp.array([0.0, 0.1, -0.2, 0.05]), jnp.array([3.0, -1e-9, 2.0, 0.0])
    np.testing.assert_allclose(pixel_noise.signed_step(deltas, gradient, 0.1, 0.2), [-0.1, 0.2, -0.2, 0.05], atol=1e-7)


def test_blur_keeps_constants_and_spreads_a_point():
    np.testing.assert_allclose(pixel_noise.blur(jnp.full((1, 4, 5, 3), 0.3)), 0.3, rtol=1e-6)
    point = pixel_noise.blur(jnp.zeros((1, 5, 5, 3)).at[0, 2, 2, 1].set(16.0))[0, 1:4, 1:4, 1]
    assert point.tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


def test_the_attacker_never_knows_all_questions_about_an_image():
    forgets = [Example(f"{i}/{j}", "x", b"", f"{i}", f"{j}?", "a") for i in range(5) for j in range(3 if i else 1)]
    for share, each in ((0.1, 1), (0.5, 2), (0.9, 2)):
        rows = pixel_noise.known_rows(forgets, share, 0, 0)
        images = [forgets[i].image_id for i in rows]
        assert len(set(rows)) == len(rows) and [images.count(name) for name in "01234"] == [0, *[each] * 4]
    assert len({forgets[i].image_id for i in pixel_noise.known_rows(forgets, 0.5, 2, 0)}) == 2


def test_copies_are_what_the_model_reads(people):
    pixels = pixel_noise._Pixels(people)
    image, process = people.forgets[0].image, people.model.processor.image
    plain = process(image)
    np.testing.assert_allclose(process(pixels.png(image)), plain, atol=0.51 / 255 / pixels.std.min())
    delta = np.full(plain.shape, 12 / 255, np.float32)
    np.testing.assert_allclose((process(pixels.png(image, delta)) - plain) * pixels.std, 12 / 255, atol=1.01 / 255)
    np.testing.assert_allclose(process(pixels.png(image, 2.0)) * pixels.std + pixels.mean, 1.0, atol=1e-5)  # clipped


def test_the_cosine_has_a_gradient_and_padding_has_none(people):
    model, pixels = people.model, pixel_noise._Pixels(people)
    encoded = model.encode(people.forgets)
    batch = encoded.batch(np.array([0, 1, 1, 1]))
    deltas, owners = jnp.full((1, *encoded.images.shapes[0]), 0.01), np.zeros(4, np.int32)

    def gradient(counts, weight):
        args = *shard_rows(people.mesh, (batch, owners, np.float32(counts))), (pixels.mean, pixels.std), weight
        return np.asarray(pixel_noise.noise_gradient(model.graphdef, model.params, deltas, *args))

    whole, padded, without = gradient([1, 1, 1, 0], 0.7), gradient([1, 1, 0, 0], 0.7), gradient([1, 1, 0, 0], 0.0)
    np.testing.assert_allclose(gradient([0, 0, 1, 0], 0.7), whole - padded, atol=1e-3 * np.abs(whole).max())
    assert np.abs(padded - without).max() > 1e-3 * np.abs(without).max()


def test_noise_makes_known_answers_likelier_within_its_radius(people, monkeypatch):
    settings = dict(universal_steps=4, image_steps=6, batch_size=4, images=1, step=4 / 255, radius=20 / 255)
    attack = attacks.create("pixel_noise", settings | dict(weight_cosine=0.0))
    learn, ask, deltas, answers = type(attack).learn, type(people).ask_sets, [], []
    monkeypatch.setattr(type(attack), "learn", lambda *args, **kw: deltas.append(learn(*args, **kw)) or deltas[-1])
    monkeypatch.setattr(type(people), "ask_sets", lambda *args: answers.append(ask(*args)) or answers[-1])
    records = attack.run(people)
    assert [len(delta) for delta in deltas] == [1, 1]
    assert all(attack.step < np.abs(delta).max() <= attack.radius + 1e-7 for delta in deltas)
    assert list(dict.fromkeys(r["variant"] for r in records)) == ["unchanged", "clean", "universal", "per_image"]
    (known,) = [r["id"] for r in records if r["variant"] == "per_image" and r["trained_on"]]  # of two questions
    clean, _, attacked = ({r["id"]: r["answer_nll"] for r in rows if r["set"] == "forget"} for rows in answers)
    assert len(attacked) == 2 and attacked[known] < clean[known]
    accuracies(attack, records)


def test_images_of_many_sizes_get_no_noise(people):
    processor = types.SimpleNamespace(max_pixels=100)
    other = dataclasses.replace(people, model=dataclasses.replace(people.model, processor=processor))
    attack = attacks.create("pixel_noise", {})
    assert attack.run(other) == [] == attack.summarize({"unlearned": []})


# Typeset questions.


def drawn(text, letters=0.1, size=(20, 10)):
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(stream, "png")
    with Image.open(io.BytesIO(typeset(stream.getvalue(), text, 200, letters))) as image:
        return np.asarray(image).astype(int)


def test_the_question_is_typeset_beside_the_portrait():
    canvas = drawn("Who is this person?")
    assert canvas.shape == (200, 200, 3)
    red = (canvas == (200, 10, 10)).all(-1)
    ys, xs = np.nonzero(red)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (0, 95, 76, 123)  # 96 x 48 pixels, in the middle
    dark = canvas[:, 96:].max(-1) < 128
    assert dark.any() and not dark[:, :3].any() and not dark[:, -3:].any()
    assert (canvas[:70, :96] == 255).all()


def test_a_long_question_is_made_smaller_until_it_fits():
    long = "Which of the four following towns is the one where this person was born and grew up? " * 4
    dark = drawn(long)[:, 96:].max(-1) < 128
    assert dark.any() and not dark[:3].any() and not dark[-3:].any() and not dark[:, -3:].any()


def test_a_question_that_does_not_fit_is_named(caplog):
    drawn("Who is this person?")
    assert not caplog.text
    drawn("Who is thispersonwhosenamewaswrittenwithoutanyspacebetweenitsmanymanyletters?")
    assert "attacks.typographic.side=200 has no room for a question of 77 characters" in caplog.text


def test_both_kinds_of_typeset_questions_are_asked(people, monkeypatch):
    calls = []
    monkeypatch.setattr(type(people), "ask_sets", lambda self, model, sets: calls.append(sets) or [])
    attacks.create("typographic", {"side": 48}).run(people)
    (sets,) = calls
    asked = people.asked["forget"]
    assert list(sets) == [("typeset", "forget"), ("both", "forget")]
    assert [e.question for e in sets["both", "forget"]] == [e.question for e in asked]
    assert {e.question for e in sets["typeset", "forget"]} == {"Read the question in the image and answer it."}
    for rows in sets.values():
        assert len({e.image_id for e in rows}) == len({e.image for e in rows}) == 8
        assert [(e.id, e.options, e.answer) for e in rows] == [(e.id, e.options, e.answer) for e in asked]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("in_context", dict(share=1.0), "attacks.in_context.share: 1.0 is not allowed"),
        ("soft_tokens", dict(tokens=0), "attacks.soft_tokens.tokens: 0 is not allowed"),
        ("pixel_noise", dict(radius=0.0), "attacks.pixel_noise.radius: 0.0 is not allowed"),
        (
            "pixel_noise",
            dict(radius=1e-3),
            r"pixel_noise.radius: universal_steps=100 of 0.00392157 within radius=0.001 ",
        ),
        ("pixel_noise", dict(step=1e-5), r"pixel_noise.step: universal_steps=100 of 1e-05 within .* at least 0.0020."),
        ("pixel_noise", dict(step=3e-5), r"pixel_noise.step: image_steps=30 of 3e-05 within"),
        ("typographic", dict(prompt=" "), "attacks.typographic.prompt: ' ' is not allowed. Give a text"),
        (
            "typographic",
            dict(letters=1e-6),
            r"letters: 1e-06 of attacks.typographic.side=384 are letters of 0.00038 pixels, .* Give at least 0.016.",
        ),
        ("benign", dict(data=("forget",)), "attacks.benign.data: .* Give .* general, retain"),
        ("depth", dict(depths=(1.5,)), "attacks.depth.depths: .* is not allowed"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        attacks.create(name, fields).check(RunConfig())
