"""Evaluation of sets: order, judging, worked examples and counts."""

import dataclasses
import functools
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.evaluation import inference, wording
from vkd_jax.evaluation.encoded_images import EncodedImages
from vkd_jax.evaluation.evaluate import evaluate, sample
from vkd_jax.evaluation.inference import Answerer, Scores
from vkd_jax.evaluation.metrics import words
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.evaluation.wording import Wording
from vkd_jax.models.base import VisualTokens
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
    """Mixed kinds, lengths and numbers of options, with shared images; at most nine of each kind."""
    forget = [example(i, picture=i % 3 if i % 2 else None, options=OPTIONS[: 4 - i % 3]) for i in range(9)]
    retain = [example(10 + i, picture=3 if i % 2 else None, task=("classification", "cloze")[i // 4]) for i in range(8)]
    return {"forget": forget, "retain": retain}


@pytest.fixture(scope="module")
def ask(tiny_model):
    return lambda batch_size: Answerer(tiny_model, batch_size=batch_size)


def run(answerer, sets, protocol="options"):
    return evaluate(answerer, sets, EvalConfig(protocol=protocol, max_new_tokens=4))


@pytest.fixture(scope="module")
def records(ask, sets):
    return run(ask(7), sets)


@pytest.mark.parametrize(("task", "modality"), [("classification", "vqa"), ("classification", "qa"), ("cloze", "vqa")])
def test_likelihoods_belong_to_their_question(ask, sets, records, task, modality):
    """The same questions in another order, without `evaluate`."""
    pairs = list(zip([*sets["forget"], *sets["retain"]], records, strict=True))[::-1]
    pairs = [(e, record) for e, record in pairs if (e.task, e.modality) == (task, modality)]
    encoded_images = ask(7).encode_images([e.image for e, _ in pairs]) if modality == "vqa" else None
    found = ask(7).score([e.question for e, _ in pairs], [e.options or (e.answer,) for e, _ in pairs], encoded_images)
    for (e, record), log_probs, nll in zip(pairs, found.log_probs, found.nll, strict=True):
        nll = dict(zip(e.options or (e.answer,), nll, strict=False))
        np.testing.assert_allclose(record["answer_nll"], nll.pop(e.answer), atol=1e-4)
        np.testing.assert_allclose(record.get("perturbed_nll", []), list(nll.values()), atol=1e-4)
        np.testing.assert_allclose(record.get("scores", []), log_probs[: len(e.options)], atol=1e-4)


def test_records_are_in_the_order_of_their_questions(sets, records):
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


NUMBERS = ("scores", "answer_nll", "probability", "paraphrase_nll", "perturbed_nll", "truth_ratio")


def test_the_batch_size_changes_nothing(ask, sets, records):
    """Nine rows fill one batch of seven and two rows of a padded batch; batches of one have no padding."""
    alone = run(ask(1), sets)
    for a, b in zip(alone, records, strict=True):
        assert list(a) == list(b)
        for key in a:
            if key in NUMBERS:
                np.testing.assert_allclose(a[key], b[key], atol=1e-4)
            else:
                assert a[key] == b[key]


def test_answers_depend_on_the_pixels_of_their_image(ask, sets, records):
    def changed(e):
        return example(int(e.id), picture=9, options=e.options) if e.image_id == "picture/1" else e

    others = run(ask(7), {name: [changed(e) for e in part] for name, part in sets.items()})
    for a, b in zip(records, others, strict=True):
        if a["image_id"] == "picture/1":
            assert np.abs(np.subtract(a["scores"], b["scores"])).min() > 1e-5
            assert abs(a["answer_nll"] - b["answer_nll"]) > 1e-6
        else:
            assert a == b


class Scripted:
    """An answerer with scripted answers; the feature of an image is the mean of its bytes.

    `says(question)` is the generated answer, and `nll(question, text)` the loss of a text; every text has two tokens.
    """

    def __init__(self, says=None, nll=None):
        self.says, self.nll, self.calls = says, nll, []

    def encode_images(self, images, names):
        means = np.array([np.mean(list(data)) for data in images])[:, None, None]
        where = np.zeros((len(means), 1, 3), np.int32)
        return EncodedImages(
            [(1, 1, 3)] * len(means), VisualTokens(means, where), tuple((i,) for i in range(len(means)))
        )

    def _note(self, how, questions, encoded_images, turns):
        for i, question in enumerate(questions):
            shown = [] if encoded_images is None else encoded_images.select([i]).tokens().values[0, :, 0].tolist()
            self.calls.append((how, question, shown, None if turns is None else turns[i]))

    def generate(self, questions, encoded_images=None, *, max_new_tokens, turns=None, names=()):
        self._note("generate", questions, encoded_images, turns)
        return [self.says(q) for q in questions]

    def score(self, questions, texts, encoded_images=None, *, turns=None, names=()):
        self._note("score", questions, encoded_images, turns)
        nll = np.full((len(questions), max(map(len, texts))), np.inf)
        for i, (question, row) in enumerate(zip(questions, texts, strict=True)):
            nll[i, : len(row)] = [self.nll(question, text) for text in row]
        return Scores(-2 * nll, np.where(np.isfinite(nll), 2, 0))


def number(question):
    return int(question.split(":")[0].split()[1])


@pytest.mark.parametrize(
    "protocol", ["letter", "options", "options,letter", "letter, options", "letter:first_character"]
)
def test_each_prediction_is_judged_by_its_own_answer(protocol):
    """All items but 2 and 5 are answered correctly; questions of four kinds are interleaved."""
    items = [
        example(i, picture=i if i % 2 else None, task="cloze" if i in (3, 6) else "classification") for i in range(9)
    ]
    wrong = (2, 5)
    given = {i: OPTIONS[(OPTIONS.index(e.answer) + (i in wrong)) % 4] for i, e in enumerate(items) if e.task != "cloze"}

    def says(question):
        i = number(question)
        if items[i].task == "cloze":
            return f"It is {items[i].answer.upper()}."
        return f"{'ABCD'[OPTIONS.index(given[i])]}: it says {items[i].answer}"

    def nll(question, text):
        return 1.0 + (given.get(number(question), text) != text)

    scripted = Scripted(says, nll)
    got = run(scripted, {"forget": items[:5], "real": items[5:]}, protocol)
    names = [name.strip() for name in protocol.split(",")]
    expected = [(i, how) for i, e in enumerate(items) for how in (["cloze"] if e.task == "cloze" else names)]
    assert [(int(r["id"]), r["protocol"]) for r in got] == expected
    assert [r["correct"] for r in got] == [i not in wrong for i, _ in expected]
    for record, (i, how) in zip(got, expected, strict=True):
        assert ("answer_nll" in record) == (how in ("cloze", names[0]))  # once per question
        if how == "options":
            assert record["scores"] == [-4.0 + 2 * (option == given[i]) for option in OPTIONS]
    for how, question, shown, turns in scripted.calls:
        e = items[number(question)]
        assert shown == ([] if e.image is None else [pytest.approx(np.mean(list(e.image)))]) and turns is None
        assert question == (Wording().letter_question(e) if how == "generate" and e.options else e.question)


def loss_of(question, text):
    """The loss of a text after a question; all are different."""
    return (number(question) + 1) * (1 + len(text) / 7) / 10


def test_truth_ratios_are_per_item():
    """Items have different numbers of wrong answers with different losses; a paraphrase replaces the answer."""
    perturbed = [("x",), ("xx", "xxxx"), (), ("x", "xxx", "xxxxxx"), (), ()]
    items = [
        dataclasses.replace(
            example(i, picture=i % 2 or None, task="classification" if i == 4 else "generation", answer="pilot"),
            perturbed=perturbed[i],
            paraphrase="flies aeroplanes" if i in (1, 3) else "",
        )
        for i in range(6)
    ]
    got = run(Scripted(lambda _: "pilot", loss_of), {"forget": items[:3], "retain": items[3:]})
    for e, record, wrong in zip(items, got, perturbed, strict=True):
        cost = functools.partial(loss_of, e.question)
        assert record["answer_nll"] == pytest.approx(cost("pilot"))
        assert record["probability"] == pytest.approx(np.exp(-cost("pilot")))
        wrong = wrong or [option for option in e.options if option != "pilot"]
        if not wrong:
            assert not {"truth_ratio", "perturbed_nll", "paraphrase_nll"} & set(record)
            continue
        truth = cost(e.paraphrase or "pilot")
        assert record["perturbed_nll"] == pytest.approx([cost(text) for text in wrong])
        assert record["paraphrase_nll"] == pytest.approx(truth)
        assert record["truth_ratio"] == pytest.approx(np.exp(np.mean([cost(text) for text in wrong]) - truth))
    assert len({r["truth_ratio"] for r in got if "truth_ratio" in r}) == 4


def test_open_answers_are_compared_with_their_true_answer():
    """Open and cloze questions, with and without images; some answers are empty."""
    said = ["she is a baker", "", "a pilot", "a teacher of history", "a baker"]
    items = [
        example(
            i, picture=i if i % 3 else None, task="cloze" if i == 2 else "generation", answer=f"she is {OPTIONS[i % 4]}"
        )
        for i in range(5)
    ]
    got = run(Scripted(lambda q: said[number(q)], loss_of), {"forget": items[:2], "retain": items[2:]})
    for i, (e, record) in enumerate(zip(items, got, strict=True)):
        assert record["prediction"] == said[i] and record["correct"] == (e.answer in said[i])
        if e.task == "cloze":
            assert not {"rouge_l", "bleu"} & set(record)
        else:
            assert record["bleu"] == words.bleu(said[i], e.answer)
            assert {k: record[k] for k in ("rouge_l", "rouge_l_recall")} == words.rouge_l(said[i], e.answer)
    scores = [r["rouge_l"] for r in got if "rouge_l" in r]
    assert scores[1] == 0 and len(set(scores)) == len(scores)


def retained(i, picture=None, person=None, **more):
    e = example(i, picture, **more)
    return dataclasses.replace(e, id=f"r{i}", person=f"{person or i:03d}")


@pytest.fixture(scope="module")
def people():
    """A forget set, and a retain set of four people with two questions with an image each, and as many text-only."""
    # The last four questions of the forget set share images with the retain set, like a photo of several people.
    shared = [example(i + 5, picture=i + 10) for i in range(4)]
    forget = [example(1, picture=1), example(2, picture=2), example(3), example(4, task="cloze"), *shared]
    pictured = [retained(i, picture=i // 2, person=i // 2) for i in range(20, 28)]
    texts = [retained(i, person=i // 2) for i in range(30, 38)]
    cloze = [retained(i, person=i, task="cloze") for i in (40, 41)]
    return {"forget": forget, "retain": [*pictured, *texts, *cloze]}


@pytest.mark.parametrize("protocol", ["options", "letter", "options,letter"])
def test_a_worked_example_about_another_person_precedes_each_question(people, protocol):
    scripted = Scripted(lambda _: "A", loss_of)
    got = evaluate(
        scripted, people, EvalConfig(protocol=protocol, max_new_tokens=4, shots=1, seed=3), shown=people["retain"]
    )
    everybody = {e.id: e for part in people.values() for e in part}
    shown: dict[tuple, list] = {}
    for record in got:
        asked, worked = everybody[record["id"]], everybody[record["worked_example"]]
        assert worked in people["retain"] and (worked.task, worked.modality) == (asked.task, asked.modality)
        assert worked.person != asked.person and worked.image_id != (asked.image_id or None)
        shown.setdefault((asked.task, asked.modality), []).append(worked.id)
    for kind, names in shown.items():  # one for all, and another for questions about its person
        assert len(set(names)) == 2 and max(map(names.count, names)) > len(names) / 2, kind
    worked_of = {r["id"]: everybody[r["worked_example"]] for r in got}
    for how, question, features, [(said, answer, pictures)] in scripted.calls:
        asked = next(e for e in everybody.values() if number(e.question) == number(question))
        worked = worked_of[asked.id]
        both = [worked.image, asked.image] if asked.image is not None else []
        assert features == pytest.approx([np.mean(list(image)) for image in both]) and pictures == bool(both)
        if how == "generate" and worked.options:
            assert (said, answer) == (Wording().letter_question(worked), "ABCD"[worked.options.index(worked.answer)])
        else:
            assert (said, answer) == (worked.question, worked.answer)


def test_worked_examples_are_drawn_by_the_seed(people):
    def drawn(seed):
        got = evaluate(
            Scripted(None, loss_of),
            {k: v[:-2] for k, v in people.items()},
            EvalConfig(protocol="options", max_new_tokens=4, shots=1, seed=seed),
            shown=people["retain"][:-2],
        )
        return [r["worked_example"] for r in got]

    people = {"forget": people["forget"][:3], "retain": people["retain"]}
    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(5)}) > 1
    assert (
        "worked_example"
        not in evaluate(
            Scripted(None, loss_of),
            people | {"retain": people["retain"][:8]},
            EvalConfig(protocol="options", max_new_tokens=4),
        )[0]
    )


def test_a_missing_worked_example_is_rejected(people):
    for retain, about in (
        ([], "with an image"),
        ([example(1, picture=1)], "with an image"),
        (people["retain"][:8], "without an image"),
    ):
        with pytest.raises(UserError, match=f"no classification question {about} about another person .*eval.shots=0"):
            evaluate(Scripted(), people, EvalConfig(protocol="options", max_new_tokens=4, shots=1), shown=retain)


def test_the_letter_prompt_shows_the_options():
    assert Wording().letter_question(example(3)).splitlines() == [
        "Question 3: what is the job?",
        "A: baker",
        "B: pilot",
        "C: a judge",
        "D: teacher of mathematics",
        wording.INSTRUCTION,
    ]


def test_a_question_has_as_many_letters_as_options():
    """CLEAR asks for a name among six and more."""
    names = tuple(f"Name {i}" for i in range(9))
    e = example(5, options=names)
    assert Wording().letter_question(e).splitlines()[6:] == [
        "F: Name 5",
        "G: Name 6",
        "H: Name 7",
        "I: Name 8",
        wording.INSTRUCTION,
    ]
    for said, right in (("F", True), ("F: Name 5", True), ("E", False), ("Name 5", False)):
        (record,) = run(Scripted(lambda _, said=said: said, loss_of), {"forget": [e]}, "letter")
        assert record["correct"] is right
    with pytest.raises(UserError, match="27 options; use eval.protocol=options"):
        Wording().letter_question(example(0, options=tuple(map(str, range(27)))))


def test_summaries_count_by_set_kind_and_task():
    texts = {"prediction": "x", "answer": "x"}

    def record(part, task, modality, correct):
        return {"set": part, "task": task, "modality": modality, "correct": correct, "person": "", **texts}

    got = summaries(
        [record("forget", "classification", "vqa", c) for c in (True, True, False, True)]
        + [record("forget", "classification", "qa", False)]
        + [record("forget", "cloze", "vqa", c) for c in (True, False)]
        + [record("real", "generation", "qa", True)]
    )
    counts = {(s, k): (v.correct, v.n, v.accuracy) for s, kinds in got.items() for k, v in kinds.items()}
    assert counts == {
        ("forget", "vqa"): (3, 4, 0.75),
        ("forget", "qa"): (0, 1, 0.0),
        ("forget", "cloze_vqa"): (1, 2, 0.5),
        ("real", "generation_qa"): (1, 1, 1.0),
    }
    assert all(v.low <= v.accuracy <= v.high for kinds in got.values() for v in kinds.values())


def test_summaries_of_an_evaluation(ask, sets):
    got = summaries(run(ask(7), {"forget": sets["forget"], "retain": [example(3, task="generation")]}))
    assert set(got["forget"]) == {"vqa", "qa"} and set(got["retain"]) == {"generation_qa"}
    assert {"probability", "truth_score"} <= set(got["forget"]["vqa"].metrics)
    assert {"probability", "rouge_l", "rouge_l_recall", "bleu"} <= set(got["retain"]["generation_qa"].metrics)
    assert got["forget"]["qa"].people == len({e.person for e in sets["forget"] if e.image is None and e.person})


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


@pytest.mark.parametrize("protocol", ["letters", "", "letter,", "options,options", "options;letter"])
def test_unknown_protocols_and_numbers_of_shots_are_rejected(protocol):
    with pytest.raises(UserError, match=f"eval.protocol: '{protocol}' is not allowed. Give options, letter, "):
        EvalConfig(protocol=protocol)
    with pytest.raises(UserError, match="eval.shots: 2 is not allowed"):
        EvalConfig(shots=2)
    assert EvalConfig(protocol="letter, options").protocols == ("letter", "options")


def test_prompts_too_long_for_the_model_are_rejected(ask, tiny_model, people):
    limit = tiny_model.config.text.max_positions
    with pytest.raises(
        UserError, match=rf"the question: its \d+ tokens and 4 for the answer exceed the model's {limit}"
    ):
        ask(7).generate(["why " * 200], max_new_tokens=4)
    with pytest.raises(UserError, match=f"^row .*exceed the model's {limit}; .*without worked examples"):
        evaluate(
            ask(7), people, EvalConfig(protocol="letter", max_new_tokens=limit // 2, shots=1), shown=people["retain"]
        )


def test_one_compilation_serves_two_models(tiny_model, ask, sets):
    """The vanilla and the unlearned model share compiled programs."""

    def compiled():
        return [program._cache_size() for program in inference.programs(ask(7).mesh)]

    inference.programs.cache_clear()  # other tests of this worker have compiled programs, too
    run(ask(7), sets)
    before = compiled()
    other = {path: jnp.copy(value) for path, value in tiny_model.params.items()}
    run(
        Answerer(dataclasses.replace(tiny_model, params=other), batch_size=7),
        sets,
    )
    assert compiled() == before and sum(map(bool, before)) == 3  # encode, score and greedy
