"""The families of the long comparison with PyTorch: their small models there, and how these take images."""

import numpy as np
import torch
import transformers

IMAGE, START, END = 4, 6, 7  # token ids


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


CLIP = dict(
    model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    image_size=28, patch_size=14, projection_dim=32,
)  # fmt: skip
DECODER = dict(
    vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


class Llava(Family):
    """LLaVA in PyTorch, and sizes of images for it."""

    sizes = [(28, 28)] * 4

    @staticmethod
    def create():
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=CLIP,
                text_config=dict(model_type="llama", **DECODER),
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
                text_config=dict(model_type="llama", **DECODER),
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
                text_config=dict(model_type="qwen2", **DECODER),
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
                vision_config=CLIP,
                text_config=dict(model_type="mistral", **DECODER, sliding_window=None),
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
