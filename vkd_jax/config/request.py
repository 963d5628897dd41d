"""Section of one of several sequential deletion requests: `request`.

`vkd requests run` sets it. People are identified by digests, so no name is stored. The people to forget are drawn
from the forget and the retain set of the benchmark, and everybody else is retained.
"""

import dataclasses
from typing import ClassVar

from vkd_jax.config.fields import Section, setting

DIGEST = r"[0-9a-f]{64}"
_PEOPLE = {"pattern": DIGEST, "expected": "the SHA-256 of what the data calls a person"}


@dataclasses.dataclass(frozen=True)
class RequestConfig(Section):
    """One of several requests that follow each other; `vkd requests run` sets it."""

    SECTION: ClassVar[str] = "request"

    people: tuple[str, ...] = setting((), "People to forget.", nonempty=True, **_PEOPLE)
    earlier: tuple[str, ...] = setting((), "People whom earlier requests have forgotten.", **_PEOPLE)
    features: tuple[str, ...] = setting((), "Folders of the cached features of these people.")
    first: str = setting("", "Model before the first request, which retained people are held to; '' is model.path.")
