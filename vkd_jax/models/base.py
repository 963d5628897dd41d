"""A model is an NNX module inside `vkd_jax.models` and a pair (graphdef, flat parameters) everywhere else."""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vkd_jax.models import lora
from vkd_jax.models.decoder import Cache, Decoder
from vkd_jax.types import UserError

Params = dict[str, jax.Array]

SCOPES = ("vision_tower", "projector", "language_model", "head")  # the named scopes that all layers run under


class VisualTokens(NamedTuple):
    """Activations that stand for places in the pictures of each prompt; every model returns its features so.

    Rows have one length; what is beyond a row's pictures is padding.
    """

    values: jax.Array  # [b, p, d]
    coords: jax.Array  # int32 [b, p, 3]: picture, row, column; picture is -1 at padding

    @property
    def valid(self) -> jax.Array:
        """Which tokens are real: bool [b, p]."""
        return self.coords[..., 0] >= 0


class VisionLanguageModel(nnx.Module, abc.ABC):
    """A vision tower, a projector and a language model; each family specializes how images enter.

    `encode` turns images into features, and `__call__` turns features and tokens into logits. A family gives
    `tower_class` and implements `build_projector`, `encode`, `embed` and `vision_neurons`.

    Every layer runs under one `jax.named_scope` of `SCOPES`; the planner and profiles attribute operations by these
    names.
    """

    tower_class: ClassVar[type[nnx.Module]]

    def __init__(self, config: Any, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.config = config
        options = dict(dtype=config.compute_dtype, param_dtype=param_dtype, rngs=rngs)
        self.vision_tower = self.tower_class(config.vision, remat=config.remat, mesh=config.mesh, **options)
        self.projector = self.build_projector(config, **options)
        self.language_model = Decoder(config.text, remat=config.remat, mesh=config.mesh, **options)

    @staticmethod
    @abc.abstractmethod
    def build_projector(config: Any, **options: Any) -> nnx.Module:
        """Builds the module that turns vision features into token embeddings."""

    @abc.abstractmethod
    def encode(
        self, images: Mapping[str, jax.Array], *, hidden: jax.Array | None = None, start: int = 0
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Turns images, or cached activations, into the embeddings that stand for the images in a prompt.

        Args:
            images: from the configuration's `pack`.
            hidden: instead of pixels, the activations entering block `start`: tap "vision/{start - 1}".
            start: the first block to compute.

        Returns:
            Features, and the taps: "vision/0" ... (the output of each computed block), "features" (the input of the
            projector) and "projector" (its output, the features again).
        """

    @abc.abstractmethod
    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> tuple[jax.Array, jax.Array]:
        """Embeds tokens and inserts image features.

        Returns:
            The embeddings [b, t, d], and the rotary position of each token, int [b, t] or [b, t, axes].
        """

    @abc.abstractmethod
    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Reduces the inner MLP activations of each vision block that feeds the projector; see `neurons`."""

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        features: VisualTokens | None = None,
        query_positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Computes next-token logits.

        Args:
            tokens: int [b, t], padded left or right.
            mask: bool [b, t], False at padding.
            features: from `encode`; the j-th image token of a row becomes its j-th feature. None for text.
            query_positions: int [b, a], the positions to return logits for; None for all.
            cache: from `language_model.empty_cache`, or of the tokens before these; filled and returned.

        Returns:
            float32 logits [b, t or a, v], and the cache (None without one).
        """
        x, positions = self.embed(tokens, mask, features)
        x, cache = self.language_model.read(x, mask, positions, cache, query_positions=query_positions)
        return self.language_model.logits(x), cache

    def neurons(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        reduce: Callable[[jax.Array, jax.Array], Any],
        *,
        images: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, Any]:
        """Reduces the inner activations of every MLP block by block, so that they are never all in memory.

        Args:
            tokens: int [b, t], as in `__call__`.
            mask: bool [b, t], False at padding.
            reduce: function of activations [b, n, f] and bool [b, n], which of them belong to real tokens, to any
                tree.
            images: as in `encode`; None for text.

        Returns:
            {"language_model": the tree, its arrays with a leading layer axis}, and with images also "vision_tower",
            a list with one tree for each block that feeds the projector.
        """
        features, reduced = None, {}
        if images is not None:
            features, _ = self.encode(images)
            reduced["vision_tower"] = self.vision_neurons(images, reduce)
        x, positions = self.embed(tokens, mask, features)
        reduced["language_model"] = self.language_model.neurons(x, mask, positions, lambda z: reduce(z, mask))
        return reduced


def check_supported(family: str, checks: Iterable[tuple[bool, str, Any, str]]) -> None:
    """Raises one `UserError` for all failed checks of a configuration: (holds, field, its value, what can be)."""
    problems = [f"{name} is {value!r} (supported: {can})" for holds, name, value, can in checks if not holds]
    if problems:
        raise UserError(f"This {family} is not supported: {'; '.join(problems)}.")


def split_model(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Cuts a module into its static graph and `{"vision_tower/blocks/0/attn/q/kernel": array, ...}`."""
    graphdef, state = nnx.split(module)
    params = {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
    return graphdef, lora.split(params)


def bind(graphdef: nnx.GraphDef, params: Mapping[str, jax.Array], key: jax.Array | None = None) -> nnx.Module:
    """Puts parameters back into a graph: the inverse of `split_model`, traceable under jit, grad and vmap.

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


def abstract_model(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """The graph and the shapes of a module that is never computed."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return graphdef, {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
