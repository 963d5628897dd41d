"""Readers of things that others wrote accept an input or raise `UserError`, whatever its bytes are.

Hypothesis changes good inputs, builds JSON of the right keys and wrong values, and tries random bytes. It runs the same
examples each time. `tests/programs/fuzz.py` searches the same readers for longer; see docs/testing.md.
"""

import json

import pytest
from fuzz_targets import SEEDS, TARGETS, accepts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = 300
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

NUMBERS = st.integers(-3, 70) | st.sampled_from([2**31, 2**63, -(2**63), 10**30]) | st.floats()
TEXTS = st.text(max_size=8) | st.sampled_from(["", "..", "../a", "/", "a\0b", "\ud800", "F32", "x", "A", "Pure_Text"])
KEYS = st.sampled_from(
    ["a", "b", "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "file_name", "question"]
    + ["answer", "options", "person", "Question", "Options", "Correct_Answer", "Ground_Truth", "Type", "bytes", "A"]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed(draw, seed):
    """A good input with a few of its bytes replaced, removed, repeated or inserted."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 8)))
        data[start:stop] = draw(st.binary(max_size=4) | st.sampled_from([b'"', b"[", b"]", b"{", b"}", b"null", b"-1"]))
    return bytes(data)


@st.composite
def spliced(draw, seed):
    """A good input whose JSON has another value, or another key, in one place."""
    start = next((start for start in (0, 2, 4) if is_json(seed[start:])), None)
    if start is None:
        return seed
    document = json.loads(seed[start:])
    parent, key, value = None, None, document
    while isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        parent, key = value, draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        value = parent[key]
    if parent is None:
        document = draw(JSON)
    elif isinstance(parent, dict) and draw(st.booleans()):
        parent[draw(KEYS | TEXTS)] = parent.pop(key)
    else:
        parent[key] = draw(JSON)
    return seed[:start] + json.dumps(document).encode()


def is_json(data):
    try:
        return isinstance(json.loads(data), (dict, list))
    except ValueError:
        return False


def inputs(name):
    """The strategy of a target's bytes."""
    document = st.builds(lambda value: json.dumps(value).encode(), JSON)
    heads = {
        "safetensors": st.binary(min_size=1, max_size=1).map(lambda b: b"\x01" + b),
        "parquet": st.binary(min_size=4, max_size=4),
    }
    document = st.builds(lambda head, body: head + body, heads.get(name, st.just(b"")), document)
    return st.one_of(*map(changed, SEEDS[name]), *map(spliced, SEEDS[name]), document, st.binary(max_size=64))


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_accepted(name):
    assert accepts(TARGETS[name], SEEDS[name][0])


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_raises_nothing_but_a_user_error(name):
    @SETTINGS
    @given(inputs(name))
    def check(data):
        accepts(TARGETS[name], data)

    check()
