"""Section of a training loop: `train`, `finetune.train`, and the loop of an attacker."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from absl import logging

from vkd_jax import messages, registry
from vkd_jax.config.fields import Section, setting


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """A training loop: of unlearning, of fine-tuning, or of an attacker."""

    SECTION: ClassVar[str] = "train"

    steps: int = setting(300, "Number of update steps; 0 if `epochs` is given.", minimum=0, maximum=10**8)
    epochs: float = setting(0.0, "Passes through the longest stream; 0 if `steps` is given.", minimum=0, maximum=10**4)
    batch_size: Mapping[str, int] = setting(
        {"forget": 32, "retain": 32, "text": 32, "forget_text": 32},
        "Examples per step of each stream, over all devices.",
        minimum=1,
    )
    microbatches: int = setting(1, "Parts that a batch is computed in one after another, to save memory.", minimum=1)
    buckets: int = setting(
        1, "Largest number of lengths that examples are padded to; each pair of lengths is compiled.", minimum=1
    )
    learning_rate: float = setting(2e-3, "Peak learning rate.", above=0)
    schedule: str = setting(
        "cosine", "Learning rate after a linear warmup: falls as a cosine, or stays.", choices=("cosine", "constant")
    )
    warmup_steps: int = setting(10, "Steps of the linear warmup.", minimum=0)
    weight_decay: float = setting(0.01, "Weight decay of AdamW, for matrices only.", minimum=0)
    clip_norm: float = setting(1.0, "Largest norm of the gradient; 1e9 clips nothing.", minimum=1e-6)
    b2: float = setting(0.999, "Decay rate of Adam's second moment.", minimum=0, below=1)
    log_every: int = setting(20, "Steps between two rows of metrics.", minimum=1)
    log_seconds: float = setting(15.0, "Seconds between two log lines on progress.", minimum=0)
    checkpoint_every: int = setting(100, "Steps between two checkpoints.", minimum=1)

    trackers: str = setting(
        "",
        f"Experiment trackers that metrics are also sent to, with commas: {', '.join(registry.TRACKERS)}; '' is none.",
    )

    def validate(self) -> None:
        """Also checks the names of the trackers."""
        super().validate()
        if unknown := [name for name in self.tracker_names if name not in registry.TRACKERS]:
            available = messages.choices(registry.TRACKERS)
            raise self.error("trackers", f"unknown tracker {messages.listed(unknown)}. Available: {available}.")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Names of the trackers, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.trackers.split(",") if name.strip()))

    def rows(self, stream: str, shards: int) -> int:
        """Examples of a stream per step.

        Args:
            stream: name of the stream.
            shards: number of devices that a batch is sharded over.

        Raises:
            FieldError: no batch size is given, or it cannot be sharded.
        """
        if stream not in self.batch_size:
            raise self.error("batch_size", f"{stream!r} is missing, and the method needs it. Give a number for it.")
        size, multiple = self.batch_size[stream], shards * self.microbatches
        if size % multiple:
            microbatches = f" in {self.microbatches} microbatches" if self.microbatches > 1 else ""
            raise self.error(
                f"batch_size.{stream}",
                f"{size} examples do not divide over {shards} devices{microbatches}. Give a multiple of {multiple}.",
            )
        return size

    def length(self, examples: Mapping[str, int]) -> int:
        """Number of update steps.

        Args:
            examples: number of examples of each stream.

        Raises:
            FieldError: both of `steps` and `epochs` are given, or neither.
        """
        if (self.steps > 0) == (self.epochs > 0):
            raise self.error(
                "steps",
                f"steps={self.steps} and epochs={self.epochs}. Give one of them, and 0 for the other.",
            )
        epochs = (math.ceil(self.epochs * n / self.batch_size[name]) for name, n in examples.items())
        return self.steps or max(epochs, default=0)

    def check(self, streams: Sequence[str], shards: int) -> None:
        """Checks, before anything is read, that the loop can train these streams.

        Raises:
            FieldError: as `rows` and `length`.
        """
        for stream in streams:
            self.rows(stream, shards)
        self.length({})
        if 0 < self.steps <= self.warmup_steps:
            logging.warning(
                "%s.warmup_steps: the warmup takes %d steps and the training %d, so that the learning rate stays below "
                "%g",
                self.SECTION,
                self.warmup_steps,
                self.steps,
                self.learning_rate,
            )
