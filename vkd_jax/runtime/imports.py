"""Libraries that cannot be imported, such as matplotlib with a backend in MPLBACKEND that does not exist.

A command imports its modules before its function is called, and a few when they are first used. `begin` covers the
first time, and `commands.guarded` the second one.
"""

import os
import sys
import traceback
import types

from vkd_jax import messages
from vkd_jax.runtime import interrupts


def begin() -> None:
    """Prepares a command for the import of its modules: Ctrl-C ends it, and a library that fails is one sentence."""
    interrupts.stop_imports()
    sys.excepthook = _show


def problem(error: BaseException) -> str | None:
    """What is wrong if an error was raised by the import of a library, in words; None if the error is another one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    below = max((i + 1 for i, name in enumerate(names) if name in ("__main__", "vkd_jax")), default=len(names))
    if below < len(names) and frames[below].f_code.co_name == "<module>":  # a frame of another package, at its import
        library = names[below]
    elif isinstance(error, ModuleNotFoundError) and error.name:
        library = error.name.partition(".")[0]
    else:
        return None
    place = f" in {names[-1]}" if names[-1] not in (library, "importlib", "") else ""
    reason = messages.sentence(f"{type(error).__name__}{place}: {error}", 300)
    return (
        f"{library} cannot be imported ({reason}); correct the environment variable or the settings file of {library} "
        "if the reason names one, or install the package again."
    )


def _show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """The hook for exceptions that nothing handles: ends the process with status 2 if an import failed."""
    if (text := problem(error)) is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {messages.sentence(text)}", file=sys.stderr, flush=True)
    os._exit(2)
