"""Several processes that run one program, each with devices of its own, as on a pod: who writes, and who decides.

All processes do the same in the same order; else they wait for each other for ever. So whatever depends on what lies on
disk is looked up by process 0 alone, and the others are told. In one process all of this is free.
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
    """Whether this is process 0, which writes and decides."""
    return jax.process_index() == 0


def run_on_process_0(work: Callable[[], T], meanwhile: Iterator[Any] | None = None) -> T:
    """What `work` gives in process 0, which alone runs it, or the error that it raises there: in every process.

    No process returns before the work is done, so that what it wrote is there for all.

    Args:
        work: of one process; what it gives is sent to all, and must be small. None of them may wait for others in it,
            but by `meanwhile`.
        meanwhile: an iterator over what `work` takes that all must make together. It is used up in every process, also
            if the work breaks off, since the others would wait for the rest; it must not raise itself.
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
    said, failure = _from_first((value, None if error is None else _sendable(error)))
    if failure is not None:
        raise error or failure
    return said


def run_process_0_first(work: Callable[[], T]) -> T:
    """`work` of every process, process 0 first: what it left, others find, where they see its disk."""
    if jax.process_count() == 1:
        return work()
    found = []
    run_on_process_0(lambda: found.append(work()))
    error = None
    if not is_process_0():
        try:
            found.append(work())
        except Exception as raised:  # of a disk of its own: the others must not wait for this one
            error = raised
    if bool(any_process(error is not None)):
        raise error or UserError("another host could not read its data: see the log there.")
    return found[0]


def gather(x: Any) -> np.ndarray:
    """The whole of an array that may lie on the devices of several processes, in NumPy, in every process."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def any_process(flag: bool) -> jax.Array:
    """Whether the flag is set in any process; bool() of it waits until all have been asked, this call does not.

    What is asked at the same place of the program gets the same answer in every process.
    """
    each, either = _either()
    count = jax.device_count()
    return either(jax.make_array_from_callback((count,), each, lambda _: np.full(1, flag)))


@functools.cache
def _either() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("device",))
    return NamedSharding(mesh, P("device")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _from_first(value: Any) -> Any:
    """Process 0's value, in every process."""
    sent = pickle.dumps(value) if is_process_0() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    room = 1 << max(size - 1, 1023).bit_length()  # of few sizes, since each is compiled
    buffer = np.zeros(room, np.uint8)
    buffer[: len(sent)] = np.frombuffer(sent, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes())


def _sendable(error: Exception) -> Exception:
    """The error, or what it says where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever an exception's arguments raise
        return RuntimeError(f"process 0 failed: {type(error).__name__}: {error}")
