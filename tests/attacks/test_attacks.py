"""Code shared by attacks, and the attacks that change weights, images or prompts."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import attacks, methods
from vkd_jax.attacks import base, rephrase
from vkd_jax.attacks.base import Subject
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.checkpoints import hf
from vkd_jax.config.schema import EvalConfig, RunConfig
from vkd_jax.data.images import open_image
from vkd_jax.evaluation import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.models import lora, quantize
from vkd_jax.types import Example, Role, UserError

JOBS = ("baker", "pilot", "judge", "nurse")


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "png")
    return stream.getvalue()


def example(number, picture=None, options=JOBS):
    image = None if picture is None else png(np.random.default_rng(picture).integers(0, 256, (20, 24, 3)))
    return Example(
        id=str(number),
        person=f"{number % 3:03d}",
        image=image,
        image_id="" if picture is None else f"picture/{picture}",
        question=f"Question {number}: what is the job?",
        answer=JOBS[number % 4],
        options=options,
        task="classification" if options else "cloze",
    )


@pytest.fixture(scope="module")
def asked():
    """Questions that share images, with text-only questions and questions without options among them."""
    forget = [example(i, picture=i % 3) for i in range(6)] + [example(6), example(7, picture=0, options=())]
    test = [example(10 + i, picture=5) for i in range(3)]
    return {"forget": forget, "test": test, "retain": [example(20 + i, picture=6 + i) for i in range(4)]}


@pytest.fixture(scope="module")
def subject(tiny_model, asked, tmp_path_factory):
    config = RunConfig(eval=EvalConfig(batch_size=8, max_new_tokens=3))
    answers = evaluate.evaluate(
        Answerer(tiny_model, batch_size=8), asked, EvalConfig(protocol="options", max_new_tokens=3)
    )
    folder = tmp_path_factory.mktemp("scratch")
    return Subject(
        "unlearned", tiny_model, asked, Mllmu.EVAL_SETS, answers, asked["forget"], [], config, tiny_model.mesh, folder
    )


def changed(subject, **fields):
    """The subject with other parameters."""
    return dataclasses.replace(subject, model=dataclasses.replace(subject.model, **fields))


# Shared code.


def test_attacks_ask_questions_with_options_and_an_image(subject, asked):
    sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT, Role.GENERAL)
    assert {name: [e.id for e in part] for name, part in sets.items()} == {
        "forget": ["0", "1", "2", "3", "4", "5"],
        "test": ["10", "11", "12"],
    }


def test_answers_of_the_evaluation_are_reused(subject):
    sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)
    records = subject.unattacked(sets)
    assert [id(record) for record in records] == [
        id(r) for r in subject.answers if r["set"] != "retain" and r["modality"] == "vqa" and r["options"]
    ]
    for ours, theirs in zip(records, subject.ask_sets(subject.model, sets), strict=True):
        assert base.attack_record("", ours) == base.attack_record("", theirs)
        np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)


@pytest.mark.parametrize("change", ["one is missing", "after a worked example", "by another protocol"])
def test_questions_that_were_asked_differently_are_asked_again(subject, change, monkeypatch):
    answers = [dict(record) for record in subject.answers]
    if change == "one is missing":
        answers = [r for r in answers if (r["set"], r["id"]) != ("test", "11")]
    elif change == "after a worked example":
        answers = [r | {"worked_example": "20"} for r in answers]
    else:
        answers = [r | {"protocol": "letter"} if r["options"] else r for r in answers]
    other = dataclasses.replace(subject, answers=answers)
    monkeypatch.setattr(Subject, "ask_sets", lambda self, model, sets: ["asked"])
    assert other.unattacked(base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)) == ["asked"]


def test_a_zero_adapter_keeps_its_kernel(subject):
    params = subject.model.params
    attached = lora.attach(params, rank=2, alpha=4.0, dropout=0.0, seed=0)
    plain = base.merged(attached)
    assert plain.keys() == params.keys()
    assert all(plain[path] is value for path, value in params.items())


@pytest.mark.parametrize("text", ["", "int8"])
def test_an_adapter_is_added_to_its_kernel(subject, text):
    how = quantize.parse(text)
    params = {p: quantize.quantize_param(p, x, how) if how else x for p, x in subject.model.params.items()}
    attached = lora.attach(params, rank=2, alpha=4.0, dropout=0.5, seed=0)
    path = "language_model/blocks/mlp/up/kernel"
    attached[f"{path}/lora_b"] = jnp.asarray(np.random.default_rng(0).normal(size=attached[f"{path}/lora_b"].shape))
    plain = base.merged(attached)
    a, b = (np.asarray(attached[f"{path}/lora_{name}"]) for name in "ab")
    wanted = np.asarray(quantize.dequantize(params[path], jnp.float32)) + 2.0 * np.einsum("ldr,lrf->ldf", a, b)
    np.testing.assert_allclose(plain[path], wanted, rtol=1e-5, atol=1e-6)
    rest = [other for other in params if other != path]
    assert all(plain[other] is params[other] for other in rest)


# Quantization.


def test_rounding_matches_values_by_hand():
    """By output channel; in groups of two inputs; and a patch of 2 x 2 pixels as one input."""
    rows = [[1.0, -4.0], [0.3, 2.0], [-0.5, 0.02], [0.11, 0.01]]
    path = "projector/fc1/kernel"
    eight = quantize.round_param(path, jnp.array(rows), quantize.parse("int8"))
    # 1 and -4 are at 127.5 steps, and 127 is the largest. -0.5 is at 63.75 steps, 0.3 at 38.25, 0.11 at 14.03.
    steps = np.array([[127, -127], [38, 64], [-64, 1], [14, 0]])
    np.testing.assert_allclose(eight, steps * np.array([1, 4]) / 127.5, rtol=1e-6)
    four = quantize.round_param(path, jnp.array(rows), quantize.parse("int4:2"))
    steps = np.array([[7, -7], [2, 4], [-7, 7], [2, 4]])  # of 1 / 7.5, 4 / 7.5, then of 0.5 / 7.5, 0.02 / 7.5
    scale = np.array([[1, 4], [1, 4], [0.5, 0.02], [0.5, 0.02]]) / 7.5
    np.testing.assert_allclose(four, steps * scale, rtol=1e-6)
    patch = jnp.array(rows).reshape(2, 2, 1, 2)
    np.testing.assert_array_equal(
        quantize.round_param("vision_tower/patch_embedding", patch, quantize.parse("int8")), eight.reshape(2, 2, 1, 2)
    )


def test_a_token_table_is_rounded_by_row_also_to_four_bits():
    table = jnp.array([[1.0, 0.3, -0.5], [-4.0, 2.0, 0.02]])
    four = quantize.round_param("language_model/embed/embedding", table, quantize.parse("int4"))
    np.testing.assert_allclose(four, np.array([[7, 2, -4], [-7, 4, 0]]) * np.array([[1], [4]]) / 7.5, rtol=1e-6)


KEPT = ("bias", "scale", "position_embedding", "class_embedding", "projector/newline")


@pytest.mark.parametrize(("text", "levels"), [("int8", 256), ("int4:8", 16)])
def test_all_weight_matrices_are_rounded_and_nothing_else(subject, text, levels):
    params = subject.model.params
    rounded = attacks.create("quantize", {}).rounded(subject.model, text).params
    assert rounded.keys() == params.keys()
    for path, value in params.items():
        if path.endswith(KEPT):
            assert rounded[path] is value
            continue
        assert (rounded[path] != value).any() and rounded[path].dtype == value.dtype, path
        assert rounded[path].sharding == value.sharding
        columns = np.asarray(rounded[path]).reshape(-1, value.shape[-1])[: 8 if text == "int4:8" else None]
        if value.ndim != 3 and "embed/" not in path:
            assert max(len(np.unique(column)) for column in columns.T) <= levels


@pytest.mark.parametrize(
    "family", ["gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "llava_next"]
)
def test_all_matrices_of_other_families_are_rounded(family_folder, family, monkeypatch):
    _, params, _ = hf.load(family_folder(family), dtype="bfloat16")
    monkeypatch.setattr(quantize, "_round", lambda array, *how: -array)
    for path, value in params.items():
        assert (quantize.round_param(path, value, quantize.parse("int4:64")) is value) == path.endswith(KEPT), path


def test_quantized_weights_are_not_rounded_again(subject, monkeypatch):
    monkeypatch.setattr(quantize, "_round", lambda array, *how: -array)
    how = quantize.parse("int8")
    params = {path: quantize.quantize_param(path, x, how) for path, x in subject.model.params.items()}
    frozen = changed(subject, params=params)
    rounded = attacks.create("quantize", {}).rounded(frozen.model, "int4:8").params
    for path, value in params.items():
        assert (rounded[path] is value) == (quantize.is_quantized(path) or path.endswith(KEPT)), path


def test_a_group_size_that_does_not_divide_the_channels_is_rejected(subject):
    prime = changed(subject, params={"projector/fc1/kernel": jnp.ones((23, 2))}).model
    with pytest.raises(UserError, match=r"attacks.quantize.bits: int4:8 does not fit this model .*23 channels"):
        attacks.create("quantize", {}).rounded(prime, "int4:8")


# Images.


def rgb(values):
    """A gray image."""
    return Image.fromarray(np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1))


def change(name, image, seed=0, **fields):
    attack = attacks.create("rephrase", fields)
    out = attack.changes()[name](image, np.random.default_rng(seed))
    assert out.mode == "RGB" and out.size == image.size
    return np.asarray(out)


def test_brightness_and_contrast_by_hand():
    values = np.array([[100, 200, 20, 0]] * 4)  # of mean 80
    np.testing.assert_array_equal(change("brightness", rgb(values))[..., 0], [[85, 170, 17, 0]] * 4)
    np.testing.assert_array_equal(change("contrast", rgb(values))[..., 1], [[97, 182, 29, 12]] * 4)


def test_noise_has_its_deviation_and_stays_in_range():
    gray = rgb(np.full((64, 64), 100))
    noise = change("noise", gray) - 100.0
    assert noise.std() == pytest.approx(0.02 * 255, rel=0.05) and abs(noise.mean()) < 0.2
    assert len({tuple(pixel) for pixel in noise[0]}) > 30  # channels differ
    np.testing.assert_array_equal(change("noise", gray, noise=0.0), np.asarray(gray))
    assert change("noise", rgb(np.full((8, 8), 255))).max() == 255


def test_resize_interpolates_between_pixels():
    """Blocks of 2 x 2 equal pixels: half the size keeps the blocks, a quarter averages them."""
    blocks = np.kron([[0, 240], [240, 0]], np.ones((2, 2)))
    coarse = change("resize", rgb(blocks))
    assert coarse[0, 0, 0] < coarse[0, 1, 0] < coarse[0, 2, 0]  # interpolated between blocks
    np.testing.assert_array_equal(change("resize", rgb(blocks), resize=0.25), np.full((4, 4, 3), 120))
    np.testing.assert_array_equal(change("resize", rgb(blocks), resize=1.0)[..., 0], blocks)


def test_the_center_is_cropped_and_enlarged():
    frame = np.full((20, 20), 200)
    frame[1:-1, 1:-1] = 50  # 90 % of each side
    assert (change("crop", rgb(frame)) == 50).all()
    assert (change("crop", rgb(frame), crop=1.0)[..., 0] == frame).all()


def test_blur_spreads_a_point_and_keeps_a_constant_image():
    point = np.zeros((21, 21))
    point[10, 10] = 255
    blurred = change("blur", rgb(point), blur=0.1).astype(float)
    assert 0 < blurred[10, 10, 0] < 255 and blurred[10, 12, 0] == blurred[12, 10, 0] > 0
    assert (change("blur", rgb(np.full((8, 8), 70))) == 70).all()


def test_a_square_is_covered_at_a_random_position():
    corners = set()
    for seed in range(8):
        out = change("occlusion", rgb(np.zeros((8, 12))), seed=seed)[..., 0]
        ys, xs = np.nonzero(out)
        assert (out[ys, xs] == 128).all() and len(ys) == 4  # a quarter of 8
        assert np.ptp(ys) == np.ptp(xs) == 1
        corners.add((ys[0], xs[0]))
    assert len(corners) > 4
    assert (change("occlusion", rgb(np.zeros((8, 8))), occlusion=1.0) == 128).all()


def test_any_image_becomes_a_png_of_its_size():
    clear = io.BytesIO()
    Image.new("RGBA", (5, 3), (10, 20, 30, 9)).save(clear, "png")
    data = rephrase.changed(clear.getvalue(), lambda image, _: image, np.random.default_rng(0))
    image = open_image(data)
    assert data.startswith(b"\x89PNG") and image.size == (5, 3) and np.asarray(image)[0, 0].tolist() == [10, 20, 30]


# Whole attacks, from questions to summary.


def variants(name):
    if name == "quantize":
        return ["unchanged", "int8", "int4:64"]
    changes = "noise brightness contrast resize crop blur occlusion".split()
    return ["unchanged", *(changes if name == "rephrase" else attacks.create(name, {}).VARIANTS)]


@pytest.mark.parametrize("name", ["quantize", "rephrase", "prompts"])
def test_an_attack_answers_for_every_variant(subject, name, monkeypatch):
    attack = attacks.create(name, {})
    attack.check(subject.config)
    calls = []
    ask = Subject.ask_sets
    monkeypatch.setattr(
        Subject, "ask_sets", lambda self, model, sets: calls.append((model, sets)) or ask(self, model, sets)
    )
    records = attack.run(subject)
    assert list(dict.fromkeys(r["variant"] for r in records)) == variants(name)
    assert json.loads(json.dumps(records)) == records
    before = {(r["set"], r["id"]): r for r in subject.answers}
    for r in records:  # the true answer never changes
        plain = before[r["set"], r["id"]]
        assert (r["answer"], r["person"]) == (plain["answer"], plain["person"])
        assert r["correct"] == (r["prediction"] == r["answer"])
        if r["variant"].startswith("unchanged"):
            assert r["prediction"] == plain["prediction"]
    assert attack.run(subject) == records
    assert len(calls) == 2 * (len(attack.bits) if name == "quantize" else 1)  # unchanged questions were not asked again
    others = attack.run(dataclasses.replace(subject, config=reseeded(subject.config)))
    assert [r["id"] for r in others] == [r["id"] for r in records]
    cells = attack.summarize({"vanilla": records, "unlearned": records})
    assert list(dict.fromkeys(cell.variant for cell in cells)) == variants(name)
    cell = next(c for c in cells if (c.model, c.set, c.variant) == ("unlearned", "forget", variants(name)[-1]))
    forget = [r["correct"] for r in records if (r["variant"], r["set"]) == (variants(name)[-1], "forget")]
    assert cell.n == len(forget) and cell.correct == sum(forget) and cell.low <= cell.mean <= cell.high


def reseeded(config):
    return config.override(f"seed={config.seed + 1} attacks.seed={config.attacks.seed + 1}")


def test_questions_show_the_changed_images(subject, monkeypatch):
    """Random changes depend on attacks.seed, and never on the seed of the run."""

    def shown(config):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(Subject, "ask_sets", lambda self, model, sets: calls.append(sets) or [])
            attacks.create("rephrase", {}).run(dataclasses.replace(subject, config=config))
        (sets,) = calls
        return {name: {e.image_id: e.image for e in part} for name, part in sets.items()}

    found = shown(subject.config)
    ids = [image_id for part in found.values() for image_id in part]
    assert len(set(ids)) == len(ids) == 7 * 3
    for variant, change in attacks.create("rephrase", {}).changes().items():
        for e in base.choices(subject.asked["forget"]):
            generator = methods.base.rng(0, f"rephrase/{variant}/{e.image_id}")
            assert found[variant, "forget"][f"{e.image_id}/{variant}"] == rephrase.changed(e.image, change, generator)
    assert shown(subject.config.override("seed=1")) == found
    other = subject.config.override("attacks.seed=1")
    drawn = {variant for (variant, name), images in shown(other).items() if images != found[variant, name]}
    assert drawn == {"noise", "occlusion"}


def test_prompts_change_only_the_question(subject, monkeypatch):
    calls = []
    monkeypatch.setattr(Subject, "ask_sets", lambda self, model, sets: calls.append(sets) or [])
    attacks.create("prompts", {"prefix": "Now: {question}"}).run(subject)
    (sets,) = calls
    plain = base.choices(subject.asked["forget"])
    assert [e.question for e in sets["prefix", "forget"]] == [f"Now: {e.question}" for e in plain]
    assert [e.question for e in sets["affirmative", "forget"]] == [
        f"{e.question} Of course. The answer is:" for e in plain
    ]
    for part in sets.values():
        assert [dataclasses.replace(e, question="") for e in part] == [
            dataclasses.replace(e, question="") for e in plain
        ]


def test_a_prompt_that_is_too_long_is_named(subject):
    long = "Tell me, please, " * 20 + "{question}"
    with pytest.raises(UserError, match=r"attacks.prompts.role='Tell me.*too long: .*exceed the model's 128"):
        attacks.create("prompts", {"role": long}).run(subject)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("quantize", dict(bits=("int8", "int5")), r"attacks.quantize.bits: \('int8', 'int5'\) is not allowed. Give"),
        ("quantize", dict(bits=("",)), r"attacks.quantize.bits: \(''\,\) is not allowed"),
        ("rephrase", dict(noise=-0.1), "attacks.rephrase.noise: -0.1 is not allowed. Give a number of at least 0"),
        (
            "rephrase",
            dict(noise=1e30),
            "attacks.rephrase.noise: 1e[+]30 is not allowed. Give a number of at least 0 and at",
        ),
        ("rephrase", dict(brightness=1e30), "attacks.rephrase.brightness: "),
        ("rephrase", dict(contrast=1e30), "attacks.rephrase.contrast: "),
        ("rephrase", dict(blur=1e30), "attacks.rephrase.blur: "),
        ("rephrase", dict(crop=0.0), "attacks.rephrase.crop: 0.0 is"),
        ("rephrase", dict(resize=1.5), "attacks.rephrase.resize: 1.5 is"),
        ("rephrase", dict(occlusion=2.0), "attacks.rephrase.occlusion: 2.0 is"),
        ("rephrase", dict(blur=float("nan")), "attacks.rephrase.blur: nan is"),
        ("prompts", dict(role="You are an expert."), "attacks.prompts.role: 'You are an expert.' is not"),
        ("prompts", dict(prefix="{question}{question}"), "attacks.prompts.prefix: "),
    ],
)
def test_invalid_settings_are_rejected_before_the_run(subject, name, fields, message):
    with pytest.raises(UserError, match=message):
        attacks.create(name, fields).check(subject.config)


def test_extreme_strengths_are_allowed(subject):
    edge = dict(noise=0, brightness=1.5, contrast=0.0, resize=1, crop=1, blur=0, occlusion=0)
    attacks.create("rephrase", edge).check(subject.config)
    image = rgb(np.random.default_rng(0).integers(0, 256, (8, 8)))
    for name in ("noise", "resize", "crop", "blur", "occlusion"):
        np.testing.assert_array_equal(change(name, image, **edge), np.asarray(image))


def test_adapters_are_merged_before_weights_are_rounded(subject):
    """A model with newly initialized adapters answers like the model without them."""
    attached = lora.attach(subject.model.params, rank=2, alpha=4.0, dropout=0.5, seed=0)
    attack = attacks.create("quantize", {"bits": ("int8",)})
    assert attack.run(changed(subject, params=attached)) == attack.run(subject)
    assert jax.tree.leaves(attached)  # no array was donated
