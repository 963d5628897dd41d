"""Rows of a data set that others wrote: each field is checked for its type where it is read.

An error names the file, the row or line, and the field: "forget/metadata.jsonl, line 3: answer is the number 3, not a
text; correct the row.".
"""

import ast
import functools
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from vkd_jax.benchmarks.names import MISSING, answer_key, has_words, plain_name
from vkd_jax.data.images import MOST_IMAGE_BYTES, open_image, pixel_digest
from vkd_jax.messages import listed
from vkd_jax.runtime import json_files
from vkd_jax.runtime.storage import SourceFolder
from vkd_jax.types import UserError

MOST_CHARACTERS = 1_000_000  # of a text; published ones have thousands
MOST_EXACT = 2**53  # above it, several integers become one floating-point number
# A cell that consists of a constant or a number where phrases are expected.
_CONSTANT = re.compile(r"(?:null|none|nan|true|false|[+-]?(?:infinity|[0-9.]+(?:e[+-]?[0-9]+)?))", re.IGNORECASE)


class EncodedImage(bytes):
    """An image file that was decoded once: its bytes, and `pixels`, the `images.pixel_digest`."""

    pixels: bytes

    @classmethod
    def decoded(cls, data: bytes) -> "EncodedImage":
        """Decodes an image.

        Raises:
            UserError: it cannot be decoded.
        """
        pixels = pixel_digest(open_image(data))
        image = cls(data)
        image.pixels = pixels
        return image


class Row:
    """A row, or an object nested in one, with typed access to its fields. A missing field is the same as null.

    Args:
        values: the fields.
        location: the file and the row in it, for messages.
        name: the name of the row, for ids of examples: "forget_10/3".
        lenient: whether a text may be stored as an integer, and a list or an object as JSON or a Python literal, as in
            published tables.
        prefix: the path of a nested object, for messages: "Mask_Task[0].".

    Example:
        >>> row = Row({"answer": 3}, "metadata.jsonl, line 1")
        >>> row.text("answer")
        Traceback (most recent call last):
        vkd_jax.types.UserError: metadata.jsonl, line 1: answer is the number 3, not a text; correct the row.
    """

    def __init__(
        self, values: Mapping[str, Any], location: str, *, name: str = "", lenient: bool = False, prefix: str = ""
    ):
        self._values, self.location, self.name = values, location, name
        self._lenient, self._prefix = lenient, prefix

    def error(self, field: str, problem: str) -> UserError:
        """An error of one of the fields, to be raised: `problem` continues a sentence that starts with the field."""
        return UserError(f"{self.location}: {self._prefix}{field} {problem}; correct the row.")

    def has(self, field: str) -> bool:
        """Whether the field is neither missing nor null."""
        return self._values.get(field) is not None

    def text(self, field: str) -> str:
        """A text that is required and has visible characters.

        Raises:
            UserError: it is missing, null, blank, or not a text.
        """
        if not self.has(field):
            raise self.error(field, "is missing")
        text = self.optional_text(field)
        if not plain_name(text):
            raise self.error(field, "is blank")
        return text

    def words(self, field: str) -> str:
        """The true answer to an open question: a text that is required and has letters or digits.

        Others, such as ".", are in almost any answer, so that everything would be right.

        Raises:
            UserError: it is missing, null, blank, or not a text, or has no letter and no digit.
        """
        text = self.text(field)
        if not has_words(text):
            raise self.error(field, f"is {text!a}, an answer without a letter or a digit")
        return text

    def optional_name(self, field: str) -> str:
        """The `names.plain_name` of a text; "" if it is missing, null, or has nothing but spaces.

        Raises:
            UserError: it is not a text, consists of invisible characters, or is "nan" or the like.
        """
        name = plain_name(text := self.optional_text(field))
        if text.strip() and not name:
            raise self.error(field, "has nothing but invisible characters")
        return self._present(field, name)

    def optional_text(self, field: str) -> str:
        """A text; "" if it is missing or null.

        Raises:
            UserError: it is not a text.
        """
        return self._text(field, self._values[field]) if self.has(field) else ""

    def identifier(self, field: str) -> str:
        """A required name that tables also store as a number: "093", 93 or 93.0.

        Raises:
            UserError: it is missing, null, blank, or not a text or a whole number.
        """
        value = self._values.get(field)
        if isinstance(value, float) and value.is_integer():
            if abs(value) > MOST_EXACT:
                raise self.error(field, f"is the number {value:g}, in which the last digits are lost; write it as text")
            return str(int(value))
        return self._present(field, plain_name(self.text(field)))

    def _present(self, field: str, name: str) -> str:
        """Returns a name, unless it is a text that represents a missing value."""
        if name in {*MISSING, "None", "N/A"}:
            problem = f"is the text {name!a}, as programs write a missing value, so that all such rows would be one"
            raise self.error(field, f"{problem}; leave it out, or spell a real name of this kind in full")
        return name

    def texts(self, field: str, *, skip_blank: bool = False) -> list[str]:
        """A list of texts; [] if it is missing or null.

        Args:
            field: the name of the field.
            skip_blank: whether items that are null or have no visible character are left out.

        Raises:
            UserError: it is not a list of texts.
        """
        texts = [self._text(name, value) for name, value in self._items(field) if not (skip_blank and value is None)]
        return [text for text in texts if plain_name(text) or not skip_blank]

    def text_or_texts(self, field: str) -> list[str]:
        """A list of texts that may be stored as one text; items that are null or blank are left out.

        Raises:
            UserError: it is neither a text nor a list of texts, or a blank text.
        """
        if isinstance(self._values.get(field), str):
            return [self.text(field)]
        return self.texts(field, skip_blank=True)

    def keywords(self, field: str) -> tuple[str, ...]:
        """The phrases of a right answer, see `phrases`, without those that almost any answer has.

        Raises:
            UserError: an item is no text, or none of them has a letter or a digit.
        """
        phrases = self.phrases(field)
        words = tuple(filter(has_words, phrases))
        if phrases and not words:
            raise self.error(field, f"has {phrases[0]!a}, and no phrase with a letter or a digit")
        return words

    def phrases(self, field: str) -> list[str]:
        """The texts in nested lists and objects, which may be stored as JSON, or one text; blank ones are left out.

        Only a table, whose cells are all texts, may have a blank text or an empty object for no phrase.

        Raises:
            UserError: an item is none of these.
        """
        value = self._values.get(field)
        if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
            return self._phrase(field)
        texts, stack = [], [(field, self._parsed(field))]
        if not isinstance(stack[0][1], Mapping | list | tuple | None) or (stack[0][1] == {} and not self._lenient):
            raise self.error(field, f"is {json_files.describe(stack[0][1])} without a phrase; leave the field out")
        while stack:
            name, value = stack.pop()
            if isinstance(value, Mapping):
                if numbers := [key for key, child in value.items() if isinstance(child, int | float)]:
                    raise self.error(f"{name}.{numbers[0]}", f"is {json_files.describe(value[numbers[0]])}, not a text")
                stack += [(f"{name}.{key}", child) for key, child in reversed(value.items())]
            elif isinstance(value, (list, tuple)):
                stack += [(f"{name}[{number}]", child) for number, child in reversed(list(enumerate(value)))]
            elif value is not None:
                texts.append(self._text(name, value))
        return [text for text in texts if text.strip()]

    def _phrase(self, field: str) -> list[str]:
        """The one phrase of a text; none if a cell of a table is blank."""
        text = self.optional_text(field) if self._lenient else self.text(field)
        if _CONSTANT.fullmatch(text.strip()):
            raise self.error(field, f"is {text!a}, a value of JSON that is no phrase")
        return [text.strip()] if text.strip() else []

    def texts_or_rows(self, field: str) -> Iterator["str | Row"]:
        """The items of a list of texts and objects; none if it is missing or null.

        Raises:
            UserError: it is not a list of these.
        """
        for name, value in self._items(field):
            yield self._nested(name, value) if isinstance(value, Mapping) else self._text(name, value)

    def rows(self, field: str) -> Iterator["Row"]:
        """The objects of a list; none if it is missing or null.

        Raises:
            UserError: it is not a list of objects.
        """
        for name, value in self._items(field):
            yield self._nested(name, value)

    def row(self, field: str) -> "Row":
        """A nested object; one without fields if it is missing, null or an empty list.

        Raises:
            UserError: it is not an object.
        """
        value = self._parsed(field)
        return self._nested(field, {} if value is None or value == [] else value)

    def option(self, field: str, options: Mapping[str, str], letter: str, text: str = "") -> str:
        """The text of the right option, which a field gives by its letter, and may give by its text as well.

        Args:
            field: the field.
            options: the texts by letter.
            letter: the letter in the field.
            text: the text that the data give beside it; one that is not an option's says nothing.

        Raises:
            UserError: there is no such option, or letter and text are those of different options.
        """
        if letter not in options:
            raise self.error(field, f"is {letter!a}, not one of the options {listed(options)}")
        texts = {letter: answer_key(option) for letter, option in options.items()}
        given = answer_key(text)
        if given and given != texts[letter] and given in texts.values():
            raise self.error(field, f"is {letter!a}, the option {options[letter]!a}, but its text is {text!a}")
        return options[letter]

    def fields(self) -> list[str]:
        """The names of the fields that are not null.

        Raises:
            UserError: a name is not a text.
        """
        for field in self._values:
            self._text(f"the name of {field!a}", field)
        return [field for field in self._values if self.has(field)]

    def all_texts(self) -> dict[str, str]:
        """All fields of an object of texts, such as options by letter.

        Raises:
            UserError: one of them is null, blank, or not a text, or its name is not a text.
        """
        self.fields()
        return {field: self.text(field) for field in self._values}

    def image(self, field: str) -> EncodedImage | None:
        """The encoded bytes of an image, checked by decoding them once; None if it is missing or null.

        Raises:
            UserError: it is not an image.
        """
        return self._image(field, self._values.get(field))

    def images(self, field: str) -> list[EncodedImage]:
        """A list of images without those that are null; [] if it is missing or null.

        Raises:
            UserError: it is not a list of images.
        """
        images = (self._image(name, value) for name, value in self._items(field))
        return [image for image in images if image is not None]

    def _text(self, field: str, value: Any) -> str:
        if self._lenient and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.error(field, f"is {json_files.describe(value)}, not a text")
        if len(value) > MOST_CHARACTERS:
            raise self.error(field, f"has {len(value):,} characters, and at most {MOST_CHARACTERS:,} are read")
        if problem := json_files.text_problem(value):
            raise self.error(field, problem)
        return value

    def _image(self, field: str, value: Any) -> EncodedImage | None:
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
            if data is None and path:
                raise self.error(field, f"is the path {path!a} without bytes. Only embedded images are read")
            value = data
        if value is None:
            return None
        if not isinstance(value, bytes):
            raise self.error(field, f"is {json_files.describe(value)}, not an encoded image")
        if len(value) > MOST_IMAGE_BYTES:
            size = f"has {len(value) / 2**20:,.1f} MiB, and at most {MOST_IMAGE_BYTES / 2**20:,.0f} MiB are read"
            raise self.error(field, size)
        try:
            return EncodedImage.decoded(value)
        except UserError as error:
            raise self.error(field, f"cannot be used: {error}") from error

    def _items(self, field: str) -> Iterator[tuple[str, Any]]:
        """The items of a list, each with its name for messages."""
        value = self._parsed(field)
        if value is not None and not isinstance(value, (list, tuple)):
            raise self.error(field, f"is {json_files.describe(value)}, not a list")
        return ((f"{field}[{number}]", item) for number, item in enumerate(value or ()))

    def _nested(self, field: str, value: Any) -> "Row":
        if not isinstance(value, Mapping):
            raise self.error(field, f"is {json_files.describe(value)}, not an object")
        prefix = f"{self._prefix}{field}."
        return Row(value, self.location, name=self.name, lenient=self._lenient, prefix=prefix)

    def _parsed(self, field: str) -> Any:
        """A list or an object, parsed if it may be stored as JSON or as a Python literal."""
        value = self._values.get(field)
        if not (self._lenient and isinstance(value, str)):
            return value
        for parse in (functools.partial(json.loads, object_pairs_hook=json_files.unique_keys), _literal):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # literal_eval warns about invalid escapes in texts
                    value = parse(value)
            except (ValueError, SyntaxError, TypeError):  # a TypeError: a list as a key
                continue
            except json_files.KeyTwiceError as error:
                raise self.error(field, f"cannot be used: {error}") from error
            except (RecursionError, MemoryError) as error:  # a MemoryError: of the parser's stack
                problem = f"is nested more than {json_files.MOST_LEVELS} levels deep"
                raise self.error(field, problem) from error
            json_files.check_value(value, f"{self.location}: {self._prefix}{field}", remedy="correct the row")
            return value
        raise self.error(field, "is neither JSON nor a Python literal")


def _literal(text: str) -> Any:
    """The value of a Python literal.

    Raises:
        ValueError, SyntaxError, TypeError: the text is none.
        KeyTwiceError: an object in it has a key twice.
    """
    tree = ast.parse(text.lstrip(" \t"), mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [ast.literal_eval(key) for key in node.keys]
            if len(set(keys)) < len(keys):
                json_files.unique_keys(list(zip(keys, map(ast.literal_eval, node.values), strict=True)))
    return ast.literal_eval(tree)


def read_image(folder: SourceFolder, name: str, row: Row, field: str) -> EncodedImage:
    """Reads an image file that a field of a row names, and checks it by decoding it once.

    Raises:
        UserError: the file is missing, outside of the folder, or not an image.
    """
    try:
        data = folder.read(name, MOST_IMAGE_BYTES)
    except UserError as error:
        raise UserError(f"{row.location}: {field} cannot be used: {error}") from error
    return Row({name: data}, row.location).image(name)
