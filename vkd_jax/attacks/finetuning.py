"""Fine-tuning of a copy of the attacked model: what the attacks that train weights share."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.safetensors_files import VANISHING
from vkd_jax.config.fields import FieldError, Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.augment import REPEATED_FIELDS
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.methods.base import Prepared
from vkd_jax.methods.finetune import Finetune
from vkd_jax.methods.scope import TRAIN_SCOPES
from vkd_jax.runtime.mesh import make_mesh, shards
from vkd_jax.training import loop
from vkd_jax.types import UserError

Observer = Callable[[ModelBundle], None]


@dataclasses.dataclass(frozen=True)
class Finetuning(Section):
    """Settings of an attacker who trains weights with a new Adam optimizer at a constant rate."""

    attackers: tuple[str, ...] = setting(
        ("visual", "all"), "Weights that each attacker trains, as for `method.train`.", choices=TRAIN_SCOPES
    )
    batch_size: int = setting(16, "Examples per step.", minimum=1)
    learning_rate: float = setting(3e-4, "Constant learning rate.", above=0)

    def check(self, config: RunConfig) -> None:
        """Validates the attackers and the batch size against the run.

        Raises:
            UserError: an attacker cannot train a quantized model, or the mesh does not divide the batch size.
        """
        if "all" in self.attackers and config.model.quantize:
            raise self.error(
                "attackers",
                "'all' cannot train the language model, which model.quantize quantizes. Give ('visual',) or "
                "('visual', 'lora'), or leave model.quantize empty.",
            )
        try:
            self.training(1, self.learning_rate).rows("image", shards(make_mesh(**dataclasses.asdict(config.mesh))))
        except FieldError as error:
            raise self.error("batch_size", error.problem) from None

    def training(self, steps: int, learning_rate: float) -> TrainConfig:
        """Settings of the attacker's training loop."""
        return TrainConfig(
            steps=steps,
            batch_size={"image": self.batch_size},
            learning_rate=learning_rate,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            log_every=steps,
            checkpoint_every=steps,
        )


def finetune(
    model: ModelBundle,
    attacker: str,
    encoded: EncodedSet,
    settings: TrainConfig,
    seed: int,
    observers: Mapping[int, Observer] = {},  # noqa: B006 (never written to)
    *,
    section: str = "attacks",
) -> ModelBundle:
    """Fine-tunes a copy of the model; all rates and shares of one attacker share a compiled program.

    Args:
        model: the attacked model, with its adapters merged.
        attacker: the weights to train, as for `method.train`.
        encoded: questions with an image, and their answers.
        settings: from `Finetuning.training`.
        seed: of the data order and of new adapters.
        observers: called with the model after these steps; its weights may not be kept.
        section: the section of the config that has the attacker's settings, for messages.

    Raises:
        Diverged: the loss became NaN or infinite.
        UserError: no weight changed, so that nothing was attacked.
    """
    method = Finetune(train=attacker)
    model = model.prepare_for(method, seed=seed)

    def trained(weights) -> ModelBundle:
        return dataclasses.replace(model, params={**model.params, **weights})

    def observed(observe: Observer) -> loop.Observer:
        return lambda weights: observe(trained(weights))

    weights = loop.fit(
        model,
        method,
        Prepared(sets={"image": encoded}),
        settings,
        seed=seed,
        folder=None,  # no checkpoints: an attempt takes seconds, and an interrupted one starts over
        observers={step: observed(observe) for step, observe in observers.items()},
    )
    # One weight after another, for the reason in `finite.nonfinite_paths`.
    if weights and not any(bool(_changed(value, model.params[path])) for path, value in weights.items()):
        raise UserError(
            f"{section}.learning_rate: {settings.steps} steps at {settings.learning_rate:g} changed no "
            f"weight of the {attacker} attacker, so that nothing was attacked; give a larger rate."
        )
    return trained(weights)


@jax.jit
def _changed(new: jax.Array, old: jax.Array) -> jax.Array:
    """Whether a trained weight differs from the one before; one that was zero must do so by `VANISHING` at least."""
    return (jnp.abs(new - old.astype(new.dtype)) >= VANISHING).any()


def rows_of(encoded: EncodedSet, rows: np.ndarray) -> EncodedSet:
    """Selects rows of a set without caches. Sequence lengths and images stay, so that no program is compiled again."""
    fields = {name: getattr(encoded, name) for name in (*REPEATED_FIELDS, "image_rows")}
    return dataclasses.replace(
        encoded,
        examples=tuple(encoded.examples[i] for i in rows),
        **{name: None if value is None else value[rows] for name, value in fields.items()},
    )
