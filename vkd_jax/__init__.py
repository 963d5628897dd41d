"""Visual unlearning of people in multimodal large language models, in JAX and Flax."""

import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

from vkd_jax.runtime import imports, threads

if TYPE_CHECKING:
    from vkd_jax.ask import answer, load
    from vkd_jax.attacks.base import Attack
    from vkd_jax.benchmarks.cache import Benchmark
    from vkd_jax.config.schema import RunConfig
    from vkd_jax.methods.base import Method
    from vkd_jax.results import RunResults
    from vkd_jax.runs.api import attack, evaluate, unlearn
    from vkd_jax.runs.pipeline import run
    from vkd_jax.types import Diverged, UserError

__version__ = "0.1.0"

# The public names with their modules, which are imported when a name is first used; docs/python_api.md explains them.
_MODULES = {
    "Attack": "vkd_jax.attacks.base",
    "Benchmark": "vkd_jax.benchmarks.cache",
    "Diverged": "vkd_jax.types",
    "Method": "vkd_jax.methods.base",
    "RunConfig": "vkd_jax.config.schema",
    "RunResults": "vkd_jax.results",
    "UserError": "vkd_jax.types",
    "answer": "vkd_jax.ask",
    "attack": "vkd_jax.runs.api",
    "evaluate": "vkd_jax.runs.api",
    "load": "vkd_jax.ask",
    "run": "vkd_jax.runs.pipeline",
    "unlearn": "vkd_jax.runs.api",
}
__all__ = [
    "Attack", "Benchmark", "Diverged", "Method", "RunConfig", "RunResults", "UserError",
    "answer", "attack", "evaluate", "load", "run", "unlearn",
]  # fmt: skip

if sys.argv[:1] == ["-m"]:  # `python -m` is importing a command; its function handles errors and Ctrl-C later
    imports.begin()

threads.use_two()
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else every run is advised to install PyTorch

# Workaround for tensorflow/tensorflow#126812: on several CPU cores, reductions over a broadcast in the YNN library of
# XLA have a data race and are sometimes wrong. One of them is the norm of the gradient of Qwen's patch embedding, which
# is broadcast to both frames of an image. Reductions without the library are as fast. XLA reads the flag once, so it
# must be set before JAX is used. Remove this with support for JAX 0.10.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_JAXLIB = importlib.metadata.version("jaxlib")  # XLA rejects unknown flags
if _JAXLIB.startswith("0.10.") and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=-LIBRARY_FUSION_TYPE_REDUCE".strip()


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import vkd_jax` loads neither JAX nor the models."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
