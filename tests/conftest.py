"""Settings for the whole test run, made before anything imports JAX, TensorFlow or transformers."""

import os

import pytest
from absl import flags

DEFAULTS = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # grain's workers are forks, and tokenizers warns about those
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        # Subprocesses inherit it too, so that what one test compiled is not compiled again by the next.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
    flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which nobody parses under pytest


@pytest.fixture(scope="session")
def tiny_config():
    """A LLaVA of some ten thousand parameters, grouped-query attention and a vision block that feeds nothing."""
    from vkd_jax.models.clip_vit import VisionConfig
    from vkd_jax.models.decoder import DecoderConfig
    from vkd_jax.models.llava import LlavaConfig

    return LlavaConfig(
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=4, heads=2, mlp_width=32),
        text=DecoderConfig(
            vocab=400, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=40, max_positions=96
        ),
        image_token_id=4,
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_config):
    """That LLaVA with random weights as a Hugging Face folder, tokenizer and processor included."""
    import dataclasses

    from transformers import LlavaConfig

    from vkd_jax import convert
    from vkd_jax.data import people, processing

    folder = tmp_path_factory.mktemp("models") / "tiny"
    names = [f"{p.name} {' '.join(p.facts.values())}" for p in people.people()]
    tokenizer = processing.create_processor(folder, names, vocab_size=400, image_size=16, patch_size=8)
    vision, text = tiny_config.vision, tiny_config.text
    hf_config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            projection_dim=vision.width,
        ),
        text_config=dict(
            model_type="llama",
            vocab_size=len(tokenizer),
            hidden_size=text.width,
            intermediate_size=text.mlp_width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            max_position_embeddings=text.max_positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config = dataclasses.replace(tiny_config, text=dataclasses.replace(text, vocab=len(tokenizer)))
    convert.create(folder, hf_config, convert.init(config, 0)[1])
    return folder


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory):
    """The made-up people in MLLMU-Bench's layout, without the pictures for fine-tuning."""
    from vkd_jax.data import people

    folder = tmp_path_factory.mktemp("snapshot")
    people.write_snapshot(folder, [name for name in people.CONFIGS if name != "ft_Data"])
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """The loaded folder: graphdef, params, config and processor."""
    import ml_collections

    from vkd_jax import sharding
    from vkd_jax.pipeline import Loaded

    options = ml_collections.ConfigDict(dict(model=dict(dtype="float32", remat=False)))
    return Loaded.open(tiny_folder, options, sharding.make_mesh())


@pytest.fixture(scope="session")
def tiny_sets(tiny_model, snapshot):
    """A forget set of one person and a retain set of three, encoded."""
    from vkd_jax.data import mllmu

    sets = mllmu.read(snapshot, 10)

    def of_first(name, people):
        chosen = sorted({e.person for e in sets[name]})[:people]
        return tiny_model.encode([e for e in sets[name] if e.person in chosen and e.image is not None][: 16 * people])

    return {"forget": of_first("forget", 1), "retain": of_first("retain", 3)}
