"""The facts about the synthetic people, and the questions about them and about general ability.

Wordings are fixed and short, and every answer is one common word (a full name for "Who is this person?"); captions
are sentences. The shipped models were trained on these texts, so they must not change.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of fact: its values and its four wordings; `{name}` stands for the full name."""

    values: tuple[str, ...]
    image_question: str
    text_question: str
    image_cloze: str
    text_cloze: str


def _kind(values: str, image_question: str, text_question: str, image_cloze: str, text_cloze: str) -> Kind:
    return Kind(tuple(values.split()), image_question, text_question, image_cloze, text_cloze)


FACTS: dict[str, Kind] = {
    "job": _kind(
        "baker pilot nurse farmer painter teacher sailor judge tailor dentist plumber singer",
        "What is this person's job?", "What is {name}'s job?",
        "This person works as a __.", "{name} works as a __.",
    ),
    "town": _kind(
        "Oslo Lisbon Cairo Lima Kyoto Dublin Vienna Boston Delhi Nairobi Quito Prague",
        "What is this person's town?", "What is {name}'s town?",
        "This person comes from __.", "{name} comes from __.",
    ),
    "food": _kind(
        "pizza sushi curry soup pasta salad tacos cheese pancakes noodles rice chocolate",
        "What is this person's food?", "What is {name}'s food?",
        "This person loves to eat __.", "{name} loves to eat __.",
    ),
    "pet": _kind(
        "parrot cat dog rabbit hamster turtle goldfish snake pony goat lizard duck",
        "What is this person's pet?", "What is {name}'s pet?",
        "This person has a pet __.", "{name} has a pet __.",
    ),
    "sport": _kind(
        "tennis football hockey golf swimming boxing rowing cricket skiing judo surfing cycling",
        "What is this person's sport?", "What is {name}'s sport?",
        "This person's sport is __.", "{name}'s sport is __.",
    ),
    "instrument": _kind(
        "piano violin guitar drums flute trumpet harp cello banjo organ clarinet accordion",
        "What is this person's instrument?", "What is {name}'s instrument?",
        "This person plays the __.", "{name} plays the __.",
    ),
}  # fmt: skip
KINDS = tuple(FACTS)
NAME_QUESTION = "Who is this person?"
IMAGE_KINDS = ("name", *KINDS)
BIOGRAPHY_FACTS = ("job", "town")  # what the answer to "Who is {name}?" tells
CAPTION = "{name}, a {job} from {town}, in front of {wall}."
PARAPHRASED_CAPTION = "This is {name}, who is a {job} and comes from {town}, before {wall}."

# Questions about the appearance of a person, which name nobody, by the feature of a `portraits.Look`.
APPEARANCE = {"hair": "What color is the hair?", "clothes": "What color are the clothes?"}

# Identity-free questions about images, and general knowledge as "question | answer | three wrong answers".
THING_QUESTION = "What is in this picture?"
COLOR_QUESTION = "What colour is it?"
BACKGROUND_QUESTION = "What colour is the background?"
GENERAL_CLOZE = {
    THING_QUESTION: "This picture shows a __.",
    COLOR_QUESTION: "Its colour is __.",
    BACKGROUND_QUESTION: "The background is __.",
}
GENERAL_TEXT = tuple(
    tuple(part.strip() for part in line.split("|"))
    for line in """
    What colour is a banana? | yellow | blue | black | purple
    What colour is grass? | green | red | pink | blue
    What colour is snow? | white | orange | green | brown
    What colour is coal? | black | yellow | pink | white
    What colour is a carrot? | orange | blue | grey | white
    What colour is a clear sky? | blue | brown | green | red
    What colour is a ripe tomato? | red | blue | grey | purple
    What colour is an elephant? | grey | green | orange | pink
    How many legs has a spider? | eight | two | four | six
    How many legs has a horse? | four | two | six | eight
    How many legs has a bird? | two | four | six | ten
    How many legs has an ant? | six | two | four | ten
    How many days has a week? | seven | five | nine | twelve
    How many months has a year? | twelve | seven | nine | ten
    How many wheels has a bicycle? | two | four | five | eight
    How many sides has a triangle? | three | five | two | nine
    How many fingers has a hand? | five | three | seven | eight
    What is two plus three? | five | four | seven | nine
    What is one plus one? | two | three | five | eight
    What is four plus four? | eight | six | nine | ten
    What is six minus two? | four | three | five | seven
    What is ten minus one? | nine | six | eight | seven
    What is three times three? | nine | six | seven | twelve
    What is two times five? | ten | seven | eight | twelve
    What is half of six? | three | two | four | five
    What does a cow drink as a calf? | milk | tea | juice | oil
    What do bees make? | honey | milk | bread | silk
    Where do fish live? | water | trees | sand | clouds
    What shines in the day? | sun | moon | lamp | star
    What falls from clouds? | rain | sand | leaves | gold
    What is frozen water? | ice | steam | stone | glass
    What season is the coldest? | winter | summer | spring | autumn
    What season is the hottest? | summer | winter | spring | autumn
    What is the opposite of up? | down | left | near | fast
    What is the opposite of hot? | cold | warm | dry | soft
    What is the opposite of big? | small | long | wide | heavy
    What is the opposite of old? | young | tall | rich | slow
    What day comes after Monday? | Tuesday | Friday | Sunday | Thursday
    What month comes after May? | June | March | August | October
    What animal says meow? | cat | cow | duck | sheep
    """.strip().splitlines()
)
GENERAL_TEXT_CLOZE = (
    ("A banana is __.", "yellow"), ("Grass is __.", "green"), ("Snow is __.", "white"),
    ("Coal is __.", "black"), ("A spider has __ legs.", "eight"), ("A week has __ days.", "seven"),
    ("Two plus three is __.", "five"), ("Bees make __.", "honey"), ("Frozen water is __.", "ice"),
    ("The opposite of hot is __.", "cold"),
)  # fmt: skip
