"""Batched inference: scores against a plain forward pass, padding, images, earlier turns."""

import copy
import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vkd_jax.checkpoints import hf
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.data.processor import Processor
from vkd_jax.evaluation import inference
from vkd_jax.evaluation.encoded_images import EncodedImages
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.models import generate, llava
from vkd_jax.models.base import VisualTokens, bind, split_model
from vkd_jax.runtime import memory
from vkd_jax.types import Example, NotFinite, UserError

OPTIONS = ("baker", "pilot", "a judge", "teacher of mathematics")


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def ask(tiny_model):
    return lambda batch_size: Answerer(tiny_model, batch_size=batch_size)


def plain(model, room):
    """log p(text | question, images) and the number of tokens of the text: without left padding and cache, row by row.

    The model packs the images of a prompt itself, with `room` for that many tokens; 0 if it packs one image alone.
    """
    processor, config, length = model.processor, model.config, model.config.text.max_positions

    @jax.jit
    def log_probs(params, tokens, mask, pictures):
        module = bind(model.graphdef, params)
        features = None if pictures is None else module.encode(pictures)[0]
        if pictures is not None and not room:  # one row per image, joined in order
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


@pytest.mark.parametrize("pictured", [True, False])
def test_scores_are_sums_of_log_probabilities_and_nll_their_means(ask, plainly, pictured):
    """Nine rows of different lengths and numbers of texts, in batches of seven and two; three images."""
    questions = [f"Question {i}: what is the job{' of this person' * (i % 3)}?" for i in range(9)]
    texts = [OPTIONS[: 4 - i % 3] for i in range(9)]
    files = [png(i) for i in range(3)]
    encoded_images = ask(7).encode_images([files[i % 3] for i in range(9)]) if pictured else None
    got = ask(7).score(questions, texts, encoded_images)
    for i, (question, row) in enumerate(zip(questions, texts, strict=True)):
        for j, text in enumerate(row):
            log_p, count = plainly(question, text, [files[i % 3]] if pictured else [])
            np.testing.assert_allclose(got.log_probs[i, j], log_p, atol=2e-4)
            np.testing.assert_allclose(got.nll[i, j], -log_p / count, atol=2e-4)
            assert got.counts[i, j] == count
        assert np.isneginf(got.log_probs[i, len(row) :]).all() and not got.counts[i, len(row) :].any()


def test_a_longer_row_in_the_batch_changes_nothing(ask):
    """Left padding and the padding of options do not affect a row."""
    answerer, short = ask(7), ["Who is it?", "Where?"]
    long = ["What does this person, who was seen in many pictures, do for a living nowadays?"]
    alone, counts = answerer.score(short, [OPTIONS[:2]] * 2)
    beside = answerer.score([*short, *long], [OPTIONS[:2], OPTIONS[:2], OPTIONS])
    np.testing.assert_allclose(beside.log_probs[:2, :2], alone, atol=1e-4)
    assert np.isneginf(beside.log_probs[:2, 2:]).all() and np.isfinite(beside.log_probs[2]).all()
    np.testing.assert_array_equal(beside.counts[:2], np.pad(counts, ((0, 0), (0, 2))))
    np.testing.assert_allclose(beside.nll[:2, :2], -alone / counts, atol=1e-4)


def test_generated_answers_depend_on_the_pixels(tiny_model, ask):
    """The projector is scaled up, so that another image changes the answer."""
    params = {k: v * (40 if k.startswith("projector/fc2") else 1) for k, v in tiny_model.params.items()}
    loud = Answerer(dataclasses.replace(tiny_model, params=params), batch_size=7)
    encoded_images = loud.encode_images([png(i) for i in range(7)])
    answers = loud.generate(["Who is this?"] * 7, encoded_images, max_new_tokens=4)
    assert len(set(answers)) > 1
    assert answers == loud.generate(["Who is this?"] * 7, encoded_images, max_new_tokens=4)
    assert answers[::-1] == loud.generate(["Who is this?"] * 7, encoded_images.select(range(7)[::-1]), max_new_tokens=4)


def test_an_image_is_encoded_once_in_order(tiny_model, ask, monkeypatch):
    files = [png(i) for i in range(9)]
    read = []
    image = Processor.image
    monkeypatch.setattr(Processor, "image", lambda self, x: read.append(x) or image(self, x))
    encoded_images = ask(4).encode_images([[files[0], files[i]] for i in range(1, 9)] + [files[0]])
    assert sorted(map(files.index, read)) == list(range(9))
    alone = [ask(1).encode_images([x]).features.values[0] for x in files]
    np.testing.assert_allclose(encoded_images.select([8]).tokens().values[0], alone[0], atol=1e-5)
    for i in range(8):
        np.testing.assert_allclose(
            encoded_images.select([i]).tokens().values[0], np.concatenate([alone[0], alone[i + 1]]), atol=1e-5
        )
    with pytest.raises(UserError, match="an image cannot be processed"):
        ask(4).encode_images([files[0], b"no picture"])


def test_image_tokens_of_a_prompt_are_in_order_with_padding_last():
    values = np.arange(6.0).reshape(2, 3, 1)
    where = np.array([[[0, 0, 0], [0, 0, 1], [-1, -1, -1]], [[0, 0, 0], [0, 1, 0], [0, 2, 0]]], np.int32)
    encoded_images = EncodedImages([(1, 2, 3), (3, 1, 3)], VisualTokens(values, where), ((0,), (1,)))
    assert encoded_images.select([1, 0, 1]).tokens().values[:, 0, 0].tolist() == [3, 0, 3]
    values, where = encoded_images.for_prompts([[0, 1], [1, 0], [1]]).tokens()
    real = where[..., 0] >= 0
    np.testing.assert_array_equal(real, np.arange(6) < np.array([[5], [5], [3]]))
    assert [row[ok][:, 0].tolist() for row, ok in zip(values, real, strict=True)] == [
        [0, 1, 3, 4, 5], [3, 4, 5, 0, 1], [3, 4, 5],
    ]  # fmt: skip
    assert where[0, :5].tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 2, 0]]
    assert where[1, :5].tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 0, 1]]
    assert [image.shape for image in encoded_images.for_prompts([[1, 0]]).blank_images(0)] == [(3, 1, 3), (1, 2, 3)]


# Images of one size, packed patches, and tiles. The others pack images by the functions of these.
FAMILIES = ["gemma3", "qwen3_vl", "llava_next"]
FAMILIES += [pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl")]


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_images_match_images_that_the_model_packs(family, family_folder):
    """Images of two sizes, in both orders: the log-probabilities match those of a row that the model packs."""
    folder = family_folder(family)
    graphdef, params, config = hf.load(folder)
    model = Answerer(ModelBundle(graphdef, params, config, Processor(folder, config), None), batch_size=2)
    files = [png(0), Image.fromarray(np.random.default_rng(9).integers(0, 256, (61, 90, 3), np.uint8))]
    rows, turns = [[0, 1], [1, 0]], [("What is it?", "a pear", 1)]
    encoded_images = model.encode_images([[files[i] for i in row] for row in rows])
    got = model.score(["Who?"] * 2, [["baker"]] * 2, encoded_images, turns=[turns] * 2).log_probs
    score = plain(model.bundle, 16)
    expected = [score("Who?", "baker", [files[i] for i in row], turns)[0] for row in rows]
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-3)
    assert abs(expected[0] - expected[1]) > 0.01


def test_a_worked_example_is_an_earlier_turn_of_the_conversation(tiny_folder, tiny_model, family_folder):
    turns = [("What is this?", "a pear", 1)]
    said = "USER: <image>\nWhat is this? ASSISTANT: a pear"
    assert tiny_model.processor.prompt("Who?", 1, turns) == f"{said} USER: <image>\nWho? ASSISTANT:"
    fallback = Processor(tiny_folder, tiny_model.config)
    fallback.chat_template = None  # as LLaVA-1.5 was trained: each answer ends with an end-of-sequence token
    assert fallback.prompt("Who?", 1, turns) == f"{said}</s>USER: <image>\nWho? ASSISTANT:"
    folder = family_folder("qwen2_vl")
    qwen = Processor(folder, hf.read_config(folder)[0].Config.from_hf(hf.read_config(folder)[1]))
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
        assert len(places) == sum(each)  # tokens of one image, text, tokens of the other
        assert np.flatnonzero(np.diff(places) > 1).tolist() == [each[0] - 1]
        assert processor.tokenizer.decode(answer).strip().startswith("Bob") and answer[-1] == processor.eos_ids[0]
        assert (prompt, answer) == processor.encode_each("Who?", [None, "Ann", "Bob"], images, turns)[2]
        assert prompt == processor.encode("Who?", None, images, turns)[0]


def test_scores_after_a_worked_example_match_the_whole_conversation(tiny_model, ask, plainly):
    turns = [[("What is it?", "a pear", 1)], [("What is it?", "a judge", 1)]]
    files = [png(i) for i in range(3)]
    encoded_images = ask(7).encode_images([[files[0], files[1]], [files[2], files[0]]])
    assert len(encoded_images.shapes) == len(encoded_images.features.values) == 3
    got = ask(7).score(["Who?", "Which one?"], [["baker", "a pilot"], ["a judge"]], encoded_images, turns=turns)
    for i, question, pictures, text, j in ((0, "Who?", (0, 1), "baker", 0), (0, "Who?", (0, 1), "a pilot", 1),
                                           (1, "Which one?", (2, 0), "a judge", 0)):  # fmt: skip
        expected, count = plainly(question, text, [files[k] for k in pictures], turns[i])
        np.testing.assert_allclose(got.log_probs[i, j], expected, atol=2e-4)
        assert got.counts[i, j] == count
    swapped = ask(7).score(["Who?"], [["baker"]], encoded_images.for_prompts([[1, 0]]), turns=turns[:1])
    assert abs(swapped.log_probs[0, 0] - got.log_probs[0, 0]) > 1e-6


@pytest.mark.parametrize("shards", [1, 2])
def test_a_shared_prefix_is_computed_once(tiny_model, monkeypatch, shards):
    """Nine questions about three images in any order: answers and scores match those of single questions."""
    params = {k: v * (40 if k.startswith("projector/fc2") else 1) for k, v in tiny_model.params.items()}
    alone, beside = (Answerer(dataclasses.replace(tiny_model, params=params), batch_size=n) for n in (1, 6))
    beside.shards = shards  # as on a mesh: shards do not share prefixes
    batches, made = [], Answerer._batches
    monkeypatch.setattr(Answerer, "_batches", lambda self, *args: batches.append([*made(self, *args)]) or batches[-1])
    questions = [f"Question {i}: who is{' this' * (i % 4)}?" for i in range(9)]
    shown = [
        [3, i] for i in (2, 0, 1, 0, 2, 0, 1, 1, 0)
    ]  # the first image is that of the worked example, the same for all ...
    encoded_images = alone.encode_images([png(i) for i in range(4)]).for_prompts(shown)
    turns = [
        [("What is it?", "a pear" if i < 8 else "a judge", 1)] for i in range(9)
    ]  # ... with another text for the last
    each = [([questions[i]], encoded_images.select([i]), turns[i : i + 1]) for i in range(9)]
    expected = [alone.generate(*row, max_new_tokens=4, turns=turn)[0] for *row, turn in each]
    scores = [alone.score(row, [OPTIONS], picture, turns=turn).log_probs[0] for row, picture, turn in each]
    assert not any(shared for found in batches for *_, shared in found) and len(set(expected)) > 2
    batches.clear()
    assert beside.generate(questions, encoded_images, max_new_tokens=4, turns=turns) == expected
    np.testing.assert_allclose(
        beside.score(questions, [OPTIONS] * 9, encoded_images, turns=turns).log_probs, scores, atol=2e-4
    )
    for found in batches:  # equal prefixes are adjacent and in order; the last row fills the last batch
        assert [rows.tolist() for rows, *_ in found] == [[0, 4, 1, 3, 5, 2], [6, 7, 8, 8, 8, 8]]
        for _, tokens, _, features, shared in found:
            assert len(features.values) == len(shared.tokens) == {1: 3, 2: 4}[shards]
            assert shared.prefix_index.shape == (shards, 6 // shards)
            assert not (tokens == tiny_model.config.image_token_id).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_continue_after_a_shared_image_of_any_size(family, family_folder, monkeypatch):
    folder = family_folder(family)
    graphdef, params, config = hf.load(folder)
    alone, beside = (
        Answerer(ModelBundle(graphdef, params, config, Processor(folder, config), None), batch_size=n) for n in (1, 4)
    )
    shared, made = [], Answerer._batches
    monkeypatch.setattr(Answerer, "_batches", lambda self, *args: shared.append([*made(self, *args)]) or shared[-1])
    files = [png(0), Image.fromarray(np.random.default_rng(9).integers(0, 256, (61, 90, 3), np.uint8))]
    encoded_images, questions = (
        alone.encode_images([files[i] for i in (0, 1, 1, 0)]),
        ["Who?", "Where is it?", "Who?", "What?"],
    )
    expected = alone.score(questions, [OPTIONS[:2]] * 4, encoded_images).log_probs
    np.testing.assert_allclose(
        beside.score(questions, [OPTIONS[:2]] * 4, encoded_images).log_probs, expected, atol=1e-3
    )
    assert [bool(batch[-1]) for found in shared for batch in found] == [False] * 4 + [True]
    assert abs(expected[0] - expected[3]).max() > 0.01


# NaN and infinity.


@pytest.fixture(scope="module")
def too_large(tiny_model):
    """A model of finite weights whose computation overflows."""
    params = {path: x * 1e30 if path.startswith("projector/") else x for path, x in tiny_model.params.items()}
    for path in ("language_model/norm/scale", "language_model/head/kernel"):
        params[path] = params[path] * 1e30
    return Answerer(dataclasses.replace(tiny_model, params=params), batch_size=3)


@pytest.mark.parametrize(
    ("measure", "what"),
    [
        (lambda model: model.generate(["Who is this?"] * 2), "The model's scores of the next token"),
        (lambda model: model.generate(["Who?", "Which?"], model.encode_images([png(0), png(1)])), "features of images"),
        (lambda model: model.score(["Who is this?"], [OPTIONS]), "The model's scores of texts"),
        (lambda model: model.score(["Who?", "Which?"], [OPTIONS[:1], OPTIONS]), "The model's scores of texts"),
        (lambda model: model.score_tokens(["Who is this?"], [OPTIONS[0]]), "The model's scores of tokens"),
        (lambda model: model.means([png(0), png(1)]), "The model's features of images"),
    ],
    ids=["answer", "answer about an image", "options", "unequally many options", "tokens", "features"],
)
def test_scores_that_are_not_finite_decide_nothing(too_large, measure, what):
    with pytest.raises(NotFinite, match=f"{what} are NaN or infinite"):
        measure(too_large)


def weights(change, *paths):
    """A function that changes the weights whose paths begin so."""
    return lambda params: {path: change(x) if path.startswith(paths) else x for path, x in params.items()}


def zeros(x):
    return x * 0


BLOCK = "language_model/blocks/"
BROKEN = {  # finite weights with which no answer depends on the image, or on anything
    "projector of 1e30": weights(lambda x: x * 1e30, "projector/"),
    "second layer of the projector of 1e30": weights(lambda x: x * 1e30, "projector/fc2"),
    "tower block of 1e38": weights(lambda x: jnp.full_like(x, 1e38), "vision_tower/blocks/0/mlp"),
    "tower block of 1e25": weights(lambda x: x * 1e25, "vision_tower/blocks/0/mlp/fc2"),
    "embedding of 1e30": weights(lambda x: x * 1e30, "language_model/embed/"),
    "embedding of 1e38": weights(lambda x: jnp.full_like(x, 3e38), "language_model/embed/"),
    "decoder of 1e25": weights(lambda x: x * 1e25, f"{BLOCK}mlp/down"),
    "attention of 1e30": weights(lambda x: x * 1e30, f"{BLOCK}attn/o"),
    "projector of zeros": weights(zeros, "projector/"),
    "tower of zeros": weights(zeros, "vision_tower/pre_norm", "vision_tower/blocks"),
    "final norm of zeros": weights(zeros, "language_model/norm"),
    "head of zeros": weights(zeros, "language_model/head"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BROKEN)
def test_finite_weights_of_no_use_give_no_figure(ask_in, name, dtype):
    model = ask_in(dtype)
    assert set(model.bundle.params) == set(BROKEN[name](model.bundle.params))
    broken = copy.copy(model)
    broken.bundle = dataclasses.replace(model.bundle, params=BROKEN[name](model.bundle.params))
    with pytest.raises(NotFinite, match="NaN or infinite, or the same for every input, although the weights are"):
        broken.score(["Who is this?"] * 2, [OPTIONS[:2]] * 2, broken.encode_images([png(0), png(1)]))


def test_a_tower_that_is_blind_by_overflow_answers_nothing_about_one_image(tiny_model):
    params = weights(lambda x: x * 1e20, "vision_tower/patch_embedding")(tiny_model.params)
    assert any((params[path] != x).any() for path, x in tiny_model.params.items())
    with pytest.raises(NotFinite, match="or the same for every input"):
        Answerer(dataclasses.replace(tiny_model, params=params), batch_size=1).encode_images([png(0)])


@pytest.fixture(scope="module")
def ask_in(tiny_model):
    """A function of a dtype to a model that computes in it."""

    @functools.cache
    def make(dtype):
        graphdef, _ = split_model(
            llava.Llava(dataclasses.replace(tiny_model.config, compute_dtype=dtype), rngs=nnx.Rngs(0))
        )
        params = {path: x.astype(dtype) for path, x in tiny_model.params.items()}
        return Answerer(dataclasses.replace(tiny_model, graphdef=graphdef, params=params), batch_size=2)

    return make


def test_a_sound_model_passes_the_checks(ask_in):
    """Copies of one image have the same features, and an image alone has nothing that it could differ from."""
    for dtype in ("float32", "bfloat16"):
        model = ask_in(dtype)
        for images in ([png(0), png(1)], [png(0), Image.open(io.BytesIO(png(0)))], [png(0)]):
            assert np.isfinite(model.encode_images(images).features.values).all()
    assert np.isfinite(model.score(["Who?"] * 2, [["a judge", "baker"]] * 2).log_probs).all()


# Sizes that data decides.


def test_many_texts_are_scored_in_chunks_of_bounded_size(ask, monkeypatch):
    model, shapes = ask(2), []
    questions = ["Who is this?", "Which?", "What?"]
    texts = [["x", *map(str, range(50))], ["a judge"], ["baker", "pilot"]]
    images = model.encode_images([png(0), png(1), png(0)])
    whole = model.score(questions, texts, images)
    monkeypatch.setattr(inference, "TEXT_BYTES", 2 * 4 * 40 * model.config.text.vocab)
    monkeypatch.setattr(Answerer, "_put", lambda self, arrays: shapes.append(arrays[3].shape) or arrays)
    chunked = model.score(questions, texts, images)
    assert len(shapes) > 3
    assert all(o * a * model.config.text.vocab * 4 * 2 <= inference.TEXT_BYTES for _, o, a in shapes)
    np.testing.assert_array_equal(chunked.counts, whole.counts)
    np.testing.assert_allclose(chunked.log_probs, whole.log_probs, atol=1e-4)


@pytest.mark.parametrize(
    ("measure", "subject"),
    [
        (lambda model: model.score(["Who?"], [["x " * 40]]), "questions"),
        (lambda model: model.score(["Who? " * 20], [["x"]]), "questions"),
        (lambda model: model.generate(["Who?"], max_new_tokens=100), "questions"),
        (lambda model: model.score_tokens(["Who?"], ["x " * 40]), "questions"),
        (lambda model: model.encode_images([png(0)]), "images"),
        (lambda model: model.means([png(0)]), "images"),
    ],
    ids=["text", "question", "answer", "tokens", "image", "means"],
)
def test_batches_that_exceed_the_memory_are_refused(ask, monkeypatch, measure, subject):
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 10_000)
    with pytest.raises(
        UserError, match=rf"the model and batches of 2 {subject} need .* GiB of memory.*eval.batch_size"
    ):
        measure(ask(2))


@pytest.mark.parametrize(
    ("question", "answers", "problem"),
    [
        ("word " * 300, ["x"], r"row 7 \('word word .*\.\.\.'\): its \d+ tokens and \d+ for the answer exceed"),
        ("What is <image> here?", ["x"], r"row 7 \('What is <image> here\?'\): a text contains <image>"),
        ("Who?", ["x", "<image>"], r"row 7 \('Who\?'\): a text contains <image>"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(ask, question, answers, problem):
    example = Example("7", "", None, "", question, answers[0])
    names = ["row 6", example.label]
    with pytest.raises(UserError, match=problem):
        ask(2).score(["Who?", question], [["x"], answers], names=names)
    if answers == ["x"]:
        with pytest.raises(UserError, match=problem):
            ask(2).generate(["Who?", question], names=names)


@pytest.mark.parametrize(
    ("questions", "answers", "problem"),
    [
        (
            ("Who is this?", "Who?"),
            ("x", "y " * 300),
            r"row 2: its answer of \d+ tokens, beside .* \d+ tokens \(row 1\),",
        ),
        (
            ("Who is it? " * 99, "Who?"),
            ("x", "y y"),
            r"row 1: its prompt of \d+ tokens, beside .* \d+ tokens \(row 2\),",
        ),
        (("Who?", "Who is this?"), ("x", "y " * 300), r"row 2: its \d+ tokens and \d+ for the answer"),
    ],
)
def test_the_longest_answer_is_named_beside_the_longest_prompt(ask, questions, answers, problem):
    for measure in (lambda **names: ask(2).score(questions, [[text] for text in answers], **names),
                    lambda **names: ask(2).score_tokens(questions, answers, **names)):  # fmt: skip
        with pytest.raises(UserError, match=f"{problem} exceed the model's .*; shorten it"):
            measure(names=["row 1", "row 2"])


@pytest.mark.parametrize("values", [[np.nan, 0, 0], [0, np.inf, 0], [-np.inf] * 3, [np.nan] * 3, [0.5] * 3])
def test_logits_that_are_not_finite_choose_no_token(values):
    logits = jnp.array([[0.0, 2.0, 1.0], values, [-np.inf, 0.5, -1.0]])
    np.testing.assert_array_equal(generate._most_probable(logits), [1, generate.NOT_FINITE, 1])
