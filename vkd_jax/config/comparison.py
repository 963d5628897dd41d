"""Sections of a comparison of methods: `compare`, and each of its entrants."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vkd_jax.config.fields import SEED, Section, setting


@dataclasses.dataclass(frozen=True)
class EntrantConfig(Section):
    """A method in a comparison."""

    SECTION: ClassVar[str] = "compare.entrants"

    method: Any = setting(None, "Method: a dataclass of vkd_jax/methods.")
    settings: str = setting("", "Other settings of the entrant's runs, as `override` reads them.")
    search: tuple[str, ...] = setting((), "Settings that are tried for it; equally many for all entrants.")


@dataclasses.dataclass(frozen=True)
class CompareConfig(Section):
    """A comparison of methods: `python -m vkd_jax.compare`."""

    SECTION: ClassVar[str] = "compare"

    entrants: Mapping[str, EntrantConfig] = dataclasses.field(
        default_factory=dict, metadata={"help": "Methods to compare, by the name that tables show."}
    )
    tuning: str = setting(
        "",
        "Settings of tuning runs, as `override` reads them, on data that is not reported; '' tunes none.",
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "Seeds, one run each.", nonempty=True, **SEED)

    def validate(self) -> None:
        """Also checks that seeds differ."""
        super().validate()
        if len(set(self.seeds)) < len(self.seeds):
            raise self.error("seeds", f"{self.seeds!r} is not allowed. Give each seed once.")
