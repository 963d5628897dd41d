"""The first sections of the reports: what was forgotten and kept, what came back, and the verdicts on them."""

import dataclasses

import pytest
from report_results import (
    MEMBERSHIP,
    MODELS,
    PROMPTS,
    RELEARN,
    SETS,
    TWO,
    attempt,
    meta_of,
    results_with,
    run_of,
    shown,
    summary,
)

from vkd_jax import results as schema
from vkd_jax.reporting import attack_view, report, view
from vkd_jax.results import AttackResults
from vkd_jax.runs.origins import vanilla_origin

FIRST_SECTIONS = ("opening", "words", "forgotten", "kept", "text_only", "recovered", "basis")


def opening(run=None, **more):
    """The first sections of the report."""
    values = {name: view.SECTIONS[name](run or run_of(results_with(**more))) for name in FIRST_SECTIONS}
    return "\n".join(report.render_section(name, section) for name, section in values.items() if section is not None)


def test_the_opening_defines_each_term_once():
    text = opening()
    for term in ("vanilla model", "unlearned model", "retain-only model", "forget set", "retain set", "Accuracy"):
        assert text.count(f"**{term}**") == 1, term
    assert "**It was asked to forget 2 of them**" in text
    assert "the 2 people to forget, the **retain set** those about the 3 people to retain." in text
    assert "It is `mine`, which was trained elsewhere; this run has no record of its training data." in text
    for word in ("never knew", "guess ", "people to keep", "picture"):
        assert word not in text


def test_the_opening_says_what_was_forgotten_and_kept():
    text = opening()
    assert (
        "## What was forgotten\n\n"
        "**The unlearned model cannot be told apart from a model that never saw these people**: its interval overlaps "
        "that of the retain-only model (15.0 %, 5.2 to 36.0).\n\n"
        "- People to forget, with image: accuracy 100.0 % before and **10.0 %** after unlearning (2.8 to 30.1; "
        "20 questions). Chance is 25.0 %.\n\n"
        "## What was kept\n\n"
        "**No loss was measured**: on each set below, the unlearned model's interval overlaps that of the vanilla "
        "model or is above it.\n\n"
        "- People to retain, with image: accuracy 95.0 % before and **95.0 %** after unlearning (76.4 to 99.1; "
        "20 questions).\n\n"
        "## What came back under attack\n\n"
        "Not measured: this run made no attack. The same command with `--config.attacks.names=all` and another "
        "`--workdir` measures it.\n\n"
        "## How we know\n\n"
        "The unlearned model was exported, loaded again from its files, and only then evaluated. 9 of its 80 tensors"
    ) in text


@pytest.mark.parametrize(
    ("models", "forget", "told"),
    [
        (MODELS, (20, 19, 3), "**The unlearned model still knows something about them**: it is above the retain-only "),
        (MODELS, (20, 0, 19), "it is below the retain-only model (95.0 %, 76.4 to 99.1)."),
        (MODELS, (20, 1, 0), "Both are below chance, probably because"),
        (TWO, (20, 3, 0), "cannot be told apart from guessing**: its interval includes chance (25.0 %)."),
        (TWO, (20, 19, 0), "**The unlearned model still knows something about them**: it is above chance (25.0 %)."),
        (TWO, (20, 0, 0), "**The unlearned model avoids the correct answers**, which can itself reveal that they were"),
    ],
)
def test_the_opening_compares_with_the_retain_only_model_or_chance(models, forget, told):
    text = opening(models=models, forget=forget)
    assert told in text
    assert ("This run has none." in text) == (models is TWO)


@pytest.mark.parametrize(("known", "little"), [(20, False), (11, False), (8, True)])
def test_the_opening_says_if_there_was_little_to_forget(known, little):
    """With 20 questions and chance at 25 %, the interval of 8 correct answers starts at 22 %, that of 11 at 34 %."""
    assert ("could not be told apart from guessing before" in opening(forget=(known, 19, 3))) == little


@pytest.mark.parametrize(
    ("models", "forget", "told"),
    [
        (MODELS, (3, 20, 20), "the vanilla model (15.0 %, 5.2 to 36.0) is below the retain-only model (100.0 %, "),
        (MODELS, (3, 20, 20), "The two models may have been given in each other's place."),
        (MODELS, (20, 20, 20), "the vanilla model (100.0 %, 83.9 to 100.0) could not be told apart from the retain-"),
        (MODELS, (8, 2, 3), "or a retain-only model that was trained without them, would show it."),
        (TWO, (8, 8, 0), "could not be told apart from chance (25.0 %), so these questions do not show whether"),
        (TWO, (8, 8, 0), "or a vanilla model that knows these people better would show it."),
    ],
)
def test_a_reference_that_the_vanilla_model_does_not_exceed_gives_no_verdict(models, forget, told):
    """Such as of exchanged models, of a retain-only model that knows these people, or of one question."""
    text = opening(models=models, forget=forget)
    assert "**No verdict**: the vanilla model" in text and told in text
    assert "cannot be told apart" not in text and "little to forget" not in text


@pytest.mark.parametrize(("known", "unlike"), [(3, True), (8, True), (11, False), (19, False)])
def test_a_retain_only_model_without_the_retained_people_gives_no_verdict(known, unlike):
    """Such as the base model, given in its place. The vanilla model answers 19 of 20 questions about them."""
    results = results_with()
    results.models["retain_only"]["retain"]["vqa"] = summary(known)
    text = opening(run_of(results))
    told = (
        f"of the questions about people to retain, the retain-only model answers {5 * known}.0 % correctly and the van"
    )
    assert (told in text) == ("**No verdict**" in text) == unlike != ("cannot be told apart" in text)


@pytest.mark.parametrize("protocols", [("letter",), ("letter", "options")])
@pytest.mark.parametrize(
    ("vanilla", "unlearned", "cautions"),
    [(20, 20, ["vanilla", "unlearned"]), (15, 2, ["vanilla"]), (0, 15, ["unlearned"]), (10, 10, [])],
)
def test_answers_without_letters_are_not_taken_as_missing_knowledge(vanilla, unlearned, cautions, protocols):
    results = results_with(models=TWO, forget=(0, 0, 3), meta=meta_of(SETS[:2], protocols=protocols, protocol="letter"))
    for model, count in (("vanilla", vanilla), ("unlearned", unlearned)):
        metrics = {"no_letter": schema.Figure(count / 20, 0.0, 1.0, 20)}
        results.models[model]["forget"]["vqa"] = summary(0, metrics=metrics)
    run = run_of(results)
    text = opening(run)
    for model, count in (("vanilla", vanilla), ("unlearned", unlearned)):
        sentence = f"the {model} model wrote no option letter in {5 * count}.0 % of its answers to these questions"
        assert (sentence in text) == (model in cautions)
        told = f"The {model} model wrote no option letter in {5 * count}.0 % of its answers under the protocol"
        assert (told in shown("measured", run)) == (count > 0)
    assert ("apart from guessing before" in text) == (not cautions) == ("avoids the correct answers" in text)
    assert ("`--config.eval.protocol=options`" in text) == (bool(cautions) and protocols == ("letter",))
    assert ("protocol `options`, which does not depend on letters, count" in text) == (
        bool(cautions) and protocols != ("letter",)
    )


MLLMU = {"benchmark": "mllmu", "source": "", "people": 0, "n_people": 60, "forget": 10}
OWN = {"benchmark": "folder", "forget": "a", "retain": "b"}


@pytest.mark.parametrize(
    ("config", "provenance", "told"),
    [
        ({"stage": "all", "model": {"base": "base"}}, {}, "It is `base`, fine-tuned in this run on the benchmark's"),
        (
            {"model": {"path": "mine"}, "data": MLLMU},
            {"model": "vanilla", "without": [], "config": {"model": {"base": "base"}, "data": MLLMU}},
            "It is `base`, fine-tuned on the benchmark's questions about all 5 people, including those to forget "
            "(model folder `mine`).",
        ),
        (
            {"model": {"path": "mine"}},
            {"without": ["1"], "config": {"model": {"base": "base"}}},
            "It is `mine`, which was trained elsewhere",
        ),
        *(
            (
                {"model": {"path": "mine"}, "data": data},
                {"model": "vanilla", "without": [], "config": {"model": {"base": "base"}, "data": {**data, **other}}},
                told,
            )
            for data, other, told in (
                (MLLMU, {"forget": 5}, "It is `base`, fine-tuned on the benchmark's questions"),
                (MLLMU, {"people": 1}, "It is `mine`, which was trained elsewhere"),
                (MLLMU, {"benchmark": "clear"}, "It is `mine`, which was trained elsewhere"),
                (OWN, {}, "It is `mine`, which was trained elsewhere"),
                (OWN, MLLMU, "It is `mine`, which was trained elsewhere"),
            )
        ),
        *(
            (
                {"model": {"path": "mine"}, "data": MLLMU},
                {"config": broken},
                "It is `mine`, which was trained elsewhere",
            )
            for broken in (None, [], {"model": None, "data": []})
        ),
        (
            {"model": {"path": "mine"}},
            {"model": "unlearned", "without": [], "config": {"model": {"base": "base"}}},
            "It is `mine`, in which an earlier run had already unlearned people or facts.",
        ),
    ],
)
def test_the_opening_says_what_the_vanilla_model_was_trained_on(config, provenance, told):
    origins = schema.Origins(*vanilla_origin({"stage": "unlearn", "data": {}} | config, provenance))
    assert told in opening(run_of(results_with(meta=meta_of(config=config), origins=origins)))


@pytest.mark.parametrize(
    ("origins", "stage", "told"),
    [
        ({"vanilla_forgot": 2}, "audit", "already unlearned **2 of the people to forget here**, by its certificate."),
        ({}, "audit", "a model that was made elsewhere and evaluated here.\n"),
        ({"unlearned_forgot": 1}, "audit", "; its certificate names **1 of the 2** people to forget as forgotten.\n"),
        ({"unlearned_forgot": 2}, "audit", "; its certificate names all 2 people to forget as forgotten.\n"),
        (
            {},
            "audit",
            "**This report asks whether it has forgotten 2 of them**, as a person has the right to ask, and ",
        ),
        (
            {},
            "unlearn",
            "The **retain-only model** was given as one that never saw the people to forget; this run has no",
        ),
        ({}, "all", "The **retain-only model** never saw the people to forget: it was trained"),
        ({}, "all", "It is `a new model`, fine-tuned in this run on the benchmark's questions about"),
        ({"retain_only": "run"}, "unlearn", "The **retain-only model** never saw the people to forget: it was trained"),
    ],
)
def test_the_opening_says_what_is_known_of_the_given_models(origins, stage, told):
    config = {"stage": stage, "model": {"path": "mine"}}
    assert told in opening(run_of(results_with(meta=meta_of(config=config), origins=schema.Origins(**origins))))


def test_the_opening_does_not_say_what_no_figure_shows():
    """No claims about a vanilla model that guesses, exchanged models, and other facts without questions."""
    guessing = results_with(models=TWO, forget=(5, 19, 0))
    guessing.models["vanilla"]["retain"]["vqa"] = summary(5)
    guessing = dataclasses.replace(guessing, chance={"forget": {"vqa": 0.25}, "retain": {"vqa": 0.25}})
    text = opening(run_of(guessing))
    assert "This one should have learned who certain people are, but its answers do not show that it had." in text
    assert "**It is also above the vanilla model** (25.0 %, 11.2 to 46.9): the two models may have been given" in text
    assert "on any of them, so there was little to lose." in text
    facts = meta_of(config={"data": {"forget_facts": ["job"]}})
    assert "**The other facts about the same people were not measured.**" in opening(meta=facts)
    assert "little to lose" not in opening() and "also above" not in opening() and "should have" not in opening()


def test_intervals_over_people_say_so():
    text = opening(people=2)
    assert "computed by resampling people where the data names them, since" in text  # the retain set has no people
    assert "(2.8 to 30.1; 20 questions about 2 people)" in text
    assert "resampling people" not in opening()
    named = results_with(people=2)
    for answers in named.models.values():
        answers["retain"]["vqa"] = dataclasses.replace(answers["retain"]["vqa"], people=3)
    assert "computed by resampling people, since" in opening(run_of(named))


def test_the_opening_has_a_sentence_on_relearning():
    """It is about the stronger of two attackers with 20 % of the forget set."""
    assert (
        "- Relearning: after fine-tuning all weights on 20 % of the forget set, the unlearned model answered "
        "**45.0 %** of the other questions correctly (25.8 to 65.8); the retain-only model after the same attack "
        "30.0 % (14.5 to 51.9).\n- All attacks are listed"
    ) in opening(attacks={"relearn": RELEARN})
    two = dataclasses.replace(RELEARN, cells=[cell for cell in RELEARN.cells if cell.model != "retain_only"])
    assert "correctly (25.8 to 65.8); before the attack 10.0 % (2.8 to 30.1).\n" in opening(attacks={"relearn": two})
    alone = dataclasses.replace(RELEARN, cells=(dataclasses.replace(RELEARN.cells[-2], attacker="visual"),))
    assert (
        "- Relearning: after fine-tuning the visual weights on 50 % of the forget set, the unlearned model answered "
        "**90.0 %** of the other questions correctly (69.9 to 97.2); nothing to compare with was measured.\n"
    ) in opening(attacks={"relearn": alone})
    for attacks in ({}, {"relearn": dataclasses.replace(RELEARN, cells=())}):
        assert attack_view.relearned(results_with(attacks=attacks)) is None


def test_the_opening_has_the_strongest_attempt_of_each_other_attack():
    """Only the forget set counts; an attack without unchanged variant, such as membership, has no sentence."""
    assert (
        "\n\n- Prompts: accuracy on the forget set at most **20.0 %** (role play; 8.1 to 41.6); without the attack "
        "10.0 % (2.8 to 30.1).\n- All attacks"
    ) in opening(attacks={"prompts": PROMPTS, "membership": MEMBERSHIP})


@pytest.mark.parametrize(
    ("attacks", "told"),
    [
        ({"relearn": (8, 4)}, "**No more came back than the attack teaches a model that never saw these people**: "),
        (
            {"relearn": (19, 4)},
            "**Knowledge comes back**: under Relearning the unlearned model's interval is above that ",
        ),
        ({"relearn": (19, 4)}, "above that of the retain-only model under the same attack."),
        ({"relearn": (19, None)}, "above that before the attack."),
        ({"prompts": (4, None)}, "**Nothing measurable came back**: for each attack with a line below"),
        ({"prompts": (19, None)}, "under Prompts the unlearned model's interval is above that without the attack."),
        ({"prompts": (19, 4), "relearn": (19, 4)}, "same attack; under Prompts it is above that without the attack."),
        ({"shown": (9, 6)}, "**Nothing measurable came back**: "),  # six of 20 is the retain-only model's
        ({"shown": (19, 6)}, "above that of the retain-only model under the same attack."),
        ({"shown": (9, 6)}, "the retain-only model under the same attack 30.0 % (14.5 to 51.9)."),
        ({"membership": None}, "**No verdict**: none of the attacks has a figure on the forget set to compare with."),
    ],
)
def test_the_verdict_on_attacks_compares_intervals(attacks, told):
    results = {}
    for name, correct in attacks.items():
        if correct is None:
            results[name] = MEMBERSHIP
            continue
        given = {"relearn": {"attacker": "all", "share": 0.2}, "shown": {"variant": "two examples", "share": 0.2}}
        given = given.get(name, {"variant": "role"})
        cells = (*attempt((20, 2, 3), "unchanged"), *attempt((20, correct[0], correct[1] or 0), **given))
        cells = tuple(cell for cell in cells if correct[1] is not None or cell.model != "retain_only")
        results[name] = AttackResults(f"{name.title()}: a title", "About.", cells=cells)
    assert told in opening(attacks=results)


@pytest.mark.parametrize(
    ("after", "told"),
    [(19, "**No loss was measured**"), (2, "**Some of it was lost**: the unlearned model's interval is")],
)
def test_the_verdict_on_what_was_kept_compares_with_the_vanilla_model(after, told):
    results = results_with()
    results.models["unlearned"]["retain"]["vqa"] = summary(after)
    text = opening(run_of(results))
    assert told in text and ("below that of the vanilla model for people to retain." in text) == (after == 2)


def with_text(forgets_text, unlearned):
    """Results with questions about the people to forget in text alone: the kinds are known before, to a share after."""
    role = "forget" if forgets_text else None
    sets = (dataclasses.replace(SETS[0], text_role=role and schema.Role(role)), SETS[1])
    results = results_with(meta=meta_of(sets))
    counts = {"vanilla": (20, 20), "unlearned": unlearned, "retain_only": (5, 0)}
    models = {
        model: {
            "forget": {**results.models[model]["forget"], "qa": summary(a), "generation_qa": summary(b)},
            "retain": {**results.models[model]["retain"], "qa": summary(19)},
        }
        for model, (a, b) in counts.items()
    }
    return dataclasses.replace(results, models=models, chance={"forget": {"vqa": 0.25, "qa": 0.25}})


def test_text_that_is_kept_and_text_that_is_forgotten_are_judged_by_their_role():
    kept, forgotten = (opening(run_of(with_text(x, (6, 19)))) for x in (False, True))
    assert "- People to forget, text only: accuracy 100.0 % before and **30.0 %** after" in kept
    assert "People to forget, text only" not in forgotten and "in images and in text" not in kept
    assert "**It was asked to forget 2 of them, in images and in text**" in forgotten
    assert "two people to forget" not in forgotten
    assert (
        "Text about these people was to be forgotten, too. Asked by name and without an image, the unlearned model\n\n"
        "- **cannot be told apart from a model that never saw these people** in multiple choice, text only: 100.0 % "
        "(83.9 to 100.0) before, 30.0 % (14.5 to 51.9) after, n=20; the retain-only model (25.0 %, 11.2 to 46.9).\n"
        "- **still knows something about them** in open answer, text only: 100.0 % (83.9 to 100.0) before, 95.0 % "
        "(76.4 to 99.1) after, n=20; the retain-only model (0.0 %, 0.0 to 16.1).\n\n"
        "## What was kept"
    ) in forgotten
    assert "- People to retain, text only: accuracy 95.0 % before" in forgotten
