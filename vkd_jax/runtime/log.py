"""Logging: what a program shows on stderr while it runs.

Lines may name people, files and texts from data; `messages.escaped` makes their control characters visible.
"""

import logging as std_logging
import sys
import threading
import types
from pathlib import Path

from absl import logging

from vkd_jax import messages

# INFO lines are shown from these files: this package's, and CLU's, which report the remaining time.
SHOWN_PATHS = (f"{Path(__file__).parents[1]}/", "/clu/")


def setup() -> None:
    """Shows the progress of this program on stderr; of other libraries, only warnings and errors are shown."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_shown)
    logging.get_absl_handler().addFilter(_escape)
    sys.excepthook = _show_exception


def _show_exception(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Shows an exception that nothing handles; that of a thread which a library in C++ started is one log line.

    TensorStore's threads print one on a full disk, whose error is raised in the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)
    else:
        logging.error("in a thread", exc_info=(kind, error, trace))


def _is_shown(record: std_logging.LogRecord) -> bool:
    return record.levelno > std_logging.INFO or any(path in record.pathname for path in SHOWN_PATHS)


def _escape(record: std_logging.LogRecord) -> bool:
    """Escapes the message of a record; messages of other libraries may have several lines.

    An exception is shown on one line. Libraries log those of their threads, which are raised again in the main thread.
    """
    keep = "\t" if record.pathname.startswith(SHOWN_PATHS[0]) else "\n\t"
    text = messages.escaped(record.getMessage(), keep)
    if record.exc_info and record.exc_info[1]:
        error = record.exc_info[1]
        text += f": {messages.sentence(f'{type(error).__name__}: {error}')}"
    record.msg, record.args, record.exc_info, record.exc_text = text, (), None, None
    return True
