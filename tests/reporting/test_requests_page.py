"""The goals of requests that follow each other, for several ledgers in one table."""

from vkd_jax.reporting import requests_page


def cells(forgotten, general):
    cell = {"n": 100, "chance": 0.25}
    return {
        "forgotten": cell | {"correct": forgotten, "accuracy": forgotten / 100},
        "general": cell | {"correct": general, "accuracy": general / 100},
    }


def ledger(**last):
    sequences = {name: [{"after": cells(*counts), "text_identical": True}] for name, counts in last.items()}
    return {"start": cells(100, 80), "sequences": sequences}


def test_each_sequence_has_a_row_that_tells_intervals_and_goals():
    page = requests_page.goals({"sixty people": ledger(requests=(35, 76), naive=(36, 75))})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[2:4]]
    assert rows == [
        ["sixty people", "35.0 (26.4 to 44.7), ≤ 35.0", "–", "–", "–", "76.0 (66.8 to 83.3), ≥ 76.0", "yes"],
        [
            *("sixty people, naive repetition", "36.0 (27.3 to 45.8), not ≤ 35.0", "–", "–", "–"),
            *("75.0 (65.7 to 82.5), not ≥ 76.0", "yes"),
        ],
    ]
    sentences = requests_page.verdicts(ledger(requests=(36, 76)))
    assert sentences[0] == "Everyone forgotten so far: 36.0 % (36 of 100); goal at most 35.0 %: **missed**."
    assert sentences[1] == "General ability: 76.0 % (76 of 100), from 80.0 % (80 of 100); goal at least 76.0 %: met."
