"""Rows of the conversion tables and sharding rules that families share.

A row is (name of the Hugging Face tensor, path of the parameter, permutation of the axes from the tensor's to the
parameter's, or None). `{i}` stands for a number. An {i} that only the name has is an index of the parameter's leading
axis: the blocks of the language model are stacked.
"""

from jax.sharding import PartitionSpec as P

from vkd_jax.models.clip_vit import VisionConfig
from vkd_jax.models.decoder import DecoderConfig

Row = tuple[str, str, tuple[int, ...] | None]

TRANSPOSE = (1, 0)  # PyTorch stores linear kernels as [out, in]


def linear_rows(name: str, path: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a linear layer."""
    kernel = (f"{name}.weight", f"{path}/kernel", TRANSPOSE)
    return (kernel, (f"{name}.bias", f"{path}/bias", None)) if bias else (kernel,)


def norm_rows(name: str, path: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a LayerNorm, or without `bias` of an RMSNorm."""
    scale = (f"{name}.weight", f"{path}/scale", None)
    return (scale, (f"{name}.bias", f"{path}/bias", None)) if bias else (scale,)


def decoder_rows(config: DecoderConfig, model: str, head: str) -> tuple[Row, ...]:
    """Returns the rows of a decoder.

    Args:
        config: the configuration of the decoder.
        model: prefix of the names of its tensors, except the head.
        head: name of the output head; files of tied models may repeat the embedding under it.
    """
    layer, block = f"{model}.layers.{{i}}", "language_model/blocks"
    norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    if config.post_norms:
        norms |= {"post_attention_layernorm": "post_attn_norm", "pre_feedforward_layernorm": "norm2"}
        norms |= {"post_feedforward_layernorm": "post_mlp_norm"}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": "attn/q_norm", "self_attn.k_norm": "attn/k_norm"}
    embedding = "language_model/embed/embedding"
    return (
        (f"{model}.embed_tokens.weight", embedding, None),
        *linear_rows(f"{layer}.self_attn.q_proj", f"{block}/attn/q", bias=config.qkv_bias),
        *linear_rows(f"{layer}.self_attn.k_proj", f"{block}/attn/k", bias=config.qkv_bias),
        *linear_rows(f"{layer}.self_attn.v_proj", f"{block}/attn/v", bias=config.qkv_bias),
        *linear_rows(f"{layer}.self_attn.o_proj", f"{block}/attn/o", bias=False),
        *(row for name, path in norms.items() for row in norm_rows(f"{layer}.{name}", f"{block}/{path}", bias=False)),
        *linear_rows(f"{layer}.mlp.gate_proj", f"{block}/mlp/gate", bias=False),
        *linear_rows(f"{layer}.mlp.up_proj", f"{block}/mlp/up", bias=False),
        *linear_rows(f"{layer}.mlp.down_proj", f"{block}/mlp/down", bias=False),
        *norm_rows(f"{model}.norm", "language_model/norm", bias=False),
        (head, embedding, None) if config.tie_embeddings else (head, "language_model/head/kernel", TRANSPOSE),
    )


def vit_rows(config: VisionConfig, model: str) -> tuple[Row, ...]:
    """Returns the rows of the vision transformer of CLIP or SigLIP; `model` is the prefix of its tensor names."""
    embeddings, tower = f"{model}.embeddings", "vision_tower"
    layer, block = f"{model}.encoder.layers.{{i}}", f"{tower}/blocks/{{i}}"
    optional = []
    if config.class_token:
        optional.append((f"{embeddings}.class_embedding", f"{tower}/class_embedding", None))
    if config.patch_bias:
        optional.append((f"{embeddings}.patch_embedding.bias", f"{tower}/patch_bias", None))
    if config.pre_norm:
        optional += norm_rows(f"{model}.pre_layrnorm", f"{tower}/pre_norm")
    return (
        *optional,
        (f"{embeddings}.patch_embedding.weight", f"{tower}/patch_embedding", (2, 3, 1, 0)),
        (f"{embeddings}.position_embedding.weight", f"{tower}/position_embedding", None),
        *norm_rows(f"{layer}.layer_norm1", f"{block}/norm1"),
        *linear_rows(f"{layer}.self_attn.q_proj", f"{block}/attn/q"),
        *linear_rows(f"{layer}.self_attn.k_proj", f"{block}/attn/k"),
        *linear_rows(f"{layer}.self_attn.v_proj", f"{block}/attn/v"),
        *linear_rows(f"{layer}.self_attn.out_proj", f"{block}/attn/out"),
        *norm_rows(f"{layer}.layer_norm2", f"{block}/norm2"),
        *linear_rows(f"{layer}.mlp.fc1", f"{block}/mlp/fc1"),
        *linear_rows(f"{layer}.mlp.fc2", f"{block}/mlp/fc2"),
        *norm_rows(f"{model}.post_layernorm", f"{tower}/post_norm"),
    )


# Names of tensors of families that call their parts `vision_tower`, `multi_modal_projector` and `language_model`. The
# aliases map three generations of names to that of the files on the Hub, which all versions of transformers read
# (docs/file_formats.md).
PARTS_ALIASES = (
    (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
VISION_PART, DECODER_PART = "vision_tower.vision_model", "language_model.model"
HEAD_PART = "language_model.lm_head.weight"

# The mesh axis of each axis of a decoder's weights. The stacked layer axis is not sharded.
DECODER_SHARDING = (
    (r"language_model/embed/embedding", P("tensor", "fsdp")),
    (r"language_model/head/kernel", P("fsdp", "tensor")),  # absent from tied models
    (r"language_model/blocks/(attn/[qkv]|mlp/gate|mlp/up)/kernel", P(None, "fsdp", "tensor")),
    (r"language_model/blocks/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
)
# The same for a vocabulary that the number of devices does not divide: the width of its tokens is sharded instead.
WIDTH_SHARDING = (
    (r"language_model/embed/embedding", P(None, ("fsdp", "tensor"))),
    (r"language_model/head/kernel", P(("fsdp", "tensor"), None)),  # absent from tied models
    *(rule for rule in DECODER_SHARDING if "blocks" in rule[0]),
)
