"""The sizes that the image processor of a model folder may give to an image: checked before anything is allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

from vkd_jax.types import UserError

MOST_SIDE = 4096  # pixels of a side that an image is resized to
MOST_PIXELS = MOST_SIDE**2  # of an image of any shape; published models shrink larger ones to at most as many
MOST_RESIZED = 2**27  # pixels of an elongated image whose shorter side is given, before it is cropped
FIELDS = ("size", "crop_size", "pad_size", "max_image_size")
AREAS = ("min_pixels", "max_pixels")
EDGES = ("shortest_edge", "longest_edge")


def size_problem(image_processor: Any, *, edges_are_areas: bool, limited: bool = False) -> str | None:
    """The first size of an image processor that no image should have, in words; None if all can be used.

    Args:
        image_processor: an image processor of transformers.
        edges_are_areas: whether shortest_edge and longest_edge of its size are numbers of pixels, as of Qwen2-VL.
        limited: whether the caller will lower the largest number of pixels.
    """
    for field, name, value in _sizes(image_processor):
        is_area = name in AREAS or (edges_are_areas and field == "size" and name in EDGES)
        most = MOST_PIXELS if is_area else MOST_SIDE
        if type(value) is int and value >= 1 and (value <= most or (limited and is_area)):
            continue
        unit = "pixels in all" if is_area else "pixels"
        remedy = " or pass --config.model.max_pixels" if is_area else ""
        label = f"{field}.{name}" if name else field
        return f"{label} of the image processor is {value!r:.40}; give 1 to {most:,} {unit}{remedy}"
    edges = [_value(image_processor, "size", edge) for edge in EDGES]
    if edges_are_areas and None not in edges and edges[0] > edges[1]:
        return f"size.shortest_edge of the image processor is {edges[0]:,}, more than size.longest_edge, {edges[1]:,}"
    return None


def check_shape(image_processor: Any, width: int, height: int) -> None:
    """Checks that an image does not become very large when its shorter side is resized.

    Raises:
        UserError: it would.
    """
    side = _value(image_processor, "size", "shortest_edge")
    if side is None or _value(image_processor, "size", "longest_edge") is not None:
        return
    long, short = max(width, height), max(min(width, height), 1)
    if side * (side * long // short) > MOST_RESIZED:
        raise UserError(
            f"it would be resized to {side:,} x {side * long // short:,} pixels, and at most {MOST_RESIZED:,} pixels "
            "are supported; crop it"
        )


def _value(image_processor: Any, field: str, name: str) -> Any:
    return next((value for f, n, value in _sizes(image_processor) if (f, n) == (field, name)), None)


def _sizes(image_processor: Any) -> Iterator[tuple[str, str, Any]]:
    """(field, name, value) of all sizes that are given."""
    for field in FIELDS:
        sizes = getattr(image_processor, field, None)
        if sizes is None:
            continue
        try:
            items = dict(sizes).items()  # a dict, or a SizeDict of transformers
        except (TypeError, ValueError):
            yield field, "", sizes
            continue
        for name, value in items:
            if value is not None and not isinstance(value, Mapping):
                yield field, str(name), value
