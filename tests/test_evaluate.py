"""Asking: scores against a plain forward pass, batches, order, who is compared with whom, worked examples, counts."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import answerer, convert, metrics
from vkd_jax import evaluate as module
from vkd_jax.answerer import Answerer, Scores, Seen
from vkd_jax.data import processing
from vkd_jax.evaluate import evaluate, letter_question, sample, summarise
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


def plain(model, room):
    """log p(text | question, pictures) and tokens of the text, not padded on the left, without a cache, row by row.

    The model packs the pictures of a prompt itself, with `room` for so many tokens; 0 where it packs one alone.
    """
    processor, config, length = model.processor, model.config, model.config.text.max_positions

    @jax.jit
    def log_probs(params, tokens, mask, pictures):
        module = bind(model.graphdef, params)
        features = None if pictures is None else module.encode(pictures)[0]
        if pictures is not None and not room:  # a picture a row, which stand one after another
            values, where = features
            features = VisualTokens(values.reshape(1, -1, values.shape[-1]), where.reshape(1, -1, 3))
        return jax.nn.log_softmax(module(tokens, mask, features=features)[0])

    def score(question, text, pictures=(), turns=()):
        images = [processor.image(picture) for picture in pictures]
        prompt, answer = processor.encode(question, text, images, turns)
        ids = np.array(prompt + answer)
        row = np.zeros((1, length), np.int32)
        row[0, : len(ids)] = ids
        packed = config.pack([images] if room else [[image] for image in images], room) if images else None
        out = np.asarray(log_probs(model.params, row, np.arange(length)[None] < len(ids), packed))[0]
        assert answer[-1] == processor.eos_ids[0]
        return sum(out[len(prompt) - 1 + j, token] for j, token in enumerate(answer)), len(answer)

    return score


@pytest.fixture(scope="module")
def plainly(tiny_model):
    return plain(tiny_model, 0)


def test_scores_are_sums_of_log_probabilities_and_losses_their_means(sets, records, plainly):
    for e, record in zip([*sets["forget"], *sets["retain"]], records, strict=True):
        shown = [] if e.image is None else [e.image]
        found = {text: plainly(e.question, text, shown) for text in {*e.options, e.answer}}
        if e.options:
            np.testing.assert_allclose(record["scores"], [found[option][0] for option in e.options], atol=2e-4)
        nll = {text: -log_p / count for text, (log_p, count) in found.items()}
        np.testing.assert_allclose(record["answer_nll"], nll[e.answer], atol=2e-4)
        wrong = [nll[option] for option in e.options if option != e.answer]
        np.testing.assert_allclose(record.get("perturbed_nll", []), wrong, atol=2e-4)


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


NUMBERS = ("scores", "answer_nll", "probability", "paraphrase_nll", "perturbed_nll", "truth_ratio")


def test_the_batch_size_changes_nothing(ask, sets, records):
    """Nine rows fill one batch of seven and two rows of a padded one; alone, nothing is padded."""
    alone = run(ask(1), sets)
    for a, b in zip(alone, records, strict=True):
        assert list(a) == list(b)
        for key in a:
            if key in NUMBERS:
                np.testing.assert_allclose(a[key], b[key], atol=1e-4)
            else:
                assert a[key] == b[key]


def test_a_long_neighbour_changes_nothing(ask):
    """Left padding, and the padding of options, are invisible to a row."""
    answerer, short = ask(7), ["Who is it?", "Where?"]
    long = ["What does this person, who was seen in many pictures, do for a living nowadays?"]
    alone, counts = answerer.score(short, [OPTIONS[:2]] * 2)
    beside = answerer.score([*short, *long], [OPTIONS[:2], OPTIONS[:2], OPTIONS])
    np.testing.assert_allclose(beside.log_probs[:2, :2], alone, atol=1e-4)
    assert np.isneginf(beside.log_probs[:2, 2:]).all() and np.isfinite(beside.log_probs[2]).all()
    np.testing.assert_array_equal(beside.counts[:2], np.pad(counts, ((0, 0), (0, 2))))
    np.testing.assert_allclose(beside.nll[:2, :2], -alone / counts, atol=1e-4)


def test_answers_depend_on_the_pixels_of_their_own_picture(ask, sets, records):
    def changed(e):
        return example(int(e.id), picture=9, options=e.options) if e.image_id == "picture/1" else e

    others = run(ask(7), {name: [changed(e) for e in part] for name, part in sets.items()})
    for a, b in zip(records, others, strict=True):
        if a["image_id"] == "picture/1":
            assert np.abs(np.subtract(a["scores"], b["scores"])).min() > 1e-5
            assert abs(a["answer_nll"] - b["answer_nll"]) > 1e-6
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
    """An answerer that says what it is told; a picture's feature is the mean of its bytes.

    `says(question)` is what it writes, `nll(question, text)` what a text costs; every text has two tokens.
    """

    def __init__(self, says=None, nll=None):
        self.says, self.nll, self.seen = says, nll, []

    def look(self, pictures):
        means = np.array([np.mean(list(data)) for data in pictures])[:, None, None]
        where = np.zeros((len(means), 1, 3), np.int32)
        return Seen([(1, 1, 3)] * len(means), VisualTokens(means, where), tuple((i,) for i in range(len(means))))

    def _note(self, how, questions, seen, turns):
        for i, question in enumerate(questions):
            shown = [] if seen is None else seen.of([i]).tokens().values[0, :, 0].tolist()
            self.seen.append((how, question, shown, None if turns is None else turns[i]))

    def generate(self, questions, seen=None, *, max_new_tokens, turns=None):
        self._note("generate", questions, seen, turns)
        return [self.says(q) for q in questions]

    def score(self, questions, texts, seen=None, *, turns=None):
        self._note("score", questions, seen, turns)
        nll = np.full((len(questions), max(map(len, texts))), np.inf)
        for i, (question, row) in enumerate(zip(questions, texts, strict=True)):
            nll[i, : len(row)] = [self.nll(question, text) for text in row]
        return Scores(-2 * nll, np.where(np.isfinite(nll), 2, 0))


def number(question):
    return int(question.split(":")[0].split()[1])


@pytest.mark.parametrize("protocol", ["letter", "options", "options,letter", "letter, options"])
def test_each_prediction_is_judged_by_its_own_answer(protocol):
    """Every item is answered right but 2 and 5; questions of four kinds are interleaved."""
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
        assert ("answer_nll" in record) == (how in ("cloze", names[0]))  # once a question
        if how == "options":
            assert record["scores"] == [-4.0 + 2 * (option == given[i]) for option in OPTIONS]
    for how, question, shown, turns in scripted.seen:
        e = items[number(question)]
        assert shown == ([] if e.image is None else [pytest.approx(np.mean(list(e.image)))]) and turns is None
        assert question == (letter_question(e) if how == "generate" and e.options else e.question)


def dear(question, text):
    """A cost of every text after every question, all different."""
    return (number(question) + 1) * (1 + len(text) / 7) / 10


def test_truth_ratios_are_per_item():
    """Items have different numbers of wrong answers, of different costs; a paraphrase stands in for the answer."""
    perturbed = [("x",), ("xx", "xxxx"), (), ("x", "xxx", "xxxxxx"), (), ()]
    items = [
        dataclasses.replace(
            example(i, picture=i % 2 or None, task="classification" if i == 4 else "generation", answer="pilot"),
            perturbed=perturbed[i],
            paraphrase="flies aeroplanes" if i in (1, 3) else "",
        )
        for i in range(6)
    ]
    got = run(Scripted(lambda _: "pilot", dear), {"forget": items[:3], "retain": items[3:]})
    for e, record, wrong in zip(items, got, perturbed, strict=True):
        cost = functools.partial(dear, e.question)
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


def test_written_answers_are_compared_with_their_own_truth():
    """Descriptions among cloze questions, with pictures and without; some answers are empty."""
    said = ["she is a baker", "", "a pilot", "a teacher of history", "a baker"]
    items = [
        example(
            i, picture=i if i % 3 else None, task="cloze" if i == 2 else "generation", answer=f"she is {OPTIONS[i % 4]}"
        )
        for i in range(5)
    ]
    got = run(Scripted(lambda q: said[number(q)], dear), {"forget": items[:2], "retain": items[2:]})
    for i, (e, record) in enumerate(zip(items, got, strict=True)):
        assert record["prediction"] == said[i] and record["correct"] == (e.answer in said[i])
        if e.task == "cloze":
            assert not {"rouge_l", "bleu"} & set(record)
        else:
            assert record["bleu"] == metrics.bleu(said[i], e.answer)
            assert {k: record[k] for k in ("rouge_l", "rouge_l_recall")} == metrics.rouge_l(said[i], e.answer)
    scores = [r["rouge_l"] for r in got if "rouge_l" in r]
    assert scores[1] == 0 and len(set(scores)) == len(scores)


def retained(i, picture=None, person=None, **more):
    e = example(i, picture, **more)
    return dataclasses.replace(e, id=f"r{i}", person=f"{person or i:03d}")


@pytest.fixture(scope="module")
def people():
    """Two to forget; in the retain set four people of two questions with a picture each, and as many of text alone."""
    forget = [example(i, picture=i) for i in (1, 2)] + [example(3), example(4, task="cloze")]
    pictured = [retained(i, picture=i // 2, person=i // 2) for i in range(20, 28)]
    texts = [retained(i, person=i // 2) for i in range(30, 38)]
    cloze = [retained(i, person=i, task="cloze") for i in (40, 41)]
    return {"forget": forget, "retain": [*pictured, *texts, *cloze]}


@pytest.mark.parametrize("protocol", ["options", "letter", "options,letter"])
def test_one_worked_example_of_somebody_else_stands_before_each_question(people, protocol):
    scripted = Scripted(lambda _: "A", dear)
    got = evaluate(scripted, people, protocol=protocol, max_new_tokens=4, shots=1, seed=3)
    everybody = {e.id: e for part in people.values() for e in part}
    shown: dict[tuple, list] = {}
    for record in got:
        asked, worked = everybody[record["id"]], everybody[record["worked_example"]]
        assert worked in people["retain"] and (worked.task, worked.modality) == (asked.task, asked.modality)
        assert worked.person != asked.person and worked.image_id != (asked.image_id or None)
        shown.setdefault((asked.task, asked.modality), []).append(worked.id)
    for kind, names in shown.items():  # one for all, and another for the example's own person
        assert len(set(names)) == 2 and max(map(names.count, names)) > len(names) / 2, kind
    worked_of = {r["id"]: everybody[r["worked_example"]] for r in got}
    for how, question, features, [(said, answer, pictures)] in scripted.seen:
        asked = next(e for e in everybody.values() if number(e.question) == number(question))
        worked = worked_of[asked.id]
        both = [worked.image, asked.image] if asked.image is not None else []
        assert features == pytest.approx([np.mean(list(image)) for image in both]) and pictures == bool(both)
        if how == "generate" and worked.options:
            assert (said, answer) == (letter_question(worked), "ABCD"[worked.options.index(worked.answer)])
        else:
            assert (said, answer) == (worked.question, worked.answer)


def test_worked_examples_are_drawn_by_the_seed(people):
    def drawn(seed):
        got = evaluate(Scripted(None, dear), {k: v[:-2] for k, v in people.items()}, protocol="options",
                       max_new_tokens=4, shots=1, seed=seed)  # fmt: skip
        return [r["worked_example"] for r in got]

    people = {"forget": people["forget"][:3], "retain": people["retain"]}
    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(5)}) > 1
    assert "worked_example" not in evaluate(Scripted(None, dear), people | {"retain": people["retain"][:8]},
                                            protocol="options", max_new_tokens=4)[0]  # fmt: skip


def test_without_an_example_to_show_nothing_is_asked(people):
    for retain, about in (
        ([], "with a picture"),
        ([example(1, picture=1)], "with a picture"),
        (people["retain"][:8], "of text alone"),
    ):
        with pytest.raises(UserError, match=f"no classification question {about} about somebody else .*eval.shots=0"):
            evaluate(Scripted(), people | {"retain": retain}, protocol="options", max_new_tokens=4, shots=1)


def test_a_worked_example_is_an_earlier_turn(tiny_folder, tiny_model, qwen_folder):
    turns = [("What is this?", "a pear", 1)]
    said = "USER: <image>\nWhat is this? ASSISTANT: a pear"
    assert tiny_model.processor.prompt("Who?", 1, turns) == f"{said} USER: <image>\nWho? ASSISTANT:"
    fallback = processing.Processor(tiny_folder, tiny_model.config)
    fallback.chat_template = None  # as LLaVA-1.5 was trained: each answer has its end
    assert fallback.prompt("Who?", 1, turns) == f"{said}</s>USER: <image>\nWho? ASSISTANT:"
    folder = qwen_folder("qwen2_vl")
    qwen = processing.Processor(folder, convert.read_config(folder)[0].Config.from_hf(convert.read_config(folder)[1]))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert qwen.prompt("Who?", 1, turns).endswith(
        f"<|im_start|>user\n{picture}What is this?<|im_end|>\n<|im_start|>assistant\na pear<|im_end|>\n"
        f"<|im_start|>user\n{picture}Who?<|im_end|>\n<|im_start|>assistant\n"
    )
    for processor in (tiny_model.processor, fallback, qwen):
        images = [processor.image(png(0)), processor.image(Image.new("RGB", (90, 60)))]
        prompt, answer = processor.encode("Who?", "Bob", images, turns)
        each = [processor.config.image_tokens(*image.shape[:2]) for image in images]
        places = np.flatnonzero(np.array(prompt) == processor.image_token_id)
        assert len(places) == sum(each)  # those of one picture, words, those of the other
        assert np.flatnonzero(np.diff(places) > 1).tolist() == [each[0] - 1]
        assert processor.tokenizer.decode(answer).strip().startswith("Bob") and answer[-1] == processor.eos_ids[0]
        assert (prompt, answer) == processor.encode_each("Who?", [None, "Ann", "Bob"], images, turns)[2]
        assert prompt == processor.encode("Who?", None, images, turns)[0]


def test_scores_after_a_worked_example_are_those_of_the_whole_conversation(tiny_model, ask, plainly):
    turns = [[("What is it?", "a pear", 1)], [("What is it?", "a judge", 1)]]
    files = [png(i) for i in range(3)]
    seen = ask(7).look([[files[0], files[1]], [files[2], files[0]]])
    assert len(seen.shapes) == len(seen.features.values) == 3
    got = ask(7).score(["Who?", "Which one?"], [["baker", "a pilot"], ["a judge"]], seen, turns=turns)
    for i, question, pictures, text, j in ((0, "Who?", (0, 1), "baker", 0), (0, "Who?", (0, 1), "a pilot", 1),
                                           (1, "Which one?", (2, 0), "a judge", 0)):  # fmt: skip
        expected, count = plainly(question, text, [files[k] for k in pictures], turns[i])
        np.testing.assert_allclose(got.log_probs[i, j], expected, atol=2e-4)
        assert got.counts[i, j] == count
    swapped = ask(7).score(["Who?"], [["baker"]], seen.show([[1, 0]]), turns=turns[:1])
    assert abs(swapped.log_probs[0, 0] - got.log_probs[0, 0]) > 1e-6


def test_pictures_of_a_prompt_stand_one_after_another_and_padding_last():
    values = np.arange(6.0).reshape(2, 3, 1)
    where = np.array([[[0, 0, 0], [0, 0, 1], [-1, -1, -1]], [[0, 0, 0], [0, 1, 0], [0, 2, 0]]], np.int32)
    seen = Seen([(1, 2, 3), (3, 1, 3)], VisualTokens(values, where), ((0,), (1,)))
    assert seen.of([1, 0, 1]).tokens().values[:, 0, 0].tolist() == [3, 0, 3]
    values, where = seen.show([[0, 1], [1, 0], [1]]).tokens()
    real = where[..., 0] >= 0
    np.testing.assert_array_equal(real, np.arange(6) < np.array([[5], [5], [3]]))
    assert [row[ok][:, 0].tolist() for row, ok in zip(values, real, strict=True)] == [
        [0, 1, 3, 4, 5], [3, 4, 5, 0, 1], [3, 4, 5],
    ]  # fmt: skip
    assert where[0, :5].tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 2, 0]]
    assert where[1, :5].tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 0, 1]]
    assert [image.shape for image in seen.show([[1, 0]]).images(0)] == [(3, 1, 3), (1, 2, 3)]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_joined_pictures_are_what_the_model_makes_of_them_together(family, qwen_folder):
    """Pictures of two sizes, in both orders: the same log-probabilities as of one row that the model itself packed."""
    folder = qwen_folder(family)
    graphdef, params, config = convert.load(folder)
    model = Answerer(graphdef, params, config, processing.Processor(folder, config), batch_size=2)
    files = [png(0), Image.fromarray(np.random.default_rng(9).integers(0, 256, (61, 90, 3), np.uint8))]
    rows, turns = [[0, 1], [1, 0]], [("What is it?", "a pear", 1)]
    seen = model.look([[files[i] for i in row] for row in rows])
    got = model.score(["Who?"] * 2, [["baker"]] * 2, seen, turns=[turns] * 2).log_probs
    score = plain(model, 16)
    expected = [score("Who?", "baker", [files[i] for i in row], turns)[0] for row in rows]
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-3)
    assert abs(expected[0] - expected[1]) > 0.01


def test_a_picture_is_read_once_and_in_its_place(tiny_model, ask, monkeypatch):
    files = [png(i) for i in range(9)]
    read = []
    image = processing.Processor.image
    monkeypatch.setattr(processing.Processor, "image", lambda self, x: read.append(x) or image(self, x))
    seen = ask(4).look([[files[0], files[i]] for i in range(1, 9)] + [files[0]])
    assert sorted(map(files.index, read)) == list(range(9))
    alone = [ask(1).look([x]).features.values[0] for x in files]
    np.testing.assert_allclose(seen.of([8]).tokens().values[0], alone[0], atol=1e-5)
    for i in range(8):
        np.testing.assert_allclose(seen.of([i]).tokens().values[0], np.concatenate([alone[0], alone[i + 1]]), atol=1e-5)
    with pytest.raises(UserError, match="a picture is refused"):
        ask(4).look([files[0], b"no picture"])


def test_the_letter_prompt_shows_the_options():
    assert letter_question(example(3)).splitlines() == [
        "Question 3: what is the job?",
        "A: baker",
        "B: pilot",
        "C: a judge",
        "D: teacher of mathematics",
        module.INSTRUCTION,
    ]


def test_questions_have_as_many_letters_as_options():
    """CLEAR asks for a name among six and more."""
    names = tuple(f"Name {i}" for i in range(9))
    e = example(5, options=names)
    assert letter_question(e).splitlines()[6:] == [
        "F: Name 5",
        "G: Name 6",
        "H: Name 7",
        "I: Name 8",
        module.INSTRUCTION,
    ]
    for said, right in (("F", True), ("F: Name 5", True), ("E", False), ("Name 5", False)):
        (record,) = run(Scripted(lambda _, said=said: said, dear), {"forget": [e]}, "letter")
        assert record["correct"] is right
    with pytest.raises(UserError, match="27 options; use eval.protocol=options"):
        letter_question(example(0, options=tuple(map(str, range(27)))))


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


def test_summaries_of_an_evaluation(ask, sets):
    got = summarise(run(ask(7), {"forget": sets["forget"], "retain": [example(3, task="generation")]}))
    assert set(got["forget"]) == {"vqa", "qa"} and set(got["retain"]) == {"generation_qa"}
    assert {"probability", "truth_score"} < set(got["forget"]["vqa"])
    assert {"probability", "rouge_l", "rouge_l_recall", "bleu"} < set(got["retain"]["generation_qa"])
    assert all(set(x) == {"mean", "low", "high", "n"} for x in got["forget"]["qa"].values() if isinstance(x, dict))


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
def test_unknown_protocols_and_numbers_of_shots(protocol):
    with pytest.raises(UserError, match=f"eval.protocol='{protocol}': give one of letter, options, or both"):
        module.check(protocol)
    with pytest.raises(UserError, match="eval.shots=2: give 0, or 1"):
        module.check("letter", 2)
    assert module.check("letter, options", 1) == ("letter", "options")


def test_prompts_too_long_for_the_model(ask, tiny_model, people):
    limit = tiny_model.config.text.max_positions
    with pytest.raises(UserError, match=rf"a question of \d+ tokens and 4 for the answer exceed the model's {limit}"):
        ask(7).generate(["why " * 200], max_new_tokens=4)
    with pytest.raises(UserError, match=f"exceed the model's {limit}; .*without worked examples"):
        evaluate(ask(7), people, protocol="letter", max_new_tokens=limit // 2, shots=1)


def test_one_compilation_serves_two_models(tiny_model, ask, sets):
    """Before and after unlearning share what is compiled."""

    def compiled():
        return [program._cache_size() for program in answerer.programs(ask(7).mesh)]

    run(ask(7), sets)
    before = compiled()
    other = {path: jnp.copy(value) for path, value in tiny_model.params.items()}
    run(
        Answerer(tiny_model.graphdef, other, tiny_model.config, tiny_model.processor, batch_size=7, mesh=ask(7).mesh),
        sets,
    )
    assert compiled() == before and min(before) > 0
