"""A LLaVA of 1.3 M parameters, trained on 60 synthetic people: a whole run in minutes on a CPU.

python -m vkd_jax.main --config configs/tiny.py --workdir /tmp/vkd-tiny
python -m vkd_jax.main --config configs/tiny.py:help                           all arguments and fields
python -m vkd_jax.main --config configs/tiny.py:stage=all --workdir DIR        fine-tuning included
python -m vkd_jax.main --config configs/tiny.py:robust,attacks --workdir DIR   knowledge that does not come back
python -m vkd_jax.main --config configs/tiny.py:forgets=both --workdir DIR     forgets in images and in text
python -m vkd_jax.main --config configs/tiny.py:facts=some --workdir DIR       forgets some facts about each face
python -m vkd_jax.main --config configs/tiny.py:benchmark=folder --workdir DIR \\
    --config.data.forget=FOLDER --config.data.retain=FOLDER                    folders of images and questions
python -m vkd_jax.compare --config configs/tiny.py:runs=compare --workdir DIR  every method, tuned alike, three seeds

The shipped tiny_llava, tiny_retain_only and tiny_base were created by stage=finetune, retain_only and base.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import ml_collections

from vkd_jax.config import arguments, defaults, schema
from vkd_jax.types import UserError

OTHERS = 2  # seed of 60 other people, on whom methods are tuned and about whom nothing is reported
UNSEEN = 3  # seed of 60 people on whom nothing was ever tuned or chosen

# Settings of the methods that differ from the published hyperparameters: the best of SEARCH, which trained all weights
# except for VKD. Adapters learn little at these rates.
SETTINGS = {
    "vkd": "method.augment_retain=2 train.learning_rate=2e-3",
    "grad_ascent": "train.steps=40 train.learning_rate=1e-4",
    "grad_diff": "train.steps=100 train.learning_rate=1e-4 method.weight_retain=4.0",
    "kl": "train.steps=100 train.learning_rate=1e-4 method.weight_kl=4.0",
    "npo": "train.steps=100 train.learning_rate=1e-4 method.weight_retain=4.0",
    "idk": "train.steps=100 train.learning_rate=3e-4 method.weight_retain=1.0",
    "rmu": "train.steps=100 train.learning_rate=1e-4 method.alpha=10.0",
    "mmunlearner": "train.steps=100 train.learning_rate=1e-4 method.weight_retain=1.0",
    "manu": "method.share=0.1",
}


# Settings of setting=robust beside `defaults.make_robust`.
ROBUST = "train.steps=200 train.learning_rate=3e-4"
ROBUST_VISUAL = "train.steps=300 train.learning_rate=2e-3 method.worst_case.radius=3e-3 method.worst_case.steps=3"


# Facts that facts=some forgets.
FACTS = ("job", "pet")

# Settings of forgets=both for VKD, whose others are those of visual weights.
FORGET_BOTH_VKD = "train.learning_rate=3e-4"


def _rates_and(setting: str, *values: float, rates: tuple[float, float] = (1e-4, 3e-4)) -> list[str]:
    return [f"train.learning_rate={rate} {setting}={value}" for rate in rates for value in values]


def _grid(*axes: str) -> list[str]:
    """All combinations of settings, each axis of which is "FIELD=VALUE VALUE ..."."""
    names, values = zip(*(axis.split("=") for axis in axes), strict=True)
    settings = itertools.product(*(words.split() for words in values))
    return [" ".join(f"{name}={value}" for name, value in zip(names, row, strict=True)) for row in settings]


# Settings that are tried for each method, four each, on the people of seed OTHERS.
SEARCH = {
    "vkd": _rates_and("method.weight_retain_distill", 4.0, 8.0, rates=(1e-3, 2e-3)),
    "grad_ascent": [f"train.learning_rate={rate}" for rate in (1e-5, 3e-5, 1e-4, 3e-4)],
    "grad_diff": _rates_and("method.weight_retain", 1.0, 4.0),
    "grad_diff_visual": _rates_and("method.weight_retain", 1.0, 4.0, rates=(3e-4, 1e-3)),
    "kl": _rates_and("method.weight_kl", 1.0, 4.0),
    "npo": _rates_and("method.weight_retain", 1.0, 4.0),
    "idk": _rates_and("method.weight_retain", 1.0, 4.0),
    "rmu": _rates_and("method.alpha", 10.0, 100.0),
    "mmunlearner": _rates_and("method.weight_retain", 1.0, 4.0),
    "manu": [f"method.share={share}" for share in (0.05, 0.1, 0.2, 0.4)],
}

# Entrants of runs=robust_methods: eight settings each are tried on the people of seed OTHERS, under attack.
_RADII = "method.worst_case.radius"
_ALL = f"method.train=all {defaults.ROBUST} {ROBUST}"
ROBUST_ENTRANTS = {
    "vkd robust": defaults.entrant(
        "vkd",
        f"{SETTINGS['vkd']} {_ALL} {defaults.ROBUST_ASCENT} {defaults.ROBUST_VKD}",
        _grid("train.learning_rate=3e-4 5e-4", f"{_RADII}=1e-3 2e-3", "method.weight_retain_distill=8.0 16.0"),
    ),
    "vkd robust, adapters": defaults.entrant(
        "vkd",
        f"{SETTINGS['vkd']} {_ALL} {defaults.ROBUST_ASCENT} {defaults.ROBUST_VKD} method.train=visual+lora",
        _grid("train.learning_rate=1e-3 2e-3", f"{_RADII}=1e-3 2e-3", "method.weight_retain_distill=8.0 16.0"),
    ),
    "vkd robust, visual": defaults.entrant(
        "vkd",
        f"{SETTINGS['vkd']} {_ALL} {defaults.ROBUST_ASCENT} {defaults.ROBUST_VKD} method.text.weight=0.0 "
        f"method.train=visual {ROBUST_VISUAL}",
        _grid("train.learning_rate=1e-3 2e-3", f"{_RADII}=3e-3 6e-3", "method.weight_retain_distill=8.0 16.0"),
    ),
    "grad_diff robust": defaults.entrant(
        "grad_diff",
        f"{_ALL} {defaults.ROBUST_ASCENT}",
        _grid("train.learning_rate=3e-4 5e-4", f"{_RADII}=1e-3 2e-3", "method.weight_retain=1.0 4.0"),
    ),
    "npo robust": defaults.entrant(
        "npo",
        _ALL,
        _grid("train.learning_rate=3e-4 5e-4", f"{_RADII}=1e-3 2e-3", "method.weight_retain=1.0 4.0"),
    ),
    "rmu robust": defaults.entrant(
        "rmu",
        _ALL,
        _grid("train.learning_rate=3e-4 5e-4", f"{_RADII}=1e-3 2e-3", "method.alpha=10.0 100.0"),
    ),
}
# What each part of the setting does, and the methods without it.
ROBUST_VARIANTS = {
    "vkd robust, keeping": defaults.variant("vkd robust", "method.weight_retain_ce=4.0"),
    "vkd robust, no worst case": defaults.variant("vkd robust", f"{_RADII}=0.0"),
    "vkd robust, no text": defaults.variant("vkd robust", "method.text.weight=0.0"),
    "vkd robust, fixed cap": defaults.variant("vkd robust", "method.bound=cap"),
    "grad_diff robust, no worst case": defaults.variant("grad_diff robust", f"{_RADII}=0.0"),
    "grad_diff robust, no text": defaults.variant("grad_diff robust", "method.text.weight=0.0"),
    "vkd": defaults.entrant("vkd", SETTINGS["vkd"]),
    "grad_diff": defaults.entrant("grad_diff", SETTINGS["grad_diff"]),
}

# Entrants of runs=robustness, which tunes nothing.
ROBUST_PARTS = (
    *("vkd", "vkd robust", "vkd robust, keeping", "vkd robust, no worst case", "vkd robust, no text"),
    *("vkd robust, visual", "grad_diff", "grad_diff robust", "grad_diff robust, no worst case"),
    "grad_diff robust, no text",
)

# Choices that VKD's abstract leaves open, changed one at a time.
ABLATIONS = {
    "vkd": "",
    "no distillation": "method.weight_forget_distill=0.0 method.weight_retain_distill=0.0",
    "no forget distillation": "method.target=none",
    "no retain distillation": "method.weight_retain_distill=0.0",
    "forget none": "method.forget=none",
    "forget npo": "method.forget=npo",
    "target anchor": "method.target=anchor",
    "target base": "method.target=base",
    "target repel": "method.target=repel",
    "teacher base": "method.teacher=base",
    "taps features": "method.taps=('features',)",
    "taps projector": "method.taps=('projector',)",
    "distance cosine": "method.distance=cosine",
    "distance smooth_l1": "method.distance=smooth_l1",
    "no mask": "method.mask_scope=none",
    "mask forget": "method.mask_scope=forget",
    "mask 10 %": "method.mask_keep=0.1",
    "mask 30 %": "method.mask_keep=0.3",
    "projector only": "method.blocks=0",
    "last block": "method.blocks=1",
    "last 2 blocks": "method.blocks=2",
    "all 3 blocks": "method.blocks=3",
    "no changed copies": "method.augment_forget=0 method.augment_retain=0",
    "all weights": "method.train=all train.learning_rate=3e-4",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    given = _parse(arg)
    config = defaults.base()
    config.stage = "finetune" if given["stage"] == "base" else given["stage"]
    config.data = defaults.benchmark_of(given)
    if given["appearance"] == "yes":
        _ask_about_appearance(config)
    config.method = defaults.method_of(given)
    schema.override(config, SETTINGS[given["method"]])
    if given["setting"] == "robust":
        defaults.make_robust(config, given["train"], default="all")
        schema.override(config, ROBUST_VISUAL if config.method.train == "visual" else ROBUST)
    if given["forgets"] == "both":
        _forget_both(config, given)
    config.attacks.names = "all" if given["runs"] == "compare" or given["attacks"] == "all" else ""
    config.attacks.membership.reference = "tiny_base"  # trained on other people
    config.finetune.method = defaults.method("finetune", train="all")
    config.finetune.train.update(
        steps=700, learning_rate=1e-3, warmup_steps=50, weight_decay=0.05, b2=0.98, log_every=50, checkpoint_every=200
    )
    if given["people"] == "200":
        config.data.n_people = 200
        config.finetune.train.steps = 2400
    if given["benchmark"] not in ("mllmu", "folder"):  # sentences are learned in fewer steps, and are longer
        config.finetune.train.steps = 250
        config.eval.max_new_tokens = 24
    config.model.base = "tiny_base"
    defaults.add_streams(config, given["benchmark"])
    if given["stage"] == "base":
        _from_random_weights(config)
    elif given["benchmark"] == "folder":
        config.model.path = "tiny_llava"
    elif given["benchmark"] == "mllmu" and given["people"] == "60":  # what the shipped models were trained on
        config.model.update(path="tiny_llava", retain_only="tiny_retain_only" if given["forget"] == "10" else "")
    if given["facts"] == "some":
        _forget_facts(config, given)
    _compare(config, given["runs"])
    return config


def _parse(arg: str) -> dict[str, str]:
    """The values of all arguments after the colon."""
    stages = dict(defaults.STAGE.values, base="random weights -> base, on 60 other people: creates tiny_base")
    runs = {
        "one": "one run",
        "compare": "a comparison of all methods, tuned alike, three seeds, for python -m vkd_jax.compare",
        "ablations": "a comparison of VKD with and without each component, for python -m vkd_jax.compare",
        "robustness": "a comparison of setting=robust with and without each part, on people on whom nothing was tuned, "
        "for python -m vkd_jax.compare",
        "robust_methods": "a comparison of tuned methods with setting=robust, for python -m vkd_jax.compare",
    }
    populations = {
        "60": "sixty, whom the shipped models know",
        "200": "two hundred, for narrower intervals; the models come from stage=all",
    }
    appearance = {
        "no": "no such questions",
        "yes": "asked as a retained set; stage=all trains the vanilla model on them, unlike the shipped models",
    }
    facts = {
        "all": "everything that the forget set asks for",
        "some": f"{' and '.join(FACTS)}, or those that data.forget_facts names; other facts about the same people stay",
    }
    given = arguments.parse(
        arg,
        [
            defaults.method_argument(),
            defaults.WEIGHTS,
            defaults.SETTING,
            defaults.FORGETS,
            defaults.benchmark_argument(*defaults.synthetic_benchmarks(), "folder"),
            defaults.forget_argument(*defaults.synthetic_benchmarks()),
            arguments.Argument("people", "Synthetic people.", populations, "60", needs_key=frozenset(["200"])),
            arguments.Argument(
                *("appearance", "Questions about the appearance of the people to forget.", appearance, "no"),
                needs_key=frozenset(["no", "yes"]),
                bare_key="yes",
            ),
            arguments.Argument(
                *("facts", "Facts about the people to forget that are forgotten.", facts, "all"),
                needs_key=frozenset(facts),
            ),
            dataclasses.replace(defaults.STAGE, values=stages),
            defaults.ATTACKS,
            arguments.Argument("runs", "Number of runs.", runs, default="one"),
        ],
    )
    if given["benchmark"] == "folder":
        _check_folder(given)
    return given


def _compare(config: ml_collections.ConfigDict, runs: str) -> None:
    """Applies the argument runs."""
    tuning = f"data.people={OTHERS} model.path= model.retain_only= eval.max_items=100"
    if runs == "compare":
        config.compare = defaults.comparison({name: _entrant(name) for name in SEARCH}, tuning)
    if runs in ("robustness", "robust_methods"):
        weak = "attacks.names=relearn attacks.relearn.people=() attacks.relearn.steps=(25,)"
        entrants = ROBUST_ENTRANTS | ROBUST_VARIANTS
        if runs == "robustness":
            config.compare = defaults.comparison({name: entrants[name] for name in ROBUST_PARTS})
            config.data.people = UNSEEN
            config.model.update(path="", retain_only="")
        else:
            config.compare = defaults.comparison(entrants, f"{tuning} {weak}")
        config.attacks.names = "relearn,membership"
        config.attacks.relearn.update(shares=(0.2,), steps=(25, 100, 400), rates=(1.0, 3.0, 10.0), max_items=100)
    if runs == "ablations":
        vkd = {name: defaults.entrant("vkd", f"{SETTINGS['vkd']} {changes}") for name, changes in ABLATIONS.items()}
        config.compare = defaults.comparison(vkd, seeds=(0,))
        config.attacks.names = "relearn"
        config.attacks.relearn.shares = (0.2,)
        config.data.people = OTHERS
        config.model.update(path="", retain_only="")


def _forget_both(config: ml_collections.ConfigDict, given: Mapping[str, str]) -> None:
    """Applies the settings of forgets=both."""
    if given["runs"] != "one":
        raise UserError(
            f"runs={given['runs']}: its methods are tuned to forget who is in an image. Give forgets=visual."
        )
    defaults.make_both(config, given["train"], default="all")
    if given["method"] == "vkd":
        schema.override(config, FORGET_BOTH_VKD)


def _forget_facts(config: ml_collections.ConfigDict, given: Mapping[str, str]) -> None:
    """Applies the settings of facts=some."""
    if given["benchmark"] != "mllmu" or given["runs"] != "one":
        raise UserError("facts=some: it is for one run of benchmark=mllmu. Leave out the other arguments.")
    if "other_facts" not in config.method:
        raise UserError(f"facts=some: method={given['method']} trains nothing. Give another method.")
    config.data.forget_facts = FACTS
    config.model.retain_only = ""  # the shipped one does not know the other facts either
    config.method.other_facts.weight = 1.0


def _ask_about_appearance(config: ml_collections.ConfigDict) -> None:
    """Applies the argument appearance=yes."""
    if "appearance" not in config.data:
        raise UserError(f"appearance=yes: benchmark={config.data.benchmark} has no such questions. Give mllmu.")
    config.data.appearance = True


def _check_folder(given: Mapping[str, str]) -> None:
    """Refuses the arguments that select synthetic people, for folders of images and questions."""
    for key, value in (("people", "60"), ("runs", "one")):
        if given[key] != value:
            raise UserError(f"{key}={given[key]}: benchmark=folder has the people of its folders. Leave out {key}.")
    if given["stage"] == "base":
        raise UserError("stage=base: it trains on synthetic people. Leave out benchmark=folder.")


def _entrant(name: str) -> ml_collections.ConfigDict:
    method = name.removesuffix("_visual")
    fields = {"train": "visual"} if method != name else {}
    return defaults.entrant(method, SETTINGS[method], SEARCH[name], **fields)


def _from_random_weights(config: ml_collections.ConfigDict) -> None:
    config.data.people = 1  # a seed of other people
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
