"""The one way to open a model: to ask, train or attack it, or, as shapes alone, to plan a run."""

import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from absl import logging
from PIL import Image

from vkd_jax import messages
from vkd_jax.checkpoints import hf
from vkd_jax.data.encoding import EncodedSet, encode_set
from vkd_jax.data.processor import Processor
from vkd_jax.models import lora, quantize
from vkd_jax.runtime import json_files, storage
from vkd_jax.runtime.mesh import param_shardings, replicated
from vkd_jax.types import Example, Params, UserError

# Settings of generation_config.json that change greedy decoding, and the values with which they do not.
GREEDY = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "suppress_tokens": [],
    "bad_words_ids": [],
    "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
} | dict.fromkeys(  # without a value
    (
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "stop_strings"),
        *("exponential_decay_length_penalty", "force_words_ids", "constraints", "dola_layers", "watermarking_config"),
    )
)


class TrainingMethod(Protocol):
    """The part of the method protocol that a bundle uses; `methods.Method` implements it."""

    @property
    def adapters(self) -> lora.AdapterConfig | None:
        """Sizes of the adapters that the method trains, or None."""
        ...

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """Returns the paths of the weights to train."""
        ...

    def check_model(self, paths: Collection[str], model_config: Any) -> None:
        """Raises a `UserError` if the method cannot train the model."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelBundle:
    """A model in memory with everything that is needed to use it.

    Example:
        >>> bundle = ModelBundle.load("/models/llava-1.5-7b-hf", dtype="bfloat16")
        >>> Answerer(bundle, batch_size=1).generate(["What color is a banana?"])
        ['yellow']
    """

    graphdef: Any  # static graph of the NNX module; `models.base.bind(graphdef, params)` returns the module
    params: Params  # all parameters by path; `jax.ShapeDtypeStruct`s in an abstract bundle
    config: Any  # `Config` of the model's family
    processor: Processor | None  # None in an abstract bundle
    mesh: jax.sharding.Mesh | None  # None if all weights are on the default device

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        quantization: str = "",
        remat: str = "",
        max_pixels: int = 0,
        masters: Callable[[Sequence[str], Any], Collection[str]] | None = None,
    ) -> "ModelBundle":
        """Loads a Hugging Face model folder; each weight is read directly into its shards.

        Args:
            folder: model folder with config.json, safetensors, tokenizer and image processor.
            dtype: dtype of weights and computation; None keeps the one on disk.
            mesh: the devices to shard over; None for the default device.
            quantization: quantization of the language model, as in `quantize.parse`; "" for none.
            remat: activations that the backward pass recomputes, a key of `layers.REMAT`.
            max_pixels: maximum number of pixels per image, for models with images of any size; 0 keeps the limit of
                the image processor.
            masters: function of (paths, configuration) to the weights to read in float32, whatever `dtype` is; see
                `load_for`.

        Raises:
            UserError: the folder cannot be read, or its tensors are not those of the model.
        """
        family, model_config = read_family(folder)
        processor = Processor(folder, model_config, max_pixels=max_pixels)
        _check_images(folder, processor)
        if ignored := ignored_generation_settings(Path(folder)):
            message = "answers are decoded greedily; %s of %s/generation_config.json is ignored."
            logging.log_first_n(logging.WARNING, message, 1, messages.listed(ignored), folder)
        settings = quantize.parse(quantization)
        graphdef, params, model_config = hf.load(
            folder,
            dtype=dtype,
            sharding=mesh and param_shardings(mesh, family.SHARDING),
            masters=masters,
            transform=settings and functools.partial(quantize.quantize_param, settings=settings),
            remat=remat,
            mesh=mesh,
        )
        return cls(graphdef, params, model_config, processor, mesh)

    @classmethod
    def load_for(cls, method: TrainingMethod, folder: str | Path, *, seed: int, **options: Any) -> "ModelBundle":
        """Loads a model that `method` will train, with float32 master weights and the method's adapters.

        The weights to train are read from disk in float32, whatever `dtype` is. If they were rounded to `dtype` first
        and cast back, weights that training never changes would be exported with other bytes. This is why
        `prepare_for`, which runs after loading, only attaches adapters.

        Args:
            method: the method that trains the model.
            folder: as in `load`.
            seed: seed of the adapters.
            **options: further arguments of `load`.
        """
        return cls.load(folder, masters=method.trainable, **options).prepare_for(method, seed=seed)

    @classmethod
    def abstract_for(
        cls,
        method: TrainingMethod,
        family: types.ModuleType,
        hf_config: Any,
        *,
        dtype: Any,
        mesh: jax.sharding.Mesh,
        quantization: str = "",
        remat: str = "",
    ) -> "ModelBundle":
        """Returns the shapes, dtypes and shardings of `load_for`; nothing is read or computed.

        Args:
            method: the method that trains the model.
            family: the module of the model's family.
            hf_config: the transformers configuration.
            dtype: as in `load`.
            mesh: as in `load`; its devices need not exist.
            quantization: as in `load`.
            remat: as in `load`.

        Raises:
            UserError: the method trains weights that would be quantized.
        """
        dtype, settings = jnp.dtype(dtype), quantize.parse(quantization)
        model_config = family.Config.from_hf(hf_config, compute_dtype=dtype.name, remat=remat, mesh=mesh)
        graphdef, shapes = hf.abstract_model(family.Model, model_config)
        sharding_of = param_shardings(mesh, family.SHARDING)
        masters = set(method.trainable(list(shapes), model_config))
        _check_quantization(masters, settings)
        params = {}
        for path, x in shapes.items():
            kind = jnp.float32 if path in masters else dtype
            params[path] = jax.ShapeDtypeStruct(x.shape, kind, sharding=sharding_of(path, x.shape))
            if settings:
                params[path] = quantize.quantized_shape(path, params[path], settings)
        return cls(graphdef, params, model_config, None, mesh).prepare_for(method, seed=0)

    def prepare_for(self, method: TrainingMethod, *, seed: int) -> "ModelBundle":
        """Attaches the adapters that `method` trains, if any; no other code attaches LoRA.

        The model computes the same function as before, since a new adapter adds zero. `training.loop.fit` trains a
        float32 copy of the weights it is given. It can therefore also train weights that `load_for` did not load, but
        these have been rounded to the dtype of the bundle.

        Args:
            method: the method that trains the model.
            seed: seed of the adapters; one seed gives the same adapters on every mesh.
        """
        if method.adapters is None:
            return self
        everywhere = None if self.mesh is None else replicated(self.mesh)
        attach = functools.partial(lora.attach, **dataclasses.asdict(method.adapters), seed=seed)
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self.params)):
            return dataclasses.replace(self, params=attach(self.params, sharding=everywhere))

        def with_sharding(path: str, x: Any) -> Any:
            if isinstance(x, lora.Lora):
                return dataclasses.replace(x, weight=self.params[path])
            if path in self.params:
                return self.params[path]
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

        adapted = jax.eval_shape(attach, self.params)
        return dataclasses.replace(self, params={path: with_sharding(path, x) for path, x in adapted.items()})

    def encode(self, examples: Sequence[Example], buckets: int = 1) -> EncodedSet:
        """Encodes examples of one modality as arrays of at most `buckets` lengths."""
        return encode_set(self.processor, examples, max_length=self.config.text.max_positions, buckets=buckets)


def _check_images(folder: str | Path, processor: Processor) -> None:
    """Checks with a blank image, which is not a square, that the image processor gives what the model takes."""
    try:
        processor.image(Image.new("RGB", (96, 64)))
    except UserError as error:
        raise UserError(f"The image processor in {folder} does not fit its config.json: {error}") from error
    except Exception as error:  # settings of other types than the ones that transformers expects
        problem = f"{type(error).__name__}: {storage.first_line(error)}"
        raise UserError(
            f"The image processor in {folder} processes no image ({problem}); get preprocessor_config.json again."
        ) from error


def ignored_generation_settings(folder: Path) -> list[str]:
    """Returns the settings of generation_config.json that would change greedy decoding, which ignores them."""
    file = folder / "generation_config.json"
    settings = json_files.read_json(file) if file.is_file() else {}
    return [f"{name}={settings[name]}" for name, plain in GREEDY.items() if settings.get(name) not in (None, plain)]


def read_family(folder: str | Path) -> tuple[types.ModuleType, Any]:
    """Reads the family and configuration of a folder; equal configurations have weights of equal names and shapes."""
    family, hf_config = hf.read_config(folder)
    return family, family.Config.from_hf(hf_config)


def check_trainable(folder: str | Path, method: TrainingMethod, quantization: str = "") -> None:
    """Checks from shapes alone that a method can train the model of a folder.

    Raises:
        UserError: the method names weights or taps that the model lacks, or trains weights that would be quantized.
    """
    family, model_config = read_family(folder)
    _, shapes = hf.abstract_model(family.Model, model_config)
    method.check_model(shapes, model_config)
    _check_quantization(method.trainable(shapes, model_config), quantize.parse(quantization))


def _check_quantization(trainable: Iterable[str], settings: quantize.Quantization | None) -> None:
    quantized = sorted(path for path in trainable if settings and quantize.is_quantized(path))
    if quantized:
        raise UserError(
            f"model.quantize: {len(quantized)} of the weights to train would be quantized, such as {quantized[0]}. "
            "Train only the visual weights or adapters, or leave model.quantize empty."
        )
