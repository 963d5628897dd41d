"""Tests of the reader of JSON files and texts."""

import json
import os

import pytest

from vkd_jax.runtime import json_files
from vkd_jax.types import UserError

DEEP = 100_000

DAMAGED = {
    "empty": (b"", "not JSON"),
    "cut off": (b'{"a": [1, 2', "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8: byte 7 is 0xff"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "deep arrays": (b"[" * DEEP + b"]" * DEEP, "nested more than 64"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested more than 64"),
    "65 levels": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64"),
    "deep and open": (b"[" * DEEP, "nested more than 64"),
    "an array": (b"[1]", "expected an object, not an array"),
    "a text": (b'"abc"', "expected an object, not the text 'abc'"),
    "a number": (b"1", "expected an object, not the number 1"),
    "null": (b"null", "expected an object, not null"),
    "a boolean": (b"true", "expected an object, not the boolean True"),
    "NaN": (b'{"a": {"b": [0, NaN]}}', "a.b[1] has the number nan"),
    "infinity": (b'{"a": -Infinity}', "a has the number -inf"),
    "overflow": (b'{"a": 1e999}', "a has the number inf"),
    "long integer": (b'{"a": ' + b"9" * 5000 + b"}", ": it has a whole number of more than 4,300 digits"),
    "a key with two values": (b'{"b": [{"a": 1, "a": 2}]}', "an object has the key 'a' twice, with two values"),
    "a key with 1 and true": (b'{"a": 1, "a": true}', "an object has the key 'a' twice, with two values"),
    "combining marks": (
        ('{"a": "x%s"}' % ("\u0301\u0323" * 101)).encode(),
        "a has more than 200 combining marks in a row",
    ),
    "lone surrogate": (b'{"a": "x\\ud800"}', "a is not Unicode: '\\ud800' is half of a surrogate pair"),
    "lone surrogate in a key": (b'{"b": {"\\udfff": 1}}', "b is not Unicode"),
    "NUL": (b'{"a": ["\\u0000"]}', "a[0] contains the character NUL"),
    "NUL in a key": (b'{"\\u0000": 1}', "it contains the character NUL"),
}


@pytest.mark.parametrize(("data", "problem"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_sentence_with_its_name_and_what_to_do(tmp_path, data, problem):
    path = tmp_path / "state.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as raised:
        json_files.read_json(path, remedy="delete it")
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and problem in message and message.endswith("; delete it.")
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ('\ufeff{"a": "\\ud83d\\ude00"}', dict, {"a": "😀"}),
        ("[1.5, null, true]", list, [1.5, None, True]),
        ('{"a":' * 64 + "1" + "}" * 64, dict, ...),
        ('{"a": "x%s"}' % ("\u0301" * 200), dict, ...),
        ("3", None, 3),
        ('{"a": 1, "b": 2, "a": 1}', dict, ...),  # the same value twice
    ],
)
def test_good_json_is_returned(text, expected, value):
    result = json_files.parse_json(text.encode(), "a.json", expected)
    assert result == (json.loads(text) if value is ... else value)


def test_lines_are_numbered_and_may_contain_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"b": 1}\n', encoding="utf-8")
    assert list(json_files.read_json_lines(path)) == [(1, {"a": "x\u2028y"}), (3, {"b": 1})]
    path.write_text('{"a": 1}\n[2]\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: expected an object, not an array"):
        list(json_files.read_json_lines(path))


def test_lines_that_end_with_carriage_returns_alone_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\r{"b": 2}\r')
    problem = (
        r"a\.jsonl, line 1: it has carriage returns \(CR\) alone, which end no line; end lines with LF or CR LF\.$"
    )
    with pytest.raises(UserError, match=problem):
        list(json_files.read_json_lines(path))
    path.write_bytes(b'{"a": 1}\r\n{"b":\r2}\r\n')  # white space within an object
    assert list(json_files.read_json_lines(path)) == [(1, {"a": 1}), (2, {"b": 2})]


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="named pipe"):
        json_files.read_json(tmp_path / "config.json")
