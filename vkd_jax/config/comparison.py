"""Sections of a comparison of methods: `compare`, and each of its entrants."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from vkd_jax.config.fields import SEED, Section, setting

LONGEST_FOLDER = 60  # characters, of up to four bytes


@dataclasses.dataclass(frozen=True)
class EntrantConfig(Section):
    """A method in a comparison, or a variant of another entrant."""

    method: Any = setting(None, "Method: a dataclass of vkd_jax/methods; None for a variant.")
    settings: str = setting("", "Other settings of the entrant's runs, as `override` reads them.")
    search: tuple[str, ...] = setting((), "Settings that are tried for it; equally many for all entrants.")
    variant_of: str = setting("", "Entrant whose method and best settings it has; its own settings override them.")

    def validate(self) -> None:
        """Also checks that a variant has no method and no search of its own."""
        super().validate()
        if self.variant_of and (self.method is not None or self.search):
            raise self.error("variant_of", f"{self.variant_of!r} gives method and search. Leave both out.")


@dataclasses.dataclass(frozen=True)
class CompareConfig(Section):
    """A comparison of methods: `python -m vkd_jax.compare`."""

    SECTION: ClassVar[str] = "compare"

    entrants: Mapping[str, EntrantConfig] = dataclasses.field(
        default_factory=dict, metadata={"help": "Methods to compare, by the name that tables show."}
    )
    tuning: str = setting(
        "",
        "Settings of tuning runs, as `override` reads them, on data that is not reported; '' tunes none. Attacks that "
        "these settings name run on every trial, and the best trial is then the one that resists most.",
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "Seeds, one run each.", nonempty=True, **SEED)

    def validate(self) -> None:
        """Also checks seeds, names, methods and searches of the entrants, and what each is a variant of."""
        super().validate()
        folders: dict[str, str] = {}
        for name in self.entrants:
            if not 1 <= len(folder_of(name)) <= LONGEST_FOLDER:
                raise self.error(f"entrants.{name}", f"give a name with 1 to {LONGEST_FOLDER} letters and digits.")
            if (other := folders.setdefault(folder_of(name), name)) != name:
                raise self.error(
                    f"entrants.{name}", f"its runs would be in the folder of {other!r}. Give one of them another name."
                )
        for name, entrant in self.entrants.items():
            if entrant.method is None and not entrant.variant_of:
                raise self.error(f"entrants.{name}.method", "is missing. Give a method, or variant_of.")
            original = self.entrants.get(entrant.variant_of)
            if entrant.variant_of and (original is None or original.variant_of):
                raise self.error(f"entrants.{name}.variant_of", f"no entrant with a method is {entrant.variant_of!r}.")
        if len(trials := {len(entrant.search) for entrant in self.entrants.values() if entrant.search}) > 1:
            counts = ", ".join(map(str, sorted(trials)))
            raise self.error("entrants", f"their searches have {counts} settings. Give each that has any equally many.")


def folder_of(name: str) -> str:
    """Name of the folder of an entrant's runs.

    Example:
        >>> folder_of("vkd robust, visual")
        'vkd_robust_visual'
    """
    return re.sub(r"\W+", "_", name).strip("_")
