"""Asking: option scores against a plain forward pass, batches, order, who is compared with whom, counts."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import evaluate as module
from vkd_jax.evaluate import Answerer, evaluate, letter_question, sample, summarise
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.types import Example, UserError

OPTIONS = ("baker", "pilot", "a judge", "teacher of mathematics")


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def example(i, picture=None, task="classification", options=OPTIONS, answer=None):
    return Example(
        id=f"{i}",
        person=f"{i:03d}",
        image=None if picture is None else png(picture),
        image_id="" if picture is None else f"picture/{picture}",
        question=f"Question {i}: what is the job{' of this person' * (i % 3)}?",
        answer=answer or options[i % len(options)],
        options=options if task == "classification" else (),
        task=task,
    )


@pytest.fixture(scope="module")
def sets():
    """Kinds, lengths and numbers of options mixed, pictures shared; nine of each kind at most."""
    forget = [example(i, picture=i % 3 if i % 2 else None, options=OPTIONS[: 4 - i % 3]) for i in range(9)]
    retain = [example(10 + i, picture=3 if i % 2 else None, task=("classification", "cloze")[i // 4]) for i in range(8)]
    return {"forget": forget, "retain": retain}


@pytest.fixture(scope="module")
def ask(tiny_model):
    return lambda batch_size: tiny_model.answerer(batch_size)


def run(answerer, sets, protocol="options"):
    return evaluate(answerer, sets, protocol=protocol, max_new_tokens=4)


@pytest.fixture(scope="module")
def records(ask, sets):
    return run(ask(7), sets)


def test_option_scores_are_sums_of_log_probabilities(tiny_model, sets, records):
    """Each option alone after its prompt, unpadded on the left, without a cache, one row at a time."""
    processor, config = tiny_model.processor, tiny_model.config

    @jax.jit
    def log_probs(params, tokens, mask, pictures):
        model = bind(tiny_model.graphdef, params)
        features = None if pictures is None else model.encode(pictures)[0]
        return jax.nn.log_softmax(model(tokens, mask, features=features)[0])

    scored = 0
    for e, record in zip([*sets["forget"], *sets["retain"]], records, strict=True):
        if not e.options:
            continue
        for option, score in zip(e.options, record["scores"], strict=True):
            shown = [] if e.image is None else [processor.image(e.image)]
            prompt, answer = processor.encode(e.question, option, shown)
            ids = np.array(prompt + answer)
            row = np.zeros((1, 96), np.int32)
            row[0, : len(ids)] = ids
            pictures = config.pack([shown]) if shown else None
            out = np.asarray(log_probs(tiny_model.params, row, np.arange(96)[None] < len(ids), pictures))[0]
            expected = sum(out[len(prompt) - 1 + j, token] for j, token in enumerate(answer))
            assert answer[-1] == processor.eos_ids[0]
            np.testing.assert_allclose(score, expected, atol=2e-4)
            scored += 1
    assert scored == sum(len(e.options) for part in sets.values() for e in part)


def test_records_stand_in_order_beside_their_questions(sets, records):
    items = [(name, e) for name, part in sets.items() for e in part]
    assert [(r["set"], r["id"], r["person"], r["image_id"], r["question"], r["answer"]) for r in records] == [
        (name, e.id, e.person, e.image_id, e.question, e.answer) for name, e in items
    ]
    for record, (_, e) in zip(records, items, strict=True):
        assert record["modality"] == e.modality and tuple(record["options"]) == e.options
        if e.options:
            assert record["protocol"] == "options" and len(record["scores"]) == len(e.options)
            assert record["prediction"] == e.options[int(np.argmax(record["scores"]))]
            assert record["correct"] == (record["prediction"] == e.answer)
        else:
            assert record["protocol"] == "cloze" and "scores" not in record


def test_the_batch_size_changes_nothing(ask, sets, records):
    """Nine rows fill one batch of seven and two rows of a padded one; alone, nothing is padded."""
    alone = run(ask(1), sets)
    for a, b in zip(alone, records, strict=True):
        np.testing.assert_allclose(a.get("scores", []), b.get("scores", []), atol=1e-4)
        assert {k: v for k, v in a.items() if k != "scores"} == {k: v for k, v in b.items() if k != "scores"}


def test_a_long_neighbour_changes_nothing(ask):
    """Left padding, and the padding of options, are invisible to a row."""
    answerer, short = ask(7), ["Who is it?", "Where?"]
    long = ["What does this person, who was seen in many pictures, do for a living nowadays?"]
    alone = answerer.score(short, [OPTIONS[:2]] * 2)
    beside = answerer.score([*short, *long], [OPTIONS[:2], OPTIONS[:2], OPTIONS])
    np.testing.assert_allclose(beside[:2, :2], alone, atol=1e-4)
    assert np.isneginf(beside[:2, 2:]).all() and np.isfinite(beside[2]).all()


def test_answers_depend_on_the_pixels_of_their_own_picture(ask, sets, records):
    def changed(e):
        return example(int(e.id), picture=9, options=e.options) if e.image_id == "picture/1" else e

    others = run(ask(7), {name: [changed(e) for e in part] for name, part in sets.items()})
    for a, b in zip(records, others, strict=True):
        if a["image_id"] == "picture/1":
            assert np.abs(np.subtract(a["scores"], b["scores"])).min() > 1e-5
        else:
            assert a == b


def test_generation_sees_the_pixels(tiny_model, ask):
    """The language model is made to hear the picture loudly, so that another one changes the words."""
    params = {k: v * (40 if k.startswith("projector/fc2") else 1) for k, v in tiny_model.params.items()}
    loud = Answerer(tiny_model.graphdef, params, tiny_model.config, tiny_model.processor, batch_size=7)
    seen = loud.look([png(i) for i in range(7)])
    answers = loud.generate(["Who is this?"] * 7, seen, max_new_tokens=4)
    assert len(set(answers)) > 1
    assert answers == loud.generate(["Who is this?"] * 7, seen, max_new_tokens=4)
    assert answers[::-1] == loud.generate(["Who is this?"] * 7, seen.of(range(7)[::-1]), max_new_tokens=4)


class Scripted:
    """An answerer that says what it is told; a picture's feature is the mean of its bytes."""

    def __init__(self, says):
        self.says, self.seen = says, []

    def look(self, pictures):
        means = np.array([np.mean(list(data)) for data in pictures])
        return module.Seen(means, VisualTokens(means, means), np.arange(len(means)))

    def _note(self, questions, seen):
        rows = [None] * len(questions) if seen is None else seen.tokens().values.tolist()
        self.seen.extend(zip(questions, rows, strict=True))

    def generate(self, questions, seen=None, *, max_new_tokens):
        self._note(questions, seen)
        return [self.says(q) for q in questions]

    def score(self, questions, options, seen=None):
        self._note(questions, seen)
        width = max(map(len, options))
        return np.array([[-float(j != self.says(q)) for j in range(width)] for q in questions])


def number(question):
    return int(question.split(":")[0].split()[1])


@pytest.mark.parametrize("protocol", ["letter", "options"])
def test_each_prediction_is_judged_by_its_own_answer(protocol):
    """Every item is answered right but 2 and 5; questions of four kinds are interleaved."""
    items = [
        example(i, picture=i if i % 2 else None, task="cloze" if i in (3, 6) else "classification") for i in range(9)
    ]
    wrong = (2, 5)

    def says(question):
        e = items[number(question)]
        right = OPTIONS.index(e.answer)
        given = (right + 1) % 4 if number(question) in wrong else right
        if e.task == "cloze":
            return f"It is {e.answer.upper()}."
        return given if protocol == "options" else f"{'ABCD'[given]}: it says {e.answer}"

    answerer = Scripted(says)
    got = run(answerer, {"forget": items[:5], "real": items[5:]}, protocol)
    assert [r["correct"] for r in got] == [i not in wrong for i in range(9)]
    assert [r["protocol"] for r in got] == ["cloze" if i in (3, 6) else protocol for i in range(9)]
    for question, feature in answerer.seen:
        e = items[number(question)]
        expected = None if e.image is None else pytest.approx(np.mean(list(e.image)))
        assert feature == expected
        if protocol == "letter" and e.task == "classification":
            assert question == letter_question(e)
        else:
            assert question == e.question


def test_the_letter_prompt_shows_the_options():
    assert letter_question(example(3)).splitlines() == [
        "Question 3: what is the job?",
        "A: baker",
        "B: pilot",
        "C: a judge",
        "D: teacher of mathematics",
        module.INSTRUCTION,
    ]


def test_summaries_count_by_set_kind_and_task():
    def record(part, task, modality, correct):
        return {"set": part, "task": task, "modality": modality, "correct": correct}

    got = summarise(
        [record("forget", "classification", "vqa", c) for c in (True, True, False, True)]
        + [record("forget", "classification", "qa", False)]
        + [record("forget", "cloze", "vqa", c) for c in (True, False)]
        + [record("real", "generation", "qa", True)]
    )
    counts = {(s, k): (v["correct"], v["n"], v["accuracy"]) for s, kinds in got.items() for k, v in kinds.items()}
    assert counts == {
        ("forget", "vqa"): (3, 4, 0.75),
        ("forget", "qa"): (0, 1, 0.0),
        ("forget", "cloze_vqa"): (1, 2, 0.5),
        ("real", "generation_qa"): (1, 1, 1.0),
    }
    assert all(v["low"] <= v["accuracy"] <= v["high"] for kinds in got.values() for v in kinds.values())


def test_a_sample_is_seeded_by_set_task_and_modality():
    items = [example(i, i if i % 2 else None, ("classification", "cloze")[i // 2 % 2]) for i in range(80)]
    got = sample(items, 5, 0, "forget")
    kinds = [(e.task, e.modality) for e in got]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        [(task, modality) for task in ("classification", "cloze") for modality in ("vqa", "qa")], 5
    )
    assert [int(e.id) for e in got] == sorted({int(e.id) for e in got})
    assert got == sample(items, 5, 0, "forget")
    assert got != sample(items, 5, 1, "forget") and got != sample(items, 5, 0, "retain")
    assert sample(items, 0, 0, "forget") == sample(items, 20, 0, "forget") == items
    # Questions of other kinds do not change which of one kind are drawn.
    pictured = [e for e in items if e.image is not None]
    assert sample(pictured, 5, 0, "forget") == [e for e in got if e.image is not None]


def test_unknown_protocol_and_questions_too_long(ask, sets):
    with pytest.raises(UserError, match="eval.protocol='letters': give one of letter, options"):
        run(ask(7), sets, "letters")
    with pytest.raises(UserError, match=r"a question of \d+ tokens and 4 for the answer exceed the model's 96"):
        ask(7).generate(["why " * 200], max_new_tokens=4)


def test_one_compilation_serves_two_models(tiny_model, ask, sets):
    """Before and after unlearning share what is compiled."""
    run(ask(7), sets)
    before = module._score._cache_size(), module._encode._cache_size()
    other = {path: jnp.copy(value) for path, value in tiny_model.params.items()}
    run(Answerer(tiny_model.graphdef, other, tiny_model.config, tiny_model.processor, batch_size=7), sets)
    assert (module._score._cache_size(), module._encode._cache_size()) == before
