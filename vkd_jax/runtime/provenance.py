"""The version of the code that runs."""

import os
import re
import subprocess
from pathlib import Path

SECONDS = 30.0  # until git is taken to hang, as on a file system that does not answer


def commit(but: Path | None = None) -> str:
    """The commit of the repository, with "+changes" if the working tree differs from it; "unknown" outside a clone.

    A package that is installed in the working tree of another project, such as in its .venv, is outside a clone.

    Args:
        but: a file whose changes are ignored, since it is being written.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook that runs this

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        options = dict(stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=True)
        return subprocess.run(command, env=env, **options).stdout.decode().rstrip("\n")

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        head, *root = git("rev-parse", "HEAD", "--show-toplevel").split("\n")
        names = [line[3:] for line in git("status", "--porcelain").splitlines()]
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return "unknown"
    if not re.fullmatch("[0-9a-f]{40,64}", head):
        return "unknown"
    changed = [name for name in names if but is None or Path(*root, name) != but.resolve()]
    return head + ("+changes" if changed else "")
