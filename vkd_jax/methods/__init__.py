"""Unlearning methods, one file each, and what they share:

    base                the `Method` contract, and the loss functions and cached arrays that several methods share
    scope               the fields that methods share, the weights that train, and defaults for the contract
    ascent              ascent on the forget set and its bounds
    worst_case          worst-case forgetting, an option of every method that trains on a forget set
    text_stream         text-only questions as a further stream, another such option
    decouple            harmless images with the questions of the forget set as a further stream, another one
    other_facts         facts about the people to forget that are retained as a further stream, another one
    replay              people of earlier requests as a further stream, another one
    kept_stream         what decouple and other_facts have in common: the cross-entropy of answers that are retained
    null_space          updates that do not affect retained examples, another such option
    losses              pure loss functions
    saliency            Fisher information and masks
    feature_targets     features of a frozen model as distillation targets
    neuron_statistics   activation statistics of MLP neurons

Contract: a method reads the model and the sets through `base.Context` and never writes to them. `prepare` returns sets
with cached arrays and a mask, exactly as `cache_spec` and `mask_shape` describe them, because the planner does not run
it. A loss is a pure function (model, batch) -> (scalar, metrics), and the training loop adds up the gradients of the
streams.

To add a method, write a frozen dataclass that extends `scope.Unlearning` in a new file and add one line to
vkd_jax/registry.py. Implement `image_losses`, and `prepare_forget` with `cache_spec` if its forget loss reads cached
arrays; or extend `scope.Scope` and implement `edit` if it trains nothing. The first line of the class docstring
describes the method in `configs/llava.py:help`.
"""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.methods.base import Method


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """Creates the method of this name with these hyperparameters; see `registry.create`."""
    return registry.create("method", registry.METHODS, name, fields)
