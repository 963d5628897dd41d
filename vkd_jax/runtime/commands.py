"""What all commands have in common: how bad input, a missing platform and Ctrl-C end them."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

from vkd_jax.config.command_line import bad_input
from vkd_jax.runtime import imports
from vkd_jax.runtime.interrupts import interruptible
from vkd_jax.runtime.storage import first_line
from vkd_jax.types import UserError

P = ParamSpec("P")
# Settings of JAX by which the computation is defined, whatever the environment says.
_JAX_SETTINGS = {
    "jax_enable_x64": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
}
# How JAX says that JAX_PLATFORMS names a platform that this machine does not have.
_NO_PLATFORM = re.compile(r"(?:Unable to initialize|Unknown) backend:? '?(\w+)")


def _platform_problem(error: Exception) -> str | None:
    """What is wrong if JAX finds no device, in words; None if the error is another one."""
    if not isinstance(error, RuntimeError | AssertionError):
        return None
    given, match = os.environ.get("JAX_PLATFORMS", ""), _NO_PLATFORM.match(str(error))
    # JAX asserts, without a message, that the platforms for GPUs were found.
    last = list(traceback.walk_tb(error.__traceback__))[-1][0].f_code.co_filename
    if not match and not (isinstance(error, AssertionError) and last.endswith(os.path.join("_src", "xla_bridge.py"))):
        return None
    platform = match[1] if match else given.partition(",")[0]
    if platform == "cpu":
        return f"JAX cannot use the CPU ({first_line(error)[:200]}); correct JAX_NUM_CPU_DEVICES or XLA_FLAGS."
    return (
        f"JAX_PLATFORMS={given}: JAX finds no platform {platform!a:.40} here; install what it requires (docs/tpu.md), "
        "or set another, such as JAX_PLATFORMS=cpu."
    )


def guarded(run: Callable[P, int]) -> Callable[P, int]:
    """Decorates the function of a command that returns its exit status.

    Bad input, a file that the system refuses to use, and a platform that JAX does not find are one sentence and status
    2; Ctrl-C is one sentence and 130. The 64-bit types that JAX_ENABLE_X64 allows are off: models compute in 32 bits or
    fewer. So are the checks of types and ranks that JAX_NUMPY_DTYPE_PROMOTION and JAX_NUMPY_RANK_PROMOTION add.
    """

    @functools.wraps(run)
    def end_with_status(*args: P.args, **options: P.kwargs) -> int:
        for name, value in _JAX_SETTINGS.items():
            os.environ[name.upper()] = str(value)  # of workers, and of this process if it imports JAX later
            if jax := sys.modules.get("jax"):
                jax.config.update(name, value)
        try:
            return run(*args, **options)
        except UserError as error:
            return bad_input(error)
        except OSError as error:  # such as of a disk that fails; one that is full is a UserError already
            if not (error.errno and isinstance(error.filename, str | bytes | os.PathLike)):
                raise
            return bad_input(
                f"{os.fsdecode(error.filename)}: the system refuses to use it ({error.strerror}); check the file, the "
                "folder that it is in, and their disk."
            )
        except Exception as error:
            if not (problem := imports.problem(error) or _platform_problem(error)):
                raise
            return bad_input(problem)

    return interruptible(end_with_status)
