"""A model folder in memory, ready to be trained or asked; and new folders, with random weights."""

import dataclasses
import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from vkd_jax import methods, models
from vkd_jax.checkpoints import export, hf
from vkd_jax.data.encoding import EncodedSet, encode_set
from vkd_jax.data.processor import Processor, create_processor
from vkd_jax.evaluation.evaluate import Answerer
from vkd_jax.models import base, lora, quantize
from vkd_jax.runtime import files
from vkd_jax.runtime.mesh import param_shardings, replicated
from vkd_jax.types import Example, Params, UserError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model folder in memory."""

    graphdef: Any
    params: Params
    config: Any
    processor: Processor
    mesh: jax.sharding.Mesh

    @classmethod
    def open(
        cls, folder: Path, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, method: methods.Method
    ) -> "Loaded":
        """Reads the processor, then weights straight into their shards.

        What the method trains is held in float32, and what it adds to the model (adapters) begins here.
        """
        family, model_config = kind(folder)
        how = quantize.parse(config.model.quantize)
        processor = Processor(folder, model_config, max_pixels=config.model.max_pixels)
        graphdef, params, model_config = hf.load(
            folder,
            dtype=config.model.dtype,
            sharding=param_shardings(mesh, family.SHARDING),
            masters=method.trainable,
            transform=how and functools.partial(quantize.quantized, how=how),
            remat=config.model.remat,
            mesh=mesh,
        )
        if method.train == "lora":
            params = lora.attach(
                params,
                rank=method.lora_rank,
                alpha=method.lora_alpha,
                dropout=method.lora_dropout,
                seed=config.seed,
                sharding=replicated(mesh),
            )
        return cls(graphdef, params, model_config, processor, mesh)

    def encode(self, examples: Sequence[Example], buckets: int = 1) -> EncodedSet:
        """Examples of one modality as arrays of at most `buckets` lengths."""
        return encode_set(self.processor, examples, max_length=self.config.text.max_positions, buckets=buckets)

    def answerer(self, batch_size: int) -> Answerer:
        """This model, ready to be asked."""
        return Answerer(self.graphdef, self.params, self.config, self.processor, batch_size=batch_size, mesh=self.mesh)


def kind(folder: Path) -> tuple[types.ModuleType, Any]:
    """A model's family and its configuration: two of one kind have the same weights by name and shape."""
    family, hf_config = hf.read_config(folder)
    return family, family.Config.from_hf(hf_config)


def check_trainable(folder: Path, config: ml_collections.ConfigDict, method: methods.Method) -> None:
    """Refuses a method that cannot train this model, by its shapes alone.

    Raises:
        UserError: it names weights or taps that the model has not, or weights that are quantised.
    """
    family, model_config = kind(folder)
    _, shapes = base.abstract(lambda rngs: family.Model(model_config, rngs=rngs))
    method.check_model(shapes, model_config)
    paths = method.trainable(shapes, model_config)
    if quantize.parse(config.model.quantize) and (frozen := [path for path in paths if quantize.quantizes(path)]):
        raise UserError(
            f"model.quantize: {len(frozen)} of the weights to train are quantised, such as {frozen[0]}; train the "
            "visual weights or adapters alone, or leave model.quantize empty."
        )


def create(folder: Path, examples: Sequence[Example], shape: ml_collections.ConfigDict, seed: int) -> Path:
    """A LLaVA with random weights and a tokenizer made for the texts of `examples`, unless the folder is there.

    Args:
        folder: where to.
        examples: whose questions and answers the tokenizer is made for.
        shape: vocab_size, and the fields of config.json's vision_config and text_config.
        seed: of the weights.
    """
    from transformers import LlavaConfig

    if folder.exists():
        return folder
    shape = shape.to_dict()
    with files.atomic_folder(folder) as new:
        tokenizer = create_processor(
            new,
            [f"USER: {e.question} ASSISTANT: {e.answer}" for e in examples],
            vocab_size=shape["vocab_size"],
            image_size=shape["vision"]["image_size"],
            patch_size=shape["vision"]["patch_size"],
        )
        ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        hf_config = LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", **shape["vision"]),
            text_config=dict(
                model_type="llama",
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                **ids,
                **shape["text"],
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        _, params = hf.init(models.module_for("llava").Config.from_hf(hf_config), seed)
        export.create(new, hf_config, params)
    return folder
