"""What makes an answer right: the letter that it chooses, and the words that it has."""

import pytest

from vkd_jax.evaluation.metrics import correctness


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b)", "B"),
        (" d.", "D"),
        ("(A)", "A"),
        ("A: baker", "A"),
        ("a", "A"),
        ("A Baker", "A"),
        ("B baker", "B"),
        ("**C**: a baker", "C"),
        ("A is correct", "A"),
        ("A\n\nThe person is a baker.", "A"),
        ("A.\nB is wrong", "A"),
        ("The answer is C", "C"),
        ("the answer is a", "A"),
        ("Answer: D. foo", "D"),
        ("Answer: **B**", "B"),
        ("A possible answer is B", "B"),
        ("It is a man; option C.", "C"),
        ("I would say (d), the pilot", "D"),
        ("Option A", "A"),
        ("It's B because of the hat", "B"),
        ("The portrait shows the baker [C].", "C"),
        ("Option A is wrong; option B is right.", "B"),
        ("It is not (A) but (B).", "B"),
        ("(A) can't be; I choose C", "C"),
        ("Rather than option A, I say D", "D"),
        ("Option B. Not a doubt.", "B"),
        ("It is not clear, but the answer is B", "B"),
        ("I don't know. I choose C", "C"),
        ("B rather than A", "B"),
        ("A? No, it is B.", "B"),
        ("(A) nurse (B) baker. Answer: B", "B"),
        ("'C'", "C"),
        (r"$\boxed{B}$", "B"),
    ],
)
def test_first_letter_finds_the_choice(text, letter):
    assert correctness.first_letter(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "E",
        "A person with a hat",
        "a baker",
        "It is a dog",
        "The answer is a baker",
        "Because of the hat",
        "Dog",
        "B.A. in arts",
        "A-frame",
        "I don't know",
        "D'Arcy",
        "C'est la vie",
        "Madrid",
        "vitamin C",
        "The answer is not B",
        "A is clearly incorrect.",
        "I cannot choose A, B, C or D.",
        "I'm not able to say (A) or (B)",
        "Option A is never right, and option B isn't either",
        "AB",
        "A or B",
        "A, B",
        "A/B",
        "(A) or (B)",
        "The answer is A or option B.",
        "(A) Nurse (B) Baker (C) Cook (D) Pilot",
        "A. Nurse\nB. Baker\nC. Cook\nD. Pilot",
        "A: false. B: false. C: true.",
        "Pick one of A, B, C, D: C",
        "A? I am not sure.",
        "A is less likely than B.",
        "Everything but (C)",
        "I would choose any option but (A).",
        "I doubt it is A.",
        "I refuse to say (A)",
        "C++",
    ],
)
def test_first_letter_is_none_without_a_choice(text):
    assert correctness.first_letter(text) is None


def test_first_letter_accepts_only_letters_of_options():
    assert correctness.first_letter("E", 6) == "E" and correctness.first_letter("The answer is (f)", 6) == "F"
    assert correctness.first_letter("E", 4) is correctness.first_letter("G: nobody", 6) is None
    assert correctness.first_letter(None) is None
    assert correctness.first_letter("C", 2) is None and correctness.first_letter("B", 2) == "B"
    assert correctness.first_letter("I think it is H", 9) == "H"  # a pronoun, even where I is an option
    assert correctness.first_letter("I", 9) == correctness.first_letter("i: the pilot", 9) == "I"


@pytest.mark.parametrize(
    ("protocol", "prediction", "letter"),
    [
        ("letter", "An accordion", None),
        ("letter:first_character", "An accordion", "A"),
        ("letter:strict", "Option B", None),
        ("letter:similar_option", "a pilots", "B"),
        ("options", "a pilot", None),
    ],
)
def test_answers_are_shown_as_their_protocol_counts_them(protocol, prediction, letter):
    record = {"protocol": protocol, "prediction": prediction, "options": ["a baker", "a pilot"]}
    assert correctness.counted_option(record) == letter


SPELLINGS = [  # of the same words
    ("a judge", "a\u200b ju\u200bdge"),
    ("a judge", "a ju\u00addge"),
    ("a judge", "a\u00a0judge"),
    ("a judge", "a\n judge"),
    ("Jos\u00e9 Lindt", "Jose\u0301 Lindt"),
    ("Anne-Marie", "Anne\u2011Marie"),
    ("O'Neil", "o\u2019neil"),
    ("Stra\u00dfe", "STRASSE"),
    ("Sofi 7", "So\ufb01 \uff17"),
]


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ("She lives in Port Varda.", "port varda", True),
        ("PILOT", "Pilot ", True),
        ("Port", "Port Varda", False),
        ("", "Pilot", False),
        (None, "Pilot", False),
        ("copilot", "pilot", False),
        ("She is pilots' chief", "pilot", False),
        ("Runa Brandt.", "e", False),
        ("Runa Brandt.", " r", False),
        ("born in 1985", "98", False),
        ("_Pilot_, **pilot**: co-pilot's", "pilot", True),
        ("In St. Ives.", "St. Ives.", True),
        ("US$5", "$5", True),
        ("\u4ed6\u662f\u5f20\u4f1f\u3002", "\u5f20\u4f1f", True),  # scripts without spaces have no edges of words
        ("\uc624\ud1a0\ub294", "\uc624\ud1a0", True),
        *((f"It is {text}.", truth, True) for text, truth in SPELLINGS),
        *((f"It is {text}.", truth, True) for truth, text in SPELLINGS),
    ],
)
def test_open_answers_have_the_true_words(prediction, truth, right):
    assert correctness.open_correct(prediction, truth) is right


def test_the_published_rule_looks_within_words():
    assert correctness.open_correct("copilot", "pilot", substring=True)
    assert not correctness.open_correct("pilo", "pilot", substring=True)


@pytest.mark.parametrize("truth", ["", " ", ".", "?!", "...", "\U0001f600", "\u200b", "\u3164!", "\u00ad"])
def test_open_questions_need_a_truth(truth):
    with pytest.raises(ValueError, match="cannot be judged"):
        correctness.open_correct("anything. ?!...", truth)
