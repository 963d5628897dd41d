"""Sixty made-up people and a LLaVA of 1.3 M parameters that knows them: a whole run in minutes on a CPU.

python -m vkd_jax.main --config configs/tiny.py --workdir /tmp/vkd-tiny

configs/tiny.py                   VKD: forget six people                      (also :vkd)
configs/tiny.py:grad_diff         gradient difference on all weights
configs/tiny.py:grad_diff_visual  gradient difference on the visual weights
configs/tiny.py:forget=5          three people instead of six; 15: nine
configs/tiny.py:all               everything before that, too: base -> vanilla -> retain-only -> unlearned -> report
configs/tiny.py:clear,all         the same in CLEAR's layout and by its protocol
configs/tiny.py:finetune          base -> vanilla alone: how the shipped tiny_llava was made
configs/tiny.py:retain_only       base -> retain-only alone: how the shipped tiny_retain_only was made
configs/tiny.py:base              how the shipped tiny_base was made, from random weights, on sixty other people
"""

import ml_collections

from vkd_jax import defaults


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    methods, stages = ["vkd", "grad_diff", "grad_diff_visual"], [*defaults.STAGES, "base"]
    words = dict(method="vkd", stage="unlearn", benchmark="mllmu", forget="10") | defaults.parse_words(
        arg, dict(method=methods, stage=stages, benchmark=["mllmu", "clear"])
    )
    config = defaults.base()
    config.stage = words["stage"]
    config.data = defaults.benchmark(words["benchmark"], forget=int(words["forget"]))
    if words["method"] == "vkd":
        config.method = defaults.method("vkd", augment_retain=2)
    else:
        config.method = defaults.method("grad_diff", train="all" if words["method"] == "grad_diff" else "visual")
        config.train.update(steps=150, learning_rate=3e-4 if words["method"] == "grad_diff" else 1e-3)
    config.finetune.method = defaults.method("finetune", train="all")
    config.finetune.train.update(
        steps=700, learning_rate=1e-3, warmup_steps=50, weight_decay=0.05, b2=0.98, log_every=50, checkpoint_every=200
    )
    if words["benchmark"] == "clear":  # captions are learned sooner, and are longer
        config.finetune.train.steps = 250
        config.eval.max_new_tokens = 24
    config.model.base = "tiny_base"
    if words["stage"] == "base":
        _from_random_weights(config)
    elif words["benchmark"] == "mllmu":  # in whose words the shipped models know the people
        config.model.update(path="tiny_llava", retain_only="tiny_retain_only" if words["forget"] == "10" else "")
    return config


def _from_random_weights(config: ml_collections.ConfigDict) -> None:
    config.stage = "finetune"
    config.data.people = 1  # the seed of other people
    config.finetune.train.update(steps=2000, learning_rate=2e-3, warmup_steps=200, checkpoint_every=500)
    config.model.base = ""
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
