"""Visual unlearning of people in multimodal large language models, in JAX and Flax."""

import os
import sys

import jaxlib

from vkd_jax.runtime import interrupts

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m` is importing a command; its function handles Ctrl-C later
    interrupts.stop_imports()

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else every run is advised to install PyTorch

# Workaround for tensorflow/tensorflow#126812: on several CPU cores, reductions over a broadcast in the YNN library of
# XLA have a data race and are sometimes wrong. One of them is the norm of the gradient of Qwen's patch embedding, which
# is broadcast to both frames of an image. Reductions without the library are as fast. XLA reads the flag once, so it
# must be set before JAX is used. Remove this with support for JAX 0.10.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if jaxlib.__version__.startswith("0.10.") and _FLAG not in os.environ.get("XLA_FLAGS", ""):  # XLA rejects unknown flags
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=-LIBRARY_FUSION_TYPE_REDUCE".strip()
