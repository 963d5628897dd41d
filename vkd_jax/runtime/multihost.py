"""Coordination of several processes that run one program, each with its own devices, as on a TPU pod.

All processes must run the same steps in the same order, or they wait for each other forever. Therefore only process 0
reads state that depends on the disk, and broadcasts it. With one process, all of this is free.
"""

import collections
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vkd_jax.types import UserError

T = TypeVar("T")


def is_process_0() -> bool:
    """Whether this is process 0, which writes files and makes decisions."""
    return jax.process_index() == 0


def run_on_process_0(work: Callable[[], T], meanwhile: Iterator[Any] | None = None) -> T:
    """Runs `work` on process 0 and returns its result, or raises its error, in every process.

    No process returns before the work is done, so the files that it wrote exist for all.

    Args:
        work: a function whose result is small, since it is broadcast. It must not wait for other processes except by
            iterating over `meanwhile`.
        meanwhile: an iterator over values that `work` needs and that all processes compute together. Every process
            exhausts it, also if `work` fails, since the others would wait for the rest; it must not raise.

    Example:
        >>> has_checkpoint = run_on_process_0(lambda: (folder / "config.json").exists())
    """
    if jax.process_count() == 1:
        return work()
    value = error = None
    if is_process_0():
        try:
            value = work()
        except Exception as raised:
            error = raised
    collections.deque(meanwhile or (), maxlen=0)
    result, failure = _broadcast((value, None if error is None else _sendable(error)))
    if failure is not None:
        raise error or failure
    return result


def run_process_0_first(work: Callable[[], T]) -> T:
    """Runs `work` in every process, first on process 0, so that the others can reuse the files that it wrote.

    Raises:
        UserError: the work of another process failed.
    """
    if jax.process_count() == 1:
        return work()
    results = []
    run_on_process_0(lambda: results.append(work()))
    error = None
    if not is_process_0():
        try:
            results.append(work())
        except Exception as raised:  # the other processes must not wait for this one
            error = raised
    raise_in_all(error)
    return results[0]


def raise_in_all(error: Exception | None) -> None:
    """Raises an error of this process here and in all others, which wait for this call; None if there is none.

    Raises:
        UserError: the work of another process failed.
    """
    if jax.process_count() == 1:
        failed = error is not None
    else:
        failed = bool(any_process(error is not None))
    if failed:
        raise error or UserError("another host could not read its data; see the log of that host.")


def gather(x: Any) -> np.ndarray:
    """Gathers an array that may be sharded over several processes, as a NumPy array in every process."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def any_process(flag: bool) -> jax.Array:
    """Whether the flag is set in any process, the same value in every process.

    The call is asynchronous; bool() of the result waits for all processes.
    """
    sharding, any_of = _any_over_devices()
    count = jax.device_count()
    return any_of(jax.make_array_from_callback((count,), sharding, lambda _: np.full(1, flag)))


@functools.cache
def _any_over_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("device",))
    return NamedSharding(mesh, P("device")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _broadcast(value: Any) -> Any:
    """The value of process 0, in every process."""
    sent = pickle.dumps(value) if is_process_0() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    size_padded = 1 << max(size - 1, 1023).bit_length()  # few sizes, since each is compiled
    buffer = np.zeros(size_padded, np.uint8)
    buffer[: len(sent)] = np.frombuffer(sent, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes())


def _sendable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # pickling may raise anything
        return RuntimeError(f"process 0 failed: {type(error).__name__}: {error}")
