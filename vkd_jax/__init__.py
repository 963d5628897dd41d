"""Unlearn people from multimodal language models, in JAX."""

__version__ = "0.1.0"
