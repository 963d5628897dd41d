"""Which weights train: all of them, the visual ones, or adapters beside the language model's."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from vkd_jax.config.fields import Section, setting
from vkd_jax.methods import base
from vkd_jax.models import lora
from vkd_jax.models.base import VisualTokens
from vkd_jax.types import Params, UserError

TRAIN_SCOPES = ("all", "visual", "lora")


@dataclasses.dataclass(frozen=True)
class Scope(Section):
    """The hyperparameters that all methods inherit, and defaults for the `Method` contract."""

    SECTION: ClassVar[str] = "method"

    train: str = setting(
        "all",
        "Weights that train: 'all', 'visual' (vision tower and projector), or 'lora' (adapters on every kernel of the "
        "language model's blocks).",
        choices=TRAIN_SCOPES,
    )
    blocks: int = setting(
        -1, "With train=visual, number of last vision blocks that train; -1 is the whole tower.", minimum=-1
    )
    lora_rank: int = setting(16, "Rank of the adapters.", minimum=1)
    lora_alpha: float = setting(16.0, "The adapters' output is scaled by lora_alpha / lora_rank.", above=0)
    lora_dropout: float = setting(
        0.05, "Share of an adapter's inputs that is dropped at each step.", minimum=0, below=1
    )
    mask_scope: ClassVar[str] = "none"  # a method with a mask says otherwise
    needs_base: ClassVar[bool] = False  # whether `prepare` loads the model before it was fine-tuned

    @property
    def adapters(self) -> lora.AdapterConfig | None:
        """The adapters that the method adds to the model, or None."""
        if self.train != "lora":
            return None
        return lora.AdapterConfig(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """The paths of the weights that train."""
        return trainable_paths(paths, model_config, self.train, self.blocks)

    def check_model(self, paths: Iterable[str], model_config: Any) -> None:
        """Refuses a model, by the paths of its weights and its configuration, that does not go with these fields.

        Raises:
            UserError: which field it is.
        """
        self.trainable(paths, model_config)

    def prepare(self, context: base.Context) -> base.Prepared:
        """Computes nothing; methods that cache, mask or teach override it."""
        return base.Prepared(sets=context.sets, teachers=self.teachers())

    def edit(self, context: base.Context) -> Params:
        """Methods that train have no edit."""
        raise NotImplementedError(f"{type(self).__name__} trains; it edits no weights.")

    def cache_spec(self, stream: str, taps: Mapping[str, VisualTokens], model_config: Any) -> base.CacheSpec:
        """No arrays; methods that cache override it."""
        del stream, taps, model_config
        return base.CacheSpec()

    def mask_shape(self, path: str, shape: tuple[int, ...], model_config: Any) -> tuple[int, ...]:
        """The shape of the weight itself."""
        del path, model_config
        return shape

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """No teachers; methods with teachers override it."""
        return {}


def trainable_paths(paths: Iterable[str], model_config: Any, scope: str, blocks: int) -> list[str]:
    """The paths of a scope.

    "visual": see `visual_paths`; "all": those of the whole tower, and the language model; "lora": the adapters.
    """
    paths = list(paths)
    if scope == "lora":
        return [path for path in paths if path.endswith((f"/{lora.A}", f"/{lora.B}"))]
    if scope == "visual":
        return visual_paths(paths, model_config, blocks)
    visual = set(visual_paths(paths, model_config, -1))
    return [path for path in paths if path in visual or path.startswith("language_model/")]


def visual_paths(paths: Iterable[str], model_config: Any, blocks: int) -> list[str]:
    """The projector and the last `blocks` vision blocks *that feed it*.

    With a feature layer of -2 the very last block feeds nothing: it would get no gradient, yet weight decay would
    move it. So it never trains, nor does the norm that stands behind it (`post_norm`).

    Args:
        paths: of all parameters.
        model_config: of the family; its `used_blocks` is how many blocks feed the projector.
        blocks: 0 is the projector alone; -1 is the whole used tower, embeddings included.
    """
    used = model_config.used_blocks
    if not -1 <= blocks <= used:
        raise UserError(
            f"blocks={blocks}: the model has {used} vision blocks that feed the projector; give -1 to {used}."
        )
    trained = {f"vision_tower/blocks/{i}" for i in range(used - blocks if blocks >= 0 else 0, used)}

    def trains(path: str) -> bool:
        tower, part, *rest = path.split("/")
        if tower == "vision_tower" and part == "blocks":
            return f"{tower}/{part}/{rest[0]}" in trained
        return tower == "projector" or (tower == "vision_tower" and blocks == -1 and part != "post_norm")

    return [path for path in paths if trains(path)]


def frozen_blocks(trainable: Iterable[str], model_config: Any) -> int:
    """How many of the vision blocks that feed the projector stand before everything that trains: what leaves them
    never changes.

    Args:
        trainable: paths of what trains.
        model_config: of the family.
    """
    first = [path.split("/")[1:3] for path in trainable if path.startswith("vision_tower/")]
    return min((int(rest[1]) if rest[0] == "blocks" else 0 for rest in first), default=model_config.used_blocks)
