"""Texts that users see: one line without control characters, of bounded length, with short lists."""

import io
import logging as std_logging
import pickle
import re
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from vkd_jax import messages
from vkd_jax.config import command_line
from vkd_jax.config.fields import FieldError
from vkd_jax.messages import listed
from vkd_jax.runtime import log
from vkd_jax.types import UserError

HOSTILE = [  # text from data, and how it is shown
    ("a\nerror: b", r"a\nerror: b"),
    ("a\r\nb", r"a\r\nb"),
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("\x9b31m", r"\x9b31m"),
    ("gpj.\u202eexe", r"gpj.\u202eexe"),
    ("\u2066a\u2069", r"\u2066a\u2069"),
    ("a\u2028b", r"a\u2028b"),
    ("\ud800", r"\ud800"),
    ("\x00", r"\x00"),
    ("Zoë 東京 मिस्त्री می‌خواهم 👩‍🔬 a\u3000b", "Zoë 東京 मिस्त्री می‌خواهم 👩‍🔬 a\u3000b"),
]


@pytest.fixture(autouse=True)
def temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_control_characters_are_visible_wherever_a_message_is_shown(text, shown, capsys):
    assert messages.escaped(messages.escaped(text)) == shown
    assert str(UserError(f"{text} is bad")) == f"{shown} is bad"
    assert str(FieldError("data.forget", text).within("a")) == f"a.data.forget: {shown}"
    assert listed([text]) == shown
    assert command_line.bad_input(f"{text}.") == 2
    command_line.show(text)
    captured = capsys.readouterr()
    assert captured.err == f"error: {shown}.\n"
    assert captured.out == messages.escaped(text, keep="\n\t") + "\n"


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_log_lines_are_escaped(text, shown):
    record = std_logging.LogRecord("absl", std_logging.INFO, log.__file__, 1, "file %s: %d", (text, 3), None)
    assert log._escape(record) and record.getMessage() == f"file {shown}: 3"
    lines = std_logging.LogRecord("jax", std_logging.WARNING, "/jax/x.py", 1, "two\nlines \x1b[0m", (), None)
    assert log._escape(lines) and lines.getMessage() == "two\nlines \\x1b[0m"


def test_an_exception_in_the_log_is_one_line():
    raised = (OSError, OSError("No space\nleft"), None)
    record = std_logging.LogRecord("absl", std_logging.ERROR, "/clu/x.py", 1, "in %s", ("a thread",), raised)
    assert log._escape(record) and std_logging.Formatter().format(record) == r"in a thread: OSError: No space\nleft"


def test_only_the_main_thread_shows_a_traceback(capsys, monkeypatch):
    lines, error = [], OSError("No space left")
    monkeypatch.setattr(log.logging, "error", lambda text, exc_info: lines.append((text, exc_info[1])))
    log._show_exception(OSError, error, None)
    assert capsys.readouterr().err == "OSError: No space left\n" and not lines
    thread = threading.Thread(target=log._show_exception, args=(OSError, error, None))
    thread.start()
    thread.join()
    assert capsys.readouterr().err == "" and lines == [("in a thread", error)]


@pytest.mark.parametrize(
    "error",
    [
        UserError("x" * 15_000 + " Do this."),
        UserError("\x1b" * 15_000 + " Do this."),
        FieldError("a" * 5_000, "Do this."),
        UserError(f"The tensors {listed(['t' * 500] * 9)} are {'un' * 400}known. Do this."),
    ],
)
def test_a_message_is_one_bounded_line_that_says_what_to_do_and_where_all_of_it_is(error, capsys):
    assert len(str(error)) == messages.MOST_CHARACTERS and str(error).endswith("Do this.")
    assert command_line.bad_input(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= messages.MOST_CHARACTERS and "Do this." in line
    path = re.search(r"\(the whole message is in (\S+)\)", line)[1]
    assert Path(path).read_text() == error.message + "\n"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # workers of a sweep send errors


def test_a_text_is_shown_whatever_the_terminal_encodes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    command_line.show("Zoë\n12 – 13")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"Zo\\xeb\n12 \\u2013 13\n"


def test_a_long_list_is_counted_and_written_to_a_file(tmp_path):
    assert listed(["a", "b", "c"]) == "a, b, c" and listed([]) == "nothing"
    assert listed(["a", "b", "c", "d"]) == "a, b, c, d"  # a file would save one name
    assert messages.choices(range(20)) == ", ".join(map(str, range(20)))
    assert not list(tmp_path.iterdir())
    items = [f"tensor {i}" for i in range(700)]
    text = listed(items, "; ")
    (file,) = tmp_path.iterdir()
    assert text == f"tensor 0; tensor 1; tensor 2 and 697 more (all 700 are listed in {file})"
    assert Path(file).read_text().splitlines() == items


def test_long_items_and_full_disks_leave_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    text = listed(["a" * 10_000, "b", "c", "\ud800", "d"])
    assert text == f"{'a' * 116} ..., b, c and 2 more"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert "all 5 are listed" in listed(["a", "b", "c", "\ud800", "d"])
