"""What all families share: the model class, its parameters as a flat dictionary, and checks of configurations.

Inside `vkd_jax.models` a model is an NNX module; everywhere else it is a pair (graphdef, {path: parameter}).
`split_model` and `bind` convert between the two.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vkd_jax import messages
from vkd_jax.models import lora
from vkd_jax.models.decoder import Cache, Decoder, DecoderConfig, Embedded
from vkd_jax.models.layers import insert_features
from vkd_jax.types import UserError

Params = dict[str, jax.Array]

DTYPES = ("float32", "bfloat16", "float16")  # of weights and computation
MOST_LAYERS = 1000  # of a tower; each block of a vision tower is a module of its own
LARGEST_SIZE = 2**31 - 1
ROPE_THETAS = (100.0, 1e9)  # bases of rotary positions; published models have 1e4 to 5e6
LARGEST_EPSILON = 0.1  # of a norm; published models have 1e-6 to 1e-5
KEY_VALUE_HEADS = ("text_config.num_key_value_heads", "text_config.num_attention_heads")  # for `divides`

ENDS = ("bos", "eos", "pad")  # tokens of texts in a configuration, with `_token_id`

SCOPES = ("vision_tower", "projector", "language_model", "head")  # the named scopes of all layers


class VisualTokens(NamedTuple):
    """Activations at the patches, or merged patches, of the images of each prompt; rows are padded to one length."""

    values: jax.Array  # [b, p, d]
    coords: jax.Array  # int32 [b, p, 3]: image index, row and column; the image index is -1 at padding

    @property
    def valid(self) -> jax.Array:
        """True at real tokens and False at padding: bool [b, p]."""
        return self.coords[..., 0] >= 0


@dataclasses.dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """Configuration of a model: its two towers, and how they are computed. A family adds its own fields."""

    vision: Any
    text: DecoderConfig
    image_token_id: int
    compute_dtype: str = "float32"  # dtype of activations; parameters have their own
    remat: str = ""  # activations that the backward pass recomputes, a key of `layers.REMAT`
    mesh: Mesh | None = None  # devices that the rows of activations are sharded over
    image_processors: ClassVar[tuple[str, ...]] = ()  # the classes of transformers that fit, without their backend
    edges_are_areas: ClassVar[bool] = False  # whether the image processor's edges are pixel counts
    has_default_template: ClassVar[bool] = False  # whether a model without a chat template has that of LLaVA-1.5
    template_frame: ClassVar[tuple[str, str]] = ("", "")  # what the chat template writes before and after a placeholder
    markup_tokens: ClassVar[tuple[str, ...]] = ()  # around image tokens, which the tokenizer has to know
    default_max_pixels: ClassVar[int] = 0  # of an image that one asks about; 0 for the image processor's limit

    @property
    def used_blocks(self) -> int:
        """Number of vision blocks that feed the projector; later blocks are loaded and exported, never computed."""
        return self.vision.layers

    @property
    def uses_post_norm(self) -> bool:
        """Whether the norm after the last vision block, `vision_tower/post_norm`, feeds the projector."""
        return False

    def taps_before(self, block: int) -> tuple[str, ...]:
        """Returns the taps from which `encode` continues at a vision block: the output of the block before it."""
        return (f"vision/{block - 1}",)

    @property
    def image_step(self) -> int | None:
        """The sides of an image are multiples of this many pixels; None if all images have one size."""
        return None

    @property
    def image_processor_options(self) -> dict[str, Any]:
        """Further arguments of the Hugging Face image processor."""
        return {}

    @abc.abstractmethod
    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens of an image that the image processor resized to this size."""

    def packed_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens that `pack` makes room for, for such an image: at least `image_tokens`."""
        return self.image_tokens(height, width)

    def largest_image(self, max_pixels: int) -> tuple[int, int]:
        """Returns the height and width of the largest square image of at most `max_pixels` pixels."""
        side = math.isqrt(max_pixels) // self.image_step * self.image_step
        return side, side

    @abc.abstractmethod
    def extract_images(self, output: Mapping[str, Any]) -> list[Any]:
        """Returns the images in the output of the Hugging Face image processor, [H, W, 3] or `TiledImage` each.

        `output["image_sizes"]` has the height and width of each image before it was processed.
        """

    @abc.abstractmethod
    def pack(self, rows: Sequence[Sequence[Any]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Turns the images of each prompt into arrays with one row per prompt.

        Args:
            rows: the images of each prompt, [H, W, 3] or `TiledImage` each.
            min_tokens: least number of image tokens to make room for, so that several calls give one shape.
        """

    @property
    def placeholder_id(self) -> int:
        """Token that stands for an image in a rendered chat template."""
        return self.image_token_id

    def image_markup(self, token: Callable[[int], str], height: int, width: int) -> str:
        """Returns the text that replaces the placeholder of an image.

        Args:
            token: function of a token id to its text.
            height: of the image that the image processor returned, in pixels.
            width: of the same image.

        Returns:
            A text in which the image token occurs once or several times; after tokenization each occurrence is repeated
            equally often, `image_tokens` in all.
        """
        del height, width
        return token(self.image_token_id)

    def pixel_limits(self, image_processor: Any) -> tuple[int, int] | None:
        """Returns the smallest and largest number of pixels of an image; None if all images have one size."""
        size = image_processor.size
        if not self.edges_are_areas:
            return None
        return (size.shortest_edge, size.longest_edge) if size.shortest_edge and size.longest_edge else None

    def limit_pixels(self, image_processor: Any, max_pixels: int) -> None:
        """Sets the largest number of pixels of an image, which `pixel_limits` allows."""
        image_processor.size.longest_edge = max_pixels

    @property
    def processor_fields(self) -> dict[str, Any]:
        """The values that fields of processor_config.json must have, by which transformers counts image tokens."""
        return {}

    def image_processor_problem(self, image_processor: Any) -> str | None:
        """Returns which setting of the Hugging Face image processor is not supported, and what to do; None if none.

        Raises:
            UserError: a setting is missing or of another type, see `image_settings.setting`.
        """
        del image_processor
        return None


class VisionLanguageModel(nnx.Module, abc.ABC):
    """A vision tower, a projector and a language model:

        images --vision_tower--> "features" --projector--> "projector" --embed--> language_model --> logits
                   (taps "vision/0", "vision/1", ...)                     tokens

    `encode` maps images to features, and `__call__` maps features and tokens to logits. A family sets `tower_class`
    and implements `build_projector`, `encode` and `vision_neurons`, or extends `fixed_size.FixedSizeModel`.

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
        self, images: Mapping[str, jax.Array], *, earlier: Mapping[str, jax.Array] | None = None
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Maps images, or cached activations, to the features that replace the image tokens of a prompt.

        Args:
            images: from the configuration's `pack`.
            earlier: values of the taps `ModelConfig.taps_before(block)` to continue from at that block; None to start
                from the images.

        Returns:
            The features, and the taps by name: "vision/0" ... (the output of each computed block), "features" (the
            input of the projector) and "projector" (its output, which is the features).
        """

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> Embedded:
        """Embeds tokens and inserts image features; the positions count the real tokens."""
        x, _ = self.insert(tokens, features)
        return Embedded(x, token_positions(mask))

    def insert(self, tokens: jax.Array, features: VisualTokens | None) -> tuple[jax.Array, jax.Array | None]:
        """Embeds tokens and replaces image tokens with features.

        Returns:
            The embeddings [b, t, d], and which tokens were replaced, bool [b, t]; None without features.
        """
        x = self.language_model.embed(tokens)
        if features is None:
            return x, None
        is_image = tokens == self.config.image_token_id
        # An image token beyond the last feature, which a model may generate, is text.
        is_image &= jnp.cumsum(is_image, axis=1) <= features.valid.sum(1, keepdims=True)
        return insert_features(x, is_image, features.values), is_image

    @abc.abstractmethod
    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Applies `reduce` to the inner MLP activations of each block that feeds the projector; see `neurons`."""

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
            features: from `encode`; the j-th image token of a row is replaced by its j-th feature. None for text.
            query_positions: int [b, a], the positions to return logits for; None for all.
            cache: from `language_model.empty_cache`, or the cache of earlier tokens; None for none.

        Returns:
            float32 logits [b, t, v] or [b, a, v], and the cache with these tokens added (None without one).
        """
        embedded = self.embed(tokens, mask, features)
        x, cache = self.language_model.read(embedded, mask, cache, query_positions=query_positions)
        return self.language_model.logits(x), cache

    def neurons(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        reduce: Callable[[jax.Array, jax.Array], Any],
        *,
        images: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, Any]:
        """Applies `reduce` to the inner activations of each MLP, one block at a time to save memory.

        Args:
            tokens: int [b, t], as in `__call__`.
            mask: bool [b, t], False at padding.
            reduce: function of activations [b, n, f] and a mask, bool [b, n], True at real tokens, to a tree of arrays.
            images: as in `encode`; None for text.

        Returns:
            {"language_model": the tree, its arrays with a leading layer axis}; with images also "vision_tower", a list
            with one tree for each block that feeds the projector.
        """
        features, reduced = None, {}
        if images is not None:
            features, _ = self.encode(images)
            reduced["vision_tower"] = self.vision_neurons(images, reduce)
        embedded = self.embed(tokens, mask, features)
        reduced["language_model"] = self.language_model.neurons(embedded, mask, lambda z: reduce(z, mask))
        return reduced


def continue_from(earlier: Mapping[str, jax.Array] | None) -> tuple[jax.Array | None, int]:
    """Returns the input of the first vision block that `encode` computes, and its index; (None, 0) to start anew."""
    if not earlier:
        return None, 0
    last = max(int(name.removeprefix("vision/")) for name in earlier)
    return earlier[f"vision/{last}"], last + 1


def token_positions(mask: jax.Array) -> jax.Array:
    """Returns the position of each token among the real ones, 0 at padding before them: bool [b, t] to int."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def check_supported(family: str, checks: Iterable[tuple[bool, str, Any, str]]) -> None:
    """Checks fields of a Hugging Face configuration.

    Args:
        family: name of the family in the error.
        checks: (whether the field is supported, its name, its value, the supported values) of each field.

    Raises:
        UserError: lists every field that is not supported.
    """
    problems = [f"{name} is {value!r} (supported: {values})" for ok, name, value, values in checks if not ok]
    if problems:
        raise UserError(f"This {family} is not supported: {messages.listed(problems, '; ')}.")


def check_model_types(family: str, hf: Any, **model_types: tuple[str, ...]) -> None:
    """Checks the `model_type` of the vision and text configurations; call it before reading their other fields.

    Args:
        family: name of the family in the error.
        hf: the Hugging Face configuration.
        **model_types: supported values of `model_type` of `vision_config` and of `text_config`.
    """
    checks = []
    for name, supported in model_types.items():
        actual = getattr(hf, name).model_type
        checks.append((actual in supported, f"{name}.model_type", actual, ", ".join(supported)))
    check_supported(family, checks)


def check_sizes(family: str, **sizes: Any) -> None:
    """Checks that sizes are positive integers; call it before computing with them, or building a model.

    Args:
        family: name of the family in the error.
        **sizes: the sizes by their field of config.json, with a double underscore for the dot; `num_hidden_layers` and
            `depth` are at most `MOST_LAYERS`.

    Raises:
        UserError: lists every field that is not such an integer.
    """
    checks = []
    for field, value in sizes.items():
        most = MOST_LAYERS if field.endswith(("num_hidden_layers", "depth")) else LARGEST_SIZE
        is_size = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        checks.append((is_size, field.replace("__", "."), value, f"an integer from 1 to {most:,}"))
    check_supported(family, checks)


def decoder_sizes(text: Any) -> dict[str, Any]:
    """Returns the sizes of a text configuration, for `check_sizes`."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings",
    )  # fmt: skip
    return {f"text_config__{name}": getattr(text, name) for name in names}


def divides(divisor: int, size: int, names: tuple[str, str]) -> tuple[bool, str, Any, str]:
    """Returns the check that one size divides another, for `check_supported`; `names` are their fields."""
    return size % divisor == 0, names[0], divisor, f"a divisor of {names[1]}, {size}"


def positive(field: str, value: Any) -> tuple[bool, str, Any, str]:
    """Returns the check that a field is a positive number, for `check_supported`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value > 0, field, value, "positive numbers"


def off(field: str, value: Any, supported: str = "False") -> tuple[bool, str, Any, str]:
    """Returns the check that a switch is off, for `check_supported`; numbers and texts, such as 0.0, are none."""
    return value is False or value is None, field, value, supported


def check_constants(hf: Any) -> None:
    """Checks the epsilons of all norms and the bases of rotary positions in a Hugging Face configuration of any family.

    Raises:
        UserError: lists every epsilon that is not a small positive number, with which a norm would divide by anything
            else than its input's size, and every base with which all positions would be rotated alike or at random.
    """
    sections = {"": hf, **{f"{name}.": getattr(hf, name, None) for name in ("text_config", "vision_config")}}
    checks = []
    for prefix, section in sections.items():
        for name, value in vars(section).items() if section is not None else ():
            if name.endswith(("_eps", "_epsilon")) and value is not None:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                is_small = is_number and 0 < value <= LARGEST_EPSILON
                checks.append((is_small, prefix + name, value, f"positive numbers up to {LARGEST_EPSILON}"))
        parameters = getattr(section, "rope_parameters", None)
        kinds = {"": parameters, **parameters} if isinstance(parameters, Mapping) else {}  # of blocks, in some families
        for name, rope in kinds.items():
            if isinstance(rope, Mapping) and (theta := rope.get("rope_theta")) is not None:
                is_number = isinstance(theta, int | float) and not isinstance(theta, bool)
                is_base = is_number and ROPE_THETAS[0] <= theta <= ROPE_THETAS[1]
                field = ".".join(filter(None, (f"{prefix}rope_parameters", name, "rope_theta")))
                checks.append((is_base, field, theta, "numbers from {:g} to {:g}".format(*ROPE_THETAS)))
    check_supported("model", checks)


def check_special_tokens(hf: Any) -> None:
    """Checks the tokens in a Hugging Face configuration, of any family, that stand for images, videos and their ends.

    Raises:
        UserError: one that the model reads is not in the vocabulary, or one has the number of another one or of an end
            of texts.
    """
    vocab = hf.text_config.vocab_size
    sections = (hf, hf.text_config)
    ends = {f"{name}_token_id": [getattr(x, f"{name}_token_id", None) for x in sections] for name in ENDS}
    names: dict[Any, str] = {}
    checks = []
    for name, value in vars(hf).items():
        if not name.endswith(("_token_id", "_token_index")) or value is None or name.lstrip("_") in ends:
            continue
        is_token = type(value) is int and 0 <= value < vocab
        is_used = name.startswith(("image_", "boi_", "eoi_"))  # transformers gives the others, if absent, any number
        checks.append((is_token or not is_used, name, value, f"tokens of the vocabulary, which are below {vocab:,}"))
        others = [end for end, tokens in ends.items() if any(value == x or value in _several(x) for x in tokens)]
        others += [names[value]] if is_token and value in names else []
        checks.append((not others, name, value, f"another token than {messages.listed(others)}"))
        names[value if is_token else None] = name
    check_supported("model", checks)


def _several(value: Any) -> Any:
    """A list of tokens; nothing in place of anything else."""
    return value if isinstance(value, list | tuple) else ()


def token_id(field: str, value: Any) -> tuple[bool, str, Any, str]:
    """Returns the check that a field is the id of a token, for `check_supported`."""
    return type(value) is int and value >= 0, field, value, "integers from 0"


def check_dtype(dtype: Any) -> str:
    """Returns the name of a dtype of weights and computation.

    Raises:
        UserError: the dtype is not one of `DTYPES`: integers and 8-bit floats cannot be trained or computed with.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    check_supported("model", [(name in DTYPES, "dtype", name, ", ".join(DTYPES))])
    return name


def hf_dtype(hf: Any) -> str:
    """Returns the name of the dtype in a Hugging Face configuration; float32 if it has none.

    Raises:
        UserError: the dtype is not one of `DTYPES`.
    """
    dtype = hf.dtype or hf.text_config.dtype or "float32"  # the published Qwen3-VL has that of the text alone
    return check_dtype(str(dtype).removeprefix("torch."))


def split_model(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a module into its static graph and `{"vision_tower/blocks/0/attn/q/kernel": array, ...}`."""
    graphdef, state = nnx.split(module)
    params = {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
    return graphdef, lora.split(params)


def bind(graphdef: nnx.GraphDef, params: Mapping[str, jax.Array], key: jax.Array | None = None) -> nnx.Module:
    """Merges parameters into a graph: the inverse of `split_model`, traceable under jit, grad and vmap.

    Args:
        graphdef: the graph of the module.
        params: all parameters of the module, and those of its adapters (`lora.attach`).
        key: random key for the dropout of adapters in training; None for no dropout.

    Raises:
        ValueError: lists parameters that are missing or unknown.
    """
    params = lora.join(params, key)
    # NNX paths have integers where ours have digits, at the elements of an nnx.List.
    paths = {tuple(int(k) if k.isdigit() else k for k in name.split("/")): name for name in params}
    state = nnx.from_flat_state([(path, nnx.Param(params[name])) for path, name in paths.items()])
    try:
        module = nnx.merge(graphdef, state)
    except ValueError as error:
        raise ValueError(f"The {len(params)} given parameters are not all parameters of the module: {error}") from error
    # nnx.merge is positional: a wrong name would silently shift all later parameters by one.
    names = {path for path, _ in nnx.to_flat_state(nnx.state(module))}
    if names != paths.keys():
        missing, unknown = (["/".join(map(str, path)) for path in sorted(difference, key=str)]
                            for difference in (names - paths.keys(), paths.keys() - names))  # fmt: skip
        raise ValueError(f"Parameters {missing} of the module are missing, and {unknown} are unknown.")
    return module


def abstract_model(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the graph of a module and {path: shape of the parameter} without computing any parameter."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return graphdef, {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
