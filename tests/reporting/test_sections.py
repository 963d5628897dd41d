"""The sections of report.md: values by hand, golden text, and escaped text from data."""

import dataclasses
import re

import jinja2
import pytest
from report_results import (
    MEMBERSHIP,
    MODELS,
    RELEARN,
    SETS,
    TWO,
    attacks_of,
    attempt,
    meta_of,
    results_with,
    run_of,
    shown,
    summary,
)

from vkd_jax import results as schema
from vkd_jax.reporting import attack_view, markdown, model_card, report, view
from vkd_jax.results import AttackCell, AttackResults, MeasuredSet

# ---- Text from data ----


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("Otto Lindt, 12.5 % (3/20)", "Otto Lindt, 12.5 % (3/20)"),
        ("a|b", r"a\|b"),
        ("*a* _b_ `c` ~d~ $e$ #f \\", r"\*a\* \_b\_ \`c\` \~d\~ \$e\$ \#f " + "\\\\"),
        ("<img src=x>&amp;", "&lt;img src=x&gt;&amp;amp;"),
        ("![x](y)", r"!\[x\](y)"),
        ("a\n\n# b\u2028c", r"a \# b c"),
        (12, "12"),
    ],
)
def test_text_is_escaped(text, escaped):
    assert markdown.escape(text) == escaped
    assert markdown.escape(markdown.escape(text)) == escaped  # escaping is idempotent


@pytest.mark.parametrize(
    ("text", "quoted"),
    [("a *b*", "`a *b*`"), ("a`b", "``a`b``"), ("`a``", "``` `a`` ```"), ("a\nb", "`a b`"), ("", "``")],
)
def test_inline_code_has_more_backticks_than_its_text(text, quoted):
    assert markdown.code(text) == quoted


HOSTILE = "</details><script>|`**x**`\n\n# [y](z)"


def test_hostile_text_changes_no_section():
    """Names of benchmarks, folders, commits and stages do not change the headings and tables of the page."""

    def page(name):
        cells = tuple(AttackCell(model, name, 0.5, 2, 0.25, 0.75, variant=name) for model in MODELS)
        sets = [MeasuredSet(name, "forget", name, name, people=2)]
        config = {"model": {"path": name}, "method": {"name": name}}
        meta = meta_of(sets, config, name, name, command=name, commit=name, devices=name, date=name)
        results = results_with(
            meta=dataclasses.replace(meta, versions={name: name}),
            attacks={name: AttackResults(name, "About.", cells=cells)},
            timing={name: 1.0},
        )
        models = {model: {name: sets["forget"]} for model, sets in results.models.items()}
        run = run_of(dataclasses.replace(results, models=models), plots=frozenset({"portraits"}))
        return report.render(run)

    def without_code(text):
        return re.sub(r"```json.*?```|(?<![`\\])(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)

    def structure(text):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()]
        return re.findall("^#+", text, re.M), [n for n in cells if n], re.findall("</?[a-z]+>", text)

    hostile, plain = page(HOSTILE), page("plain")
    assert structure(without_code(hostile)) == structure(without_code(plain))
    assert "](z)" not in without_code(hostile).replace("\\](z)", "")
    assert "&lt;script&gt;\\|\\`\\*\\*x\\*\\*\\` \\# \\[y\\](z)" in hostile


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="command"):
        report.render_section("evidence", {})


def test_every_section_has_a_template_and_every_template_a_section():
    templates = [name for name in report._environment().list_templates() if name.endswith(".md.j2")]
    assert {name.removesuffix(".md.j2") for name in templates} == view.SECTIONS.keys() | {"macros", "model_card"}


def test_every_section_shows_hostile_text_as_text():
    text = "x|<script>[y](javascript:z)`w`\n# v\x1b[31m\u202e$u${{7*7}}"
    config = {"method": {"name": text}, "model": {"path": text}}
    sets = [dataclasses.replace(s, title=text, short=text) for s in SETS[:2]]
    meta = meta_of(sets, config, title=text, source=text, command=text, commit=text, devices=text, protocol=text)
    attack = AttackResults(title=text, about="About.", variants={text: text}, cells=attempt((20, 2, 3), text))
    page = report.render(run_of(results_with(meta=meta, attacks={text: attack}, timing={text: 1.0})))
    body, config = page.split("```json")
    assert not re.search(r"[\x1b\u202e]|\{\{49|\n# v", page) and page.isprintable() is False
    outside_code = re.sub(r"(`+).*?\1(?!`)", "", body.replace("\\`", ""))
    assert not re.search(r"<script>|[^\\]\[y|x\|&lt;|[^\\]\$u", outside_code)
    assert body.count("7\\*7") > 8 and "{{7*7}}" in config


def test_the_model_card_names_a_base_model_of_the_hub_and_no_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"method": {"name": "vkd"}, "model": {"path": "org/name"}}
    results = results_with(meta=meta_of(SETS[:2], config))
    assert 'base_model: "org/name"' in model_card.render(results, [])
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert "base_model" not in model_card.render(results, [])


# ---- Other sections ----


def test_the_section_on_measurements_in_full():
    results = results_with(
        meta=meta_of(SETS[:2], protocols=("options", "letter", "letter:strict", "letter:similar_option"))
    )
    results.models["vanilla"]["forget"]["cloze_qa"] = summary(3, 5)
    assert shown("measured", run_of(results)) == (
        "## What was measured\n\n"
        "Benchmark: A benchmark; data: a folder. Numbers of people and of questions:\n\n"
        "| questions about | people | multiple choice, with image | fill in the blank, text only |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| people to forget | 2 | 20 | 5 |\n"
        "| people to retain | 3 | 20 | – |\n\n"
        "- Multiple choice, protocol `options`: the model is asked the question without its options, and the option to "
        "which it gives the highest probability is its answer.\n"
        "- Multiple choice, protocol `letter`: the model is shown the question with lettered options and writes an "
        "answer, and the one option letter that it states counts.\n"
        "- Multiple choice, protocol `letter:strict`: the same prompt, and only a lone capital letter or the letter "
        'after "The answer is" counts, as in the code of OFFSIDE.\n'
        "- Multiple choice, protocol `letter:similar_option`: the same prompt, and the option that is most similar to "
        "what the model writes counts, as in the code of UMU-Bench, whatever that is.\n"
        "- A table that names no protocol uses `options`. Results of different protocols are never mixed.\n"
        "- Fill in the blank: the model writes; the answer is correct if it contains the missing words.\n"
        "- No worked example precedes the questions. Decoding is greedy, with at most 8 new tokens.\n"
        "- Images are resized and normalized as by the PIL backend of transformers; its torchvision backend differs by "
        "up to two gray levels of 255.\n"
    )


def test_the_section_on_accuracy_in_full():
    assert shown("accuracy", run_of()) == (
        "## Accuracy\n\n"
        "Each cell: accuracy, (correct answers / questions), and the 95 % interval of the accuracy (%).\n\n"
        "### Multiple choice, with image\n\n"
        "| questions about | vanilla | unlearned | retain-only | change (points) |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| people to forget | 100.0 % (20/20), 83.9 to 100.0 | 10.0 % (2/20), 2.8 to 30.1 "
        "| 15.0 % (3/20), 5.2 to 36.0 | -90.0 |\n"
        "| people to retain | 95.0 % (19/20), 76.4 to 99.1 | 95.0 % (19/20), 76.4 to 99.1 "
        "| 95.0 % (19/20), 76.4 to 99.1 | +0.0 |\n\n"
        "![Accuracy on the forget set against accuracy on the retain set](report/forget_retain.png)\n\n"
        "Good unlearning moves from right to left, to the dashed line of chance and the star of the retain-only model, "
        "without moving down.\n"
    )
    without_chance = shown("accuracy", run_of(results_with(models=TWO, chance={})))
    assert without_chance.endswith("Good unlearning moves from right to left without moving down.\n")


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (TWO, "**not measured**, because this run has no retain-only model"),
        (MODELS, "no question of the forget set has"),
    ],
)
def test_missing_forget_quality_is_explained(models, told):
    text = shown("quality", run_of(results_with(models=models)))
    assert told in text and ("--config.model.retain_only=DIR" in text) == (models is TWO)
    assert "Model utility" not in text and "| --- |" not in text


def test_forget_quality_and_utility():
    test = schema.ForgetQuality(0.25, p=0.5, js=0.125, n=12, low=0.125, high=0.5, p_questions=0.031, people=2)
    quality = {"vanilla": {"vqa": schema.ForgetQuality(1.0, 0.0, 1.0, 12)}, "unlearned": {"vqa": test}}
    utility = {"vanilla": schema.Utility(0.75, 0.7, 0.8, dict.fromkeys("ab", schema.Component(0.75, 9)))}
    text = shown("quality", run_of(results_with(forget_quality=quality, utility=utility)))
    assert "| vanilla | multiple choice, with image | 12 | – | 1.000 | 0 | – | 1.000 |\n" in text
    assert "| unlearned | multiple choice, with image | 12 | 2 | 0.250 (0.125 to 0.500) | 0.5 | 0.031 |" in text
    assert "| people | KS statistic | p-value, people | p-value, questions |" in text
    assert "is from a permutation test over people" in text
    assert "| vanilla | 0.750 (0.700 to 0.800) | 2 |" in text and "not measured" not in text


def test_limits_name_every_assumption_of_the_reconstruction():
    text = shown("limits", run_of())
    assert [f"A{i}" for i in range(1, 9)] == re.findall(r"\((A\d)\)", text)
    audit = run_of(results_with(meta=meta_of(config={"stage": "audit"})))
    assert "reconstruction" not in shown("limits", audit)


def test_the_section_on_confusions():
    counts = {
        "vanilla": schema.Confusion(20, 20, 0, 0),
        "unlearned": schema.Confusion(20, 2, 12, 5, {"013": 9, "a|b": 3}),
    }
    figures = {model: schema.Figure(0.5, 0.25, 0.75, 8, 2) for model in TWO}
    groups = (schema.SimilarityGroup(0.0, 0.0, 2, figures), schema.SimilarityGroup(1 / 3, 2 / 3, 2, figures))
    text = shown("confusions", run_of(results_with(models=TWO, confusions=counts, similarity_groups=groups)))
    assert (
        "| answers | vanilla | unlearned |\n| --- | ---: | ---: |\n| correct | 20 | 2 |\n"
        "| true of one retained person | 0 | 12 |\n| true of several retained people | 0 | 5 |\n"
        "| other | 0 | 1 |\n| all | 20 | 20 |\n"
    ) in text
    assert "20 answers, **9 are true of the same retained person**, 013, and of no other." in text
    assert "| 013 | 0 | 9 |\n| a\\|b | 0 | 3 |\n" in text
    assert "| 0.33 to 0.67 | 2 | 50.0 %, 25.0 to 75.0 | 50.0 %, 25.0 to 75.0 |" in text
    assert "It compares facts, not faces" in text
    assert view.confusions(run_of()) is None


# ---- Attacks ----


def test_each_attack_has_a_table_of_all_models():
    text = attacks_of(relearn=RELEARN, membership=MEMBERSHIP)
    assert "and on the retain-only model, which never saw the people to forget." in text
    assert (
        "### Relearning: again\n\nSome of it is taught *again*.\n\n"
        "| variant | vanilla | unlearned | retain-only |\n| --- | ---: | ---: | ---: |\n"
        "| before | 100.0 % (20/20), 83.9 to 100.0 | 10.0 % (2/20), 2.8 to 30.1 | 15.0 % (3/20), 5.2 to 36.0 |\n"
        "| fine-tuning the visual weights on 20 % of the questions | 100.0 % (20/20), 83.9 to 100.0 "
        "| 40.0 % (8/20), 21.9 to 61.3; recovery 0.25 | 20.0 % (4/20), 8.1 to 41.6; recovery -0.10 |\n"
        "| fine-tuning the visual weights on 20 % of the questions; people to forget, other images |"
    ) in text
    assert "on 20 % of the people; people to forget, other images; people whom the attacker trained on | 100.0" in text
    assert (
        "### Membership: who?\n\nScores are compared.\n\n"
        "| variant | vanilla | unlearned | retain-only |\n| --- | ---: | ---: | ---: |\n"
        "| loss | 1.00 (1.00 to 1.00) | 0.53 (0.48 to 0.58) | – |\n"
    ) in text
    assert "<details>" not in text and "relearning.png" not in text
    drawn = attacks_of(relearn=RELEARN, membership=MEMBERSHIP, plots=["relearning"])
    assert "*again*.\n\n![" in drawn and "](report/relearning.png)\n\n| variant" in drawn and drawn.count("![") == 1


def test_budgets_are_told_only_if_there_are_several():
    one = attempt((20, 8, 4), attacker="all", share=0.2, steps=25, learning_rate=3e-4)
    other = attempt((20, 9, 4), attacker="all", share=0.2, steps=100, learning_rate=3e-3)
    best = attempt((20, 9, 4), "strongest", "all", 0.2, steps=100), attempt((20, 11, 4), "strongest", "all", 0.2)
    variants = {"strongest": "the strongest budget"}
    text = attacks_of(relearn=AttackResults("R", "A", cells=(*one,)))
    assert "| fine-tuning all weights on 20 % of the questions | 100" in text
    results = AttackResults("R", "A", variants=variants, cells=(*one, *other, *best[0], *best[1]))
    text = attacks_of(relearn=results)
    for words in ("; 25 steps at 0.0003 |", "; 100 steps at 0.003 |", "budget; fine-tuning all weights on 20 % of the"):
        assert words in text
    assert "of the questions; 100 steps |" in text
    assert attack_view.relearned(results_with(attacks={"relearn": results}))["unlearned"].mean == 0.55


def test_a_run_without_attacks_has_no_section_of_them():
    assert view.attacks(run_of()) is None


def test_an_attack_without_questions_says_so():
    names = ("membership", "leak", "probe", "prompts", "pixel_noise", "depth")
    text = attacks_of(models=TWO, **{name: AttackResults(name, "About.") for name in names})
    assert "Not measured: the data has no people whom no model ever saw." in text and "held_out=DIR" in text
    assert "no text-only question" in text and "no other images" in text and "no question to ask" in text
    assert "differ in size" in text and "no question has options" in text
    assert "This run has no retain-only model, which would" in text and "| --- |" not in text


@pytest.mark.parametrize("count", [8, 9])
def test_a_long_table_is_folded(count):
    cells = tuple(cell for i in range(count) for cell in attempt((1, 2, 3), f"variant {i}"))
    text = attacks_of(rephrase=AttackResults("Images", "About.", cells=cells))
    assert ("<details><summary>All 9 rows</summary>\n\n| variant" in text) == (count == 9)
    assert text.count("</details>") == (count == 9) and "| variant 7 | 5.0 % (1/20)" in text
