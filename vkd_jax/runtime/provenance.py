"""The version of the code that runs."""

import subprocess
from pathlib import Path


def commit(but: Path | None = None) -> str:
    """The commit of the repository, with "+changes" if the working tree differs from it; "unknown" outside a clone.

    Args:
        but: a file whose changes are ignored, since it is being written.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")

    try:
        head, *root = git("rev-parse", "HEAD", "--show-toplevel").split("\n")
        names = [line[3:] for line in git("status", "--porcelain").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = [name for name in names if but is None or Path(*root, name) != but.resolve()]
    return head + ("+changes" if changed else "")
