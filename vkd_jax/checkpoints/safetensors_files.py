"""Reads and writes the safetensors files of a model folder in pieces, so that no tensor is in memory twice."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from absl import logging

from vkd_jax import messages
from vkd_jax.runtime import files, json_files
from vkd_jax.runtime.finite import is_finite
from vkd_jax.types import UserError, located

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
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

VANISHING = 1e-12  # magnitude below which weights are zero in effect; no float16 is that small
# Bytes and rows to read at a time, whichever is more. A chunk is transposed while it is in the processor's cache.
CHUNK, ROWS = 1 << 16, 16
EQUAL_ROWS = 4096  # rows of two tensors that are compared at a time
LOG_SECONDS = 5.0  # between two lines of progress


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk: its name, file, dtype, shape and bytes."""

    name: str
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # offset in the file, in bytes
    stop: int

    # `safe_open(...).get_slice` of safetensors 0.8 would be less code, but reading 1 GiB took 6.3 CPU seconds with it
    # in one run, and 3.3 and 3.6 CPU seconds here in two runs; both added 0.5 GiB of memory.
    def copy_to(
        self,
        targets: Sequence[tuple[tuple[slice, ...], np.ndarray]],
        progress: Callable[[int], None] = lambda count: None,
    ) -> bool:
        """Copies parts of the tensor to arrays and casts them; rows that several parts share are read once.

        Only a few rows are in memory at a time. Rows that no part contains are not read.

        Args:
            targets: for each part its slices, with a start and stop for every axis, and the array to copy it to.
            progress: function that is called with the number of bytes that were read or skipped.

        Returns:
            Whether all copied values are finite after the cast.

        Raises:
            UserError: the file became shorter while it was read.
        """
        if self.start == self.stop:
            return True
        if not self.shape:
            one_row = [((slice(0, 1),), array.reshape(1)) for _, array in targets]
            return dataclasses.replace(self, shape=(1,)).copy_to(one_row, progress)
        count, width = self.shape[0], (self.stop - self.start) // self.shape[0]
        step = min(max(CHUNK // width, ROWS), count)
        chunk = np.empty((step, *self.shape[1:]), self.dtype)
        finite = True
        with self.file.open("rb", buffering=0) as stream:
            for start in range(0, count, step):
                rows = chunk[: count - start]
                stop = start + len(rows)
                overlapping = [(part, out) for part, out in targets if part[0].start < stop and start < part[0].stop]
                if overlapping:
                    stream.seek(self.start + start * width)
                    self._fill(rows, stream)
                for (first, *rest), out in overlapping:
                    low, high = max(first.start, start), min(first.stop, stop)
                    piece = rows[(slice(low - start, high - start), *rest)]
                    # Casting first is faster, because reads are contiguous and writes are scattered.
                    with np.errstate(over="ignore", invalid="ignore"):  # is found below
                        values = piece.astype(out.dtype, copy=False)
                    out[low - first.start : high - first.start] = values
                    finite &= is_finite(values)
                progress(rows.nbytes)
        return finite

    def _fill(self, rows: np.ndarray, stream: io.RawIOBase) -> None:
        remaining = memoryview(rows.reshape(-1).view(np.uint8))
        while remaining:
            count = stream.readinto(remaining)
            if not count:
                raise UserError(f"{self.file} became shorter while it was read. Download it again.")
            remaining = remaining[count:]

    def sha256(self) -> str:
        """Returns the SHA-256 of the tensor's bytes, in hexadecimal."""
        digest, remaining = hashlib.sha256(), self.stop - self.start
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while remaining:
                chunk = stream.read(min(remaining, 1 << 24))
                digest.update(chunk)
                remaining -= len(chunk)
        return digest.hexdigest()


class Checkpoint:
    """The tensors of a model folder with single-file or indexed safetensors; only headers are read.

    Attributes:
        folder: the folder.
        files: the weight files, in order.
        tensors: {name: Tensor} of all files.

    Raises:
        UserError: the folder has no weights or only pickled ones, its index names missing files or tensors, or a file
            is truncated or corrupt.
    """

    def __init__(self, folder: Folder):
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"There is no model folder {self.folder}.")
        index = self.folder / INDEX
        file_of_tensor = _read_index(index) if index.exists() else {}
        self.files = self._find_files(file_of_tensor)
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors = read_header(file)
            expected = [name for name, file_name in file_of_tensor.items() if file_name == file.name]
            absent = [name for name in expected if name not in tensors]
            if absent:
                raise UserError(f"{index} lists tensors that {file.name} does not contain: {messages.listed(absent)}.")
            duplicates = sorted(self.tensors.keys() & tensors.keys())
            if duplicates:
                raise UserError(f"{self.folder} contains tensors twice: {messages.listed(duplicates)}.")
            self.tensors |= tensors

    def _find_files(self, file_of_tensor: Mapping[str, str]) -> list[pathlib.Path]:
        if file_of_tensor:
            files = [self.folder / name for name in sorted(set(file_of_tensor.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{self.folder / INDEX} names files that are missing: {messages.listed(missing)}.")
            if (self.folder / WEIGHTS).exists() and self.folder / WEIGHTS not in files:
                raise UserError(
                    f"{self.folder} has both {WEIGHTS}, which transformers would read, and {INDEX}, which names other "
                    "files; remove the one that is not the model's."
                )
            return files
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UserError(
                f"{self.folder} has only pickled weights ({messages.listed(pickles)}), which can run code when they "
                "are read. Convert them to safetensors with save_pretrained of transformers."
            )
        raise UserError(f"{self.folder} has no weights: neither {WEIGHTS} nor {INDEX} exists.")


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """Reads the file that has each tensor, by the tensor's name.

    Raises:
        UserError: the index is damaged, or names a file that is not directly in the folder.
    """
    weight_map = json_files.read_json(index, remedy="download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index} is not a safetensors index: its weight_map is {json_files.describe(weight_map)}, and should be "
            "an object of tensor names and file names; download it again."
        )
    for tensor, file in weight_map.items():
        with located(f"{index}: weight_map names no file of its folder for the tensor {tensor[:100]!r}"):
            if not isinstance(file, str):
                raise UserError(f"the file is {json_files.describe(file)}, and should be a file name")
            files.check_name(str(index.parent), file)
            if pathlib.PurePath(file).name != file:
                raise UserError(f"the file {file!r} is not directly in that folder")
    return weight_map


def read_header(file: pathlib.Path) -> dict[str, Tensor]:
    """Reads the header of a safetensors file: 8 bytes of length and JSON, followed by the tensors without gaps.

    The library checks the header; it does not tell the offsets, which are read here.

    Raises:
        UserError: the file is truncated or corrupt, or a dtype is not in `DTYPES`.
    """
    files.check_regular(file, None)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length == int.from_bytes(files.LFS_POINTER[:8], "little"):
            raise UserError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` where it is from.")
        if size < 8 or 8 + length > size:
            raise UserError(f"{file} is truncated: the header is longer than the file. Download it again.")
        try:
            with safetensors.safe_open(file, "np"):
                header = json.loads(stream.read(length))
        except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
            kind = "truncated" if "ncomplete" in str(error) else "corrupt: its header cannot be read"
            raise UserError(f"{file} is {kind} ({str(error)[:200]}). Download it again.") from error
    header.pop("__metadata__", None)
    entries = {n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()}
    tensors, begin = {}, 8 + length
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in DTYPES:
            raise UserError(f"{name} in {file} has dtype {dtype}. Supported dtypes: {messages.choices(DTYPES)}.")
        tensors[name] = Tensor(name, file, DTYPES[dtype], shape, begin + start, begin + stop)
    return tensors


def _float64(tensor: Tensor, rows: int = ROWS) -> Iterator[np.ndarray]:
    """The values of a tensor of one dimension or more, `rows` rows at a time."""
    rest = tuple(slice(0, size) for size in tensor.shape[1:])
    for start in range(0, tensor.shape[0], rows):
        values = np.empty((min(rows, tensor.shape[0] - start), *tensor.shape[1:]), np.float64)
        tensor.copy_to([((slice(start, start + len(values)), *rest), values)])
        yield values


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same values; reads until some differ."""
    if first.shape != second.shape:
        return False
    pieces = zip(_float64(first, EQUAL_ROWS), _float64(second, EQUAL_ROWS), strict=True)
    return all(np.array_equal(*values) for values in pieces)


def is_constant(tensor: Tensor, zero: float = 0.0) -> bool:
    """Whether all rows of a tensor are the same, or all values of a vector are `zero`; reads until one differs.

    A layer with such a weight computes the same for every input, or the same number at every output.
    """
    first = None if tensor.shape[1:] else zero
    for values in _float64(tensor):
        first = values[:1] if first is None else first
        if (values != first).any():
            return False
    return True


def is_zero(tensor: Tensor, zero: float = 0.0, least: float = VANISHING) -> bool:
    """Whether no value of a tensor differs from `zero` by `least` or more; reads until one does."""
    return all((np.abs(values - zero) < least).all() for values in _float64(tensor))


def write(file: pathlib.Path, like: Mapping[str, np.ndarray], value: Callable[[str], np.ndarray]) -> None:
    """Writes a safetensors file with its tensors in alphabetical order.

    Args:
        file: the file to write.
        like: {name: array with the dtype and shape of the tensor}.
        value: function of a name to the tensor; tensors are requested one at a time to save memory.
    """
    labels = {dtype: label for label, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    order, offset = sorted(like), 0
    for name in order:
        end = offset + like[name].nbytes
        header[name] = dict(dtype=labels[like[name].dtype], shape=like[name].shape, data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(value(name).tobytes())


class ProgressLog:
    """Logs how much of a folder has been read: every `LOG_SECONDS`, and at the end if reading took that long."""

    def __init__(self, folder: Folder, total: int):
        self.folder, self.total, self.done = folder, total, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        """Adds a number of bytes."""
        self.done += count
        now = time.monotonic()
        since = self.start if self.done == self.total else self.last
        if now - since >= LOG_SECONDS:
            self.last = now
            done, total, percent = self.done / 1e9, self.total / 1e9, 100 * self.done // self.total
            logging.info("read %.1f of %.1f GB of %s (%d %%)", done, total, self.folder, percent)
