"""Unlearning methods and fine-tuning, and the files that they share.

Each method has a file of its own: `vkd`, `grad_ascent`, `grad_diff`, `kl`, `npo`, `idk`, `rmu`, `mmunlearner` and
`manu`; `finetune` is supervised fine-tuning.

Options of every method that trains on a forget set (fields of `scope.Unlearning`)

    worst_case          worst-case forgetting
    text_stream         further streams of text-only questions, to retain or to forget
    decouple            further stream: harmless images with the questions of the forget set
    other_facts         further stream: retained facts about the people to forget
    replay              further stream: people of earlier requests
    null_space          updates that do not affect retained examples

Shared code

    base                the `Method` contract, and the loss functions and cached arrays that several methods share
    scope               the fields that methods share, the weights that train, and defaults for the contract
    ascent              ascent on the forget set and its bounds
    kept_stream         what decouple and other_facts have in common: the cross-entropy of answers that are retained
    losses              pure loss functions
    saliency            Fisher information and masks
    feature_targets     features of a frozen model as distillation targets
    neuron_statistics   activation statistics of MLP neurons

Contract: a method reads the model and the sets through `base.Context` and never writes to them. `prepare` returns sets
with cached arrays and a mask, exactly as `cache_spec` and `mask_shape` describe them, because the planner calls these
and `teachers` with shapes instead of `prepare`. A loss is a pure function (model, batch) -> (scalar, metrics), and the
training loop adds up the gradients of the streams.

To add a method, write a frozen dataclass that extends `scope.Unlearning` in a new file and add one line to
vkd_jax/registry.py. Implement `image_losses`. If the forget loss reads cached arrays, implement `prepare_forget` and
`cache_spec`. Override `prepare` only for arrays of other streams or a mask: either extend what `super().prepare`
returns, or call `prepare_forget` for each of `forget_streams` whose arrays the method does not compute itself, as
`vkd` does. A method that trains nothing extends `scope.Scope` and implements `losses`, which returns {}, and `edit`.
The first line of the class docstring describes the method in `configs/llava.py:help`.
"""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.methods.base import Method


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """Creates the method of this name with these hyperparameters; see `registry.create`."""
    return registry.create("method", registry.METHODS, name, fields)
