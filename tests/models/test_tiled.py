"""Images that a model reads as tiles: their layout, coordinates, limits, copies and compiled programs."""

import io
import types

import jax
import numpy as np
import pytest
from PIL import Image

from vkd_jax.checkpoints import hf
from vkd_jax.data import augment
from vkd_jax.data.encoding import encode_set
from vkd_jax.data.images import PackedImages, TiledImage
from vkd_jax.data.processor import Processor
from vkd_jax.methods import feature_targets
from vkd_jax.models import base
from vkd_jax.models.tiled import cut, join
from vkd_jax.types import Example, UserError

SIDE = 28  # of a tile of the small model; an image has at most 2 x 2 of them, and one for the whole image


@pytest.fixture(scope="module")
def folder(family_folder):
    return family_folder("smolvlm")


def png(width, height, seed=0):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiled(config, rows, columns):
    """An image whose pixels are their number, by view, row and column."""
    size = rows * SIDE, columns * SIDE
    sides = [(r * SIDE, c * SIDE, 3) for r, c in config.grids(*size)]
    return TiledImage(tuple(np.arange(np.prod(side), dtype=np.float32).reshape(side) for side in sides), size)


def test_views_are_cut_row_by_row_and_joined_again():
    view = np.arange(2 * 3 * 3 * 3 * 3).reshape(6, 9, 3)
    tiles = cut(view, 3)
    assert tiles.shape == (6, 3, 3, 3)
    np.testing.assert_array_equal(tiles[1], view[:3, 3:6])
    np.testing.assert_array_equal(tiles[3], view[3:, :3])
    np.testing.assert_array_equal(join(tiles, (2, 3)), view)


def test_tiles_of_a_prompt_are_packed_in_order_with_their_view_row_and_column(config):
    wide, whole = tiled(config, 1, 2), tiled(config, 1, 1)
    packed = config.pack([[wide, whole], [whole]])
    assert packed["pixels"].shape == (2, 4, SIDE, SIDE, 3)
    # The smallest view has the first number. Tokens of the grid come before those of the whole image.
    assert packed["tile_coords"][0].tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0], [2, 0, 0]]
    assert packed["tile_coords"][1].tolist() == [[0, 0, 0], *[[-1, -1, -1]] * 3]
    np.testing.assert_array_equal(packed["pixels"][0, 1], wide.views[0][:, SIDE:])
    np.testing.assert_array_equal(packed["pixels"][0, 2], wide.views[1])
    assert not packed["pixels"][1, 1:].any()
    assert config.pack([[whole], [whole]]).keys() == {"pixels"}
    assert config.pack([[whole]], min_tokens=9)["pixels"].shape[1] == 3  # four tokens a tile
    with pytest.raises(UserError, match="views of 28 x 56 and 28 x 28 pixels does not consist of the model's tiles"):
        config.pack([[wide._replace(size=(SIDE, 3 * SIDE))]])


def test_an_array_of_the_size_stands_for_a_black_image(config):
    blank = np.broadcast_to(np.float32(0), (2 * SIDE, SIDE, 3))
    want = config.pack([[tiled(config, 2, 1).map(np.zeros_like)]])
    for name, array in config.pack([[blank]]).items():
        np.testing.assert_array_equal(array, want[name])


def test_features_of_a_grid_are_resampled_by_their_place_in_the_whole_image(folder, config):
    graphdef, params, _ = hf.load(folder)
    images = [tiled(config, 2, 2), tiled(config, 1, 2), tiled(config, 1, 1)]
    features, taps = jax.jit(lambda x: base.bind(graphdef, params).encode(x))(config.pack([[x] for x in images]))
    coords = np.asarray(features.coords)
    grid = coords[0][coords[0, :, 0] == 1]
    assert sorted(map(tuple, grid[:, 1:].tolist())) == [(row, column) for row in range(4) for column in range(4)]
    assert grid[4].tolist() == [1, 0, 2]  # the first token of the second tile
    assert coords[0, 16:, 0].tolist() == [0] * 4 and (coords[2, 4:] == -1).all()
    assert taps["vision/0"].values.shape == (3, 5 * 16, 32) and taps["features"].coords[0, :, 1].max() == 7
    tokens = base.VisualTokens(coords[..., 1:].astype(np.float32), coords)
    # From an image of one tile: each token of the grid takes that of the whole image at its place.
    resampled = feature_targets.resample_features(tokens, np.array([2]), coords[:1])[0]
    np.testing.assert_array_equal(resampled[:16], coords[0, :16, 1:] // 2)
    np.testing.assert_array_equal(resampled[16:], coords[0, 16:, 1:])


def test_max_pixels_limits_the_grid(folder, config):
    assert Processor(folder, config).max_pixels == (2 * SIDE) ** 2
    small = Processor(folder, config, max_pixels=2 * SIDE**2)
    image = small.image(png(90, 40))
    assert [view.shape for view in image.views] == [(SIDE, SIDE, 3)] and image.shape == (SIDE, SIDE, 3)
    prompt, _ = small.encode("Who?", None, [image])
    assert prompt.count(config.image_token_id) == 4
    with pytest.raises(UserError, match=r"model\.max_pixels=783: the model needs at least 784"):
        Processor(folder, config, max_pixels=783)


def test_images_that_are_not_split_are_one_tile_and_keep_their_size(folder, config):
    processor = Processor(folder, config)
    processor.image_processor.do_image_splitting = False
    before = processor.image(png(90, 40))
    processor.limit_pixels(2 * SIDE**2)
    image = processor.image(png(90, 40))
    assert image.shape == (SIDE, SIDE, 3) and processor.max_pixels == SIDE**2
    np.testing.assert_array_equal(image.views, before.views)


def test_tiles_of_another_size_are_refused(config):
    settings = types.SimpleNamespace(size={"longest_edge": 56}, max_image_size={"longest_edge": 56})
    assert "max_image_size.longest_edge is 56" in config.image_processor_problem(settings)
    output = {"pixel_values": np.zeros((1, 1, 3, 56, 28), np.float32), "rows": [[0]], "cols": [[0]]}
    with pytest.raises(UserError, match="returns tiles of 56 x 28 pixels .* and the model takes 28 x 28"):
        config.extract_images(output)


def test_augmented_copies_keep_the_layout_and_move_all_views_alike(folder, config):
    examples = [Example("a", "p", png(90, 40), "a", "Who?", "Bob")]
    encoded = encode_set(Processor(folder, config), examples, max_length=config.text.max_positions)
    light = tiled(config, 1, 2).map(lambda view: np.full_like(view, 2.0))
    images = PackedImages.of([light], config)
    out = augment.augment_set(encoded, 3, np.random.default_rng(0)).images
    assert out.shapes == [(SIDE, 2 * SIDE, 3)] * 4
    out = augment.augment_set(encoded.__class__(**{**vars(encoded), "images": images}), 3, np.random.default_rng(0))
    brightness = out.images.cached["pixels"].mean((2, 3, 4))  # [4, 3]: a copy has one brightness
    np.testing.assert_allclose(brightness, np.broadcast_to(brightness[:, :1], brightness.shape), rtol=1e-5)
    assert len(np.unique(brightness[:, 0].round(4))) == 4


# What a prompt with one image has: one tile, or those of a grid and one for the whole image.
@pytest.mark.parametrize(
    "family, tiles",
    [
        ("smolvlm", [3, 5]),  # one row or column of two tiles, or two of both
        ("internvl", [1, 3, 4, 5]),
        ("llava_next", [3, 4, 5]),  # grids of two, three and four tiles
    ],
)
def test_a_hundred_images_of_different_sizes_compile_one_program_for_each_number_of_tiles(family_folder, family, tiles):
    folder = family_folder(family)
    module, hf_config = hf.read_config(folder)
    config = module.Config.from_hf(hf_config)
    processor = Processor(folder, config)
    sizes = np.random.default_rng(0).integers(10, 200, (100, 2)).tolist()
    graphdef, shapes = base.abstract_model(lambda rngs: module.Model(config, rngs=rngs))
    traced = []

    @jax.jit
    def encode(params, images):
        traced.append(images["pixels"].shape)
        return base.bind(graphdef, params).encode(images)[0].coords

    made = [processor.image(Image.new("RGB", tuple(size))) for size in sizes]
    for image in made:  # traced, not compiled; what was traced is cached as what was compiled would be
        jax.eval_shape(encode, shapes, config.pack([[image]]))
    assert sorted(shape[1] if len(shape) == 5 else 1 for shape in traced) == tiles
    # A set has one shape, although the image with most tokens need not be the one with most tiles.
    packed = PackedImages.of(made[:12], config)
    packed.cached = None  # each image is packed anew
    assert len({str(jax.tree.map(np.shape, packed[np.array([i])])) for i in range(12)}) == 1
