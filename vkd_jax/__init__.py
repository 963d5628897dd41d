"""Unlearn people from multimodal language models, in JAX."""

import os

import jaxlib

__version__ = "0.1.0"

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise, on every run, to install PyTorch

# On several CPU cores XLA's sums over a broadcast are now and then wrong: two threads add to one place, in a library
# that it calls (tensorflow/tensorflow#126812). The gradient of Qwen's patch embedding, the same for both frames of a
# still, is such a broadcast, and its norm such a sum. Sums without that library are as fast; XLA reads this once.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if jaxlib.__version__.startswith("0.10.") and _FLAG not in os.environ.get("XLA_FLAGS", ""):  # others may not know it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=-LIBRARY_FUSION_TYPE_REDUCE".strip()
