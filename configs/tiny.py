"""Sixty made-up people and a LLaVA of 1.3 M parameters that knows them: a whole run in minutes on a CPU.

python -m vkd_jax.main --config configs/tiny.py --workdir /tmp/vkd-tiny

configs/tiny.py                   VKD: forget six people                      (also :vkd)
configs/tiny.py:grad_diff         gradient difference on all weights
configs/tiny.py:grad_diff_visual  gradient difference on the visual weights
configs/tiny.py:finetune          how the shipped model was made, from random weights
configs/tiny.py:retain_only       the same without the six people: what never having known them looks like
"""

import ml_collections

from vkd_jax import defaults
from vkd_jax.types import UserError


def get_config(arg: str = "vkd") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    config = defaults.base()
    if arg == "vkd":
        config.method = defaults.method("vkd", augment_retain=2)
    elif arg in ("grad_diff", "grad_diff_visual"):
        config.method = defaults.method("grad_diff", train="all" if arg == "grad_diff" else "visual")
        config.train.update(steps=150, learning_rate=3e-4 if arg == "grad_diff" else 1e-3)
    elif arg in ("finetune", "retain_only"):
        _finetune(config, retain_only=arg == "retain_only")
    else:
        raise UserError(f"configs/tiny.py:{arg}: give vkd, grad_diff, grad_diff_visual, finetune or retain_only.")
    return config


def _finetune(config: ml_collections.ConfigDict, retain_only: bool) -> None:
    config.stage = "finetune"
    config.method = defaults.method("finetune", train="all")
    config.data.retain_only = retain_only
    config.train.update(
        steps=2000,
        batch_size=dict(image=64, text=16),
        learning_rate=2e-3,
        warmup_steps=200,
        weight_decay=0.05,
        b2=0.98,
        log_every=50,
        checkpoint_every=500,
    )
    config.model.create = ml_collections.ConfigDict(
        dict(
            vocab_size=1024,
            vision=dict(
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=48,
                patch_size=12,
                projection_dim=96,
            ),
            text=dict(
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
            ),
        )
    )
