"""Tensors on disk: the safetensors files of a model folder, read in pieces so that nothing is held twice."""

import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from vkd_jax.types import UserError

Folder = str | os.PathLike[str]

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What is read at a time, bytes or rows, whichever is more: it is turned while in the processor's cache.
CHUNK, ROWS = 1 << 16, 16
SECONDS = 5.0  # from one line about the progress to the next


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies on disk."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int

    # `safe_open(...).get_slice` of safetensors 0.8 would be less code. Reading 1 GiB of bfloat16 into transposed shards
    # on 8 CPU devices took 6.3 s of CPU time with it and 3.3 to 3.6 s here, and its memory map added 0.5 GiB.
    def copy(
        self, parts: Sequence[tuple[tuple[slice, ...], np.ndarray]], passed: Callable[[int], None] = lambda count: None
    ) -> None:
        """Copies parts of the tensor, cast, to where they belong; what several parts share is read once.

        Only a few rows are held at a time, and rows that no part has are not read.

        Args:
            parts: which part, a slice with both ends for every axis; and the array of its shape to fill.
            passed: is told of every few bytes, read or left out, that lie behind.

        Raises:
            UserError: the file ends before the tensor.
        """
        if self.start == self.stop:
            return
        if not self.shape:
            return dataclasses.replace(self, shape=(1,)).copy(
                [((slice(0, 1),), x.reshape(1)) for _, x in parts], passed
            )
        count, width = self.shape[0], (self.stop - self.start) // self.shape[0]
        step = min(max(CHUNK // width, ROWS), count)
        chunk = np.empty((step, *self.shape[1:]), self.dtype)
        with self.file.open("rb", buffering=0) as stream:
            for begin in range(0, count, step):
                rows = chunk[: count - begin]
                end = begin + len(rows)
                wanted = [(cut, out) for cut, out in parts if cut[0].start < end and begin < cut[0].stop]
                if wanted:
                    stream.seek(self.start + begin * width)
                    self._fill(rows, stream)
                for (first, *rest), out in wanted:
                    low, high = max(first.start, begin), min(first.stop, end)
                    piece = rows[(slice(low - begin, high - begin), *rest)]
                    # Cast before it is laid down: what is written is scattered, what is read is not.
                    out[low - first.start : high - first.start] = piece.astype(out.dtype, copy=False)
                passed(rows.nbytes)

    def _fill(self, rows: np.ndarray, stream: io.RawIOBase) -> None:
        left = memoryview(rows.reshape(-1).view(np.uint8))
        while left:
            count = stream.readinto(left)
            if not count:
                raise UserError(f"{self.file} became shorter while it was read; fetch it again.")
            left = left[count:]

    def sha256(self) -> str:
        """The digest of the tensor's raw bytes."""
        digest, left = hashlib.sha256(), self.stop - self.start
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                chunk = stream.read(min(left, 1 << 24))
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


class Checkpoint:
    """The tensors of a model folder, single-file or indexed safetensors; headers are read, weights are not.

    Attributes:
        folder: the folder.
        files: the weight files, in order.
        tensors: name -> Tensor, for every tensor of every file.

    Raises:
        UserError: no weights, pickled weights, an index that names what is not there, a truncated file.
    """

    def __init__(self, folder: Folder):
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"There is no model folder {self.folder}.")
        index = self.folder / INDEX
        where = _read_index(index) if index.exists() else {}
        if index.exists():
            self.files = [self.folder / name for name in sorted(set(where.values()))]
            missing = [file.name for file in self.files if not file.is_file()]
            if missing:
                raise UserError(f"{index} names files that are missing: {', '.join(missing)}.")
        elif (self.folder / WEIGHTS).is_file():
            self.files = [self.folder / WEIGHTS]
        else:
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
            if pickles:
                raise UserError(
                    f"{self.folder} holds only pickled weights ({', '.join(pickles)}), which can run code "
                    "when read; convert them to safetensors with transformers' save_pretrained."
                )
            raise UserError(f"{self.folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors = read_header(file)
            absent = [name for name, home in where.items() if home == file.name and name not in tensors]
            if absent:
                names = ", ".join(absent)
                raise UserError(f"{index} places tensors in {file.name} that it does not hold: {names}.")
            twice = sorted(self.tensors.keys() & tensors.keys())
            if twice:
                raise UserError(f"{self.folder} holds tensors twice: {', '.join(twice)}.")
            self.tensors |= tensors


def _read_index(index: pathlib.Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text())["weight_map"]
        if where and all(isinstance(v, str) and pathlib.PurePath(v).name == v for v in where.values()):
            return where
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} is not a safetensors index: it has no weight_map from tensor names to file names.")


def read_header(file: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of length, JSON, then the tensors without gaps.

    Raises:
        UserError: the file is truncated or corrupt, or holds a dtype that is not in `DTYPES`.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise UserError(f"{file} is truncated: its header ends after the file; fetch it again.")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is corrupt: its header cannot be read; fetch it again.") from error
    tensors, begin = {}, 8 + length
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in DTYPES:
            raise UserError(f"{file} holds {name} as {dtype}; supported are {', '.join(DTYPES)}.")
        if start < 0 or stop - start != DTYPES[dtype].itemsize * math.prod(shape):
            raise UserError(f"{file} is corrupt: {name}'s bytes do not fit {dtype} {shape}; fetch it again.")
        tensors[name] = Tensor(file, DTYPES[dtype], shape, begin + start, begin + stop)
    needed = max((tensor.stop for tensor in tensors.values()), default=begin)
    if size != needed:
        raise UserError(f"{file} is truncated: it has {size} bytes and needs {needed}; fetch it again.")
    return tensors


def write(file: pathlib.Path, like: Mapping[str, np.ndarray], value: Callable[[str], np.ndarray]) -> None:
    """Writes a safetensors file, its tensors in the order of their names.

    Args:
        file: the file.
        like: name -> an array of the tensor's dtype and shape, for every tensor.
        value: name -> the tensor; called when its turn comes, so that only one need be held.
    """
    labels = {dtype: label for label, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    order, offset = sorted(like), 0
    for name in order:
        end = offset + like[name].nbytes
        header[name] = dict(dtype=labels[like[name].dtype], shape=like[name].shape, data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(value(name).tobytes())


class Meter:
    """Logs how much of a folder has been read: now and then, and at the end if that was long in coming."""

    def __init__(self, folder: Folder, total: int):
        self.folder, self.total, self.done = folder, total, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        """Counts so many more bytes."""
        self.done += count
        now = time.monotonic()
        since = self.start if self.done == self.total else self.last
        if now - since >= SECONDS:
            self.last = now
            done, total, percent = self.done / 1e9, self.total / 1e9, 100 * self.done // self.total
            logging.info("read %.1f of %.1f GB of %s (%d %%)", done, total, self.folder, percent)
