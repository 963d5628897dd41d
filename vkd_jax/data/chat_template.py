"""The chat template of a model folder: which of several files counts, and what a prompt must be.

The template of the joint processor comes first, in the order of transformers: processor_config.json,
chat_template.json, chat_template.jinja. That of tokenizer_config.json comes last, since it may be for text alone.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from absl import logging

from vkd_jax.runtime import files, json_files, storage
from vkd_jax.runtime.interrupts import time_limit
from vkd_jax.types import UserError

MOST_BYTES = 2**20  # of a template; published ones have a few kB
MOST_CHARACTERS = 2**20  # of a prompt, without the texts that it is made of
MOST_SECONDS = 10.0  # to render a prompt, which takes less than a millisecond
CONFIGS = ("processor_config.json", "chat_template.json")  # of the processor, with the template as a field
JINJA = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")  # of an object, which is another one in each process
# Takes the place of the function of templates for today's date.
_NO_CLOCK = (
    '{% macro strftime_now(pattern) %}{{ raise_exception("it reads the clock with strftime_now(\'" ~ pattern ~ "\'), '
    'so that a resumed run would have other prompts: write a date in its place") }}{% endmacro %}'
)
ATTEMPTS = 3  # to render a prompt without random numbers, which another thread may draw meanwhile
_LIST = re.compile(r"""['"]type['"]: ?['"](?:text|image)['"]""")  # a message's content, printed as a list


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A jinja template of conversations.

    Args:
        text: the template.
        source: the file that it was read from, for messages.

    Raises:
        UserError: the template has the operator `**`; no time limit stops Python while it computes a large power.
    """

    text: str
    source: str

    def __post_init__(self) -> None:
        if _has_power(self.text):
            raise self._error("computes a power, which may not end")

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
        """Formats a conversation as the prompt of its next answer.

        Args:
            tokenizer: the tokenizer, whose special tokens the template may use.
            messages: the conversation; the content of each message is a list of texts and images, and the last one
                is a question.

        Raises:
            UserError: the template has an error, does not have all texts in their order, prints the content as a list,
                or reads the clock or random numbers, so that a run could not be resumed.
        """
        try:
            with time_limit(MOST_SECONDS):
                prompt = self._without_random_numbers(tokenizer, messages)
        except Exception as error:  # syntax errors, what the template raises, and what its expressions raise
            line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""
            raise self._error(f"fails{line} ({type(error).__name__}: {storage.first_line(error)[:200]})") from error
        if problem := json_files.text_problem(prompt):
            raise self._error(f"renders a prompt that {problem}")
        if len(prompt) > MOST_CHARACTERS + 2 * len(repr(messages)):
            raise self._error(f"renders a prompt of {len(prompt):,} characters")
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if _LIST.search(prompt) and not any(_LIST.search(text) for text in texts):
            raise self._error("prints the list of texts and images in place of its items: it is for text alone")
        if _ADDRESS.search(prompt) and not any(_ADDRESS.search(text) for text in texts):
            raise self._error("prints an object with its address, which changes from run to run")
        if not prompt.strip():
            raise self._error("renders an empty prompt")
        if texts[-1].strip() not in prompt:
            raise self._error("leaves the question out of the prompt")
        position = 0
        for text in map(str.strip, texts):
            if (found := prompt.find(text, position)) < 0:
                raise self._error("changes, reorders or leaves out earlier questions or answers of a conversation")
            position = found + len(text)
        return prompt

    def warn_of_unannounced_answer(self, rest: str, ends: Sequence[str]) -> None:
        """Warns if nothing follows the last question that tells the model to answer; templates of base models are so.

        Args:
            rest: what follows the question in a prompt.
            ends: the tokens that end a turn.
        """
        for end in filter(None, ends):
            rest = rest.replace(end, "")
        if not rest.strip():
            logging.warning(
                "%s: the chat template writes nothing after the question, such as ASSISTANT:, that announces the "
                "answer, so answers may be poor; if it ignores add_generation_prompt, get the model's own template",
                self.source,
            )

    def _without_random_numbers(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
        text = _NO_CLOCK * ("strftime_now" in self.text) + self.text
        for _ in range(ATTEMPTS):
            state = random.getstate()
            prompt = tokenizer.apply_chat_template(
                messages, chat_template=text, tokenize=False, add_generation_prompt=True
            )
            if random.getstate() == state:
                return prompt
        raise ValueError("it draws random numbers, so that the same question has another prompt each time")

    def _error(self, problem: str) -> UserError:
        counts_first = Path(self.source).name in CONFIGS
        remedy = "remove it from this file, which counts first, and have" if counts_first else "write"
        return UserError(
            f"{self.source}: the chat template {problem}; {remedy} the template of the model's processor, which takes "
            f"images, {'in' if counts_first else 'to'} {JINJA} in the model folder."
        )


def _has_power(text: str) -> bool:
    """Whether a template has the operator `**` between two numbers; `f(**options)` is no operator."""
    try:
        tokens = [kind_and_value for _, *kind_and_value in jinja2.Environment().lex(text)]
    except jinja2.TemplateSyntaxError:  # is reported when the template is rendered
        return False
    tokens = [(kind, value) for kind, value in tokens if kind != "whitespace"]
    pairs = itertools.pairwise(tokens)
    return any(token == ("operator", "**") and before[1] not in ("(", ",") for before, token in pairs)


def read_chat_template(folder: Path, tokenizer: Any) -> ChatTemplate | None:
    """Reads the chat template of a model folder; None if it has none.

    Raises:
        UserError: a file cannot be read, or its template is not a text.
    """
    found = list(_templates(folder, tokenizer))
    if not found:
        return None
    (first, path), *others = found
    if differing := [other.name for template, other in others if template != first]:
        logging.info("%s has the chat template that counts; %s has another", path, differing[0])
    return _template(first, path)


def _templates(folder: Path, tokenizer: Any) -> Iterator[tuple[Any, Path]]:
    """The chat templates of a model folder with their files, the one that counts first."""
    for name in CONFIGS:
        if (folder / name).is_file():
            template = json_files.read_json(folder / name).get("chat_template")
            if template is not None:
                yield template, folder / name
    if (folder / JINJA).is_file():
        yield files.read_text(folder / JINJA, MOST_BYTES), folder / JINJA
    if tokenizer.chat_template is not None:
        yield tokenizer.chat_template, folder / TOKENIZER_CONFIG


def _template(value: Any, path: Path) -> ChatTemplate:
    """The template of a field, which is a text or several texts by name."""
    if isinstance(value, Mapping):
        value = value.get("default")
    if not isinstance(value, str):
        raise UserError(
            f"{path}: chat_template is {json_files.describe(value)}, not a text or several with one named default; "
            "get the file again."
        )
    return ChatTemplate(value, str(path))
