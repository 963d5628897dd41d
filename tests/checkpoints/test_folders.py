"""Model folders as people bring them: what is read, what is exported, and what is refused with what to do."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from vkd_jax.checkpoints import export, hf, new_model, sources
from vkd_jax.checkpoints.bundle import GREEDY, ModelBundle, ignored_generation_settings
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.runtime import hub, memory
from vkd_jax.types import UserError

HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
ADAPTER = dict(peft_type="LORA", base_model_name_or_path="ORG/NAME", r=4, target_modules=["q_proj"])
QUANTIZED = dict(quant_method="awq", bits=4)


@pytest.fixture
def model(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change(file, **fields):
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | fields))


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def save(folder, values):
    safetensors.numpy.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def add_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save(folder, tensors(folder))
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")


def only_adapter(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))


def retype(dtype):
    def edit(folder):
        values = tensors(folder)
        save(folder, values | {HEAD: np.ones(values[HEAD].shape, dtype)})

    return edit


def original_names(folder):
    save(folder, {f"model.mm_projector.{i}.weight": np.ones(1, np.float32) for i in range(400)})


def field(name, value, section=None):
    def edit(folder):
        file = folder / "config.json"
        if section is None:
            change(file, **{name: value})
        else:
            change(file, **{section: json.loads(file.read_text())[section] | {name: value}})

    return edit


def content(name, text):
    return lambda folder: (folder / name).write_text(text)


def header(text):
    data = text.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)


def entry(**fields):
    return json.dumps({"a": dict(dtype="F32", shape=[1], data_offsets=[0, 4]) | fields})


def crop(folder):
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= dict(crop_size=dict(height=24, width=24), size=dict(shortest_edge=24))
    file.write_text(json.dumps(settings))


REFUSED = {
    "an adapter": (only_adapter, "is a PEFT adapter, not a model; --config.model.path"),
    "an adapter beside weights": (add_adapter, "has a PEFT adapter (adapter_model.safetensors) beside its weights"),
    "quantized": (field("quantization_config", QUANTIZED), "quant_method 'awq'"),
    "quantized text model": (field("quantization_config", QUANTIZED, "text_config"), "Give the model that was"),
    "original config": (field("mm_vision_tower", "openai/clip"), "LLaVA's original format. Use a converted model"),
    "original names": (original_names, "have LLaVA's original names. Use a converted model"),
    "int8 computation": (field("dtype", "int8"), "dtype is 'int8' (supported: float32, bfloat16, float16)"),
    "float8 computation": (field("dtype", "float8_e4m3fn"), "dtype is 'float8_e4m3fn'"),
    "int32 tensors": (retype(np.int32), "dtype int32 instead of a floating-point dtype"),
    "int64 tensors": (retype(np.int64), "dtype int64 instead of a floating-point dtype"),
    "uint8 tensors": (retype(np.uint8), "dtype uint8 instead of a floating-point dtype"),
    "bool tensors": (retype(np.bool_), "dtype bool instead of a floating-point dtype"),
    "many layers": (field("num_hidden_layers", 10**9, "text_config"), "num_hidden_layers is 1000000000 (supported"),
    "many blocks": (field("num_hidden_layers", 10**9, "vision_config"), "num_hidden_layers is 1000000000 (supported"),
    "crop size": (crop, "does not fit its config.json"),
    "config of a list": (content("config.json", "[]"), "expected an object"),
    "nested config": (content("config.json", "[" * 100_000), "nested"),
    "nested index": (content("model.safetensors.index.json", "[" * 100_000), "nested"),
    "nested header": (header('{"a":' * 100_000), "corrupt"),
    "header of a list": (header("[]"), "corrupt"),
    "header with a number": (header('{"a": 1}'), "corrupt"),
    "negative shape": (header(entry(shape=[-1])), "corrupt"),
    "huge shape": (header(entry(shape=[2**62, 2**62])), "corrupt"),
    "text as shape": (header(entry(shape="1")), "corrupt"),
    "fraction as shape": (header(entry(shape=[1.5])), "corrupt"),
    "reversed offsets": (header(entry(data_offsets=[4, 0])), "corrupt"),
    "three offsets": (header(entry(data_offsets=[0, 2, 4])), "corrupt"),
    "huge offsets": (header(entry(shape=[2**40], data_offsets=[0, 2**42])), "truncated"),
    "surrogate": (header('{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'), "corrupt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_cannot_be_used_are_refused(model, case):
    edit, message = REFUSED[case]
    edit(model)
    with pytest.raises(UserError) as error:
        ModelBundle.load(model)
    text = str(error.value)
    assert message in text and len(text) <= 600 and "\n" not in text


def test_a_tied_model_keeps_another_head(model, tmp_path):
    change(model / "config.json", tie_word_embeddings=True)
    values = tensors(model)
    assert (values[HEAD] != values[TABLE]).any()
    bundle = ModelBundle.load(model)
    assert not bundle.config.text.tie_embeddings
    np.testing.assert_array_equal(bundle.params["language_model/head/kernel"], values[HEAD].T)
    trained = {"language_model/head/kernel": bundle.params["language_model/head/kernel"] + 1}
    export.export(trained, model, tmp_path / "out", bundle.config)
    assert compare_tensors(model, tmp_path / "out")["changed"] == [HEAD]
    save(model, values | {HEAD: values[TABLE]})
    assert hf.read_config(model)[1].tie_word_embeddings


def test_a_tied_model_with_another_head_answers_as_with_transformers(model):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("torch")
    change(model / "config.json", tie_word_embeddings=True)
    torch_model = transformers.LlavaForConditionalGeneration.from_pretrained(model)
    head = torch_model.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(ModelBundle.load(model).params["language_model/head/kernel"], head.T)


def test_a_leftover_adapter_configuration_is_not_exported(model, tmp_path):
    (model / "adapter_config.json").write_text(json.dumps(ADAPTER))
    _, _, config = hf.load(model)
    export.export({}, model, tmp_path / "out", config)
    names = {file.name for file in model.iterdir()} - {"adapter_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_an_image_processor_of_a_class_that_is_gone_is_replaced(model):
    image = Image.radial_gradient("L").convert("RGB").resize((40, 30))
    want = ModelBundle.load(model).processor.image(image)
    file = model / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_processor_type"] = "CLIPImageProcessorOfOldTimes"
    file.write_text(json.dumps(settings))
    np.testing.assert_array_equal(ModelBundle.load(model).processor.image(image), want)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("repetition_penalty", 1.05), ("no_repeat_ngram_size", 3), ("num_beams", 4)),
        *(("forced_bos_token_id", 7), ("stop_strings", ["."]), ("guidance_scale", 1.5)),
    ],
)
def test_settings_that_change_greedy_decoding_are_named(model, name, value):
    file = model / "generation_config.json"
    change(file, **{name: value, "temperature": 0.1, "do_sample": True})
    assert ignored_generation_settings(model) == [f"{name}={value}"]
    change(file, **GREEDY)
    assert ignored_generation_settings(model) == []


def test_weights_are_compared_with_the_memory_before_they_are_read(model, monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: 20_000)
    with pytest.raises(UserError, match=r"the weights of .* need .* GiB of memory, and there are .* GiB; use"):
        hf.load(model)


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("text", "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("text", "intermediate_size", 2 * 10**9, "GiB of memory"),
        ("vision", "patch_size", 0, "patch_size"),
        ("text", "hidden_size", 0, ""),
        ("text", "num_hidden_layers", "three", "config.model.create is not a LLaVA"),
    ],
)
def test_sizes_of_new_models_are_checked_before_anything_is_allocated(tmp_path, section, field, value, message):
    shape = dict(
        vocab_size=300,
        vision=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                    patch_size=4, projection_dim=16),
        text=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=2, max_position_embeddings=64),
    )  # fmt: skip
    shape[section] |= {field: value}
    with pytest.raises(UserError) as error:
        new_model.create_llava(tmp_path / "model", [], shape, 0)
    assert message in str(error.value)
    assert not (tmp_path / "model").exists()


def test_a_field_that_is_divided_by_is_named(tmp_path):
    text = dict(sliding_window_pattern=0, num_hidden_layers=2, bos_token_id=0)
    change(tmp_path / "config.json", model_type="gemma3", text_config=text)
    with pytest.raises(UserError) as error:
        hf.read_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json cannot be read by transformers: ")
    assert str(error.value).endswith("(0 is the value of text_config.sliding_window_pattern); get the file again.")


def test_an_adapter_on_the_hub_needs_its_base(tmp_path, monkeypatch):
    import huggingface_hub

    only_adapter(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: tmp_path)
    assert hub.fetch_model("org/adapter") == tmp_path and hub.is_adapter(tmp_path)
    with pytest.raises(UserError, match="the base .* of the adapter .*: it is an adapter itself"):
        sources.fetch_model("org/adapter")
