"""Relearning: the questions of an attacker, the weights that it trains, and the recovery."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import attacks
from vkd_jax.attacks.base import Subject
from vkd_jax.attacks.finetuning import rows_of
from vkd_jax.attacks.lessons import attacker_rows, lessons, recovery
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.config.schema import EvalConfig, RunConfig
from vkd_jax.evaluation import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.models import lora, quantize
from vkd_jax.results import AttackResults
from vkd_jax.training import loop
from vkd_jax.types import Diverged, Example, NotFinite, UserError

NAMES = ("Anna Berg", "Otto Lindt", "Ulla Lopez")
SMALL = dict(shares=(0.1, 0.5), people=(), steps=(2,), batch_size=4)


def example(number, picture, options=NAMES, question="Who is this person?"):
    pixels = np.random.default_rng(picture).integers(0, 256, (16, 16, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    name = NAMES[picture % 3]
    return Example(
        str(number), name, stream.getvalue(), f"picture/{picture}", question, name, options, "classification"
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject(tiny_model, tmp_path_factory):
    """Ten questions to train on; those of the evaluation have other ids and another order of options."""
    forgets = [example(i, picture=i) for i in range(10)]
    asked = {
        "forget": [dataclasses.replace(e, id=f"asked/{e.id}", options=NAMES[::-1]) for e in forgets[:9]],
        "test": [example(20 + i, picture=30 + i) for i in range(3)],
    }
    config = RunConfig(eval=EvalConfig(batch_size=4, max_new_tokens=3))
    answers = evaluate.evaluate(
        Answerer(tiny_model, batch_size=4), asked, EvalConfig(protocol="options", max_new_tokens=3)
    )
    folder = tmp_path_factory.mktemp("scratch")
    return Subject(
        "unlearned", tiny_model, asked, Mllmu.EVAL_SETS, answers, forgets, [], config, tiny_model.mesh, folder
    )


def create(**fields):
    return attacks.create("relearn", SMALL | fields)


# Shares.


def test_a_larger_share_contains_the_smaller():
    shares = [set(attacker_rows(share, 216, seed=0)) for share in (0.05, 0.1, 0.2, 0.5)]
    assert [len(rows) for rows in shares] == [11, 22, 43, 108]
    assert all(smaller < larger for smaller, larger in zip(shares, shares[1:], strict=False))
    assert set().union(*shares) <= set(range(216))


def test_the_seed_draws_at_least_one_question():
    assert len(attacker_rows(0.05, 3, seed=0)) == 1
    drawn = [tuple(attacker_rows(0.2, 40, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_selected_rows_keep_their_images(subject):
    encoded = subject.model.encode(subject.forgets)
    some = rows_of(encoded, np.array([1, 4, 7]))
    assert len(some) == 3 and [e.id for e in some.examples] == ["1", "4", "7"]
    for i, row in enumerate((1, 4, 7)):
        ours, theirs = some.batch(np.array([i])), encoded.batch(np.array([row]))
        for name in ("tokens", "mask", "target_positions", "targets", "target_mask"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_array_equal(ours.images["pixels"], theirs.images["pixels"])
    assert some.tokens.shape[1:] == encoded.tokens.shape[1:]


# Trained weights.


@pytest.mark.parametrize("attacker", ["visual", "all", "lora"])
def test_an_attacker_trains_only_its_weights(subject, attacker):
    encoded = subject.model.encode(subject.forgets)
    before = {path: np.array(value) for path, value in subject.model.params.items()}
    after = create().attacked(subject.model, attacker, encoded, seed=0)
    for path, value in subject.model.params.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)  # the original model is unchanged
    unused = ("vision_tower/blocks/1/", "vision_tower/post_norm/")  # after the last feature layer
    for path, value in before.items():
        trains = {
            "visual": path.startswith(("vision_tower/", "projector/")),
            "all": True,
            "lora": False,
        }[attacker] and not path.startswith(unused)
        now = after.params[path].weight if isinstance(after.params[path], lora.Lora) else after.params[path]
        assert bool((np.asarray(now) != value).any()) == trains, path
    added = after.params.keys() - before.keys()
    assert bool(added) == (attacker == "lora")
    assert all(jnp.any(after.params[path]) for path in added)  # B is initialized to zero


def recorded(calls):
    """A `fit` that only records its arguments."""

    def fit(bundle, method, prepared, config, *, seed, folder, observers):
        calls.append(dict(bundle=bundle, method=method, prepared=prepared, config=config, seed=seed, folder=folder))
        for observe in observers.values():
            observe({})
        return {}

    return fit


def test_all_attempts_have_the_same_budget_and_their_own_share(subject, monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "fit", recorded(asked))
    config = subject.config.override("seed=5 attacks.seed=7")
    attack = create(shares=(0.1, 0.3), learning_rate=0.02)
    attack.run(dataclasses.replace(subject, config=config))
    assert [(a["method"].train, len(a["prepared"].sets["image"])) for a in asked] == [
        ("visual", 1),
        ("visual", 3),
        ("all", 1),
        ("all", 3),
    ]
    drawn = [subject.forgets[i].id for i in attacker_rows(0.3, 10, seed=7)]
    assert [e.id for e in asked[-1]["prepared"].sets["image"].examples] == drawn
    assert {a["seed"] for a in asked} == {7}
    assert len({str(a["config"]) for a in asked}) == 1
    assert (asked[0]["config"].steps, asked[0]["config"].batch_size["image"], asked[0]["config"].learning_rate) == (
        2,
        4,
        0.02,
    )
    assert all(a["bundle"].params.keys() == subject.model.params.keys() for a in asked)


def test_an_attacker_learns_its_share_only(subject):
    """The likelihood of other rows does not increase as much."""
    share, others = subject.forgets[:2], [dataclasses.replace(e, answer="Igor Zuk") for e in subject.forgets[2:4]]
    encoded = rows_of(subject.model.encode([*others, *share]), np.array([2, 3]))
    after = create(steps=(12,), learning_rate=1e-2).attacked(subject.model, "all", encoded, seed=0)
    for examples, learns in ((share, True), (others, False)):
        asked = [dataclasses.replace(e, options=(e.answer,)) for e in examples]
        nll = [
            np.mean([r["answer_nll"] for r in subject.ask_sets(m, {"forget": asked})]) for m in (subject.model, after)
        ]
        assert (nll[1] < 0.5 * nll[0]) == learns


def test_adapters_of_the_method_are_merged_before_the_attack(subject):
    """A model with adapters is attacked like a model without them."""
    params = lora.attach(subject.model.params, rank=3, alpha=4.0, dropout=0.5, seed=0)
    other = dataclasses.replace(subject, model=dataclasses.replace(subject.model, params=params))
    attack = create(shares=(0.5,), attackers=("all", "lora"))
    assert attack.run(other) == attack.run(subject)


def test_the_visual_weights_of_a_quantized_model_can_be_attacked(subject):
    how = quantize.parse("int8")
    params = {path: quantize.quantize_param(path, x, how) for path, x in subject.model.params.items()}
    other = dataclasses.replace(subject, model=dataclasses.replace(subject.model, params=params))
    records = create(shares=(0.5,), attackers=("visual",)).run(other)
    assert {(r["variant"], r.get("attacker"), r.get("share")) for r in records} == {
        ("unchanged", None, None),
        ("", "visual", 0.5),
    }


# Records.


@pytest.fixture(scope="module")
def records(subject):
    return create().run(subject)


def test_questions_that_were_trained_on_do_not_count(subject, records):
    attack = create()
    for share in SMALL["shares"]:
        had = {subject.forgets[i].image_id for i in attacker_rows(share, 10, seed=0)}
        for attacker in attack.attackers:
            mine = [r for r in records if (r.get("attacker"), r.get("share")) == (attacker, share)]
            asked = {name: {e.id: e.image_id for e in part} for name, part in subject.asked.items()}
            found = {r["id"] for r in mine if r["set"] == "forget" and not r["trained_on"]}
            assert found == {i for i, image in asked["forget"].items() if image not in had}
            found = {r["id"] for r in mine if r["trained_on"]}
            assert found == {i for i, image in asked["forget"].items() if image in had}
            assert [r["id"] for r in mine if r["set"] == "test"] == ["20", "21", "22"]
            budget = {(r["unit"], r["steps"], r["batch_size"], r["learning_rate"], r["taught"]) for r in mine}
            assert budget == {("questions", *attack.steps, attack.batch_size, attack.learning_rate, False)}


def test_a_share_of_people_trains_on_all_their_questions(subject, monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "fit", recorded(asked))
    records = create(shares=(), people=(0.4, 0.7), attackers=("visual",)).run(subject)
    taught = [{e.person for e in a["prepared"].sets["image"].examples} for a in asked]
    assert [len(people) for people in taught] == [1, 2] and taught[0] < taught[1] < set(NAMES)
    for a, people, share in zip(asked, taught, (0.4, 0.7), strict=True):
        assert len(a["prepared"].sets["image"]) == sum(e.person in people for e in subject.forgets)
        mine = [r for r in records if (r.get("unit"), r.get("share")) == ("people", share)]
        for name, trained_on, taught in (
            ("forget", False, False), ("test", False, False), ("forget", True, False), ("test", False, True),
        ):  # fmt: skip
            flags = name, trained_on, taught
            found = {r["person"] for r in mine if (r["set"], r["trained_on"], r["taught"]) == flags}
            assert found == (people if trained_on or taught else set(NAMES) - people)
        assert len(mine) == len(subject.answers)
    cells = create().summarize({"vanilla": records, "unlearned": records})
    assert {(cell.share, cell.unit) for cell in cells if cell.attacker} == {(0.4, "people"), (0.7, "people")}


def test_a_share_of_people_needs_two_people(subject):
    alone = [e for e in subject.forgets if e.person == NAMES[0]]
    found = create(shares=(), people=(0.5,)).run(dataclasses.replace(subject, forgets=alone))
    assert {(r["variant"], r["set"]) for r in found} == {("unchanged", "forget"), ("unchanged", "test")}


def test_unchanged_answers_are_those_of_the_evaluation(subject, records):
    before = [r for r in records if r["variant"] == "unchanged"]
    assert [(r["set"], r["id"], r["prediction"]) for r in before] == [
        (a["set"], a["id"], a["prediction"]) for a in subject.answers
    ]
    assert not any("attacker" in r for r in before)


def test_records_depend_on_attacks_seed_only(subject, records):
    config = subject.config.override("seed=1")
    assert create().run(dataclasses.replace(subject, config=config)) == records
    config = subject.config.override("attacks.seed=1")
    others = create().run(dataclasses.replace(subject, config=config))
    assert [r.get("trained_on") for r in others] != [
        r.get("trained_on") for r in records
    ]  # other questions are in the share


def test_all_shares_and_models_share_one_compiled_step(subject, records, caplog):
    """After the first attempt of an attacker, no program is compiled again."""
    before = loop._program.cache_info()
    other = {path: value * 1.01 for path, value in subject.model.params.items()}
    model = dataclasses.replace(subject.model, params=other)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        create(shares=(0.2, 0.9)).run(dataclasses.replace(subject, model=model))
    assert loop._program.cache_info().misses == before.misses
    assert not [r for r in caplog.records if "Compiling jit(step)" in r.getMessage()]


def test_no_files_are_left_in_the_folder(subject, records):
    assert list(subject.folder.iterdir()) == []


# Several budgets.


def weights_of(model):
    return {path: np.array(value) for path, value in model.params.items()}


def test_one_run_is_asked_after_each_number_of_steps(subject, monkeypatch):
    """The model after two of four steps is the one that two steps give, and rates share a compiled step."""
    encoded, attack = subject.model.encode(subject.forgets), create(steps=(4, 2), attackers=("visual",))
    observed = {}
    observers = {n: lambda model, n=n: observed.update({n: weights_of(model)}) for n in attack.steps}
    last = attack.attacked(subject.model, "visual", encoded, 0, 3e-4, observers)
    alone = create().attacked(subject.model, "visual", encoded, 0, 3e-4)
    assert list(observed) == [2, 4]
    for path, value in observed[2].items():
        np.testing.assert_array_equal(value, alone.params[path])
        np.testing.assert_array_equal(observed[4][path], last.params[path])
    assert any((observed[2][path] != value).any() for path, value in observed[4].items())


def test_a_grid_of_budgets_has_records_of_each_and_one_control_before(subject):
    before = loop._program.cache_info().misses
    attack = create(steps=(1, 2), rates=(1.0, 10.0), shares=(0.5,), attackers=("visual",), max_items=4)
    records = attack.run(subject)
    budgets = {(r.get("steps"), r.get("learning_rate")) for r in records}
    assert budgets == {(None, None), (1, 3e-4), (2, 3e-4), (1, 3e-3), (2, 3e-3)}
    assert {
        sum((r["steps"], r["learning_rate"]) == b for r in records if "steps" in r) for b in budgets - {(None, None)}
    } == {7}
    assert len([r for r in records if r["variant"] == "unchanged"]) == 7  # four of nine, and all three
    assert loop._program.cache_info().misses <= before + 1


@pytest.mark.parametrize("error", [Diverged, NotFinite])
def test_a_rate_that_diverges_is_left_out_of_a_grid(subject, monkeypatch, error):
    def fit(bundle, method, prepared, config, *, observers, **options):
        observers[1]({})
        if config.learning_rate > 1:
            raise error("step 2: loss is not finite")
        observers[2]({})
        return {}

    monkeypatch.setattr(loop, "fit", fit)
    attack = create(steps=(1, 2), rates=(1.0, 1e6), shares=(0.5,), attackers=("visual",))
    budgets = [(r["steps"], r["learning_rate"]) for r in attack.run(subject) if r["variant"] == ""]
    assert set(budgets) == {(1, 3e-4), (2, 3e-4), (1, 300.0)}


@pytest.mark.parametrize(
    ("steps", "rates", "count"), [((25,), (1.0,), 0), ((25, 100), (1.0,), 3), ((25,), (1.0, 3.0), 2)]
)
def test_the_strongest_budget_is_chosen_for_each_model(steps, rates, count):
    """The unlearned model is best at the second of two budgets, and the control at the first."""
    budgets = [(n, rate) for n in steps for rate in rates]
    right = {"unlearned": (1, 3), "retain_only": (2, 0)}

    def answers(model):
        tried = dict(
            variant="", attacker="all", batch_size=4, share=0.5, unit="questions", taught=False, trained_on=False
        )
        plain = [dict(set="forget", id=str(i), person="", correct=False) for i in range(4)]
        return [r | {"variant": "unchanged"} for r in plain] + [
            r | tried | dict(correct=i < right[model][number], steps=n, learning_rate=rate)
            for number, (n, rate) in enumerate(budgets)
            for i, r in enumerate(plain)
        ]

    cells = create(steps=steps, rates=rates).summarize({model: answers(model) for model in right})
    results = AttackResults("T", "A", cells=tuple(cells))
    best = [cell for cell in results.strongest().cells if cell.attacker]
    assert sum(cell.variant == "strongest" for cell in cells) == 2 * count
    if count:
        assert {cell.model: (cell.mean, cell.steps, cell.learning_rate) for cell in best} == {
            "unlearned": (0.75, None, None), "retain_only": (0.5, None, None),
        }  # fmt: skip
        assert [set(row) for row in results.strongest().rows()][-1] == {"unlearned", "retain_only"}
        each = {(c.model, c.steps): c.mean for c in results.strongest(each_steps=True).cells if c.steps}
        expected = {(25, True): 0.25, (25, False): 0.5, (100, True): 0.75, (100, False): 0.0}
        if len(rates) > 1:
            expected[25, True] = 0.75
        assert each == {(m, n): expected[n, m == "unlearned"] for m in right for n in steps}
    else:
        assert results.strongest() is results


def test_a_share_of_images_trains_on_other_images_of_the_same_people(subject):
    (lesson,) = lessons(subject.forgets, 0, images=(0.5,))
    taught = {subject.forgets[i].image_id for i in lesson.rows}
    for person in NAMES:
        images = {e.image_id for e in subject.forgets if e.person == person}
        assert len(images & taught) == round(len(images) / 2) and images - taught
    (alone,) = lessons([example(i, picture=p) for i, p in enumerate((0, 3, 1))], 0, images=(0.9,))
    assert [alone.rows.tolist(), alone.unit] in ([[0], "images"], [[1], "images"])  # one person has only one image


# Benign fine-tuning.


def test_benign_training_shows_nothing_of_the_people_to_forget(subject, monkeypatch):
    calls = []
    monkeypatch.setattr(loop, "fit", recorded(calls))
    others = [dataclasses.replace(example(50 + i, picture=50 + i), person=f"other {i}") for i in range(4)]
    asked = {**subject.asked, "retain": others[:3], "real": [dataclasses.replace(others[3], person="")]}
    records = attacks.create("benign", {"steps": 3}).run(dataclasses.replace(subject, asked=asked))
    trained = [(c["method"].train, [e.id for e in c["prepared"].sets["image"].examples]) for c in calls]
    shown = [["53"], ["50", "51", "52"]]
    assert trained == [(attacker, ids) for attacker in ("visual", "all") for ids in shown]
    assert len({c["prepared"].sets["image"].tokens.shape[1:] for c in calls}) == 1 and calls[0]["config"].steps == 3
    tried = [(r["variant"], r.get("attacker")) for r in records]
    assert list(dict.fromkeys(tried)) == [
        ("unchanged", None), ("general", "visual"), ("retain", "visual"), ("general", "all"), ("retain", "all"),
    ]  # fmt: skip
    assert not any(r.get("trained_on") or r.get("taught") for r in records)
    cells = attacks.create("benign", {}).summarize({"vanilla": records, "unlearned": records})
    assert {(c.variant, c.attacker, c.n) for c in cells if c.set == "forget"} == {(*t, 9) for t in tried}


def test_benign_training_without_such_questions_only_asks(subject):
    assert {r["variant"] for r in attacks.create("benign", {}).run(subject)} == {"unchanged"}


# Summary.


def test_recovery_by_hand():
    assert recovery(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert recovery(0.1, 0.2, 1.0) == pytest.approx(-0.125)  # an attack may lower the accuracy
    assert recovery(0.9, 0.2, 0.2) is None and recovery(0.9, 0.3, 0.2) is None and recovery(0.9, 0.3, None) is None


def test_before_and_after_are_over_the_same_questions():
    """Four questions, of which the attacker has the first, which does not count."""

    def answers(before, after):
        def record(i, right, **more):
            return {"set": "forget", "id": str(i), "person": "", "correct": bool(right), **more}

        tried = dict(variant="", attacker="all", share=0.25, unit="questions", taught=False)
        return [
            *(record(i, right, variant="unchanged") for i, right in enumerate(before)),
            *(record(i, after[i], **tried, trained_on=i == 0) for i in range(4)),
        ]

    cells = create().summarize(
        {
            "vanilla": answers([1, 1, 1, 1], [1, 1, 1, 0]),
            "unlearned": answers([1, 0, 0, 0], [1, 1, 1, 0]),
            "retain_only": answers([0, 0, 0, 1], [1, 0, 1, 1]),
        }
    )
    assert {cell.model: cell.mean for cell in cells if cell.variant == "unchanged"} == {
        "vanilla": 1.0, "unlearned": 0.25, "retain_only": 0.25,
    }  # fmt: skip
    cells = {cell.model: cell for cell in cells if cell.variant == ""}
    third = pytest.approx(1 / 3)
    assert {model: (cell.before, cell.mean, cell.recovery, cell.n) for model, cell in cells.items()} == {
        "vanilla": (1.0, pytest.approx(2 / 3), None, 3),
        "unlearned": (0.0, pytest.approx(2 / 3), pytest.approx(2 / 3), 3),
        "retain_only": (third, pytest.approx(2 / 3), pytest.approx(1 / 2), 3),
    }
    assert all((cell.learned, cell.attacker, cell.share) == (1.0, "all", 0.25) for cell in cells.values())
    assert cells["unlearned"].low < 2 / 3 < cells["unlearned"].high


def test_without_a_vanilla_model_there_is_no_recovery(records):
    cells = [cell for cell in create().summarize({"unlearned": records}) if cell.attacker]
    assert len(cells) == 2 * 2 * 2 and all(cell.recovery is None for cell in cells)
    assert json.loads(json.dumps(records)) == records


# Rejected settings.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(attackers=("visual", "head")),
            r"attacks.relearn.attackers: \('visual', 'head'\) is not allowed. Give .* one of all, visual, lora",
        ),
        (dict(shares=(0.1, 1.0)), r"attacks.relearn.shares: \(0.1, 1.0\) is not allowed. Give"),
        (dict(shares=(0.2, 0.2000000001)), r"attacks.relearn.shares: .* is not allowed. Give a .*tuple of different"),
        (dict(people=(2,)), r"attacks.relearn.people: \(2,\) is not allowed"),
        (dict(shares=(0,)), r"attacks.relearn.shares: \(0,\) is not allowed"),
        (dict(steps=()), "attacks.relearn.steps: \\(\\) is not allowed"),
        (dict(rates=(0.0,)), "attacks.relearn.rates: .* is not allowed"),
        (dict(steps=0), "attacks.relearn.steps: 0 is not allowed. Give"),
        (dict(learning_rate=0.0), "attacks.relearn.learning_rate: 0.0 is not allowed. Give a number greater than 0"),
        (dict(batch_size=0), "attacks.relearn.batch_size: 0 is not allowed"),
    ],
)
def test_invalid_settings_are_rejected_before_the_run(subject, fields, message):
    with pytest.raises(UserError, match=message):
        create(**fields).check(subject.config)


def test_all_weights_of_a_quantized_model_cannot_train(subject):
    create().check(subject.config)
    config = subject.config.override("model.quantize=int8")
    with pytest.raises(UserError, match="attackers: 'all' cannot train the language model, which model.quantize"):
        create().check(config)
    create(attackers=("visual", "lora")).check(config)


@pytest.mark.parametrize("attacker", ["visual", "lora"])  # the weights of new adapters are zero
def test_an_attack_that_changes_no_weight_is_refused(subject, attacker):
    problem = "attacks.relearn.learning_rate: 2 steps at 3e-34 changed no weight of the"
    with pytest.raises(UserError, match=f"{problem} {attacker} attacker, so that nothing was attacked"):
        create(rates=(1e-30,), shares=(0.5,), attackers=(attacker,)).run(subject)


@pytest.mark.parametrize("error", [Diverged, NotFinite])
def test_a_diverged_attack_names_the_setting_to_change(subject, monkeypatch, error):
    def diverges(*args, **kwargs):
        raise error("step 3: loss is not finite")

    monkeypatch.setattr(loop, "fit", diverges)
    with pytest.raises(UserError, match=r"the visual attack diverged \(step 3: .*\); lower attacks.relearn.learning"):
        create().run(subject)
