"""What all commands have in common: how bad input, a missing platform and Ctrl-C end them."""

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import ParamSpec

from vkd_jax.config.command_line import bad_input
from vkd_jax.runtime.interrupts import interruptible
from vkd_jax.types import UserError

P = ParamSpec("P")
# How JAX says that JAX_PLATFORMS names a platform that this machine does not have.
_NO_PLATFORM = re.compile(r"(?:Unable to initialize|Unknown) backend:? '?(\w+)")


def guarded(run: Callable[P, int]) -> Callable[P, int]:
    """Decorates the function of a command that returns its exit status.

    Bad input, and a platform that JAX does not find, are one sentence and status 2; Ctrl-C is one sentence and 130. The
    64-bit types that JAX_ENABLE_X64 allows are off: models compute in 32 bits or fewer.
    """

    @functools.wraps(run)
    def end_with_status(*args: P.args, **options: P.kwargs) -> int:
        os.environ["JAX_ENABLE_X64"] = "0"  # of workers, and of this process if it imports JAX later
        if jax := sys.modules.get("jax"):
            jax.config.update("jax_enable_x64", False)
        try:
            return run(*args, **options)
        except UserError as error:
            return bad_input(error)
        except RuntimeError as error:
            if not (platform := _NO_PLATFORM.match(str(error))):
                raise
            return bad_input(
                f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no platform {platform[1]!a:.40} here; "
                "install what it requires (docs/tpu.md), or set another, such as JAX_PLATFORMS=cpu."
            )

    return interruptible(end_with_status)
