"""The sizes of the image processor of a model folder, checked before anything is allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

from vkd_jax.types import UserError

MOST_SIDE = 4096  # pixels of a side that an image is resized to
MOST_PIXELS = MOST_SIDE**2  # of an image of any shape; published models shrink larger ones to at most as many
MOST_RESIZED = 2**27  # pixels of an elongated image whose shorter side is given, before it is cropped
FIELDS = ("size", "crop_size", "pad_size", "max_image_size")
TILES = ("min_patches", "max_patches")  # numbers of tiles, each of the size height x width
AREAS = ("min_pixels", "max_pixels")
EDGES = ("shortest_edge", "longest_edge")
NEEDED = {"size": "do_resize", "resample": "do_resize", "crop_size": "do_center_crop", "rescale_factor": "do_rescale"}


def processor_problem(image_processor: Any, edges_are_areas: bool) -> str | None:
    """The first size of an image processor that cannot be used, in words; None if all can.

    Args:
        image_processor: an image processor of transformers.
        edges_are_areas: whether shortest_edge and longest_edge of its size are numbers of pixels, as of Qwen2-VL.
    """
    for field, switch in NEEDED.items():
        if getattr(image_processor, switch, False) and getattr(image_processor, field, field) is None:
            return f"{field} of the image processor is null, and {switch} needs it; get its file again"
    for field, name, value in _sizes(image_processor):
        is_area = name in AREAS or (edges_are_areas and field == "size" and name in EDGES)
        most = MOST_PIXELS if is_area else MOST_SIDE
        if name and type(value) is int and 1 <= value <= most:
            continue
        if not name:
            return f"{field} of the image processor is {value!r:.40}, and has to be an object; correct its file"
        unit = "pixels in all" if is_area else "pixels"
        label = f"{field}.{name}"
        return f"{label} of the image processor is {value!r:.40}, and can be 1 to {most:,} {unit}; correct its file"
    height, width = (_value(image_processor, "size", side) or 1 for side in ("height", "width"))
    for name in TILES:
        value, most = getattr(image_processor, name, None), MOST_PIXELS // (height * width)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            return f"{name} of the image processor is {value!r:.40}, and can be 1 to {most:,} tiles; correct its file"
    if problem := _crop_problem(image_processor):
        return problem
    edges = [_value(image_processor, "size", edge) for edge in EDGES]
    if edges_are_areas and None not in edges and edges[0] > edges[1]:
        return f"size.shortest_edge of the image processor is {edges[0]:,}, more than size.longest_edge, {edges[1]:,}"
    return None


def _crop_problem(image_processor: Any) -> str | None:
    """A side that is shorter than what is cropped out of it, so that black pixels would fill the rest; None if none."""
    if not (getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "do_resize", False)):
        return None
    side = max(_value(image_processor, "crop_size", name) or 0 for name in ("height", "width"))
    for name in ("shortest_edge", "height", "width"):
        if 0 < (edge := _value(image_processor, "size", name) or 0) < side:
            return f"size.{name} of the image processor is {edge:,}, less than crop_size, {side:,}; correct its file"
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
