"""The pictures of a set: decoded and resized by several threads, held in memory while they are few."""

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

HELD_BYTES = 4 << 30  # sets of at most so many bytes of pixels are made once and held
THREADS = min(os.cpu_count() or 1, 16)  # decoding and resizing leave Python's lock to others

T = TypeVar("T")


class Pictures:
    """m pictures, a row each, as the model packs them, all in one shape.

    Few are packed at once and held; of many, each is made anew whenever it is asked for, by the threads that ask.

    Args:
        make: picture i, normalised, [height, width, 3].
        shapes: of each, [m] (height, width, 3).
        config: of the model, which knows how many tokens a picture has and how pictures are packed.
    """

    def __init__(
        self,
        make: Callable[[int], np.ndarray],
        shapes: Sequence[tuple[int, ...]],
        config: Any,
    ):
        self.make, self.shapes, self.config = make, shapes, config
        self._room = max((config.image_tokens(*shape[:2]) for shape in shapes), default=0)
        self.held = None
        if shapes and sum(map(nbytes, shapes)) <= HELD_BYTES:
            self.held = self._pack(in_threads(make, range(len(shapes))))

    @classmethod
    def of(cls, pictures: Sequence[np.ndarray], config: Any) -> "Pictures":
        """Pictures that are there already."""
        return cls(pictures.__getitem__, [picture.shape for picture in pictures], config)

    @classmethod
    def measured(cls, make: Callable[[int], np.ndarray], count: int, config: Any) -> "Pictures":
        """Pictures that are each made once now, to learn their shapes, and again when asked for if they are many."""
        shapes, made, total = [], [], 0
        for picture in in_threads(make, range(count)):
            shapes.append(picture.shape)
            total += nbytes(picture.shape)
            if total <= HELD_BYTES:
                made.append(picture)
            else:
                made.clear()
        return cls.of(made, config) if len(made) == count else cls(make, shapes, config)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """Some of the pictures, packed: [len(rows), ...] each."""
        if self.held is not None:
            return {name: array[rows] for name, array in self.held.items()}
        return self._pack(self.make(int(row)) for row in rows)

    def _pack(self, pictures: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        return self.config.pack([[picture] for picture in pictures], self._room)


def nbytes(shape: tuple[int, ...]) -> int:
    """Of float32 pixels of this shape."""
    return int(np.prod(shape)) * np.dtype(np.float32).itemsize


def in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> Iterable[T]:
    """The function of each item, in order, computed by several threads."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(function, items)
