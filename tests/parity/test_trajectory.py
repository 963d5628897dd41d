"""Fifty VKD steps here and in plain PyTorch with transformers give the same losses and weights.

    pytest -s -m slow tests/parity/test_trajectory.py

prints the differences. The PyTorch side is written in the usual way: a model from transformers, requires_grad_, AdamW,
clip_grad_norm_, a mask after the step. It shares only data with our side: batches, the target features of the forget
set, and the saliency mask.
"""

import math

import numpy as np
import pytest

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages, TiledImage
from vkd_jax.data.sampler import Sampler
from vkd_jax.methods.base import Context
from vkd_jax.methods.vkd import VKD
from vkd_jax.models.tiled import TiledConfig
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.training import loop, metric_writer
from vkd_jax.types import Example

torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
transformers = pytest.importorskip("transformers")

IMAGE, START, END = 4, 6, 7
CONFIG = TrainConfig(
    steps=50, batch_size=dict(forget=3, retain=3), learning_rate=3e-4, warmup_steps=5, weight_decay=0.1, log_every=1,
    checkpoint_every=1000,
)  # fmt: skip
VKD_FIELDS = dict(mask_keep=0.5, fisher_samples=4, fisher_chunk=2, augment_forget=1, weight_retain_distill=4.0)


class Family:
    """A model in PyTorch."""

    def __init__(self, model):
        self.model = model

    def logits(self, tokens, mask, images, features):
        """Computes the logits of prompts from the output of the projector for each row."""
        embedded = self.embed(tokens, torch.cat(features["projector"]))
        return self.model(inputs_embeds=embedded, attention_mask=mask, **self.inputs(tokens, mask, images)).logits

    def embed(self, tokens, features):
        embedded = self.model.get_input_embeddings()(tokens)
        return embedded.masked_scatter((tokens == IMAGE)[..., None].expand_as(embedded), features)


class Llava(Family):
    """LLaVA in PyTorch, and sizes of images for it."""

    sizes = [(28, 28)] * 4

    @staticmethod
    def create():
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=dict(
                    model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=4, image_size=28, patch_size=14, projection_dim=32,
                ),
                text_config=dict(
                    model_type="llama", vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                ),
                image_token_index=IMAGE,
            )
        )  # fmt: skip

    def encode_images(self, images):
        """Returns the input and output of the projector for each row."""
        pixels = torch.tensor(images["pixels"]).permute(0, 3, 1, 2)
        features = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return {"features": list(features), "projector": list(self.model.model.multi_modal_projector(features))}

    def inputs(self, tokens, mask, images):
        return dict(position_ids=positions(mask))


class Qwen2VL(Family):
    """Qwen2-VL in PyTorch, and sizes of images for it."""

    sizes = [(56, 28), (28, 84), (28, 28), (56, 56)]
    patch_size = 14

    @staticmethod
    def create():
        return transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(
                vision_config=dict(
                    depth=3, embed_dim=32, hidden_size=48, num_heads=4, mlp_ratio=2, patch_size=14,
                ),
                text_config=dict(
                    vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
                    rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0},
                ),
                image_token_id=IMAGE, video_token_id=5, vision_start_token_id=START, vision_end_token_id=END,
            )
        )  # fmt: skip

    def encode_images(self, images):
        """Returns the input and output of the merger for each row, without padding."""
        pixels, grids = self._unpadded(images)
        out = self.model.model.visual(pixels, grid_thw=grids)
        counts = grids.prod(-1).tolist()
        merged = [count // 4 for count in counts]
        return {
            "features": list(out.last_hidden_state.split(counts)),
            "projector": list(out.pooler_output.split(merged)),
        }

    def inputs(self, tokens, mask, images):
        kinds = (tokens == IMAGE).int()
        position_ids, _ = self.model.model.get_rope_index(
            tokens, mm_token_type_ids=kinds, image_grid_thw=self._unpadded(images)[1], attention_mask=mask
        )
        return dict(position_ids=position_ids)

    def _unpadded(self, images):
        coords = images["patch_coords"]
        real = coords[..., 0] >= 0
        grids = [[1, *(rows[mask, 1:].max(0) + 1)] for rows, mask in zip(coords, real, strict=True)]
        patches = images["patches"][real].reshape(-1, 3, 1, self.patch_size**2)
        still = np.repeat(patches, 2, axis=2).reshape(len(patches), -1)
        return torch.tensor(still), torch.tensor(np.array(grids))


class Qwen3VL(Qwen2VL):
    """Qwen3-VL in PyTorch, and sizes of images for it."""

    sizes = [(64, 32), (32, 96), (32, 32), (64, 64)]
    patch_size = 16

    @staticmethod
    def create():
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 1], "mrope_interleaved": True}
        return transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(
                vision_config=dict(
                    depth=3, hidden_size=32, out_hidden_size=48, intermediate_size=64, num_heads=4, patch_size=16,
                    num_position_embeddings=25, deepstack_visual_indexes=[0, 1],
                ),
                text_config=dict(
                    vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=10, max_position_embeddings=128, rope_parameters=rope,
                ),
                image_token_id=IMAGE, video_token_id=5, vision_start_token_id=START, vision_end_token_id=END,
            )
        )  # fmt: skip

    def encode_images(self, images):
        """Returns the input of the merger and the output of all mergers for each row, without padding."""
        pixels, grids = self._unpadded(images)
        out = self.model.model.visual(pixels, grid_thw=grids)
        counts = grids.prod(-1).tolist()
        merged = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)
        return {
            "features": list(out.last_hidden_state.split(counts)),
            "projector": list(merged.split([count // 4 for count in counts])),
        }

    def logits(self, tokens, mask, images, features):
        """Computes the logits of prompts from the output of the mergers for each row."""
        merged, *deepstack = torch.cat(features["projector"]).chunk(3, dim=-1)
        out = self.model.model.language_model(
            inputs_embeds=self.embed(tokens, merged), attention_mask=mask, visual_pos_masks=tokens == IMAGE,
            deepstack_visual_embeds=deepstack, **self.inputs(tokens, mask, images),
        )  # fmt: skip
        return self.model.lm_head(out.last_hidden_state)


class Gemma3(Family):
    """Gemma-3 in PyTorch, and sizes of images for it."""

    sizes = [(30, 30)] * 4

    @staticmethod
    def create():
        model = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                vision_config=dict(
                    model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=4, image_size=30, patch_size=4, vision_use_head=False,
                ),
                text_config=dict(
                    model_type="gemma3_text", vocab_size=100, hidden_size=48, intermediate_size=80,
                    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
                    max_position_embeddings=128, sliding_window=5, sliding_window_pattern=2,
                ),
                image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=9,
            )
        )  # fmt: skip
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # initially zero
        for parameter in model.model.vision_tower.parameters():  # initially large, which would hide their changes
            parameter.data.div_(3 if parameter.ndim > 1 else 1)
        return model

    def encode_images(self, images):
        """Returns the input and output of the projector for each row."""
        pixels = torch.tensor(images["pixels"]).permute(0, 3, 1, 2)
        features = self.model.model.vision_tower(pixels).last_hidden_state
        return {"features": list(features), "projector": list(self.model.model.multi_modal_projector(features))}

    def inputs(self, tokens, mask, images):
        return dict(position_ids=positions(mask), token_type_ids=(tokens == IMAGE).long())


class SmolVLM(Family):
    """SmolVLM in PyTorch, and sizes of images for it, which have three, five and one tiles of 20 pixels."""

    sizes = [(40, 20), (40, 40), (20, 20), (20, 40)]

    @staticmethod
    def create():
        return transformers.SmolVLMForConditionalGeneration(
            transformers.SmolVLMConfig(
                vision_config=dict(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=20,
                    patch_size=5,
                ),
                text_config=dict(
                    model_type="llama", vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                ),
                image_token_id=IMAGE, scale_factor=2,
            )
        )  # fmt: skip

    def encode_images(self, images):
        """Returns the input and output of the connector for each row, without padding."""
        real = images["tile_coords"][..., 0] >= 0
        counts = real.sum(1).tolist()
        features = self.model.model.vision_model(torch.tensor(images["pixels"][real]).permute(0, 3, 1, 2))
        features = features.last_hidden_state
        taps = {"features": features, "projector": self.model.model.connector(features)}
        return {name: [row.flatten(0, 1) for row in x.split(counts)] for name, x in taps.items()}

    def inputs(self, tokens, mask, images):
        return dict(position_ids=positions(mask))


class InternVL(SmolVLM):
    """InternVL in PyTorch, with images of the same sizes."""

    @staticmethod
    def create():
        return transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig(
                vision_config=dict(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                    image_size=[20, 20], patch_size=[5, 5], attention_bias=True, layer_scale_init_value=0.5,
                ),
                text_config=dict(
                    model_type="qwen2", vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                ),
                image_token_id=IMAGE,
            )
        )  # fmt: skip

    def encode_images(self, images):
        """Returns the input and output of the projector for each row, without padding."""
        real = images["tile_coords"][..., 0] >= 0
        counts = real.sum(1).tolist()
        out = self.model.get_image_features(torch.tensor(images["pixels"][real]).permute(0, 3, 1, 2))
        taps = {"features": out.last_hidden_state[:, 1:], "projector": out.pooler_output}
        return {name: [row.flatten(0, 1) for row in x.split(counts)] for name, x in taps.items()}


class LlavaNext(Llava):
    """LLaVA-1.6 in PyTorch, with images of two, three and four tiles of 28 pixels in their grids."""

    sizes = [(28, 56), (84, 28), (56, 56), (28, 54)]  # `TiledImage.size`; in the last one, two columns are dropped
    originals = {14: (28, 56), 22: (90, 30), 24: (50, 50), 10: (28, 40)}  # before the image processor, by their tokens

    @staticmethod
    def create():
        return transformers.LlavaNextForConditionalGeneration(
            transformers.LlavaNextConfig(
                vision_config=dict(
                    model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=4, image_size=28, patch_size=14, projection_dim=32,
                ),
                text_config=dict(
                    model_type="mistral", vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, sliding_window=None,
                ),
                image_token_index=IMAGE, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
            )
        )  # fmt: skip

    def encode_images(self, images):
        """Returns the input and output of the projector for each row, unpadded and with newlines."""
        model, real = self.model.model, images["tile_coords"][..., 0] >= 0
        counts, tokens = real.sum(1).tolist(), (images["token_coords"][..., 0] >= 0).sum(1).tolist()
        pixels = torch.tensor(images["pixels"][real]).permute(0, 3, 1, 2)
        features = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = model.multi_modal_projector(features).split(counts)
        sizes = [self.originals[count] for count in tokens]
        merged, _ = model.pack_image_features(projected, sizes, "default", image_newline=model.image_newline)
        return {"features": [row.flatten(0, 1) for row in features.split(counts)], "projector": merged}


FAMILIES = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "gemma3": Gemma3,
    "qwen2_vl": Qwen2VL,
    "qwen3_vl": Qwen3VL,
    "smolvlm": SmolVLM,
    "internvl": InternVL,
}


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def draw(config, rng, size):
    """Draws a random image of a size."""
    if not isinstance(config, TiledConfig):
        return rng.standard_normal((*size, 3)).astype(np.float32)
    sides = np.array(config.grids(*size)) * config.vision.image_size
    return TiledImage(tuple(rng.standard_normal((*side, 3)).astype(np.float32) for side in sides), size)


def encoded(config, sizes, seed):
    """Encodes two questions about each of four images, with answers of one to three tokens."""
    rng = np.random.default_rng(seed)
    images = [draw(config, rng, size) for size in sizes]
    rows = []
    for i in range(8):
        count = config.image_tokens(*sizes[i // 2])
        prompt = [1, START, *[IMAGE] * count, END, *rng.integers(10, 100, rng.integers(2, 6))]
        rows.append((prompt, rng.integers(10, 100, rng.integers(1, 4)).tolist()))
    t, a = max(len(p) + len(answer) for p, answer in rows), 3
    out = dict(
        tokens=np.full((8, t), 3, np.int32),
        mask=np.zeros((8, t), bool),
        target_positions=np.zeros((8, a), np.int32),
        targets=np.zeros((8, a), np.int32),
        target_mask=np.zeros((8, a), bool),
    )
    for i, (prompt, answer) in enumerate(rows):
        n, m = len(prompt), len(answer)
        out["tokens"][i, : n + m], out["mask"][i, : n + m] = prompt + answer, True
        out["target_positions"][i, :m], out["targets"][i, :m], out["target_mask"][i, :m] = (
            n - 1 + np.arange(m),
            answer,
            True,
        )
    return EncodedSet(
        examples=[Example(str(i), "", b"", str(i // 2), "", "") for i in range(8)],
        prompt_length=np.array([len(p) for p, _ in rows], np.int32),
        image_rows=np.arange(8, dtype=np.int32) // 2,
        images=PackedImages.of(images, config),
        **out,
    )


class Recorder:
    """Collects the metrics instead of writing them."""

    def __init__(self, folder, *, steps, log_seconds, trackers):
        Recorder.rows = []

    def overview(self, trainable):
        pass

    def tick(self, step):
        pass

    def write(self, step, scalars):
        Recorder.rows.append(scalars)

    def close(self):
        pass


def distance(feature, target, scale):
    """Returns the mean squared error over the real tokens of a row, divided by the teacher's mean square."""
    return (feature - target[: len(feature)]).square().mean() / scale


def losses_in_torch(family, method, name, batch):
    """Computes the forget or retain part of the objective as in vkd.py, row by row."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    mask = torch.tensor(batch.mask).long()
    features = family.encode_images(batch.images)
    logits = family.logits(tokens, mask, batch.images, features)
    rows = []
    for i in range(len(tokens)):
        real = batch.target_mask[i]
        positions, targets = (torch.tensor(x[i][real]).long() for x in (batch.target_positions, batch.targets))
        ce = torch.nn.functional.cross_entropy(logits[i, positions], targets)
        distances = sum(
            distance(
                features[tap][i], torch.tensor(batch.cached[f"target/{tap}"][i]), float(batch.cached[f"scale/{tap}"][i])
            )
            for tap in method.taps
        )
        if name == "forget":
            rows.append(-ce.clamp(max=method.cap) + method.weight_forget_distill * distances)
        else:
            rows.append(ce + method.weight_retain_distill * distances)
    return torch.stack(rows).mean()


def rate(step):
    """Returns the learning rate: linear warmup, then half a cosine; the first step is 0."""
    if step < CONFIG.warmup_steps:
        return CONFIG.learning_rate * step / CONFIG.warmup_steps
    done = (step - CONFIG.warmup_steps) / (CONFIG.steps - CONFIG.warmup_steps)
    return CONFIG.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train_in_torch(family, method, prepared, masks):
    """Trains the model in place and returns the loss of every step; `masks` are by parameter name."""
    trained = {name: p for name, p in family.model.named_parameters() if name in masks}
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(name in trained)
    decayed = [p for p in trained.values() if p.ndim > 1]
    rest = [p for p in trained.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=CONFIG.weight_decay), dict(params=rest, weight_decay=0.0)],
        betas=(0.9, CONFIG.b2),
        eps=1e-8,
    )
    streams = {
        name: Sampler(prepared.sets[name], CONFIG.batch_size[name], seed=0, name=name) for name in ("forget", "retain")
    }
    losses = []
    for step in range(CONFIG.steps):
        loss = sum(losses_in_torch(family, method, name, streams[name][step]) for name in streams)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), CONFIG.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(torch.where(masks[name], parameter, before[name]))
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_fifty_steps_agree_with_pytorch(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    family = FAMILIES[name](FAMILIES[name].create().eval())
    with torch.no_grad():  # at the initial scales images hardly change the logits
        for parameter in family.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    family.model.save_pretrained(tmp_path / "model")
    graphdef, params, config = hf.load(tmp_path / "model")
    method = VKD(**VKD_FIELDS)
    sets = {"forget": encoded(config, family.sizes, 1), "retain": encoded(config, family.sizes[::-1], 2)}
    prepared = method.prepare(Context(graphdef, params, None, config, sets, seed=0))

    with torch.no_grad():  # the teacher's features, the target of both sides, agree
        teacher = family.encode_images(prepared.sets["retain"].images.cached)
    for tap in method.taps:
        for in_torch, cached in zip(teacher[tap], prepared.sets["retain"].per_image[f"target/{tap}"], strict=True):
            np.testing.assert_allclose(cached[: len(in_torch)], in_torch, atol=1e-4)

    monkeypatch.setattr(metric_writer, "Progress", Recorder)
    trained = loop.fit(
        ModelBundle(graphdef, params, config, None, make_mesh()),
        method,
        prepared,
        CONFIG,
        seed=0,
        folder=tmp_path / "train",
    )
    ours = np.array([row["loss"] for row in Recorder.rows])

    module = models.module_for(name)
    slots = {key: hf.find_slot(module, config, key) for key, _ in family.model.named_parameters()}
    masks = {
        key: torch.tensor(slot.to_tensor(np.asarray(prepared.mask[slot.path])).copy())
        for key, slot in slots.items()
        if slot.path in trained
    }
    assert {slots[key].path for key in masks} == set(trained)
    theirs = train_in_torch(family, method, prepared, masks)

    distance_squared = change_squared = norm_squared = 0.0
    for key, parameter in family.model.named_parameters():
        if key in masks:
            want = slots[key].to_param(parameter.detach().numpy())
            distance_squared += np.square(trained[slots[key].path] - want).sum()
            change_squared += np.square(params[slots[key].path] - want).sum()
            norm_squared += np.square(want).sum()
    of_norm, of_change = np.sqrt(distance_squared / norm_squared), np.sqrt(distance_squared / change_squared)
    print(
        f"\n{name}: {CONFIG.steps} steps, {len(masks)} trained tensors; loss {ours[0]:.4f} -> {ours[-1]:.4f}; largest "
        f"difference of a loss {np.abs(ours - theirs).max():.1e}; distance of the weights {of_norm:.1e} of their norm, "
        f"{of_change:.1e} of their change in training"
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert of_norm <= 1e-3 and of_change <= 5e-4
    assert np.sqrt(change_squared / norm_squared) > 1e-2  # the weights did change
