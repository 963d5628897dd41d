"""Unlearn people from multimodal language models, in JAX."""

import os

__version__ = "0.1.0"

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise, on every run, to install PyTorch
