"""Files that are either whole or absent, and what is said when a disk or a bucket refuses them."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from vkd_jax.runtime import storage
from vkd_jax.types import UserError


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes a file beside its place and renames it, so that it is either whole or absent; in a bucket it always is."""
    if not isinstance(path, Path):
        path.write_bytes(data)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write one file
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turns a full disk, or a folder or bucket that cannot be written, into a `UserError`."""
    try:
        with storage.bucket_errors():
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            where = f" at {error.filename}" if error.filename else ""
            raise UserError(
                f"cannot write{where}: {error.strerror}; free some space or pass another --workdir."
            ) from error
        raise
