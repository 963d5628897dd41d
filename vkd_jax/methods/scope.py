"""The hyperparameters that all methods share, and the selection of the weights that train."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vkd_jax.config.fields import Section, setting
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.messages import listed
from vkd_jax.methods import base
from vkd_jax.methods.decouple import Decouple
from vkd_jax.methods.null_space import NullSpace
from vkd_jax.methods.other_facts import OtherFacts
from vkd_jax.methods.replay import Replay
from vkd_jax.methods.text_stream import ForgetText, TextStream
from vkd_jax.methods.worst_case import TRAINED, Adversary, WorstCase
from vkd_jax.models import lora
from vkd_jax.models.base import VisualTokens
from vkd_jax.runtime import memory
from vkd_jax.types import Params, UserError

TRAIN_SCOPES = ("all", "visual", "lora", "visual+lora")


@dataclasses.dataclass(frozen=True)
class Scope(Section):
    """The hyperparameters that all methods inherit, and defaults for the `Method` contract."""

    SECTION: ClassVar[str] = "method"

    train: str = setting(
        "all",
        "Weights that train: 'all', 'visual' (vision tower and projector), 'lora' (adapters on every kernel of the "
        "language model's blocks), or 'visual+lora' (both of these).",
        choices=TRAIN_SCOPES,
    )
    blocks: int = setting(
        -1, "Number of last vision blocks that train with the projector; -1 is the whole tower.", minimum=-1
    )
    lora_rank: int = setting(16, "Rank of the adapters.", minimum=1)
    lora_alpha: float = setting(16.0, "The adapters' output is scaled by lora_alpha / lora_rank.", above=0)
    lora_dropout: float = setting(0.05, "Dropout rate of the adapters' inputs.", minimum=0, below=1)
    cache_gib: float = setting(
        memory.CACHE_BYTES / memory.GIB,
        "Memory of the host for the cached features of each set, in GiB. Teacher features that need more go to "
        "memory-mapped files; outputs of frozen vision blocks that need more are recomputed at each step.",
        minimum=0,
    )
    mask_scope: ClassVar[str] = "none"  # methods with a mask override it
    needs_base: ClassVar[bool] = False  # whether `prepare` loads the model before it was fine-tuned
    null_space: ClassVar[NullSpace] = NullSpace()  # projects nothing; `Unlearning` has settings of it

    @property
    def cache_bytes(self) -> int:
        """The budget of the host's memory for the cached arrays of each set."""
        return int(self.cache_gib * memory.GIB)

    @property
    def adapters(self) -> lora.AdapterConfig | None:
        """The adapters that the method adds to the model, or None."""
        if self.train not in ("lora", "visual+lora"):
            return None
        return lora.AdapterConfig(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """Selects the weights of the scope; see `trainable_paths`."""
        return trainable_paths(paths, model_config, self.train, self.blocks)

    def check_model(self, paths: Iterable[str], model_config: Any) -> None:
        """Checks that the fields fit a model.

        Args:
            paths: the paths of the model's weights.
            model_config: the model's configuration.

        Raises:
            UserError: a field does not fit the model; the message names it.
        """
        self.trainable(paths, model_config)

    def prepare(self, context: base.Context) -> base.Prepared:
        """Returns the sets unchanged; methods that cache arrays or compute a mask override it."""
        return base.Prepared(sets=context.sets)

    def edit(self, context: base.Context) -> Params:
        """Raises `NotImplementedError`; methods that edit weights override it."""
        raise NotImplementedError(f"{type(self).__name__} trains; it edits no weights.")

    def cache_spec(self, stream: str, taps: Mapping[str, VisualTokens], model_config: Any) -> base.CacheSpec:
        """Returns an empty specification; methods that cache arrays override it."""
        del stream, taps, model_config
        return base.CacheSpec()

    def mask_shape(self, path: str, shape: tuple[int, ...], model_config: Any) -> tuple[int, ...]:
        """Returns the shape of the weight itself; methods whose masks broadcast override it."""
        del path, model_config
        return shape

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """Returns no teachers; methods with teachers override it."""
        return {}

    def adversary(self, params: Params, model_config: Any) -> Adversary | None:
        """Returns None; `Unlearning` overrides it."""
        del params, model_config


@dataclasses.dataclass(frozen=True)
class Unlearning(Scope):
    """A method that trains on a forget set: the hyperparameters that all of these share.

    Methods implement `image_losses`, and `prepare_forget` if their forget loss reads cached arrays. The streams of
    text-only questions, of harmless images, of other facts and of people of earlier requests are added to them here,
    and worst-case forgetting in the training step.
    """

    worst_case: WorstCase = dataclasses.field(default_factory=WorstCase, metadata={"help": WorstCase.__doc__})
    text: TextStream = dataclasses.field(default_factory=TextStream, metadata={"help": TextStream.__doc__})
    forget_text: ForgetText = dataclasses.field(default_factory=ForgetText, metadata={"help": ForgetText.__doc__})
    decouple: Decouple = dataclasses.field(default_factory=Decouple, metadata={"help": Decouple.__doc__})
    other_facts: OtherFacts = dataclasses.field(default_factory=OtherFacts, metadata={"help": OtherFacts.__doc__})
    replay: Replay = dataclasses.field(default_factory=Replay, metadata={"help": Replay.__doc__})
    null_space: NullSpace = dataclasses.field(default_factory=NullSpace, metadata={"help": NullSpace.__doc__})

    def validate(self) -> None:
        """Also checks that the losses and the streams of text train something, and that no adapter is projected."""
        super().validate()
        weights = [field.name for field in dataclasses.fields(self) if field.name.startswith("weight_")]
        if weights and not any(getattr(self, name) for name in weights):
            problem = f"{listed(weights)} are all 0, so that no loss is left. Give one of them a value above 0."
            raise self.error(weights[0], problem)
        if self.null_space.energy and self.adapters is not None:
            raise self.error(
                "null_space.energy", f"adapters are not projected, and train={self.train} has them. Give 0."
            )
        for name in ("text", "forget_text"):
            if getattr(self, name).weight and self.train == "visual":
                raise self.error(
                    f"{name}.weight", "train=visual trains no weight that text reaches. Give 0, or another train."
                )

    @property
    def forget_streams(self) -> tuple[str, ...]:
        """The streams that are forgotten: of questions with an image and, if it has a weight, of text alone."""
        return base.FORGET_STREAMS if self.forget_text.weight else base.FORGET_STREAMS[:1]

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns one loss function for each of the streams "forget" and "retain", whose questions have an image."""
        raise NotImplementedError

    def text_forget_loss(self) -> base.LossFn:
        """Returns the loss of text-only questions about the people to forget; by default that of the forget set."""
        return self.image_losses()["forget"]

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns `image_losses`, and the losses of the further streams that have a weight."""
        forget_text = self.forget_text.losses(self.text_forget_loss()) if self.forget_text.weight else {}
        text = {**forget_text, **self.text.losses()}
        further = {**self.decouple.losses(), **self.other_facts.losses(), **self.replay.losses()}
        return {**self.image_losses(), **text, **further}

    def prepare(self, context: base.Context) -> base.Prepared:
        """Adds the arrays of `prepare_forget` to the sets that are forgotten."""
        prepared = {stream: self.prepare_forget(context, stream) for stream in self.forget_streams}
        return base.Prepared(sets={**context.sets, **prepared})

    def prepare_forget(self, context: base.Context, stream: str) -> EncodedSet:
        """Returns a set that is forgotten unchanged; methods whose forget loss reads cached arrays override it.

        Args:
            context: the method's context.
            stream: one of `base.FORGET_STREAMS`.
        """
        return context.sets[stream]

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """Returns the teacher of the text stream, if it has one; methods with further teachers extend it."""
        return self.text.teachers()

    def attack_loss(self, model: Any, batch: Batch) -> jax.Array:
        """Computes the loss that a relearning attacker minimizes on the forget batch: scalar."""
        return jnp.mean(base.cross_entropy(model, batch))

    def adversary(self, params: Params, model_config: Any) -> Adversary | None:
        """Returns the simulated attacker of worst-case forgetting, or None.

        Raises:
            UserError: a weight that it moves is quantized or has an adapter, or the model has no such weight.
        """
        if not self.worst_case.radius:
            return None
        if self.worst_case.moves in (TRAINED, self.train):
            paths = self.trainable(params, model_config)
        else:
            paths = trainable_paths(params, model_config, self.worst_case.moves, -1)
        fixed = [path for path in paths if not hasattr(params[path], "dtype")]
        if fixed or not paths:
            problem = f"{fixed[0]} is quantized or has an adapter" if fixed else "the model has no such weight"
            raise self.error("worst_case.moves", f"moves={self.worst_case.moves}: {problem}. Give trained or visual.")
        return Adversary(self.worst_case, self.attack_loss, tuple(paths))


def trainable_paths(paths: Iterable[str], model_config: Any, scope: str, blocks: int) -> list[str]:
    """Selects the weights of a scope.

    Args:
        paths: the paths of all weights.
        model_config: the model's configuration.
        scope: "visual" (see `visual_paths`), "lora" (the adapters), "visual+lora" (both), or "all" (the whole vision
            tower, the projector and the language model).
        blocks: the number of last vision blocks that train; see `visual_paths`.

    Raises:
        UserError: the model has fewer vision blocks.
    """
    paths = list(paths)
    adapters = [path for path in paths if lora.is_adapter(path)]
    if scope == "lora":
        return adapters
    if scope in ("visual", "visual+lora"):
        return visual_paths(paths, model_config, blocks) + (adapters if scope == "visual+lora" else [])
    visual = set(visual_paths(paths, model_config, -1))
    return [path for path in paths if path in visual or path.startswith("language_model/")]


def visual_paths(paths: Iterable[str], model_config: Any, blocks: int) -> list[str]:
    """Selects the projector and the last `blocks` vision blocks that feed it.

    With a feature layer of -2 the output of the last vision block is not used. That block and the norm after it
    (`post_norm`) never train: they have no gradient, and weight decay would move them. Where the norm feeds the
    projector, it trains together with the embeddings.

    Args:
        paths: the paths of all weights.
        model_config: the model's configuration; its `used_blocks` is the number of blocks that feed the projector.
        blocks: 0 selects the projector alone, and -1 the whole tower, as far as it feeds the projector.

    Raises:
        UserError: fewer blocks feed the projector.
    """
    used = model_config.used_blocks
    if not -1 <= blocks <= used:
        raise UserError(
            f"method.blocks={blocks}: fewer vision blocks of the model feed the projector. Give -1 to {used}."
        )
    first = used - blocks if blocks >= 0 else 0

    def trains(path: str) -> bool:
        component, layer, *rest = path.split("/")
        if component == "vision_tower" and layer == "blocks":
            return first <= int(rest[0]) < used
        if component == "vision_tower":
            return blocks == -1 and (layer != "post_norm" or model_config.uses_post_norm)
        return component == "projector"

    return [path for path in paths if trains(path)]


def frozen_blocks(trainable: Iterable[str], model_config: Any) -> int:
    """Returns the number of vision blocks before the first trainable weight, whose output never changes.

    Args:
        trainable: the paths of the weights that train.
        model_config: the model's configuration.
    """
    layers = [path.split("/")[1:3] for path in trainable if path.startswith("vision_tower/")]
    return min((int(layer[1]) if layer[0] == "blocks" else 0 for layer in layers), default=model_config.used_blocks)
