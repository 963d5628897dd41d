"""Rows of the conversion tables and sharding rules that families share.

A row is (name of the Hugging Face tensor, path of the parameter, permutation of the axes from the tensor's to the
parameter's, or None). `{i}` stands for a number. An {i} that only the name has is an index of the parameter's leading
axis: the blocks of the language model are stacked.
"""

from jax.sharding import PartitionSpec as P

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


def decoder_rows(model: str, *, qkv_bias: bool) -> tuple[Row, ...]:
    """Returns the rows of a LLaMA-style decoder except its head; `model` is the prefix of its tensor names."""
    layer, block = f"{model}.layers.{{i}}", "language_model/blocks"
    return (
        (f"{model}.embed_tokens.weight", "language_model/embed/embedding", None),
        *norm_rows(f"{layer}.input_layernorm", f"{block}/norm1", bias=False),
        *linear_rows(f"{layer}.self_attn.q_proj", f"{block}/attn/q", bias=qkv_bias),
        *linear_rows(f"{layer}.self_attn.k_proj", f"{block}/attn/k", bias=qkv_bias),
        *linear_rows(f"{layer}.self_attn.v_proj", f"{block}/attn/v", bias=qkv_bias),
        *linear_rows(f"{layer}.self_attn.o_proj", f"{block}/attn/o", bias=False),
        *norm_rows(f"{layer}.post_attention_layernorm", f"{block}/norm2", bias=False),
        *linear_rows(f"{layer}.mlp.gate_proj", f"{block}/mlp/gate", bias=False),
        *linear_rows(f"{layer}.mlp.up_proj", f"{block}/mlp/up", bias=False),
        *linear_rows(f"{layer}.mlp.down_proj", f"{block}/mlp/down", bias=False),
        *norm_rows(f"{model}.norm", "language_model/norm", bias=False),
    )


def head_row(name: str, *, tied: bool) -> Row:
    """Returns the row of the output head; files of tied models may repeat the embedding under the head's name."""
    if tied:
        return name, "language_model/embed/embedding", None
    return name, "language_model/head/kernel", TRANSPOSE


# The mesh axis of each axis of a decoder's weights. The stacked layer axis is not sharded.
DECODER_SHARDING = (
    (r"language_model/embed/embedding", P("tensor", "fsdp")),
    (r"language_model/head/kernel", P("fsdp", "tensor")),  # absent from tied models
    (r"language_model/blocks/(attn/[qkv]|mlp/gate|mlp/up)/kernel", P(None, "fsdp", "tensor")),
    (r"language_model/blocks/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
)
