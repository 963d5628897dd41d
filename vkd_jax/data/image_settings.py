"""The settings of an image processor in its JSON file: each field has a type, checked before transformers reads it.

transformers accepts any JSON type and fails later, while it processes an image: an empty list of sizes is "list index
out of range", and a string instead of a number changes pixels. Fields without a rule are not checked.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vkd_jax.runtime import json_files
from vkd_jax.types import UserError

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
SECTION = "image_processor"  # of the first file, which counts before the second one
SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
INTEGERS = frozenset(
    ("resample", "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "min_patches")
    + ("max_patches", "image_seq_length", "size_divisor", "pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops")
)
SWITCHES = frozenset(("crop_to_patches", "default_to_square", "disable_grouping"))  # and all that begin with "do_"
SIZES = frozenset(("size", "crop_size", "pad_size", "max_image_size"))
NUMBERS = frozenset(("rescale_factor", "pan_and_scan_min_ratio_to_activate"))
CHANNELS = frozenset(("image_mean", "image_std"))
TEXTS = frozenset(
    ("image_processor_type", "feature_extractor_type", "processor_class", "aspect_ratio_setting")
    + ("data_format", "input_data_format", "return_tensors", "device")
)
GRIDS = "image_grid_pinpoints"
RESAMPLINGS = range(6)  # of PIL
SPREAD = (0.2, 50.0)  # from black to white as the model sees them; published processors have 2 to 5
_KINDS = {bool: "true or false", int: "a whole number", list: "an array", dict: "an object of sizes"}


def file_of(folder: Path) -> Path:
    """The file of a model folder that has the settings of its image processor."""
    path = folder / PROCESSOR
    has_section = path.is_file() and json_files.read_json(path, remedy="get it again").get(SECTION) is not None
    return path if has_section else folder / IMAGE_PROCESSOR


def setting(image_processor: Any, name: str, kind: type) -> Any:
    """A setting of an image processor of transformers, of which each class has others.

    Args:
        image_processor: the image processor.
        name: the name of the setting.
        kind: its type: bool, int, list or dict. Sizes, which transformers gives a type of their own, are returned as a
            dict without those that are null.

    Raises:
        UserError: the setting is missing, null or of another type.

    Example:
        >>> setting(types.SimpleNamespace(patch_size=14), "patch_size", int)
        14
    """
    value = getattr(image_processor, name, None)
    if kind is dict and (isinstance(value, Mapping) or hasattr(value, "longest_edge")):
        return {side: pixels for side, pixels in dict(value).items() if pixels is not None}
    if type(value) is kind or (kind is list and isinstance(value, tuple)):
        return value
    state = "null or missing" if value is None else f"{value!r:.40}"
    raise UserError(f"{name} of the image processor is {state}, and has to be {_KINDS[kind]}; get its file again")


def class_problem(image_processor: Any, supported: tuple[str, ...]) -> str | None:
    """What is wrong if an image processor is that of another family of models, in words; None if it is not.

    Args:
        image_processor: an image processor of transformers.
        supported: the names of the classes that fit the model, without the name of their backend; () for any.
    """
    name = re.sub("(Pil|Fast)$", "", type(image_processor).__name__)
    if not supported or name in supported:
        return None
    return f"its settings are those of {name}, and the model has {' or '.join(supported)}: get the model's own file"


def range_problem(image_processor: Any) -> str | None:
    """What is wrong with the pixels that black (0) and white (255) become, in words; None if nothing is.

        pixel -> (rescale_factor * pixel - image_mean) / image_std

    A mean of pixels up to 255 with a factor of 1/255, or a factor that is applied twice, makes all images alike.

    Args:
        image_processor: an image processor of transformers, whose settings are numbers.
    """
    ends = np.array([[0.0], [255.0]])
    if getattr(image_processor, "do_rescale", True) is not False:
        factor = getattr(image_processor, "rescale_factor", None)
        ends = ends * (1 / 255 if factor is None else factor)
    if getattr(image_processor, "do_normalize", True) is not False:
        ends = (ends - getattr(image_processor, "image_mean", 0.0)) / getattr(image_processor, "image_std", 1.0)
    for black, white in np.broadcast_to(ends, (2, 3)).T:
        spread = white - black
        problem = "has almost the same value everywhere" if spread < SPREAD[0] else None
        problem = "has values that the model does not know" if spread > SPREAD[1] else problem
        if problem is None and max(black, -white) > spread:
            problem = "has values far from 0"
        if problem:
            return (
                f"with its rescale_factor, image_mean and image_std an image {problem} (black becomes {black:.4g}, "
                f"white {white:.4g})"
            )
    return None


def differences(first: Path, second: Path) -> list[str]:
    """The settings of pixels that the image processors of two model folders both have, with different values."""
    values, others = _values(first), _values(second)
    numbers = INTEGERS | SWITCHES | SIZES | NUMBERS | CHANNELS
    names = [name for name in sorted(values.keys() & others.keys()) if name.startswith("do_") or name in numbers]
    return [name for name in names if None not in (values[name], others[name]) and values[name] != others[name]]


def _values(folder: Path) -> Mapping[str, Any]:
    """The settings of the image processor of a model folder; {} if it has none."""
    path = file_of(folder)
    if not path.is_file():
        return {}
    values = json_files.read_json(path, remedy="get it again")
    return values[SECTION] if path.name == PROCESSOR else values


def check(folder: Path) -> None:
    """Checks the types of all settings of the image processor of a model folder, null being that of any field.

    Raises:
        UserError: a field has another type.
    """
    for path in (folder / PROCESSOR, folder / IMAGE_PROCESSOR):
        if not path.is_file():
            continue
        values = json_files.read_json(path, remedy="get it again")
        section = ""
        if path.name == PROCESSOR:
            values, section = values.get(SECTION), f"{SECTION}."
            if values is None:
                continue
            if not isinstance(values, Mapping):
                raise UserError(f"{path}: {SECTION} is {json_files.describe(values)}, not an object; get it again.")
        for field, value in values.items():
            if value is not None and (problem := _problem(field, value)):
                raise UserError(f"{path}: {section}{problem}; get the file again.")
        return  # the second file is not read


def _problem(field: str, value: Any) -> str | None:
    """What is wrong with a field, in words; None if nothing is."""
    if field in SIZES:
        return _size_problem(field, value)
    if field.startswith("do_") or field in SWITCHES:
        fits, expected = isinstance(value, bool), "true or false"
    elif field == "resample":
        fits, expected = _is_integer(value) and value in RESAMPLINGS, f"a whole number up to {RESAMPLINGS[-1]}"
    elif field in INTEGERS:
        fits, expected = _is_integer(value), "a whole number"
    elif field in NUMBERS:
        fits, expected = _is_number(value), "a number"
    elif field in CHANNELS:
        fits, expected = _is_number(value) or _is_list(value, 3, _is_number), "a number for each of three colors"
    elif field == GRIDS:
        fits = _is_list(value, None, lambda item: _is_list(item, 2, _is_integer))
        expected = "an array of pairs of whole numbers"
    elif field in TEXTS:
        fits, expected = isinstance(value, str), "a text"
    else:
        return None
    return None if fits else f"{field} is {value!r:.40}, and has to be {expected}"


def _size_problem(field: str, value: Any) -> str | None:
    """What is wrong with a size: a side, a height and a width, or an object of them."""
    if _is_integer(value) or _is_list(value, 2, _is_integer):
        return None
    if not isinstance(value, Mapping) or not value:
        return f"{field} is {value!r:.40}, and has to be an object such as {{'height': 336, 'width': 336}}"
    for side, pixels in value.items():
        if side not in SIDES:
            return f"{field} has the unknown side {side!a} (supported: {', '.join(SIDES)})"
        if pixels is not None and not _is_integer(pixels):
            return f"{field}.{side} is {pixels!r:.40}, and has to be a whole number of pixels"
    return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list(value: Any, length: int | None, is_item: Any) -> bool:
    """Whether a value is an array of so many items (None: of any number but 0) that are what they should be."""
    return isinstance(value, list) and (len(value) == length if length else bool(value)) and all(map(is_item, value))
