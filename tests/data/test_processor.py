"""Target tokens, image tokens, and inputs that are refused."""

import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from vkd_jax.data import tokenizer_checks
from vkd_jax.data.chat_template import ChatTemplate
from vkd_jax.data.encoding import encode_set
from vkd_jax.data.processor import Processor, create_processor
from vkd_jax.data.sampler import Sampler
from vkd_jax.types import Example, UserError

CORPUS = [
    "USER: What is this person's job? ASSISTANT: baker",
    "USER: Who is Mara Lindt? ASSISTANT: a sailor",
] * 9


def png(color=(200, 30, 30), size=(20, 20), mode="RGB", **save):
    out = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(out, "PNG", **save)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    create_processor(folder, CORPUS, vocab_size=400, image_size=16, patch_size=8)
    return folder


@pytest.fixture(scope="module")
def processor(folder, tiny_config):
    return Processor(folder, tiny_config)


def examples():
    image = png()
    return [
        Example("0", "001", image, "p", "What is this person's job?", "baker"),
        Example("1", "001", image, "p", "Who is this person?", "Mara Lindt"),
        Example("2", "002", png((0, 0, 255)), "q", "Who?", "a sailor"),
    ]


def test_the_prompt_has_the_format_of_llava(processor):
    assert processor.prompt("Who?", 1) == "USER: <image>\nWho? ASSISTANT:"
    assert processor.prompt("Who?", 0) == "USER: Who? ASSISTANT:"


def test_targets_are_the_answer_and_the_end_token(processor):
    encoded = encode_set(processor, examples(), max_length=64)
    for row, example in enumerate(encoded.examples):
        targets = encoded.targets[row][encoded.target_mask[row]]
        assert targets[-1] == processor.eos_ids[0]
        assert processor.tokenizer.decode(targets[:-1]) == " " + example.answer
        predicted = encoded.tokens[row][encoded.target_positions[row][encoded.target_mask[row]] + 1]
        np.testing.assert_array_equal(predicted, targets)  # logits at a position predict the next token
        assert processor.image_token_id not in targets
        first = encoded.target_positions[row][0]
        assert first == encoded.prompt_length[row] - 1
        assert encoded.mask[row].sum() == encoded.prompt_length[row] + len(targets)


def test_every_image_has_all_its_tokens_and_is_stored_once(processor):
    encoded = encode_set(processor, examples(), max_length=64)
    np.testing.assert_array_equal((encoded.tokens == processor.image_token_id).sum(1), [4, 4, 4])
    assert encoded.images.cached["pixels"].shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(encoded.image_rows, [0, 0, 1])
    batch = encoded.batch(np.array([2, 0]))
    np.testing.assert_array_equal(batch.images["pixels"], encoded.images.cached["pixels"][[1, 0]])


def test_text_only_questions_have_no_image(processor):
    text = [Example("0", "", None, "", "Who is Mara Lindt?", "a sailor")]
    encoded = encode_set(processor, text, max_length=64)
    assert encoded.batch(np.array([0])).images is None
    assert processor.image_token_id not in encoded.tokens


def test_a_row_that_is_too_long_is_refused_and_never_truncated(processor):
    with pytest.raises(UserError, match=r"row 0 \(.*\) has \d+ tokens, but the model takes at most 14"):
        encode_set(processor, examples(), max_length=14)


def test_a_tokenizer_without_the_tokens_around_images_is_refused(folder, tiny_config, monkeypatch):
    monkeypatch.setattr(type(tiny_config), "markup_tokens", ("<image>", "<img>"))
    with pytest.raises(UserError, match=r"its tokenizer lacks <img>, which marks images"):
        Processor(folder, tiny_config)


def test_images_and_image_tokens_must_match(processor, monkeypatch):
    for special in ("</s>", "<pad>", "<unk>"):
        with pytest.raises(UserError, match=f"a text contains {special}, a special token of the tokenizer; remove it"):
            processor.encode("Who is this?", f"Otto Lindt{special}")
        with pytest.raises(UserError, match=f"a text contains {special}, a special token"):
            processor.encode(f"Who is{special} this?", "Otto Lindt")
    with pytest.raises(UserError, match="a text contains <image>, which stands for an image; remove it"):
        processor.encode("What is <image>?", None)
    no_images = ChatTemplate("{{ messages[0]['content'][-1]['text'] }}", "template")
    monkeypatch.setattr(processor, "chat_template", no_images)
    with pytest.raises(UserError, match="contains <image> 0 times for 1 images"):
        processor.encode("Who?", None, [processor.image(png())])


def test_invalid_files_of_a_model_folder_are_refused(folder, tiny_config, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json: it is not JSON"):
        Processor(copy, tiny_config)
    with pytest.raises(UserError, match="an image cannot be processed"):
        Processor(folder, tiny_config).image(b"no image")


def test_an_image_token_in_a_question_is_refused(processor):
    bad = Example("7", "", png(), "p", "What is <image>?", "x")
    with pytest.raises(UserError, match="row 7"):
        encode_set(processor, [bad], max_length=64)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_images_of_any_mode_are_converted(processor, mode):
    data = io.BytesIO()
    image = Image.new("RGB", (31, 17), (120, 60, 200))
    image = Image.fromarray(np.full((17, 31), 40_000, np.uint16)) if mode == "I;16" else image.convert(mode)
    assert image.mode == mode
    image.save(data, "PNG")
    pixels = processor.image(data.getvalue())
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.float32 and np.isfinite(pixels).all()


def test_exif_rotation_is_applied(processor):
    upright = Image.new("RGB", (16, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # red above white
    rotated, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    upright.rotate(90).save(rotated, "PNG", exif=exif)
    plain = io.BytesIO()
    upright.save(plain, "PNG")
    np.testing.assert_allclose(processor.image(rotated.getvalue()), processor.image(plain.getvalue()), atol=1e-5)


def test_pixels_equal_those_of_the_processor_of_transformers(processor, folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8))
    data = io.BytesIO()
    noise.save(data, "PNG")
    hf = AutoProcessor.from_pretrained(folder)
    want = hf(images=[noise], text=["<image>"], return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(processor.image(data.getvalue()), want.transpose(1, 2, 0), atol=1e-6)


def test_batches_are_a_function_of_seed_name_and_step(processor):
    encoded = encode_set(processor, examples(), max_length=64)
    a, b = (Sampler(encoded, 2, seed=3, name="forget") for _ in range(2))
    np.testing.assert_array_equal(a[5].tokens, b[5].tokens)
    epoch = np.concatenate([a[0].targets[:, 0], a[1].targets[:, 0], a[2].targets[:, 0]])
    assert sorted(epoch) == sorted(np.repeat(encoded.targets[:, 0], 2))  # each row once per epoch, two epochs
    orders = {
        name: [Sampler(encoded, 3, seed=3, name=name)[i].targets[:, 0].tolist() for i in range(8)] for name in "xy"
    }
    assert orders["x"] != orders["y"] and len(set(map(tuple, orders["x"]))) > 1


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, tiny_config):
    with pytest.raises(UserError, match="no usable tokenizer"):
        Processor(tmp_path, tiny_config)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "x.jinja"])
def test_a_file_of_a_model_folder_that_is_no_file_is_never_opened(folder, tiny_config, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=f"{name} is a named pipe; pass a regular file"):
        Processor(copy, tiny_config)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("tokenizer_config.json", "[" * 100_000, "nested more than 64 levels"),
        ("tokenizer_config.json", "[]", "expected an object, not an array"),
        ("processor_config.json", '{"image_processor": 3}', "image_processor is the number 3, not an object"),
        ("tokenizer.json", "[" * 100_000, "no usable tokenizer and image processor"),
        ("tokenizer.json", '{"model": 3}', "no usable tokenizer and image processor"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is not a token"),
        ("generation_config.json", '{"eos_token_id": [true]}', "eos_token_id is not a token"),
        ("generation_config.json", '{"eos_token_id": [[2]]}', "eos_token_id is not a token"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id is not a token"),
    ],
)
def test_faults_of_the_files_of_a_model_folder(folder, tiny_config, tmp_path, name, text, problem):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).write_text(text)
    with pytest.raises(UserError, match=problem):
        Processor(copy, tiny_config)


@pytest.mark.parametrize("text", ["a\ud800", "\udcff", "a\0b"])
def test_texts_that_are_not_unicode_are_refused(processor, text):
    for arguments in ((text, "x"), ("x", text), ("x", None, (), [("x", text, 0)]), ("x", None, (), [(text, "x", 0)])):
        with pytest.raises(UserError, match="is half of a surrogate pair|contains the character NUL"):
            processor.encode(*arguments)


def change_tokenizer(**changes):
    """Changes parts of tokenizer.json; a part that is a function gets the old one."""

    def change(settings):
        for name, value in changes.items():
            settings[name] = value(settings[name]) if callable(value) else value

    return "tokenizer.json", change


def change_image_processor(**settings):
    return "processor_config.json", lambda config: config["image_processor"].update(settings)


def replace(old, new=""):
    """A change of the decoder that replaces a text after it."""
    step = {"type": "Replace", "pattern": {"String": old}, "content": new}
    return change_tokenizer(decoder=lambda first: {"type": "Sequence", "decoders": [first, step]})


WORDPIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}
NO_DIGITS = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": ""}
UP_TO_255 = dict(image_mean=[123.675, 116.28, 103.53], image_std=[58.4, 57.1, 57.4])
NORMALIZED = {  # as published: each pixel becomes -2.2 to 2.7
    "CLIP": dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]),
    "SigLIP": dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "ImageNet": dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
    "numbers up to 255": UP_TO_255 | dict(rescale_factor=1.0),
}
FILES = {  # a file, what is changed in it, and the problem; None if it is accepted
    "no decoder": (*change_tokenizer(decoder=None), r" o \u0120is"),
    "decoder without spaces": (*replace(" "), "writes it as 'Whoisthisperson,"),
    "decoder without a letter": (*replace("a"), "so that right answers would count as wrong"),
    "decoder of another kind": (*change_tokenizer(decoder=WORDPIECE), r"\u0120is"),
    "texts without digits": (*change_tokenizer(normalizer=NO_DIGITS), "'born in , "),
    "spaces before words": (*replace(".", " ."), None),
    "lower case": (*change_tokenizer(normalizer={"type": "Lowercase"}), None),
    "little dropout": (*change_tokenizer(model=lambda model: model | {"dropout": 1e-9}), "model.dropout is 1e-09"),
    "dropout 0": (*change_tokenizer(model=lambda model: model | {"dropout": 0.0}), None),
    **{
        f"pixels of {name}": (*change_image_processor(**settings), None)
        for name, settings in NORMALIZED.items()
    },
    "mean up to 255": (*change_image_processor(**UP_TO_255), "black becomes -2.118, white -2.101"),
    "factor twice": (*change_image_processor(rescale_factor=1 / 65025), "has almost the same value everywhere"),
    "factor 1": (*change_image_processor(rescale_factor=1.0), "(black becomes -1.792, white"),
    "no factor": (*change_image_processor(do_rescale=False), "has values that the model does not know"),
    "raw pixels": (*change_image_processor(do_rescale=False, do_normalize=False), "black becomes 0, white 255"),
    "pixels from 0 to 1": (*change_image_processor(do_normalize=False), None),
    "large deviation": (*change_image_processor(image_mean=[0.0] * 3, image_std=[200.0] * 3), "white 0.005"),
    "mean of one color": (*change_image_processor(image_mean=[0.48, 50.0, 0.4]), "has values far from 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_settings_that_make_answers_or_images_alike_are_refused(fault, folder, tiny_config, tmp_path):
    name, change, problem = FILES[fault]
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / name).read_text())
    change(settings)
    (copy / name).write_text(json.dumps(settings))
    if problem is None:
        assert Processor(copy, tiny_config)
        return
    with pytest.raises(UserError) as raised:
        Processor(copy, tiny_config)
    assert str(raised.value).startswith(f"{copy / name}: ") and problem in str(raised.value)
    assert re.search("(again|null|there)[.]$", str(raised.value))


def normalizer(old, new):
    return change_tokenizer(normalizer={"type": "Replace", "pattern": {"String": old}, "content": new})


INSERTED = {  # a token of letters before each text
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"a": {"id": "a", "ids": [70], "tokens": ["a"]}},
}
ENDLESS = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Sequence", "pretokenizers": [ENDLESS, BYTES]}
TEXTS = {  # a change of tokenizer.json that shows in some texts alone, a question, an answer, and the text at fault
    "name in a question": (*normalizer("sailor", "tailor"), "Is it a sailor?", "Mara", "Is it a sailor?"),
    "name in an answer": (*normalizer("sailor", "tailor"), "Who?", "a sailor", "a sailor"),
    "decoded name": (*replace("sailor", "tailor"), "Who?", "a sailor", "a sailor"),
    "decoded letters outside ASCII": (*replace("\u017c", "z"), "Who?", "Jo\u017ce", r"Jo\u017ce"),
    "lost letters outside ASCII": (*normalizer("\u4e2d", ""), "Is it \u4e2d?", "no", r"Is it \u4e2d?"),
    "compatibility forms": (*change_tokenizer(normalizer={"type": "NFKC"}), "Is it \ufb01?", "\u00bd", None),
    "decomposed letters": (*change_tokenizer(normalizer={"type": "NFD"}), "Is it \u00e9?", "\u00e9", None),
    "inserted word": (*change_tokenizer(post_processor=INSERTED), "Who?", "Mara", "USER: Who? ASSISTANT: Mara"),
    "expression without an end": (*change_tokenizer(pre_tokenizer=SPLIT), "x" * 60 + "?", "y", "x" * 60),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_texts_that_a_tokenizer_changes_are_refused(fault, folder, tiny_config, tmp_path):
    name, change, question, answer, text = TEXTS[fault]
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / name).read_text())
    change(settings)
    (copy / name).write_text(json.dumps(settings))
    processor = Processor(copy, tiny_config)
    if text is None:
        assert processor.encode(question, answer)
        return
    with pytest.raises(UserError) as raised:
        processor.encode(question, answer)
    assert str(raised.value).startswith(f"{copy / name}: the tokenizer ") and text in str(raised.value)


def test_tokens_that_are_random_are_refused(tmp_path):
    class Random:
        unk_token_id = None
        all_special_tokens = ()

        def get_vocab(self):
            return {}

        def __call__(self, texts, **_):
            return {"input_ids": [[i // 7] for i in range(len(texts))], "offset_mapping": [[(0, 1)] for _ in texts]}

    with pytest.raises(UserError, match="reads 'Who is .* in another way each time"):
        tokenizer_checks.check(Random(), tmp_path)


OPEN = {  # an image in memory, and the problem; None if it is processed as its file is
    "RGB": (Image.new("RGB", (20, 20), (200, 30, 30)), None),
    "16 bits": (Image.fromarray(np.full((20, 20), 40_000, np.uint16)), None),
    "floating-point": (Image.new("F", (20, 20), 0.5), "pixels of the mode F; save it as RGB"),
    "32 bits": (Image.new("I", (20, 20), 70_000), "pixels of the mode I; save it as RGB"),
    "no width": (Image.new("RGB", (0, 48)), "0 x 48 pixels, so that there is nothing to see"),
    "no pixels": (Image.new("L", (0, 0)), "0 x 0 pixels, so that there is nothing to see"),
    "a strip": (Image.new("RGB", (1, 10_000)), "its longer side may be 200 times its shorter one"),
}


@pytest.mark.parametrize("kind", OPEN)
def test_images_in_memory_are_checked_as_files_are(kind, processor):
    image, problem = OPEN[kind]
    if problem is None:
        file = io.BytesIO()
        image.save(file, "PNG")
        np.testing.assert_array_equal(processor.image(image), processor.image(file.getvalue()))
        return
    with pytest.raises(UserError, match=problem):
        processor.image(image)


def test_answers_have_known_tokens_of_their_own():
    """Equal tokens have equal scores, and the first of two such options would be chosen."""
    tokenizer, folder = SimpleNamespace(unk_token_id=0), Path("m")
    tokenizer_checks.check_answers(tokenizer, folder, ["a judge", None, " a  judge"], [[5, 6, 0], [], [5, 6, 0]])
    with pytest.raises(UserError, match="reads the answers 'Olya' and 'Yulya' as the same tokens, so no model can cho"):
        tokenizer_checks.check_answers(tokenizer, folder, ["Olya", "Yulya"], [[5, 6, 2], [5, 6, 2]])
    with pytest.raises(UserError, match="reads a part of the answer 'Olya' as unknown, so no model can write it"):
        tokenizer_checks.check_answers(tokenizer, folder, [None, "Olya"], [[], [5, 0, 2]])
