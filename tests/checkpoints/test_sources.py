"""PEFT adapters and visual weights over a base: what the merged model holds, and what is refused."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from llava_folders import TEXT, VISION, read

from vkd_jax.checkpoints import hf, sources
from vkd_jax.runtime import storage
from vkd_jax.types import NotFinite, UserError

Q, V = "language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.1.self_attn.v_proj"
EMBED, PROJECTOR = "language_model.model.embed_tokens", "multi_modal_projector.linear_2"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding"
WIDTH, RANK, ALPHA = TEXT["hidden_size"], 2, 6
CONFIG = dict(  # as peft writes it
    alpha_pattern={}, auto_mapping=None, base_model_name_or_path="BASE", bias="none", fan_in_fan_out=False,
    inference_mode=True, init_lora_weights=True, layer_replication=None, layers_pattern=None, layers_to_transform=None,
    loftq_config={}, lora_alpha=ALPHA, lora_dropout=0.05, megatron_config=None, megatron_core="megatron.core",
    modules_to_save=None, peft_type="LORA", r=RANK, rank_pattern={}, revision=None,
    task_type="CAUSAL_LM", use_dora=False, use_rslora=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")


def pair(module, out, width=WIDTH, *, rank=RANK, suffix=".weight", seed=0):
    """Random A and B of a module under the names of peft."""
    rng = np.random.default_rng(seed)
    shapes = {
        f"base_model.model.{module}.lora_A{suffix}": (rank, width),
        f"base_model.model.{module}.lora_B{suffix}": (out, rank),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors, base=None, **config):
    path.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors if ".lora_" in name}
    settings = CONFIG | dict(target_modules=sorted(modules))
    settings |= (dict(base_model_name_or_path=str(base)) if base else {}) | config
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def product(tensors):
    a, b = tensors.values()
    return b @ a


def test_a_product_worked_by_hand(folder, tmp_path):
    a, b = np.zeros((RANK, WIDTH), np.float32), np.zeros((WIDTH, RANK), np.float32)
    a[0, 3], a[1, 3], b[-1, 0], b[-1, 1] = 2.0, 1.0, 0.5, 4.0
    names = [f"base_model.model.{Q}.lora_{x}.weight" for x in "AB"]
    merged = sources.fetch_model(write(tmp_path / "adapter", dict(zip(names, (a, b), strict=True)), folder))
    difference = read(merged)[f"{Q}.weight"] - read(folder)[f"{Q}.weight"]
    assert difference[-1, 3] == pytest.approx(6 / 2 * (0.5 * 2 + 4 * 1), rel=1e-6)  # alpha / r * (B A)
    assert np.count_nonzero(difference) == 1
    others = {name: x for name, x in read(merged).items() if name != f"{Q}.weight"}
    assert others and all((x == read(folder)[name]).all() for name, x in others.items())
    assert not (merged / "adapter_config.json").exists()


@pytest.mark.parametrize("suffix", [".weight", ".default.weight"])
@pytest.mark.parametrize("module", [V, "model.language_model.layers.1.self_attn.v_proj"])  # before 4.52, and later
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / 2),
        (dict(use_rslora=True), 6 / np.sqrt(2)),
        (dict(alpha_pattern={"layers.1.self_attn.v_proj": 10}), 10 / 2),
        (dict(alpha_pattern={"layers.0.self_attn.v_proj": 10}), 6 / 2),
        (dict(r=8, rank_pattern={r"layers\.\d+\.self_attn\.v_proj": 2}), 6 / 2),
        (dict(target_modules=r".*\.1\..*\.v_proj", fan_in_fan_out=True), 6 / 2),  # peft: False for linear layers
        (dict(target_modules="all-linear", exclude_modules=r".*(?<!1\.self_attn\.v_proj)"), 6 / 2),
        (dict(layers_to_transform=1, layers_pattern=None, target_modules=["v_proj"]), 6 / 2),
        (dict(layers_to_transform=[0, 1], layers_pattern=["h", "layers"]), 6 / 2),
        (dict(layers_to_transform=[], layers_pattern=[]), 6 / 2),
    ],
)
def test_names_and_scales_of_peft(folder, tmp_path, suffix, module, config, scale):
    out = TEXT["num_key_value_heads"] * WIDTH // TEXT["num_attention_heads"]
    tensors = pair(module, out, suffix=suffix)
    merged = sources.fetch_model(write(tmp_path / "adapter", tensors, folder, **config))
    want = read(folder)[f"{V}.weight"] + np.float32(scale) * product(tensors)
    np.testing.assert_allclose(read(merged)[f"{V}.weight"], want, rtol=0, atol=1e-6)


def test_a_merged_model_is_that_of_transformers_with_merged_weights(folder, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    modules = dict(model.named_modules())
    names = [name for name in modules if name.endswith(("q_proj", "v_proj")) and "language_model" in name]
    tensors = {}
    for seed, name in enumerate(names):
        tensors |= (new := pair(name, *modules[name].weight.shape, seed=seed))
        with torch.no_grad():
            modules[name].weight += 3 * torch.tensor(product(new))
    targets = dict(target_modules=["q_proj", "v_proj"])  # names modules of the vision tower as well
    merged = sources.fetch_model(write(tmp_path / "adapter", tensors, folder, **targets))
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(merged)
    assert len(names) == 2 * TEXT["num_hidden_layers"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-6)


def test_embeddings_convolutions_and_saved_modules(folder, tmp_path):
    rng, base = np.random.default_rng(0), read(folder)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    tensors = {
        f"base_model.model.{EMBED}.lora_embedding_A": draw(RANK, TEXT["vocab_size"]),
        f"base_model.model.{EMBED}.lora_embedding_B": draw(WIDTH, RANK),
        f"base_model.model.{PATCHES}.lora_A.weight": draw(RANK, 3, 4, 4),
        f"base_model.model.{PATCHES}.lora_B.weight": draw(VISION["hidden_size"], RANK, 1, 1),
        "base_model.model.multi_modal_projector.modules_to_save.linear_1.bias": draw(WIDTH),
        "base_model.model.multi_modal_projector.modules_to_save.default.linear_2.bias": draw(WIDTH),
        f"base_model.model.{PROJECTOR}.weight": draw(WIDTH, WIDTH),  # as newer versions write saved modules
    }
    a, b, kernel_a, kernel_b, bias_1, bias_2, weight = tensors.values()
    targets = dict(target_modules=["embed_tokens", "patch_embedding"])
    merged = read(sources.fetch_model(write(tmp_path / "adapter", tensors, folder, **targets)))
    np.testing.assert_allclose(merged[f"{EMBED}.weight"], base[f"{EMBED}.weight"] + 3 * (b @ a).T, atol=1e-5)
    kernel = np.einsum("or,rihw->oihw", kernel_b[:, :, 0, 0], kernel_a)
    np.testing.assert_allclose(merged[f"{PATCHES}.weight"], base[f"{PATCHES}.weight"] + 3 * kernel, atol=1e-5)
    np.testing.assert_array_equal(merged["multi_modal_projector.linear_1.bias"], bias_1)
    np.testing.assert_array_equal(merged["multi_modal_projector.linear_2.bias"], bias_2)
    np.testing.assert_array_equal(merged[f"{PROJECTOR}.weight"], weight)


@pytest.mark.parametrize(
    "damage",
    ["another file", "file removed", "cut", "no list of files", "list of bytes", "a link", "a link to nothing"],
)
def test_a_merged_model_that_changed_is_written_again(folder, tmp_path, damage):
    merged = sources.fetch_model(write(tmp_path / "adapter", pair(Q, WIDTH), folder))
    before, weights = read(merged), merged / "model.safetensors"
    if damage == "another file":  # of the same size and time
        time = weights.stat().st_mtime_ns
        shutil.copyfile(folder / weights.name, weights)
        os.utime(weights, ns=(time, time))
    elif damage == "file removed":
        (merged / "config.json").unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "no list of files":
        merged.with_name(f"{merged.name}.json").unlink()
    elif damage.startswith("a link"):
        shutil.copytree(folder, tmp_path / "another")
        shutil.rmtree(merged)
        merged.symlink_to(tmp_path / ("another" if damage == "a link" else "nothing"))
    else:
        merged.with_name(f"{merged.name}.json").write_bytes(b"\xff")
    assert sources.fetch_model(tmp_path / "adapter") == merged and (merged / "config.json").is_file()
    assert not merged.is_symlink() and (damage != "a link" or (tmp_path / "another" / "config.json").is_file())
    for name, tensor in read(merged).items():
        np.testing.assert_array_equal(tensor, before[name])


def test_an_adapter_that_is_replaced_by_one_of_the_same_size_and_time_is_read(folder, tmp_path):
    first = sources.fetch_model(write(tmp_path / "adapter", pair(Q, WIDTH), folder))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    size, time = file.stat().st_size, file.stat().st_mtime_ns
    write(tmp_path / "adapter", pair(Q, WIDTH, seed=1), folder)
    os.utime(file, ns=(time, time))
    assert file.stat().st_size == size
    second = sources.fetch_model(tmp_path / "adapter")
    assert not np.array_equal(read(first)[f"{Q}.weight"], read(second)[f"{Q}.weight"])


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/below"])
def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch, place):
    monkeypatch.setattr(storage, "CACHE", Path(place))
    adapter = write(tmp_path / "adapter", pair(Q, WIDTH), folder)
    with pytest.raises(UserError, match=rf"cannot write at {place}.*pass another folder of caches as XDG_CACHE_HOME"):
        sources.fetch_model(adapter)


def test_a_full_cache_is_named_and_nothing_is_left(folder, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    adapter = write(tmp_path / "adapter", pair(Q, WIDTH), folder)
    monkeypatch.setattr(sources.export.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"cannot write at .*/cache/merged/.*: No space left .* XDG_CACHE_HOME"):
        sources.fetch_model(adapter)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if not path.name.endswith(".lock")] == ["merged"]


def test_the_base_may_be_given_and_a_merged_model_is_reused(folder, tmp_path, monkeypatch):
    adapter = write(tmp_path / "adapter", pair(Q, WIDTH))
    with pytest.raises(
        UserError, match=r"the base BASE of the adapter .*adapter, which BASE\+.*There is no model folder BASE"
    ):
        sources.fetch_model(adapter)
    merged = sources.fetch_model(f"{folder}+{adapter}")
    assert merged.is_relative_to(storage.CACHE) and hf.load(merged)
    monkeypatch.setattr(sources, "_write", None)
    assert sources.fetch_model(f"{folder}+{adapter}") == merged
    write(adapter, pair(Q, WIDTH, seed=1))
    with pytest.raises(TypeError):  # it is written again
        sources.fetch_model(f"{folder}+{adapter}")
    shutil.copytree(folder, tmp_path / "a+b")
    assert sources.fetch_model(tmp_path / "a+b") == tmp_path / "a+b"


BAD_CONFIG = {
    "DoRA": (dict(use_dora=True), "use_dora is True (supported: False, None); merge the adapter with"),
    "biases": (dict(bias="lora_only"), "bias is 'lora_only'"),
    "IA3": (dict(peft_type="IA3"), "peft_type is 'IA3' (supported: 'LORA')"),
    "PiSSA": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "no rank": (dict(r=None), "r is None, and should be a positive whole number"),
    "rank 0": (dict(r=0), "r is 0, and should be a positive whole number"),
    "a rank with a fraction": (dict(r=2.5), "r is 2.5, and should be a positive whole number"),
    "a rank that is true": (dict(r=True), "r is True, and should be"),
    "a huge rank": (dict(r=10**400), "and should be a positive whole number up to"),
    "a huge alpha": (dict(lora_alpha=10**400), "and should be a positive number up to 1e+09"),
    "a large alpha": (dict(lora_alpha=1e308), "lora_alpha is 1e+308, and should be"),
    "a scale": (dict(lora_alpha=2.1e4), f"lora_alpha / r is 10500 for {Q}, and should be at most 10,000"),
    "a scale of a module": (dict(alpha_pattern={"q_proj": 3e4}), f"lora_alpha / r is 15000 for {Q}"),
    "a scale of RS-LoRA": (dict(lora_alpha=1.5e4, use_rslora=True), "lora_alpha / sqrt(r) is 10606.6 for"),
    "an alpha that is null": (dict(alpha_pattern={"q_proj": None}), "alpha_pattern['q_proj'] is None, and should be"),
    "a pattern that is a text": (dict(rank_pattern={"q_proj": "2"}), "rank_pattern['q_proj'] is '2', and should be"),
    "targets that are a number": (dict(target_modules=3), "target_modules is 3, and should be a text or an array"),
    "targets that are an object": (dict(target_modules={"q_proj": 1}), "and should be a text or an array of texts"),
    "targets that are numbers": (dict(target_modules=["q_proj", 1]), "and should be a text or an array of texts"),
    "saved modules that are a number": (dict(modules_to_save=3), "modules_to_save is 3, and should be a text or an"),
    "a saved module without a tensor": (
        dict(modules_to_save=["lm_head"]),
        "names 'lm_head', of which it has no tensor",
    ),
    "an endless pattern": (dict(target_modules=r"(?:.|..|...)+\d\d"), "takes longer than 1 s for"),
    "an endless pattern of ranks": (dict(rank_pattern={r"(?:.|..|...)+\d\d": 2}), "takes longer than 1 s for"),
    "patterns that are a list": (dict(rank_pattern=[3]), "rank_pattern is [3], and should be an object"),
    "a flood of ranks": (dict(rank_pattern={f"x{i}": 2 for i in range(4097)}), "rank_pattern has 4,097 names, and at"),
    "a flood of saved modules": (dict(modules_to_save=["x"] * 4097), "modules_to_save has 4,097 names, and at most"),
    "another rank": (dict(r=3), "has shape (2, 12), and rank 3"),
    "other targets": (dict(target_modules=["v_proj"]), f"target_modules does not name {Q}"),
    "other pattern": (dict(target_modules=".*vision.*"), f"target_modules does not name {Q}"),
    "no pattern": (dict(target_modules="("), "'(' is not a regular expression"),
    "a switch that is a text": (dict(use_rslora="false"), "use_rslora is 'false' (supported: True, False, None)"),
    "excluded": (dict(exclude_modules=["q_proj"]), f"exclude_modules names {Q}"),
    "saved": (dict(modules_to_save=["self_attn"]), f"modules_to_save names {Q}, which then has no matrices"),
    "another layer": (dict(layers_to_transform=[1]), f"layers_to_transform leaves out the layer of {Q}"),
    "another layer's number": (dict(layers_to_transform=1), f"layers_to_transform leaves out the layer of {Q}"),
    "another pattern": (dict(layers_to_transform=0, layers_pattern="h"), "leaves out the layer of"),
    "a layer that is a text": (dict(layers_to_transform="0"), "layers_to_transform is '0', and should be the number"),
    "a layer that is true": (dict(layers_to_transform=True), "layers_to_transform is True, and should be the number"),
    "a negative layer": (dict(layers_to_transform=[-1]), "layers_to_transform is [-1], and should be the number"),
    "layers of texts": (dict(layers_to_transform=["0"]), "layers_to_transform is ['0'], and should be the number"),
    "a pattern of layers alone": (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    "a pattern that is a number": (dict(layers_to_transform=0, layers_pattern=3), "layers_pattern is 3, and should be"),
    "layers of an expression": (dict(target_modules=".*q_proj", layers_to_transform=0), "need target_modules that are"),
    "a class": (dict(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS' (supported: 'CAUSAL_LM'"),
    "a switch that is a number": (dict(fan_in_fan_out=1), "fan_in_fan_out is 1 (supported: True, False, None)"),
    "blocks": (dict(use_bdlora={"nblocks": 2}), "use_bdlora is {'nblocks': 2} (supported: None)"),
    "a mixture": (dict(arrow_config={"top_k": 3}), "arrow_config is"),
    "tied matrices": (dict(ensure_weight_tying=True), "ensure_weight_tying is True"),
    "no base": (dict(base_model_name_or_path=None), "has no base_model_name_or_path; pass BASE+"),
}


@pytest.mark.parametrize("fault", BAD_CONFIG)
def test_settings_that_are_not_supported_are_refused(fault, folder, tmp_path):
    config, problem = BAD_CONFIG[fault]
    with pytest.raises(UserError) as error:
        sources.fetch_model(write(tmp_path / "adapter", pair(Q, WIDTH), folder, **config))
    assert problem in error.value.message and str(tmp_path / "adapter") in error.value.message


def test_an_adapter_of_another_program_is_named(folder, tmp_path):
    adapter = write(tmp_path / "adapter", pair(Q, WIDTH), folder)
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}')
    with pytest.raises(UserError, match="no peft_type, so it is not an adapter of PEFT. Merge it into its base"):
        sources.fetch_model(f"{folder}+{adapter}")


def without_b(tensors):
    return {name: x for name, x in tensors.items() if "lora_B" not in name}


def cut(module, a, b):
    """A pair of which the first rows of A and of B are kept, and the others are zeros."""
    kept = {"A": a, "B": b}
    return {
        name: x * (np.arange(len(x)) < kept[name[-len("A.weight")]])[:, None]
        for name, x in pair(module, WIDTH, seed=1).items()
    }


LAST = "language_model.model.layers.1.self_attn.q_proj"
ENDS = "ends with zeros, so that the end of the file was lost"
BAD_TENSORS = {
    "no B": (without_b(pair(Q, WIDTH)), f"{Q} lacks lora_B"),
    "unknown module": (
        pair("language_model.model.layers.9.self_attn.q_proj", WIDTH),
        "the base model has no weight of",
    ),
    "unknown tensor": (
        {"base_model.model.x.weight": np.ones(1, np.float32)},
        "unknown tensor base_model.model.x.weight",
    ),
    "magnitudes": ({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(1, np.float32)}, "unknown tensor"),
    "a second adapter": (pair(Q, WIDTH) | pair(Q, WIDTH, suffix=".other.weight"), ", of another adapter"),
    "two generations of names": (
        pair(Q, WIDTH) | pair("model.language_model.layers.0.self_attn.q_proj", WIDTH, seed=1),
        "model.language_model.layers.0.self_attn.q_proj occurs a second time under another name",
    ),
    "matrices of an embedding as well": (
        pair(Q, WIDTH)
        | {f"base_model.model.{Q}.lora_embedding_{x}": np.ones((RANK, WIDTH)[:: (1, -1)["AB".index(x)]]) for x in "AB"},
        f"{Q} occurs a second time under another name",
    ),
    "a saved module twice": (
        {f"base_model.model.{x}multi_modal_projector.linear_2.bias": np.ones(WIDTH) for x in ("", "model.")},
        "multi_modal_projector.linear_2.bias occurs a second time under another name",
    ),
    "before training": (
        {name: x * (".lora_A." in name) for name, x in pair(Q, WIDTH).items()},
        "A or B of each of its modules is zero, as before training, so that it would change nothing",
    ),
    "without A": (
        {name: x * (".lora_B." in name) for name, x in pair(Q, WIDTH).items()},
        "A or B of each of its modules is zero",
    ),
    "without one A": (pair(Q, WIDTH) | cut(LAST, 0, WIDTH), f"{LAST}.lora_A.weight {ENDS}"),
    "half of the last A, and no B": (pair(Q, WIDTH) | cut(LAST, 1, 0), f"{LAST}.lora_A.weight {ENDS}"),
    "half of the last B": (pair(Q, WIDTH) | cut(LAST, RANK, 3), f"{LAST}.lora_B.weight {ENDS}"),
    "no tensors": ({}, "it has no tensors, so that it would change nothing"),
    "no A": ({name: x for name, x in pair(Q, WIDTH).items() if "lora_A" not in name}, f"{Q} lacks lora_A"),
    "whole numbers": ({name: x.astype(np.int32) for name, x in pair(Q, WIDTH).items()}, "has the dtype int32, and"),
    "one whole-number matrix": (
        pair(Q, WIDTH) | {f"base_model.model.{Q}.lora_A.weight": np.ones((RANK, WIDTH), np.uint8)},
        "uint8",
    ),
    "transposed": ({name: x.T.copy() for name, x in pair(Q, WIDTH).items()}, f"has shape ({WIDTH}, {RANK}), and rank"),
    "three dimensions": (
        {name: x[..., None].copy() if "lora_B" in name else x for name, x in pair(Q, WIDTH).items()},
        f"do not fit a weight of shape ({WIDTH}, {WIDTH})",
    ),
    "names of another model": (
        pair("transformer.h.0.attn.c_attn", WIDTH),
        "the base model has no weight of transformer",
    ),
    "another width": (pair(Q, WIDTH, WIDTH + 1), f"do not fit a weight of shape ({WIDTH}, {WIDTH})"),
    "more tokens": (
        {f"base_model.model.{EMBED}.weight": np.ones((50, WIDTH), np.float32)},
        "has shape (50, 12), and the",
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(fault, folder, tmp_path):
    tensors, problem = BAD_TENSORS[fault]
    with pytest.raises(UserError) as error:
        sources.fetch_model(write(tmp_path / "adapter", tensors, folder))
    assert problem in error.value.message
    assert not list((storage.CACHE / "merged").glob("*/config.json"))


OF_LAYER_0 = {"self_attn.q_proj": WIDTH, "self_attn.o_proj": WIDTH}
LACKING = {  # settings of an adapter of the queries and outputs of the first layer, and what they name beyond that
    "another layer": (dict(target_modules=["q_proj", "o_proj"]), ("layers.1.self_attn.q_proj", "1.self_attn.o_proj")),
    "another module": (dict(target_modules=["o_proj", "q_proj", "k_proj"], layers_to_transform=[0]), ("0.*k_proj",)),
    "a layer by its number": (
        dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 1], layers_pattern="layers"),
        ("layers.1.self_attn.q_proj",),
    ),
    "an expression": (dict(target_modules=r".*(q_proj|o_proj|layers\.1\.mlp\.up_proj)"), ("1.mlp.up_proj",)),
    "all linear layers": (dict(target_modules="all-linear"), (r"layers\.\S*",)),
    "all but one layer": (dict(target_modules=["q_proj", "o_proj", "norm"], exclude_modules=r".*\.1\..*"), ()),
    "the vision tower": (dict(target_modules=["q_proj", "o_proj", "fc1"], layers_to_transform=[0]), ()),
    "no settings": (dict(target_modules=None), ()),
}


@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
@pytest.mark.parametrize("fault", LACKING)
def test_layers_that_the_settings_name_are_all_there(fault, prefix, folder, tmp_path):
    config, missing = LACKING[fault]
    tensors = {}
    for module, out in OF_LAYER_0.items():
        tensors |= pair(f"{prefix}.layers.0.{module}", out)
    adapter = write(tmp_path / "adapter", tensors, folder, **config)
    if not missing:
        assert sources.fetch_model(adapter)
        return
    with pytest.raises(UserError, match="target_modules names .*, of which it has no tensor") as error:
        sources.fetch_model(adapter)
    for name in missing:
        assert re.search(rf"names {re.escape(prefix)}\S*{name}, of which", error.value.message)
    assert "vision_tower" not in error.value.message


def test_pickled_adapters_and_products_that_are_not_finite_are_refused(folder, tmp_path):
    adapter = write(tmp_path / "adapter", {name: x * np.float32(np.inf) for name, x in pair(Q, WIDTH).items()}, folder)
    for factor in (1.0, 1e30):  # 1e30^2 overflows
        problem = f"{Q}.weight of .* has NaN or infinity when {adapter} is merged into it"
        if factor > 1:
            write(adapter, {name: x * np.float32(factor) for name, x in pair(Q, WIDTH).items()}, folder)
        with pytest.raises(NotFinite, match=problem):
            sources.fetch_model(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="only pickled weights .adapter_model.bin.*safe_serialization=True"):
        sources.fetch_model(adapter)


def visual(folder, *parts):
    return {name: x + 1 for name, x in read(folder).items() if name.startswith(parts)}


def tower_alone(folder):  # as CLIP's own files
    return {name.removeprefix("vision_tower."): x for name, x in visual(folder, "vision_tower").items()}


VISUAL = {
    "tower": lambda folder: visual(folder, "vision_tower"),
    "tower alone": tower_alone,
    "tower and projector": lambda folder: visual(folder, "vision_tower", "multi_modal"),
    "newer names": lambda folder: {f"model.{name}": x for name, x in visual(folder, "vision_tower").items()},
}


@pytest.mark.parametrize("kind", VISUAL)
def test_visual_weights_replace_those_of_the_base(kind, folder, tmp_path):
    file = tmp_path / "visual.safetensors"
    safetensors.numpy.save_file(VISUAL[kind](folder), file)
    merged, base = read(sources.fetch_model(f"{folder}+{file}")), read(folder)
    parts = ("vision_tower", "multi_modal") if "projector" in kind else ("vision_tower",)
    for name, x in base.items():
        np.testing.assert_array_equal(merged[name], x + 1 if name.startswith(parts) else x)


def test_visual_weights_that_do_not_fit_are_refused(folder, tmp_path):
    file, tensors = tmp_path / "visual.safetensors", visual(folder, "vision_tower")
    bias = f"{PATCHES.removesuffix('patch_embedding')}class_embedding"
    cases = {
        f"missing tensor {bias}": {name: x for name, x in tensors.items() if name != bias},
        "unexpected tensor vision_tower.x": tensors | {"vision_tower.x": np.ones(1, np.float32)},
        f"unexpected tensor {Q}.weight": tensors | {f"{Q}.weight": np.ones(1, np.float32)},
        "has shape (3,), and the base model has (16,)": tensors | {bias: np.ones(3, np.float32)},
        "no tensor of the vision tower": visual(folder, "multi_modal"),
        "missing tensor multi_modal_projector.linear_1.bias": visual(folder, "vision_tower", f"{PROJECTOR}.weight"),
    }
    for problem, values in cases.items():
        safetensors.numpy.save_file(values, file)
        with pytest.raises(UserError) as error:
            sources.fetch_model(f"{folder}+{file}")
        assert problem in error.value.message
    file.rename(file.with_suffix(".pt"))
    with pytest.raises(
        UserError, match="is not a safetensors file. Pickles can run code.*save_file of safetensors.torch"
    ):
        sources.fetch_model(f"{folder}+{file.with_suffix('.pt')}")
    with pytest.raises(UserError, match="is not a PEFT adapter"):
        sources.fetch_model(f"{folder}+{folder}")
    with pytest.raises(UserError, match="x is given twice, and would be added twice"):
        sources.fetch_model(f"{folder}+x+y+x")


def test_an_adapter_of_embeddings_that_are_the_head_as_well_is_refused(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = read(copy)
    safetensors.numpy.save_file(
        {name: x for name, x in tensors.items() if "lm_head" not in name},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    embeddings = {f"base_model.model.{EMBED}.weight": tensors[f"{EMBED}.weight"] + 1}
    with pytest.raises(UserError, match=f"changes {EMBED}.weight, which is the head of this model as well"):
        sources.fetch_model(write(tmp_path / "adapter", embeddings, copy, modules_to_save=["embed_tokens"]))
