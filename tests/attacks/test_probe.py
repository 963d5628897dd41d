"""The linear probe and the leak attack: choice of images and answers, and the predictions of the classifier."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vkd_jax import attacks
from vkd_jax.attacks import probe
from vkd_jax.attacks.base import Subject
from vkd_jax.attacks.leak import Leak
from vkd_jax.attacks.probe import Probe, classify, split
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.schema import RunConfig
from vkd_jax.types import Example, UserError


def clouds(people, pictures, width=12, noise=0.3, seed=0):
    """Points around one center per person, [people * pictures, width], and their labels."""
    centers = np.random.default_rng(7).normal(size=(people, width)) * np.logspace(-2, 3, width)
    jitter = np.random.default_rng(seed).normal(size=(pictures, people, width)) * np.logspace(-2, 3, width) * noise
    return (centers + jitter).reshape(-1, width), np.tile([f"{i:03d}" for i in range(people)], pictures)


def test_the_probe_solves_the_normal_equations_of_ridge_regression():
    (x, labels), (test, _) = clouds(4, 6), clouds(4, 5, noise=2.0, seed=1)
    z, t = ((part - x.mean(0)) / x.std(0) for part in (x, test))
    names = np.unique(labels)
    y = (labels[:, None] == names).astype(float)
    w = np.linalg.solve(z.T @ z + 0.1 * 12 * np.eye(12), z.T @ (y - y.mean(0)))
    expected = names[np.argmax(y.mean(0) + t @ w, axis=1)]
    assert classify(x, labels, test, 0.1).tolist() == expected.tolist()
    assert len(set(expected)) > 1
    # Two people on a line, at -1 and 1: the nearer one is predicted.
    assert classify(np.array([[-1.0], [1.0]]), np.array(["a", "b"]), np.array([[-0.1], [0.2]]), 1.0).tolist() == [
        "a",
        "b",
    ]


def test_the_probe_identifies_people_independent_of_feature_scales():
    (x, labels), (test, truth) = clouds(10, 8), clouds(10, 4, seed=1)
    constant = np.full((len(x), 1), 5.0)
    got = classify(np.hstack([x, constant]), labels, np.hstack([test, constant[: len(test)]]), 0.01)
    assert (got == truth).mean() > 0.95
    assert (classify(x.astype(np.float32), labels, test.astype(np.float32), 0.01) == got).all()


def test_with_random_labels_the_probe_is_at_chance():
    (x, labels), (test, truth) = clouds(10, 8), clouds(10, 4, seed=1)
    shares = [
        (classify(x, np.random.default_rng(s).permutation(labels), test, 0.01) == truth).mean() for s in range(20)
    ]
    assert abs(np.mean(shares) - 0.1) < 0.06


# ---- Choice of images ----


def shown(part, person, picture, question=0, data=None):
    name = f"{part}/{person}/{picture}"
    return Example(f"{name}/{question}", person, data or f"{person} {picture} {part}".encode(), name, "Who?", "x")


def sets(people="abcd", forgotten="a", pictures=4):
    """Two questions per image, a text-only question per person, and an image of no person."""

    def asked(part, whom, numbers):
        pairs = [shown(part, p, n, q) for p in whom for n in numbers for q in range(2)]
        alone = [dataclasses.replace(shown(part, p, 0), image=None, image_id="") for p in whom]
        return [*pairs, *alone, dataclasses.replace(shown(part, "z", 0), person="")]

    kept = [p for p in people if p not in forgotten]
    return {
        "forget": asked("forget", forgotten, range(pictures)),
        "test": asked("test", forgotten, range(2)),
        "retain": asked("retain", kept, range(pictures)),
        "retain_test": asked("retain_test", [*kept, "stranger"], range(2)),
        "real": asked("real", kept, range(2)),
    }


def test_the_probe_trains_on_all_people_and_is_tested_on_other_images():
    train, test = split(sets(), Mllmu.EVAL_SETS)
    assert [(part, e.image_id) for part, e in train] == [
        *(("forget", f"forget/a/{n}") for n in range(4)),
        *(("retain", f"retain/{p}/{n}") for p in "bcd" for n in range(4)),
    ]
    assert [(part, e.image_id) for part, e in test] == [
        *(("test", f"test/a/{n}") for n in range(2)),
        *(("retain_test", f"retain_test/{p}/{n}") for p in "bcd" for n in range(2)),
    ]


def test_without_holdout_images_every_fourth_image_is_a_test_image():
    asked = {name: part for name, part in sets(pictures=8).items() if name in ("forget", "retain")}
    train, test = split(asked, Mllmu.EVAL_SETS)
    assert [(part, e.image_id) for part, e in test] == [("forget", "forget/a/3"), ("forget", "forget/a/7")]
    assert not {e.image_id for _, e in train} & {e.image_id for _, e in test} and len(train) == 6 + 3 * 8
    few = {"forget": asked["forget"][:2], "retain": asked["retain"]}
    assert split(few, Mllmu.EVAL_SETS)[1] == []


class Reader:
    """An answerer whose features identify the people that it knows; its projector gives noise."""

    def __init__(self, blind=""):
        self.blind, self.read = blind, []

    def means(self, files):
        self.read.append(list(files))
        names = [data.decode().split()[0] for data in files]
        noise = np.random.default_rng(0).normal(size=(len(files), 4)) * 0.1
        features = np.eye(4)[["abcd".index(n) if n not in self.blind else 3 for n in names]] + noise
        return {"features": features, "projector": noise}


@pytest.fixture(autouse=True)
def readers_answer(monkeypatch):
    """A Reader takes the place of an Answerer."""
    answerer = probe.Answerer
    monkeypatch.setattr(
        probe, "Answerer", lambda model, **options: model if isinstance(model, Reader) else answerer(model, **options)
    )


def subject(model, asked, answers=(), **more):
    config = RunConfig()
    return Subject("unlearned", model, asked, Mllmu.EVAL_SETS, answers, [], [], config, None, None, **more)


def test_each_image_is_encoded_once_and_its_person_predicted():
    reader = Reader()
    got = Probe().run(subject(reader, sets()))
    (files,) = reader.read
    assert len(files) == len(set(files)) == 16 + 8
    cells = Probe().summarize({"unlearned": got})
    assert [(cell.variant, cell.set) for cell in cells] == [
        (variant, name) for variant in ("features", "projector", "random_labels") for name in ("test", "retain_test")
    ]
    assert [(cell.correct, cell.n, cell.people) for cell in cells[:2]] == [(2, 2, 1), (6, 6, 3)]
    assert got[0] == {
        "variant": "features", "set": "test", "id": "test/a/0", "person": "a", "prediction": "a", "correct": True,
    }  # fmt: skip
    forgotten, *_ = Probe().summarize({"unlearned": Probe().run(subject(Reader(blind="a"), sets()))})
    assert (forgotten.variant, forgotten.set) == ("features", "test") and forgotten.mean < 1
    assert got == Probe().run(subject(Reader(), sets()))  # deterministic


def test_random_labels_depend_on_attacks_seed_only():
    def dealt(seed, of_the_run=0):
        config = RunConfig().override(f"attacks.seed={seed} seed={of_the_run}")
        attacked = dataclasses.replace(subject(Reader(), sets(pictures=8)), config=config)
        return tuple(r["prediction"] for r in Probe().run(attacked))

    assert len({dealt(seed) for seed in range(4)}) > 1 and len({dealt(0, seed) for seed in range(4)}) == 1


def test_without_test_images_no_image_is_encoded():
    reader = Reader()
    assert Probe().run(subject(reader, {"forget": sets()["forget"][:2]})) == [] == reader.read


def test_a_zero_penalty_is_rejected():
    with pytest.raises(UserError, match="attacks.probe.ridge"):
        Probe(ridge=0).check(None)
    Probe().check(None)


# ---- A model ----


def test_means_are_over_valid_tokens(family_folder):
    """Two images of different sizes; the smaller one is padded."""
    from vkd_jax.checkpoints import hf
    from vkd_jax.data.processor import Processor
    from vkd_jax.evaluation.inference import Answerer

    folder = family_folder("qwen2_vl")
    graphdef, params, config = hf.load(folder)
    model = Answerer(ModelBundle(graphdef, params, config, Processor(folder, config), None), batch_size=2)
    pixels = [
        np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i, shape in enumerate([(56, 56, 3), (61, 90, 3)])
    ]
    files = [Image.fromarray(x) for x in pixels]
    got = model.means(files)
    assert {name: value.shape for name, value in got.items()} == {"features": (2, 32), "projector": (2, 48)}
    for i, file in enumerate(files):
        (values,), (where,) = model.encode_images([file]).features
        real = values[where[:, 0] >= 0]
        np.testing.assert_allclose(got["projector"][i], real.mean(0), atol=1e-4)
        assert len(real) == (4, 6)[i]
        np.testing.assert_allclose(got["features"][i], model.means([file])["features"][0], atol=1e-4)
    assert np.abs(got["features"][0] - got["features"][1]).max() > 1e-3


def test_probe_and_leak_of_a_model(tiny_model):
    def png(part, person, picture):
        stream = io.BytesIO()
        pixels = np.random.default_rng([person, picture, len(part)]).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(stream, "png")
        return shown(part, f"{person}", picture, data=stream.getvalue())

    whom = {"forget": [0], "test": [0], "retain": [1, 2], "retain_test": [1, 2]}
    asked = {part: [png(part, person, i) for person in people for i in range(3)] for part, people in whom.items()}
    answers = [answer(part, i, "classification", "qa") for i, part in enumerate(("forget", "test", "retain"))]
    model = dataclasses.replace(subject(tiny_model, asked, answers), mesh=tiny_model.mesh)
    got = attacks.create("probe", {}).run(model)
    assert [r["id"] for r in got if (r["variant"], r["set"]) == ("features", "test")] == [
        f"test/0/{i}" for i in range(3)
    ]
    assert {r["prediction"] for r in got} <= {"0", "1", "2"} and len(got) == 3 * 9
    assert len(attacks.create("leak", {}).run(model)) == 2


# ---- Text-only questions ----


def answer(part, number, task, modality, protocol="options", correct=True):
    return {
        "set": part, "id": f"{part}/{number}", "person": "a", "task": task, "modality": modality,
        "protocol": protocol if task == "classification" else task, "correct": correct, "question": "?",
    }  # fmt: skip


def test_a_leak_counts_text_only_answers_about_the_people_to_forget():
    answers = [
        answer(part, number, task, modality, protocol, correct=part == "forget")
        for part in ("forget", "test", "retain", "real")
        for number, (task, modality) in enumerate(
            (t, m) for t in ("generation", "classification", "cloze") for m in ("vqa", "qa")
        )
        for protocol in (("options", "letter") if task == "classification" else ("",))
    ]
    got = Leak().run(subject(None, {}, answers))
    assert got == [
        {"variant": variant, "set": part, "id": f"{part}/{number}", "person": "a", "correct": part == "forget"}
        for variant, number in (("qa", 3), ("cloze_qa", 5), ("generation_qa", 1))
        for part in ("forget", "test")
    ]
    cells = Leak().summarize({"unlearned": got, "vanilla": got[:1]})
    assert [(c.model, c.variant, c.set, c.correct, c.n) for c in cells] == [
        *(("unlearned", kind, "", 1, 2) for kind in Leak.VARIANTS),
        ("vanilla", "qa", "", 1, 1),
    ]
    assert Leak().run(subject(None, {}, [answer("forget", 0, "classification", "vqa")])) == []
    Leak().check(None)
