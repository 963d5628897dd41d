"""Sizes of image processors that no image should have."""

import types

import pytest
from transformers import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vkd_jax.data import image_sizes
from vkd_jax.types import UserError

SQUARE = {"height": 48, "width": 48}
PUBLISHED = {  # (image processor, whether its edges are areas)
    "LLaVA": (CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}), False),
    "Qwen2-VL": (Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056), True),
    "Qwen3-VL": (Qwen2VLImageProcessorPil(size={"shortest_edge": 65_536, "longest_edge": 16_777_216}), True),
    "SmolVLM": (SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}), False),
}
PROBLEMS = {
    "shortest edge": (CLIPImageProcessorPil(size={"shortest_edge": 10**5}), False, "size.shortest_edge", "1 to 4,096"),
    "height": (CLIPImageProcessorPil(size={"height": 5000, "width": 8}), False, "size.height", "5000"),
    "width": (CLIPImageProcessorPil(size={"height": 8, "width": 0}), False, "size.width", "is 0"),
    "crop": (CLIPImageProcessorPil(crop_size={"height": -1, "width": 8}), False, "crop_size.height", "is -1"),
    "longest edge": (SmolVLMImageProcessorPil(size={"longest_edge": 10**5}), False, "size.longest_edge", "100000"),
    "a text": (SmolVLMImageProcessorPil(size={"longest_edge": "56"}), False, "size.longest_edge", "'56'"),
    "tile": (SmolVLMImageProcessorPil(max_image_size={"longest_edge": 10**6}), False, "max_image_size.longest_edge"),
    "a tile's number": (types.SimpleNamespace(max_image_size=28), False, "max_image_size", "an object"),
    "fewest pixels": (
        Qwen2VLImageProcessorPil(min_pixels=10**9, max_pixels=10**7),
        True,
        "size.shortest_edge",
        "1 to 16,777,216 pixels in all",
    ),
    "most pixels": (Qwen2VLImageProcessorPil(max_pixels=10**12), True, "size.longest_edge", "16,777,216"),
    "a fraction": (Qwen2VLImageProcessorPil(min_pixels=1.5), True, "size.shortest_edge", "1.5"),
    "true": (types.SimpleNamespace(size={"height": True}), False, "size.height", "True"),
    "fewest above most": (Qwen2VLImageProcessorPil(min_pixels=5000, max_pixels=400), True, "5,000, more than", "400"),
    "tiles": (types.SimpleNamespace(size=SQUARE, max_patches=10**9), False, "max_patches", "1 to 7,281 tiles"),
    "no tiles": (types.SimpleNamespace(size=SQUARE, min_patches=0), False, "min_patches", "is 0"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_supported(name):
    assert image_sizes.processor_problem(*PUBLISHED[name]) is None


@pytest.mark.parametrize("name", PROBLEMS)
def test_sizes_are_bounded_by_one_rule(name):
    processor, edges_are_areas, *words = PROBLEMS[name]
    problem = image_sizes.processor_problem(processor, edges_are_areas)
    assert all(word in problem for word in words), problem


def test_an_elongated_image_does_not_become_huge():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336})
    image_sizes.check_shape(processor, 20_000, 100)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 4096})
    image_sizes.check_shape(processor, 800, 100)
    with pytest.raises(UserError, match="would be resized to 4,096 x 819,200 pixels, and at most 134,217,728"):
        image_sizes.check_shape(processor, 100, 20_000)
    image_sizes.check_shape(PUBLISHED["Qwen2-VL"][0], 20_000, 100)  # which has a largest size
