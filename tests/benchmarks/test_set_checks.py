"""What the sets of a benchmark may not have in common, and which faults of a few rows are a warning."""

import dataclasses
import io
import re

import pytest
from PIL import Image

from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.benchmarks.rows import EncodedImage
from vkd_jax.benchmarks.set_checks import SetChecks, check_held_out, check_names
from vkd_jax.types import Example, UserError

SETS = Mllmu.EVAL_SETS  # forget, test, retain, retain_test, real


def image(color, **options):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG", **options)
    return EncodedImage.decoded(stream.getvalue())


def row(name, color, *questions, person="Ada", **fields):
    """One question after the other about an image."""
    shown = image(color, **fields.pop("options", {})) if isinstance(color, str) else None
    return [
        Example(f"{name}/{i}", person, shown, f"{name}/0" if shown else "", question, "a judge", task="generation")
        for i, question in enumerate(questions)
    ]


def read(**sets):
    checks = SetChecks(SETS)
    return {name: [e for checked in checks.checked(name, rows) for e in checked] for name, rows in sets.items()}


def renamed(*rows):
    """Rows whose questions differ, so that no question is there twice."""
    return [[dataclasses.replace(e, question=f"{e.question} {i}") for e in asked] for i, asked in enumerate(rows)]


FORGET = [row("f0", "red", "Who?", "Why?"), row("f1", "blue", "Who?")]
OTHER = [row("o0", "green", "Who?", person="Otto")]
REFUSED = {
    "a test set that is the forget set": (dict(forget=FORGET, test=FORGET), "3 of 3 .* of the set test are .* forget"),
    "encoded anew": (
        dict(forget=FORGET[1:], test=[row("t", "blue", "Who?", options=dict(compress_level=0))]),
        "1 of 1 .* test are also in the set forget, such as f1/0 and t/0",
    ),
    "with the question spelled otherwise": (
        dict(forget=FORGET[1:], test=[row("t", "blue", " WHO\u200b?")]),
        "1 of 1 .* test are also in the set forget",
    ),
    "with other punctuation at its end": (
        dict(forget=FORGET[1:], test=[row("t", "blue", "Who ...")]),
        "1 of 1 .* test are also in the set forget",
    ),
    "a small test set of a larger forget set": (dict(forget=FORGET, test=FORGET[1:]), "1 of 1 .* of the set test"),
    "a retained test set that is the retain set": (dict(retain=OTHER, retain_test=OTHER), "retain_test are also in"),
    "a general set that is the retain set": (dict(retain=OTHER, real=OTHER), "1 of 1 .* real are .* set retain"),
    "a question to forget and to retain": (
        dict(forget=FORGET, retain=[*OTHER, row("r", "red", "Why?", "When?")]),
        "1 questions are both to be forgotten and not: .* forget and retain share f0/1 and r/0",
    ),
    "a question to forget in a holdout and to retain": (dict(retain=FORGET[1:], test=FORGET), "both to be forgotten"),
    "training both ways": (dict(finetune_forget=FORGET[:1], finetune_retain=FORGET), "sets finetune_forget and"),
    "people who share one image": (
        dict(forget=[row("a", "gray", "Who?", person="A"), row("b", "gray", "Who?", person="B")]),
        "1 of 1 questions of the set forget are asked about somebody else with the same image, such as a/0 and b/0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sets_that_cannot_be_told_apart_are_refused(name):
    sets, problem = REFUSED[name]
    with pytest.raises(UserError, match=problem):
        read(**sets)


ALLOWED = {
    "other questions about the images": dict(forget=FORGET, test=[row("t", "red", "Where?")]),
    "other images": dict(forget=FORGET, test=[row("t", "black", "Who?", "Why?")]),
    "the same questions in text": dict(forget=[row("f", None, "Who?")], test=[row("t", None, "Who?")]),
    "a subset for training": dict(finetune_retain=FORGET, finetune_train_retain=FORGET),
    "no set to forget, as in a suite": dict(pope_random=FORGET, pope_popular=FORGET),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_sets_that_may_be(name, caplog):
    checks = SetChecks(() if "suite" in name else SETS)
    for part, rows in ALLOWED[name].items():
        assert [list(checked) for checked in checks.checked(part, rows)] == rows
    assert not caplog.text


def test_two_facts_of_one_question_may_be_in_both_sets():
    pairs = [dataclasses.replace(FORGET[1][0], pair=fact) for fact in ("job", "town")]
    read(forget=[[pairs[0]]], retain=[[pairs[1]]])
    with pytest.raises(UserError, match="both to be forgotten and not"):
        read(forget=[[pairs[0]]], retain=[[pairs[0]]])


def test_a_few_such_questions_are_a_warning(caplog):
    some = [row(f"t{i}", color, "Who?") for i, color in enumerate(("red", "green", "black"))]
    assert read(forget=FORGET, test=some)["test"] == [example for asked in some for example in asked]
    people = [row(f"p{i}", color, "Who?", person=f"{i}") for i, color in enumerate(("red", "green", "black", "red"))]
    read(forget=people)
    assert caplog.messages == [
        "1 of 3 questions with an image of the set test are also in the set forget, such as f0/0 and t0/0",
        "1 of 3 questions of the set forget are asked about somebody else with the same image, such as p0/0 and p3/0",
    ]


def wrong(*texts, paraphrase="The job is judge."):
    return [dataclasses.replace(FORGET[1][0], perturbed=texts, paraphrase=paraphrase)]


@pytest.mark.parametrize("text", ["a judge", " A  Judge", "a ju\u00addge"])
def test_wrong_answers_that_are_true_are_left_out_or_refused(text, caplog):
    rows = renamed(wrong("a nurse", text), wrong("a cook"), wrong(text))
    assert [e.perturbed for e in read(forget=rows)["forget"]] == [("a nurse",), ("a cook",), ()]
    assert "1 of 3 questions of the set forget have wrong answers that are the true one, such as f1/0" in caplog.text
    with pytest.raises(UserError, match="2 of 3 questions of the set retain have wrong answers that are the true one"):
        read(retain=renamed(wrong(text), wrong(text, text), wrong("a cook")))


@pytest.mark.parametrize(
    ("fields", "kept", "problem"),
    [
        (dict(keywords=("Judge", "JUDGE ", "a judge")), dict(keywords=("Judge", "a judge")), "the same keyword twice"),
        (dict(keywords=("judge",) * 2, rule="fiubench:upstream"), {}, "the same keyword twice"),
        (dict(perturbed=("A cook.", "a cook", "a nurse")), dict(perturbed=("A cook.", "a nurse")), "there twice"),
        (dict(perturbed=("a cook", "A judge")), dict(perturbed=("a cook",)), "that are the true one or there twice"),
        (dict(perturbed=("a cook", "a judge.")), dict(perturbed=("a cook",)), "that are the true one or there twice"),
        (dict(perturbed=("a cook", "a nurse"), keywords=("judge", "a judge")), {}, ""),
    ],
)
def test_equal_keywords_and_wrong_answers_count_once(fields, kept, problem, caplog):
    fine = [dataclasses.replace(FORGET[1][0], perturbed=("a nurse",), keywords=("judge",))]
    rows = renamed([dataclasses.replace(FORGET[1][0], **fields)], fine)
    read_rows = read(forget=rows)["forget"]
    assert read_rows[0] == dataclasses.replace(rows[0][0], **kept)
    assert bool(re.search(f"1 of [12] questions of the set forget have .*{problem}", caplog.text)) is bool(problem)


def test_keywords_that_the_true_answer_lacks_are_refused(caplog):
    all_keywords = (("x", "JUDGE"), ("a nurse",))
    rows = renamed(*[[dataclasses.replace(FORGET[1][0], keywords=keywords)] for keywords in all_keywords])
    assert read(forget=rows)["forget"] == [example for [example] in rows]
    assert "1 of 2 questions of the set forget have keywords of which none is in the true answer" in caplog.text
    with pytest.raises(UserError, match="2 of 3 questions of the set retain have keywords of which none is in"):
        read(retain=renamed(*rows, rows[1]))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(perturbed=("a cook", ".")), "have wrong answers without a letter or a digit"),
        (dict(perturbed=("?", "\u3164.")), "have wrong answers without a letter or a digit"),
        (dict(paraphrase="."), "have a paraphrase of the true answer without a letter or a digit"),
        (dict(paraphrase="A nurse", perturbed=("a  NURSE", "a cook")), "have a paraphrase .* that is one of the wrong"),
        (dict(keywords=("a",)), "have only keywords of one letter or digit"),
        (dict(options=("a judge", "A Judge", "a cook")), "have the same option twice"),
        (dict(options=("a judge", "a cook", "A cook.")), "have the same option twice"),
        (dict(options=("a judge", "a cook", "nan ")), "have a text such as nan, NaN or <NA>"),
        (dict(answer="<NA>"), "have a text such as nan, NaN or <NA>"),
        (
            dict(answer="the mayor of a town", keywords=("The", "of A")),
            "have only keywords of one letter or digit, or such as 'the'",
        ),
        (dict(options=("B. nurse", "A. judge")), "have options that begin with the letter of another place"),
        (dict(options=("(C) x", "b) nurse", "A")), "have options that begin with the letter of another place"),
        (dict(options=("nurse", "0"), answer="0"), "have a number or a letter for the true option, unlike the others"),
        (dict(options=("nurse", "judge", "B"), answer="B"), "have a number or a letter for the true option"),
        (dict(answer="a jud\N{REPLACEMENT CHARACTER}e"), "have the character .*, which stands for one that was lost"),
        (dict(answer="ASSISTANT: a judge"), "have answers that begin with the name of who speaks"),
    ],
)
def test_faults_of_most_questions_are_refused(fields, problem, caplog):
    bad = [dataclasses.replace(FORGET[1][0], **fields)]
    good = [dataclasses.replace(FORGET[1][0], perturbed=("a cook",), keywords=("judge", "a"), paraphrase="A judge.")]
    good_options = dict(options=("a judge", "a cook"), perturbed=(), keywords=(), paraphrase="")
    fine = [good, [dataclasses.replace(good[0], **good_options)]]
    assert read(forget=fine)["forget"] == [e for asked in fine for e in asked] and not caplog.text
    read(forget=renamed(bad, *fine, *fine))
    assert "1 of " in caplog.text and re.search(problem, caplog.text)
    with pytest.raises(UserError, match=problem):
        read(forget=renamed(bad, bad, bad, *fine))


def test_answers_that_name_somebody_else_are_a_warning(caplog):
    asked = [row(name, color, "Who?", person=name) for name, color in (("Ada", "red"), ("Otto", "blue"))]
    named = [[dataclasses.replace(e, answer=e.person.upper()) for e in part] for part in asked]
    read(forget=[*named, row("j", "gray", "Job?"), row("k", "gray", "Null?", person="Nan")])
    assert not caplog.text
    read(forget=[named[0], [dataclasses.replace(named[1][0], answer="Ada ")]])
    problem = "whose answer is the name of one of its people have somebody else's, such as Otto/0"
    assert caplog.messages == [f"1 of 2 questions of the set forget {problem}"]


def test_options_that_may_be(caplog):
    options = [("A. judge", "B. nurse"), ("B. Obama", "J. Biden"), ("7", "12"), ("A", "AB", "O"), ("judge", "A")]
    read(retain=[[dataclasses.replace(FORGET[1][0], options=each, answer=each[0])] for each in options])
    assert not caplog.text


def test_answers_to_train_on_have_words(caplog):
    rows = [[dataclasses.replace(FORGET[1][0], task="chat", answer=answer)] for answer in ("a cook", ".", "\u200b?")]
    read(finetune_retain=[*rows[:2], rows[0]])
    assert "1 of 3 questions of the set finetune_retain have answers without a letter or a digit" in caplog.text
    with pytest.raises(UserError, match="2 of 3 questions of the set finetune_forget have answers without a letter"):
        read(finetune_forget=rows)


def test_a_paraphrase_that_is_not_seen_is_none():
    assert [e.paraphrase for e in read(forget=[wrong("a cook", paraphrase="\u200b ")])["forget"]] == [""]


def test_one_fact_has_one_answer_in_both_modalities(caplog):
    pair = [dataclasses.replace(FORGET[1][0], pair="job", task="cloze", answer=answer) for answer in ("cook", "nurse")]
    pair[1] = dataclasses.replace(pair[1], image=None, image_id="")
    read(forget=[pair])
    assert "1 of 1 questions of the set forget have another answer than the same fact in the other mod" in caplog.text


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(answer="a cook"), "have two different answers, such as f1/0 and f1/0"),
        (dict(answer="a cook", question=" who\u200b?"), "have two different answers"),
        (dict(answer="a cook", image=image("blue", compress_level=0)), "have two different answers"),
        (dict(options=("a cook", "a judge"), answer="a cook"), "have two different answers"),
        (dict(image=None, image_id="", answer="a cook"), "have two different answers"),
        (dict(), "are there twice"),
        (dict(answer="A  judge"), "are there twice"),
    ],
)
def test_a_question_has_one_answer_and_is_there_once(fields, problem, caplog):
    common = {key: value for key, value in fields.items() if key in ("options", "image", "image_id")}
    first = [dataclasses.replace(FORGET[1][0], **common, task="cloze")]
    second = [dataclasses.replace(first[0], **fields)]
    others = renamed(*[FORGET[1]] * 3)
    read(forget=[first, *others, second])
    assert "1 of 4 " in caplog.text and problem in caplog.text
    with pytest.raises(UserError, match=f"1 of 1 questions of the set forget {problem}"):
        read(forget=[first, second])


def test_a_row_of_a_suite_is_there_once(caplog):
    rows = renamed(*[FORGET[1]] * 3)
    checks = SetChecks(())
    assert [list(checks.checked(name, [*rows, rows[0]])) for name in ("pope_random", "pope_popular")]
    assert "1 of 3 questions of the set pope_random are there twice, such as f1/0 and f1/0" in caplog.text
    with pytest.raises(UserError, match="3 of 3 questions of the set mmvet are there twice"):
        list(checks.checked("mmvet", rows * 3))


def test_questions_in_text_may_come_with_several_images_of_somebody(caplog):
    text = row("t", None, "What does Ada do?")
    rows = [row(f"f{i}", color, "Who?") + text for i, color in enumerate(("red", "blue", "black"))]
    assert read(retain=rows)["retain"] and not caplog.text
    with pytest.raises(UserError, match="4 of 4 questions of the set forget are there twice"):
        read(forget=rows * 2)
    with pytest.raises(UserError, match="1 of 1 questions of the set forget are there twice"):
        read(forget=[text] * 3)


def test_rows_to_train_on_are_there_once():
    captions = [[dataclasses.replace(FORGET[1][0], task="chat", answer=answer)] for answer in ("a cook", "a judge")]
    read(finetune_forget=captions)
    with pytest.raises(UserError, match="2 of 2 questions of the set finetune_forget are there twice"):
        read(finetune_forget=captions * 3)


@pytest.mark.parametrize("first", [FORGET[1], row("f", None, "What is Ada's job?")])
def test_two_sets_do_not_contradict_each_other(first, caplog):
    asked = [dataclasses.replace(first[0], task="cloze", question=f"{first[0].question} {i}") for i in range(3)]
    other = [dataclasses.replace(e, answer="a cook") for e in asked]
    more = renamed(*[row("t", "black", "Where?")] * 9)  # so that few of the questions are in both sets
    forget = [asked, *renamed(*[row("g", "gray", "Where?")] * 9)]
    read(forget=forget, test=[*more, other[:1] + asked[1:]])
    assert "1 of 3 questions of the set test have another answer in the set forget, such as f" in caplog.text
    with pytest.raises(UserError, match="2 of 3 questions of the set test have another answer in the set forget"):
        read(forget=forget, test=[*more, other[:2] + asked[2:]])
    sentences = [[dataclasses.replace(e, task="generation") for e in part] for part in (asked, other)]
    read(forget=[*sentences[:1], *forget[1:]], test=[*more, sentences[1]])  # may say the same in other words


@pytest.mark.parametrize(
    "fields",
    [
        dict(person="Eve", question="Where?"),
        dict(options=("a cook", "a nurse"), answer="a cook"),  # which of these is true?
        dict(task="generation", answer="She is a judge."),  # asked for a sentence, not for a word
    ],
)
def test_questions_of_the_same_words_may_ask_something_else(fields, caplog):
    first = dataclasses.replace(FORGET[1][0], options=("a judge", "a nurse"), task="classification")
    read(forget=[[first], [dataclasses.replace(first, **fields)]])
    assert not caplog.text


def test_a_question_in_text_is_not_both_to_be_forgotten_and_not():
    forget = [row("f", None, "What does Ada do?")]
    read(forget=forget, retain=[row("r", None, "What does Ada do?", person="Otto"), row("s", None, "Does Ada?")])
    with pytest.raises(UserError, match="1 questions are both to be forgotten and not: .* forget and retain share f/0"):
        read(forget=forget, retain=[row("r", None, "what does  ADA do?")])


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (row("h", "white", "Who?", person="ADA"), "1 person also in the set forget: ADA; give other people"),
        (row("h", "red", "Where?", person="Zoe"), "1 images also in the set forget: f0/0; give other people"),
        (row("h", "red", "Where?", person=""), "1 images also in the set forget"),
    ],
)
def test_held_out_people_are_not_in_the_data(other, problem):
    check_held_out(row("h", "white", "Who?", person="Zoe"), {"forget": FORGET[0]}, "held_out=DIR")
    check_held_out(row("h", "white", "Who?", person=""), {"forget": FORGET[0]}, "held_out=DIR")
    with pytest.raises(UserError, match=problem):
        check_held_out(other, {"retain": OTHER[0], "forget": FORGET[0]}, "held_out=DIR")


def test_no_person_to_forget_is_in_a_set_for_training_under_another_spelling():
    sets = {"forget": FORGET[0], "finetune_retain": row("r", "blue", "Who?", person="ADA")}
    with pytest.raises(UserError, match="set forget has 1 person who may be in the set finetune_retain .*: Ada and AD"):
        check_names(sets, SETS)
    check_names(sets | {"finetune_retain": OTHER[0]}, SETS)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (dict(retain=FORGET[1]), "1 person of the set forget, which is .* also in the set retain, .*: Ada"),
        (dict(retain_test=FORGET[1]), "also in the set retain_test"),
        (dict(real=FORGET[1]), "also in the set real"),
        (dict(finetune_retain=FORGET[1]), "also in the set finetune_retain"),
        (dict(finetune_forget=FORGET[1], retain=FORGET[1]), "also in the set retain"),
        (dict(finetune_forget=FORGET[1] + OTHER[0]), "finetune_forget has 1 person not in the set forget: Otto"),
        (dict(forget=OTHER[0], finetune_forget=FORGET[1]), "finetune_forget has 1 person not in the set forget: Ada"),
    ],
)
def test_people_to_forget_are_nowhere_retained_unless_facts_divide_them(more, problem):
    sets = {"forget": FORGET[0]} | more
    with pytest.raises(UserError, match=problem):
        check_names(sets, SETS)
    if "retained" in problem or "also" in problem:
        check_names(sets, SETS, shares_people=True)


def test_training_forgets_most_of_the_people_to_forget(caplog):
    people = [row(name, None, "Who?", person=name)[0] for name in "abcd"]
    check_names({"forget": people, "finetune_forget": people[1:]}, SETS)
    assert caplog.messages == ["1 of 4 people of the set forget are not in the set finetune_forget, such as a"]
    with pytest.raises(UserError, match="3 of 4 people of the set forget are not in the set finetune_forget, such as"):
        check_names({"forget": people, "finetune_forget": people[3:]}, SETS)
