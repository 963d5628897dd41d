"""Images of every kind and family against transformers' processors: equal pixels and equal tokens."""

import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vkd_jax.checkpoints import hf
from vkd_jax.data.encoding import encode_set
from vkd_jax.data.images import open_image
from vkd_jax.data.processor import Processor
from vkd_jax.models import MODELS, module_for
from vkd_jax.models.base import abstract_model
from vkd_jax.models.llava import LlavaConfig
from vkd_jax.models.tiled import TiledConfig
from vkd_jax.types import Example, UserError

transformers = pytest.importorskip("transformers")


def noise(width, height, channels=3):
    """Random noise, smooth enough that rounding does not dominate after resizing."""
    small = np.random.default_rng(0).integers(0, 256, (5, 4, channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    return encoded(noise(90, 40), "JPEG", exif=exif)


IMAGES = {
    "portrait": encoded(noise(40, 90)),
    "landscape": encoded(noise(130, 50)),
    "gray": encoded(noise(60, 50).convert("L")),
    "gray with alpha": encoded(noise(60, 50).convert("LA")),
    "RGBA": encoded(noise(60, 50, 4)),
    "palette": encoded(noise(60, 50).convert("P")),
    "CMYK": encoded(noise(60, 50).convert("CMYK"), "JPEG"),
    "one bit": encoded(noise(60, 50).convert("1")),
    "EXIF": rotated(),
    "one pixel": encoded(noise(1, 1)),
    "very large": encoded(noise(5000, 3001), "JPEG"),
}


@pytest.fixture(scope="module", params=MODELS)
def processor(request, family_folder):
    folder = family_folder(request.param)
    module, hf_config = hf.read_config(folder)
    return Processor(folder, module.Config.from_hf(hf_config))


def parts(processor):
    return processor.image_processor, processor.tokenizer


def joint_processor(processor):
    """The joint processor of the family in transformers, without videos, which need torchvision."""
    if hf.family_of(processor.config) is module_for("gemma3"):
        return transformers.Gemma3Processor(
            processor.image_processor,
            processor.tokenizer,
            image_seq_length=processor.config.image_tokens(0, 0),
            chat_template=processor.chat_template.text,
        )
    if isinstance(processor.config, LlavaConfig):
        is_next = hf.family_of(processor.config) is module_for("llava_next")
        return (transformers.LlavaNextProcessor if is_next else transformers.LlavaProcessor)(
            processor.image_processor,
            processor.tokenizer,
            patch_size=processor.config.vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=processor.chat_template.text,
        )
    if hf.family_of(processor.config) is module_for("internvl"):
        joint = object.__new__(transformers.InternVLProcessor)
        joint.image_processor, joint.tokenizer, joint.video_processor = *parts(processor), None
        joint.image_seq_length, joint.image_token, joint.video_token = 4, processor.image_token, "<video>"
        joint.start_image_token, joint.end_image_token = "<img>", "</img>"
        joint.image_token_id = processor.image_token_id
        joint.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
        joint.chat_template = processor.chat_template.text
        return joint
    if isinstance(processor.config, TiledConfig):
        # SmolVLM's has the same methods for images, and needs torchvision.
        return transformers.Idefics3Processor(
            processor.image_processor,
            processor.tokenizer,
            image_seq_len=len(processor.config.token_coords),
            chat_template=processor.chat_template.text,
        )
    joint = object.__new__(transformers.Qwen2VLProcessor)
    joint.image_processor, joint.tokenizer, joint.video_processor = *parts(processor), None
    joint.image_token, joint.video_token = processor.image_token, "<|video_pad|>"
    joint.image_token_id, joint.video_token_id = processor.image_token_id, -1
    joint.chat_template = processor.chat_template.text
    return joint


def tiles(processor, image):
    """The arrays that the model reads: the tiles of an image, or the image."""
    return list(processor.config.tiles(image)[0]) if isinstance(processor.config, TiledConfig) else [image]


@pytest.mark.parametrize("kind", IMAGES)
def test_pixels_and_tokens_equal_those_of_transformers(processor, kind):
    data = IMAGES[kind]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who is this?"}]}]
    joint = joint_processor(processor)
    text = joint.apply_chat_template(prompt, add_generation_prompt=True)
    # As `apply_chat_template(tokenize=True)` does, which takes no image in memory.
    add_special_tokens = not text.startswith(str(processor.tokenizer.bos_token))
    want = joint(images=[image], text=[text], return_tensors="np", add_special_tokens=add_special_tokens)

    pixels = processor.image(data)
    packed = processor.config.pack([[pixels]])
    if "patches" in packed:
        count = int(want["image_grid_thw"].prod())
        np.testing.assert_array_equal(packed["patch_coords"][0, count:, 0], -1)
        frames = want["pixel_values"].reshape(count, 3, 2, -1)
        for frame in (0, 1):
            got = packed["patches"][0, :count].reshape(count, 3, -1)
            np.testing.assert_allclose(got, frames[:, :, frame], atol=1e-5)
    elif isinstance(processor.config, TiledConfig):
        # Those of SmolVLM have the images of a prompt on a further axis.
        tiles_of_all = want["pixel_values"].reshape(-1, *want["pixel_values"].shape[-3:]).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(packed["pixels"].reshape(tiles_of_all.shape), tiles_of_all)
    else:
        (row,) = packed["pixels"].reshape(-1, *pixels.shape)
        np.testing.assert_allclose(row, want["pixel_values"][0].transpose(1, 2, 0), atol=1e-5)
    tokens, answer = processor.encode("Who is this?", None, [pixels])
    assert tokens == want["input_ids"][0].tolist() and answer == []
    assert tokens.count(processor.image_token_id) == processor.config.image_tokens(*pixels.shape[:2])


def test_the_model_returns_one_feature_per_image_token(processor):
    import jax

    from vkd_jax.models.base import bind

    module, _ = hf.read_config(processor.tokenizer.name_or_path)
    graphdef, shapes = abstract_model(lambda rngs: module.Model(processor.config, rngs=rngs))
    for kind in ("portrait", "landscape", "one pixel"):
        image = processor.image(IMAGES[kind])
        packed = processor.config.pack([[image]])
        features, _ = jax.eval_shape(lambda p, x: bind(graphdef, p).encode(x), shapes, packed)
        count = processor.config.image_tokens(*image.shape[:2])
        if "patch_coords" in packed:
            assert (packed["patch_coords"][0, :, 0] >= 0).sum() == 4 * count <= 4 * features.values.shape[1]
        else:
            assert features.values.shape[1] == processor.config.packed_tokens(*image.shape[:2]) >= count


def test_packed_images_can_be_unpacked(processor, unpack):
    images = [processor.image(IMAGES[kind]) for kind in ("portrait", "landscape", "one pixel")]
    rows = [[x] for x in images]
    if type(processor.config).pack is not LlavaConfig.pack:
        rows.append(images)  # three images in one prompt
    unpacked = unpack(processor.config, processor.config.pack(rows))
    for row, unpacked_row in zip(rows, unpacked, strict=True):
        for x, y in zip((x for image in row for x in tiles(processor, image)), unpacked_row, strict=True):
            np.testing.assert_array_equal(x, y)


def test_sets_of_images_of_any_size_share_one_shape(processor, unpack):
    kinds = ("portrait", "landscape", "one pixel", "very large")
    examples = [Example(k, "p", IMAGES[k], k, f"Who is number {i}?", "Bob") for i, k in enumerate(kinds)]
    encoded_set = encode_set(processor, examples, max_length=processor.config.text.max_positions)
    for i, kind in enumerate(kinds):
        image = processor.image(IMAGES[kind])
        tokens = encoded_set.tokens[i][encoded_set.mask[i]]
        assert (tokens == processor.image_token_id).sum() == processor.config.image_tokens(*image.shape[:2])
        packed = encoded_set.batch(np.array([i])).images
        for x, y in zip(tiles(processor, image), unpack(processor.config, packed)[0], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "smolvlm", "internvl", "llava_next"])
def test_a_prompt_can_have_several_images(family_folder, family):
    folder = family_folder(family)
    module, hf_config = hf.read_config(folder)
    processor = Processor(folder, module.Config.from_hf(hf_config))
    images = [processor.image(IMAGES[kind]) for kind in ("portrait", "landscape")]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Who?"}]
    joint = joint_processor(processor)
    text = joint.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pil = [Image.open(io.BytesIO(IMAGES[kind])) for kind in ("portrait", "landscape")]
    add_special_tokens = not text.startswith(str(processor.tokenizer.bos_token))
    want = joint(images=[pil], text=[text], add_special_tokens=add_special_tokens)["input_ids"][0]
    assert processor.encode("Who?", None, images)[0] == want


def test_max_pixels_bounds_images_and_is_refused_where_unsupported(family_folder, tiny_folder, tiny_config):
    folder = family_folder("qwen2_vl")
    module, hf_config = hf.read_config(folder)
    config = module.Config.from_hf(hf_config)
    height, width, _ = Processor(folder, config).image(IMAGES["very large"]).shape
    assert 4 * 28 * 28 < height * width <= 16 * 28 * 28
    small = Processor(folder, config, max_pixels=4 * 28 * 28)
    height, width, _ = small.image(IMAGES["very large"]).shape
    assert height * width <= 4 * 28 * 28
    with pytest.raises(UserError, match=r"model\.max_pixels=100: .* at least 784"):
        Processor(folder, config, max_pixels=100)
    with pytest.raises(UserError, match=r"model\.max_pixels=100: all images of .* have one size; set it to 0"):
        Processor(tiny_folder, tiny_config, max_pixels=100)
    with pytest.raises(UserError, match="image of 900 x 3 pixels cannot be processed"):
        small.image(noise(900, 3))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_a_model_without_a_chat_template_is_refused(family_folder, monkeypatch, family):
    folder = family_folder(family)
    module, hf_config = hf.read_config(folder)
    processor = Processor(folder, module.Config.from_hf(hf_config))
    monkeypatch.setattr(processor, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        processor.encode("Who?", None)


@pytest.mark.parametrize(
    ("family", "want"),
    [
        ("qwen2_vl", ["<|im_end|>", "<|endoftext|>"]),
        ("gemma3", ["<end_of_turn>", "<eos>"]),
        ("smolvlm", ["<end_of_utterance>"]),
        ("llava_next", ["</s>"]),
    ],
)
def test_the_first_eos_id_is_the_one_that_the_chat_template_writes_after_an_answer(family_folder, family, want):
    folder = family_folder(family)
    module, hf_config = hf.read_config(folder)
    processor = Processor(folder, module.Config.from_hf(hf_config))
    names = processor.tokenizer.convert_ids_to_tokens(list(processor.eos_ids))
    assert names == want
    assert processor.tokenizer.convert_ids_to_tokens(processor.encode("Who?", "Bob")[1][-1]) == want[0]


def test_gemma_refuses_pan_and_scan_and_marks_of_images_in_texts(family_folder, tmp_path):
    folder = family_folder("gemma3")
    module, hf_config = hf.read_config(folder)
    config = module.Config.from_hf(hf_config)
    processor = Processor(folder, config)
    prompt, _ = processor.encode("Who?", None)
    assert prompt.count(processor.tokenizer.bos_token_id) == 1
    image = processor.image(IMAGES["portrait"])
    for text in ("a <start_of_image> b", "a <image_soft_token> b"):
        with pytest.raises(UserError, match="a text contains <(start_of_image|image_soft_token)>, which stands for"):
            processor.encode(text, None, [image])
        examples = [Example("7", "", IMAGES["portrait"], "p", text, "Bob")]
        with pytest.raises(UserError, match="7.*: a text contains <"):
            encode_set(processor, examples, max_length=99)
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | dict(do_pan_and_scan=True)))
    with pytest.raises(UserError, match="do_pan_and_scan is on, .* set it to false"):
        Processor(tmp_path, config)


def png_header(width, height):
    """The beginning of a PNG image: its size without its pixels."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def encoded_16_bits(value, hot=0):
    """An image with 16 bits per pixel: a half is black, a half has a value, and one pixel may be hot."""
    pixels = np.zeros((40, 40), np.uint16)
    pixels[20:] = value
    pixels[3, 3] = hot
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("value", "seen"), [(0, 0), (16384, 64), (65535, 255)])
def test_16_bits_become_8(value, seen):
    assert np.asarray(open_image(encoded_16_bits(value))).max() == seen


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (png_header(20_000, 10_000), "the image is too large: it has 200,000,000 pixels, and at most 178,956,970"),
        (png_header(2**31 - 1, 2**31 - 1), "the image is too large: it has 4,611,686,014,132,420,609 pixels"),
        (png_header(0, 10), "the image"),
        (png_header(10, 10), "the image is truncated"),
        (IMAGES["EXIF"][:-200], "the image cannot be decoded"),
        (b"GIF89a", "the image"),
        (b"", "the image is broken or of a format that is not read"),
        (
            encoded_16_bits(4095),
            "the image would be almost black: nearly all 16-bit values are below 16,384; save it with 8",
        ),
        (encoded_16_bits(4095, hot=65535), "the image would be almost black"),
        (encoded_16_bits(255), "the image would be almost black"),
        (encoded_16_bits(1), "the image would be almost black"),
        *(
            (encoded(noise(9, 9), format), "broken or of a format that is not read; save it as PNG, JPEG, WebP, BMP or")
            for format in ("TIFF", "PPM", "ICO", "EPS")
        ),
    ],
)
def test_images_that_cannot_be_decoded(data, problem):
    with pytest.raises(UserError, match=problem):
        open_image(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_half_an_image_is_refused_even_if_the_program_allows_it(monkeypatch, format):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(noise(120, 90), format)
    half = whole[: len(whole) // 2 + 300]
    with pytest.raises(UserError, match="the image"):
        open_image(half)
    if format in ("JPEG", "PNG"):  # which Pillow opens before it reads their pixels
        with pytest.raises(UserError, match="the image .*truncated"):
            open_image(Image.open(io.BytesIO(half)))
    assert open_image(whole).size == (120, 90)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_last_of_several_threads_allows_half_images_again(monkeypatch):
    """Two threads are in the decoder at once; the program sets the flag while the first one is."""
    from vkd_jax.data import images

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with images._WHOLE_FILES.required():
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with images._WHOLE_FILES.required():
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    assert open_image(IMAGES["portrait"]) and ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_an_image_that_cannot_be_processed_is_named(family_folder):
    folder = family_folder("qwen2_vl")
    module, hf_config = hf.read_config(folder)
    processor = Processor(folder, module.Config.from_hf(hf_config))
    images = {"forget/a.png": IMAGES["one pixel"], "forget/b.png": encoded(noise(900, 3))}
    examples = [Example(name, "", image, name, "Who?", "Bob") for name, image in images.items()]
    with pytest.raises(UserError, match=r"^forget/b\.png: an image cannot be processed: the image has 900 x 3 pixels"):
        encode_set(processor, examples, max_length=processor.config.text.max_positions)
