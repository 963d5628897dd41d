"""OFFSIDE: the published data set, or the synthetic people in the same layout.

Set         | file                                               | questions about
forget      | forget_set.json, classification_forget_set.json    | images of players that are to be forgotten
retain      | retain_set.json, classification_retain_set.json    | other images of the same players
retain_test | test_set.json, classification_test_set.json        | altered copies of the retained images
finetune_forget, finetune_retain | forget_set.json, retain_set.json | the same images; trains the vanilla model

The scenario chooses the folder of the files. A player has five numbered images (5k+1 to 5k+5): three are retained, the
fourth is to be forgotten, and the fifth, for relearning, is not read. Each image is asked about facts that all images
of the player share and about facts of its own. A person here is therefore in both sets, and what is forgotten is part
of what is known of the person. `person` is the number of the player, k+1 as three digits, from the name of the image
file.

A question starts with the line "<image>", which is left out, and may have the marker again in its sentence, where it
becomes "the image". Classification questions without their files are left out.

Reference: the repository zh121800/OFFSIDE, with data.zip unpacked; the data set zh1218001/OFFSIDE.
"""

import contextlib
import dataclasses
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.config.fields import setting
from vkd_jax.messages import listed
from vkd_jax.types import EvalSet, Example, Role, UserError

FOLDERS = {  # of each scenario
    "complete": "complete_unlearning_data",
    "selective": "selective_unlearning_data",
    "text": "pure_text_data",
}
SETS = {"forget": "forget_set.json", "retain": "retain_set.json", "retain_test": "test_set.json"}
CHOICES = "classification_"  # prefix of the files of classification questions
IMAGES_EACH = 5  # numbered images of a player
MARKER = "<image>"
NAME = "offside"


@dataclasses.dataclass(frozen=True)
class Offside(parquet.PublishedBenchmark):
    """OFFSIDE."""

    scenario: str = setting(
        "complete",
        "What is forgotten: 'complete' is all facts of an image, 'selective' some of them, 'text' has no images.",
        choices=tuple(FOLDERS),
    )

    TITLE: ClassVar[str] = "OFFSIDE"
    shares_people: ClassVar[bool] = True
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="finetune_forget", retain="finetune_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "images and facts to forget", "forget"),
        EvalSet("retain", Role.RETAIN, "other images and facts of the same people", "retain"),
        EvalSet("retain_test", Role.RETAIN_HOLDOUT, "altered copies of the retained images", "retain test"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(
        lora_rank=8, lora_alpha=32.0, lora_dropout=0.05, learning_rate=1e-4, batch_size=16, epochs=8
    )

    @property
    def label(self) -> str:
        """The name of the benchmark with the scenario."""
        return f"offside-{self.scenario}"

    @property
    def variant(self) -> str:
        """The scenario, for the title of the report."""
        return f", scenario {self.scenario}"

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a file is missing or damaged, a row or an image is invalid, or the forget and the retain set
                share a question about an image.
        """
        with self.open_snapshot(part) as files:
            folder = self._folder(files)
            if part == "finetune":
                yield {f"finetune_{name}": _open(files, f"{folder}/{SETS[name]}") for name in ("forget", "retain")}
                return
            _check_disjoint(*(f"{folder}/{SETS[name]}" for name in ("forget", "retain")), files)
            yield {name: _evaluation(files, folder, file) for name, file in SETS.items()}

    def _folder(self, files: Snapshot) -> str:
        """The folder of the scenario: in the snapshot, or in its folder "data", as the archive is unpacked."""
        name = FOLDERS[self.scenario]
        for folder in (name, f"data/{name}"):
            if files.has_file(f"{folder}/{SETS['forget']}"):
                return folder
        raise UserError(
            f"There is no {name}/{SETS['forget']} in {files.folder.display()}; pass the folder that data.zip of the "
            "benchmark was unpacked to."
        )

    def _configs(self, part: str) -> tuple[str, ...]:
        return ()

    def _files(self) -> tuple[str, ...]:
        return f"*{FOLDERS[self.scenario]}/*", "*.jpg", "*.jpeg", "*.png"

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import offside_writer  # imports the names of files from this module

        offside_writer.write_snapshot(folder, self.scenario, self.population)


def clean(question: str) -> str:
    """A question without the markers of images.

    Example:
        >>> clean("<image>\\nHow tall is the player in <image>?")
        'How tall is the player in the image?'
    """
    question = re.sub(rf"^\s*{MARKER}\s*", "", question)
    question = re.sub(rf"(?<!\s)\s*:\s*{MARKER}", "", question)
    return question.replace(MARKER, "the image").strip()


def _evaluation(files: Snapshot, folder: str, name: str) -> Iterator[list[Example]]:
    yield from _open(files, f"{folder}/{name}", task="generation")
    if files.has_file(f"{folder}/{CHOICES}{name}"):
        yield from _choices(files, f"{folder}/{CHOICES}{name}")


def _open(files: Snapshot, name: str, task: str = "chat") -> Iterator[list[Example]]:
    """The open questions of a file, grouped by image."""
    for image, rows in _by_image(files, name).items():
        examples = []
        for row in rows:
            user, assistant = _messages(row)
            examples.append(_example(row, image, user.text("content"), assistant.words("content"), task))
        yield _sharing(files, rows[0], image, examples)


def _choices(files: Snapshot, name: str) -> Iterator[list[Example]]:
    """The classification questions of a file, grouped by image."""
    for image, rows in _by_image(files, name).items():
        examples = []
        for row in rows:
            options = row.row("Options").all_texts()
            answer = row.option("Correct_Answer", options, row.text("Correct_Answer").strip())
            example = _example(row, image, row.text("Question"), answer, "classification")
            examples.append(dataclasses.replace(example, options=tuple(options.values())))
        yield _sharing(files, rows[0], image, examples)


def _messages(row: Row) -> tuple[Row, Row]:
    """The question and the answer of a row."""
    messages = list(row.rows("messages"))
    if [message.optional_text("role") for message in messages] != ["user", "assistant"]:
        raise row.error("messages", "are not one of the user and one of the assistant")
    return messages[0], messages[1]


def _by_image(files: Snapshot, name: str) -> dict[str, list[Row]]:
    """The rows of a file by the image that they name, "" for none."""
    by_image: dict[str, list[Row]] = {}
    for row in files.json_rows(name):
        by_image.setdefault(_image_name(row), []).append(row)
    return by_image


def _image_name(row: Row) -> str:
    """The image that a row names in `images` or `image`, a text or a list of one; "" for none."""
    names = row.text_or_texts("images") or row.text_or_texts("image")
    if len(names) > 1:
        raise row.error("images", f"are {len(names)}, not one")
    return posixpath.normpath(names[0].replace("\\", "/")) if names else ""


def _example(row: Row, image: str, question: str, answer: str, task: str) -> Example:
    """An example without its image, which `_sharing` adds.

    Raises:
        UserError: the question has the marker of an image, and the row names none; the scenario "text" has no images.
    """
    if MARKER in question and not image and FOLDERS["text"] not in row.name:
        raise row.error("images", f"is missing, and the question has {MARKER}")
    name = f"{row.name}/{'image' if image else 'text'}/0"
    return Example(name, _player(image), None, image, clean(question), answer, task=task, rule=NAME)


def _sharing(files: Snapshot, row: Row, image: str, examples: list[Example]) -> list[Example]:
    """The examples with their image, which is beside the file, or in the folder of the snapshot."""
    if not image:
        return examples
    folder = posixpath.dirname(row.name)
    candidates = [posixpath.normpath(posixpath.join(place, image)) for place in (folder, posixpath.dirname(folder), "")]
    inside = [name for name in candidates if files.has_file(name)]
    data = files.image(row, "images", inside[0] if inside else candidates[0])
    return [dataclasses.replace(example, image=data) for example in examples]


def _player(image: str) -> str:
    """The player of an image with a number in its name, "" of others."""
    number = re.search(r"(?<!\d)(\d{1,9})\D*$", posixpath.splitext(image)[0])
    return f"{(int(number[1]) - 1) // IMAGES_EACH + 1:03d}" if number and int(number[1]) else ""


def _check_disjoint(forget: str, retain: str, files: Snapshot) -> None:
    """Checks that no question about an image is in both sets, and that something is to be forgotten."""
    asked = [
        {(_image_name(row), clean(_messages(row)[0].text("content"))) for row in files.json_rows(name)}
        for name in (forget, retain)
    ]
    if not asked[0]:
        raise UserError(f"The forget set is empty: {files.folder.display(forget)} has no rows.")
    if both := sorted(asked[0] & asked[1]):
        shared = listed([f"{image}: {question}" for image, question in both])
        raise UserError(f"{len(both)} questions are in both {forget} and {retain}: {shared}; remove them from one.")
