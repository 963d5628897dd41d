"""The section `eval`: which questions models are asked, how, and who judges their answers."""

import dataclasses
import re
from typing import ClassVar

from vkd_jax import messages, registry
from vkd_jax.config import fields
from vkd_jax.config.fields import Section, setting

PROTOCOLS = ("options", "letter", "letter:first_character", "letter:similar_option", "letter:strict")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    """How models are evaluated."""

    SECTION: ClassVar[str] = "eval"

    protocol: str = setting(
        "options",
        "How questions with options are asked: 'options' takes the most probable option, 'letter' the letter that the "
        "model writes, 'letter:first_character' the first letter of whatever it writes, as MLLMU-Bench does, "
        "'letter:similar_option' the option most similar to what it writes, as UMU-Bench does, and 'letter:strict' "
        "only a lone letter or 'The answer is B', as OFFSIDE does. Several with commas; the first one counts.",
    )
    prompts: str = setting("", "JSON file of prompt wordings, see docs/extending.md; '' is the package's own.")
    shots: int = setting(0, "1 shows a worked example before each question.", choices=(0, 1))
    batch_size: int = setting(64, "Questions per batch.", minimum=1)
    max_items: int = setting(300, "Largest number of questions per set and kind; 0 asks all.", minimum=0)
    max_new_tokens: int = setting(8, "Largest number of tokens of a written answer.", minimum=1)
    seed: int = setting(0, "Seed of the sample of questions.", **fields.SEED)
    general: str = setting("", f"Standard suites of general ability, with commas: {', '.join(registry.SUITES)}.")
    general_source: str = setting(
        "",
        "Where the suites are: a folder with a subfolder for each, 'hub' for the usual ids on the Hugging Face hub, or "
        "NAME=SOURCE for single suites, with commas. '' writes small stand-ins of drawn images.",
    )

    judge: str = setting(
        "",
        "Language model that grades the open answers: the URL of an OpenAI-compatible endpoint, as in "
        "http://localhost:8000/v1, or a model as in model.path; '' for none.",
    )
    judge_model: str = setting("", "Name of the judge at the endpoint.")
    judge_prompts: str = setting("", "JSON file of the judge's prompts, see docs/judge.md; '' is the package's own.")

    def validate(self) -> None:
        """Also checks the names of the protocols and of the suites, and that the judge is given in full."""
        super().validate()
        self.general_sources()
        if self.judge_at_endpoint != bool(self.judge_model):
            needed = "Name the model that the endpoint serves" if self.judge_at_endpoint else "Leave it out"
            raise self.error("judge_model", f"{self.judge_model!r} does not fit eval.judge={self.judge!r}. {needed}.")
        if self.judge_prompts and not self.judge:
            raise self.error("judge_prompts", "there is no judge. Give eval.judge, or leave it out.")
        names = self.protocols
        if not set(names) <= set(PROTOCOLS) or len(set(names)) < len(names):
            raise self.error(
                "protocol",
                f"{self.protocol!r} is not allowed. Give {', '.join(PROTOCOLS)}, or several, as in options,letter.",
            )

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of the protocols, in order."""
        return tuple(name.strip() for name in self.protocol.split(","))

    @property
    def judge_at_endpoint(self) -> bool:
        """Whether the judge is a model behind a URL, and not one that this process loads."""
        return self.judge.startswith(("http://", "https://"))

    def general_sources(self) -> dict[str, str]:
        """The source of each suite that is asked, by name, in the order of `registry.SUITES`; "hub" is its usual id.

        Raises:
            FieldError: a name is unknown or given twice, or a source is for a suite that is not asked.
        """
        names = fields.comma_separated(self.general)
        if unknown := [name for name in names if name not in registry.SUITES]:
            available = messages.choices(registry.SUITES)
            raise self.error("general", f"unknown suite {messages.listed(unknown)}. Available: {available}.")
        if len(set(names)) < len(names):
            raise self.error("general", f"{self.general!r} names a suite twice. Give each once.")
        default, sources = "", {}
        for text in fields.comma_separated(self.general_source):
            if match := re.fullmatch(r"(\w+)=(.*)", text):
                if not match[2].strip() or match[1] in sources:
                    raise self.error("general_source", f"{text!r} is not allowed. Give each suite one source.")
                sources[match[1]] = match[2]
            elif default:
                raise self.error("general_source", f"{default!r} and {text!r} are both for all suites. Give one.")
            else:
                default = text
        if unasked := [name for name in sources if name not in names] or ([default] if default and not names else []):
            raise self.error(
                "general_source",
                f"{unasked[0]!r} is not needed: eval.general is {self.general!r}. Name the suite there.",
            )
        folder = {"": "", "hub": "hub"}
        return {
            name: sources.get(name, folder.get(default, f"{default.rstrip('/')}/{name}"))
            for name in registry.SUITES
            if name in names
        }
