"""A model is an NNX module inside `vkd_jax.models` and a pair (graphdef, flat parameters) everywhere else."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from vkd_jax.models import lora
from vkd_jax.types import UserError

Params = dict[str, jax.Array]


class VisualTokens(NamedTuple):
    """Activations that stand for places in the pictures of each prompt; every model returns its features so.

    Rows have one length; what is beyond a row's pictures is padding.
    """

    values: jax.Array  # [b, p, d]
    where: jax.Array  # int32 [b, p, 3]: picture, row, column; picture is -1 at padding

    @property
    def valid(self) -> jax.Array:
        """Which tokens are real: bool [b, p]."""
        return self.where[..., 0] >= 0


def refuse(family: str, checks: Iterable[tuple[bool, str, Any, str]]) -> None:
    """Raises one `UserError` for all failed checks of a configuration: (holds, field, its value, what can be)."""
    problems = [f"{name} is {value!r} (supported: {can})" for holds, name, value, can in checks if not holds]
    if problems:
        raise UserError(f"This {family} is not supported: {'; '.join(problems)}.")


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Cuts a module into its static graph and `{"vision_tower/blocks/0/attn/q/kernel": array, ...}`."""
    graphdef, state = nnx.split(module)
    params = {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
    return graphdef, lora.part(params)


def bind(graphdef: nnx.GraphDef, params: Mapping[str, jax.Array], key: jax.Array | None = None) -> nnx.Module:
    """Puts parameters back into a graph: the inverse of `split`, traceable under jit, grad and vmap.

    Args:
        graphdef: of the module.
        params: all its parameters, and those of `lora.attach`.
        key: for the dropout of adapters, while they train; None for none.

    Raises:
        ValueError: the names are not exactly the module's, or an adapter's are not there; they are listed.
    """
    params = lora.join(params, key)
    # Positions in an nnx.List are integers in NNX paths and digits in ours.
    paths = {tuple(int(k) if k.isdigit() else k for k in name.split("/")): name for name in params}
    state = nnx.from_flat_state([(path, nnx.Param(params[name])) for path, name in paths.items()])
    try:
        module = nnx.merge(graphdef, state)
    except ValueError as error:
        raise ValueError(f"These {len(params)} parameters are not all of the module's: {error}") from error
    # nnx.merge goes by order: under a wrong name every later parameter would land one place off, in silence.
    names = {path for path, _ in nnx.to_flat_state(nnx.state(module))}
    if names != paths.keys():
        missing, unknown = (["/".join(map(str, path)) for path in sorted(odd, key=str)]
                            for odd in (names - paths.keys(), paths.keys() - names))  # fmt: skip
        raise ValueError(f"The module has parameters {missing} where {unknown} were given.")
    return module


def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """The graph and the shapes of a module that is never computed."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return graphdef, {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
