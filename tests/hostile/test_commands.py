"""What commands are given beside their config and their data: comparisons, certificates, keys, questions and tables."""

import json
import os

import pytest
from hostile_cases import TINY_CONFIG, TINY_LLAVA, Case, check, config_file, model_copy, written

from vkd_jax.checkpoints import certificate
from vkd_jax.models import gemma3, internvl, llava, module_for, qwen2_5_vl, qwen2_vl, smolvlm

COMPARISON = """
import ml_collections
from vkd_jax.config import defaults


def get_config():
    config = defaults.base()
    config.data = defaults.benchmark("mllmu", source="absent")
    config.model.path = "absent"
    compare = defaults.comparison({{"vkd a": defaults.entrant("vkd", "train.steps=1")}}, seeds=(0,)).to_dict()
    entrant = lambda **fields: compare["entrants"]["vkd a"] | fields
    {change}
    config.compare = ml_collections.ConfigDict(compare)
    return config
"""


def comparison(change):
    return config_file(COMPARISON.format(change=change))


def field(name, value):
    """A field of the section has another value."""
    return comparison(f"compare[{name!r}] = {value}")


def entrant(name, **fields):
    """One entrant more."""
    values = ", ".join(f"{key}={value}" for key, value in fields.items())
    return comparison(f"compare['entrants'][{name!r}] = entrant({values})")


COMPARE = [
    Case("seeds that are a number", field("seeds", 3), ("compare.seeds", "3")),
    Case("seeds that are a text", field("seeds", "'012'"), ("compare.seeds", "012")),
    Case("seeds that are null", field("seeds", None), ("compare.seeds", "None")),
    Case("entrants that are a list", field("entrants", ["vkd"]), ("compare.entrants", "not a section")),
    Case("no entrants", field("entrants", {}), ("compare.entrants", "none")),
    Case("entrants of one folder", entrant("vkd_a"), ("compare.entrants.vkd_a", "vkd a", "another name")),
    Case("entrant of symbols", entrant("!!!"), ("compare.entrants.!!!", "letters")),
    Case("entrant of a long name", entrant("x" * 100), ("compare.entrants.xxx", "letters")),
    Case("search that is a text", entrant("x", search="'seed=1'"), ("compare.entrants.x.search", "seed=1")),
    Case("search that is null", entrant("x", search=None), ("compare.entrants.x.search", "None")),
    Case("no method", entrant("x", method=None), ("compare.entrants.x.method", "missing")),
    Case(
        "searches of two lengths",
        comparison(
            "compare['entrants'] |= dict(x=entrant(search=('seed=1',)), y=entrant(search=('seed=1', 'seed=2')))"
        ),
        ("compare.entrants", "1, 2", "equally many"),
    ),
    Case(
        "comparison in a folder of others",
        lambda folder: (
            written(folder / "own" / "data" / "thesis.txt", "mine"),
            [f"--config={TINY_CONFIG}:compare", "--workdir=own"],
        )[1],
        ("--workdir=own", "other files (data)"),
    ),
    Case("tuning that fits nothing", field("tuning", "'seed=first'"), ("seed", "first")),
]


def table(make):
    """A file of plans that something else is in the place of."""

    def prepare(folder):
        make(folder / "plans.json")
        return [f"--config={TINY_LLAVA.parents[2] / 'configs' / 'plans.py'}", "--json=plans.json"]

    return prepare


PLAN = [
    Case("named pipe as a table", table(os.mkfifo), ("--json=plans.json", "pipe")),
    Case("table nested deeply", table(lambda path: written(path, "[" * 100_000)), ("--json=plans.json", "nested")),
    Case("table that is a text", table(lambda path: written(path, '"x"')), ("--json=plans.json", "another kind")),
    Case("folder as a table", table(lambda path: path.mkdir()), ("--json=plans.json", "folder")),
    Case(
        "config of a model as a plan",
        lambda folder: (model_copy(folder), [f"--config={TINY_CONFIG}", "--json=model/config.json"])[1],
        ("--json=model/config.json", "into the model folder"),
    ),
    *(
        Case(
            f"{what} as a plan",
            lambda folder, text=text: (written(folder / "f", text), [f"--config={TINY_CONFIG}", "--json=f"])[1],
            ("--json=f", problem),
        )
        for what, text, problem in (
            ("settings", '{"seed": 3}', "has no plan"),
            ("table", "[1]", "of another kind"),
            ("key", "-----BEGIN", "of another kind"),
        )
    ),
    Case("plan in a bucket", lambda _: [f"--config={TINY_CONFIG}", "--json=gs://b/f"], ("gs://b/f", "this machine")),
]


def certified(change=lambda folder: None, *args, **facts):
    """A certified model; facts replace fields of its certificate."""

    def prepare(folder):
        model = model_copy(folder)
        content = json.loads(certificate.describe(model, {"forgotten": ["x"], "model": {"method": "vkd"}}))
        written(model / certificate.FILE, content | facts)
        change(model)
        return ["model", "--certificate", *args]

    return prepare


def key_beside(model):
    """A private key, another name of it, and a text, beside the model."""
    written(model.parent / "key", private_key())
    os.link(model.parent / "key", model.parent / "hard_link")
    written(model.parent / "request.txt", "who is to be forgotten")


VERIFY = [
    *(
        Case(f"certified folder with {name}", certified(lambda f, name=name: written(f / name, "x")), (name,), status=1)
        for name in ("pytorch_model.bin", "modeling_evil.py", "more/config.json", "README.md")
    ),
    Case(
        "named pipe as a certificate",
        certified(lambda f: ((f / "certificate.json").unlink(), os.mkfifo(f / "certificate.json"))),
        ("certificate.json", "pipe"),
    ),
    Case("forgotten that is a number", certified(forgotten=3), ("certificate.json", "format 2")),
    Case("forgotten that is null", certified(forgotten=None), ("certificate.json", "format 2")),
    Case("model that is a list", certified(model=["vkd"]), ("certificate.json", "format 2")),
    Case("forgotten that are numbers", certified(forgotten=[1]), ("certificate.json", "format 2")),
    Case("named pipe as a page", certified(lambda f: os.mkfifo(f.parent / "c.pdf"), "--pdf=c.pdf"), ("c.pdf", "pipe")),
    Case("folder as a page", certified(lambda f: (f.parent / "c").mkdir(), "--pdf=c"), ("c is a folder",)),
    *(
        Case(f"page over {name}", certified(key_beside, "--sign=key", f"--pdf={name}"), (f"--pdf={name}", problem))
        for name, problem in (
            ("model/model.safetensors", "which is read"),
            ("model/certificate.json", "which is read"),
            ("model/new.pdf", "which is read"),
            ("key", "which is read"),
            ("hard_link", "which is read"),
            ("request.txt", "another kind"),
            ("gs://b/page.pdf", "this machine"),
        )
    ),
    Case(
        "key in the place of the signature",
        certified(lambda f: written(f / "certificate.sig", private_key()), "--sign=model/certificate.sig"),
        ("model/certificate.sig", "move the key"),
    ),
    Case(
        "method of 10000 letters", certified(model={"method": "x" * 10_000}), ("xxx ...",), status=0, lacks=("x" * 200,)
    ),
    Case("empty name of a model", lambda _: [""], ("model is empty",)),
    Case("empty name of a key", certified(lambda _: None, "--public_key="), ("--public_key is empty",)),
    Case("named pipe as a key", certified(lambda f: os.mkfifo(f.parent / "key"), "--sign=key"), ("key", "pipe")),
    Case(
        "folder as a signature",
        certified(lambda f: ((f / "certificate.sig").mkdir(), written(f.parent / "key", private_key())), "--sign=key"),
        ("certificate.sig", "folder"),
    ),
]


def private_key():
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return Ed25519PrivateKey.generate().private_bytes(encoding, form, serialization.NoEncryption())


def configured(family, section="", **fields):
    """A question to a folder that has only the published config.json of a family, with other fields."""
    preset = json.dumps(next(iter(family.PRESETS.values()))[1])  # before a test makes a config of it, which changes it
    name = family.__name__.rpartition(".")[2]

    def prepare(folder):
        values = {"model_type": name, **json.loads(preset)}
        assert module_for(name) is family
        target = values.setdefault(section, {}) if section else values
        target |= fields
        written(folder / "model" / "config.json", values)
        return ["--model=model", "--question=Who is it?"]

    return prepare


def rope(kind, **fields):
    """The `rope_scaling` of the language model of Gemma-3."""
    return configured(gemma3, "text_config", rope_scaling=dict(rope_type=kind, **fields))


TEXT = "--question=Who is it?"
ASK = [
    Case("empty name of a model to ask", lambda _: ["--model=", TEXT], ("--model is empty",)),
    Case(
        "image at an address",
        lambda _: ["--model=tiny_llava", TEXT, "--image=http://x/a.png"],
        ("--image", "http://x/a.png", "a disk", "download"),
    ),
    Case("misspelled model", lambda _: ["--modle=tiny_llava", TEXT], ("--modle is no flag", "did you mean --model")),
    Case("negative pixels", lambda _: ["--model=tiny_llava", TEXT, "--max_pixels=-5"], ("max_pixels=-5", "negative")),
    Case("two questions", lambda _: ["--model=absent", TEXT, "--question=Why?"], ("--question is given twice", "Why?")),
    Case("tokens that are a text", lambda _: ["--model=absent", TEXT, "--max_new_tokens=x"], ("max_new_tokens", "'x'")),
    Case("question of invisible characters", lambda _: ["--model=tiny_llava", "--question=\u200b"], ("blank",)),
    # Fields of config.json that transformers does not check.
    Case("factor that is a text", rope("linear", factor="8"), ("factor", "'8'", "positive")),
    Case("factor that is true", rope("linear", factor=True), ("factor", "True", "positive")),
    Case("boi token that is null", configured(gemma3, boi_token_index=None), ("boi_token_id", "None")),
    Case("eoi token that is negative", configured(gemma3, eoi_token_index=-1), ("eoi_token_id", "-1")),
    Case("image token that is negative", configured(llava, image_token_index=-1), ("image_token_index", "-1")),
    *(
        Case(f"{name} as {value} of {family.__name__}", configured(family, **{name: value}), (name, words))
        for family, name, value, words in (
            (qwen2_vl, "image_token_id", 151652, "another token than"),
            (qwen2_vl, "vision_end_token_id", 151655, "another token than"),
            (qwen2_vl, "image_token_id", 10**6, "below 151,936"),
            (gemma3, "eoi_token_index", 262144, "another token than"),
            (internvl, "image_token_id", 151674, "below 151,674"),
            (smolvlm, "image_token_id", 49280, "below 49,280"),
            (llava, "pad_token_id", 32000, "another token than pad_token_id"),
        )
    ),
    Case(
        "theta that is a text",
        configured(qwen2_vl, rope_theta="1e6"),
        ("rope_theta",),
    ),
    Case(
        "sections that are a text",
        configured(qwen2_vl, rope_scaling=dict(type="mrope", mrope_section="abc")),
        ("mrope_section",),
    ),
    Case(
        "sections that are a number",
        configured(qwen2_5_vl, rope_scaling=dict(type="mrope", mrope_section=3)),
        ("config.json", "wrong type"),
    ),
    Case(
        "full attention in a block that is not there",
        configured(qwen2_5_vl, "vision_config", fullatt_block_indexes=[7, 99]),
        ("fullatt_block_indexes", "99", "from 0 to 31"),
    ),
    *(
        Case(
            f"{name} of {family.__name__} as {value}", configured(family, section, **{name: value}), (name, "up to 0.1")
        )
        for family, section, name, value in (
            (llava, "vision_config", "layer_norm_eps", 1e30),
            (smolvlm, "vision_config", "layer_norm_eps", -1e-6),
            (smolvlm, "text_config", "rms_norm_eps", 1e30),
            (gemma3, "vision_config", "layer_norm_eps", 0.2),
            (qwen2_vl, "text_config", "rms_norm_eps", 1e30),
            (internvl, "vision_config", "layer_norm_eps", 1.0),
        )
    ),
    *(
        Case(f"{name} as {value}", configured(gemma3, "text_config", **{name: value}), (name, "False or null"))
        for name, value in (("final_logit_softcapping", 0.0), ("attn_logit_softcapping", 0.0))
    ),
    *(
        Case(
            f"sections {sizes}",
            configured(qwen2_vl, rope_scaling=dict(type="mrope", mrope_section=sizes)),
            ("mrope_section", "three positive numbers"),
        )
        for sizes in ([80, -40, 24], [64, 0, 0])
    ),
    Case(
        "epsilon that is 0",
        configured(llava, "text_config", rms_norm_eps=0.0),
        ("rms_norm_eps", "positive"),
    ),
]
ADD = ["--forget", "1"]


def dangling(folder):
    os.symlink("gone/ledger", folder / "ledger")
    return ["add", "ledger", *ADD]


PUSH = [
    Case("name of a run too long", lambda _: ["x" * 300, "ORG/NAME"], ("too long", "xxx")),
    Case("run in a bucket to upload", lambda _: ["gs://b/run", "ORG/NAME"], ("gs://b/run", "bucket", "download")),
    Case("run of an unknown address", lambda _: ["memory://run", "ORG/NAME"], ("memory://run", "not supported")),
    Case("no name on the hub", lambda _: ["run"], ("required: repo",)),
]
REQUESTS = [
    Case(
        "more IDs than a name has characters",
        lambda _: ["add", "l", "--forget", ",".join(f"{number:03}" for number in range(300))],
        ("request 1: 300 to forget",),
        status=0,
    ),
    Case("number of 5000 digits", lambda _: ["purge", "l", "9" * 5000], ("number of a request",), lacks=("9" * 30,)),
    Case("misspelled people", lambda _: ["add", "l", "--froget=1"], ("--froget is no flag", "did you mean --forget")),
    Case("people that are empty", lambda _: ["add", "l", "--forget="], ("--forget is empty",)),
    Case("number that is negative", lambda _: ["withdraw", "l", "-1"], ("-1",)),
    Case("two folders to forget", lambda _: ["add", "l", *ADD, "--forget=2"], ("--forget is given twice", "1 and 2")),
    Case(
        "one folder to forget and to test",
        lambda folder: (written(folder / "f" / "metadata.jsonl", ""), ["add", "l", "--forget=f", "--test=f/../f/"])[1],
        ("data.forget and data.test", "different folders"),
    ),
    Case("IDs with NUL", lambda _: ["add", "l", "--forget", "a\0b"], ("NUL",)),
    Case(
        "workdir without a name",
        lambda folder: (written(folder / "l", ""), ["run", "l", f"--config={TINY_CONFIG}", "--workdir="])[1],
        ("--workdir is empty",),
    ),
    Case(
        "ledger in a model folder",
        lambda folder: (model_copy(folder), ["add", "model/ledger", *ADD])[1],
        ("model/ledger", "into the model folder"),
    ),
    *(
        Case(
            f"runs of requests in {what}",
            lambda folder, name=name: (
                (
                    model_copy(folder),
                    written(folder / "own" / "data" / "thesis.txt", "mine"),
                    written(folder / "l", ""),
                ),
                (written(folder / "own" / "l", "")),
                ["run", "l", f"--config={TINY_CONFIG}", f"--workdir={name}"],
            )[-1],
            (f"--workdir={name}", problem),
        )
        for what, name, problem in (
            ("a model folder", "model", "into the model folder"),
            ("a folder in it", "model/run", "into the model folder"),
            ("a folder of others", "own", "other files (data, l)"),
        )
    ),
    Case("ledger that is a link to nothing", dangling, ("ledger", "is a link to gone/ledger", "does not exist")),
    Case("name of a ledger too long", lambda _: ["add", "x" * 300, *ADD], ("too long", "xxx")),
    Case("path of a ledger too long", lambda _: ["show", "x/" * 3000], ("too long",)),
    Case("empty name of a ledger", lambda _: ["show", ""], ("ledger is empty",)),
    Case("person of invisible characters", lambda _: ["add", "ledger", "--forget", "\u200b"], ("--forget", "empty")),
    Case("person in two spellings", lambda _: ["add", "l", "--forget", "\u00e9,e\u0301"], ("named twice",)),
]
CASES = [
    Case(**{**vars(case), "command": command})
    for command, cases in (
        *(("compare", COMPARE), ("plan", PLAN), ("verify", VERIFY), ("ask", ASK), ("requests", REQUESTS)),
        ("checkpoints.push", PUSH),
    )
    for case in cases
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_argument_is_refused(case, fork_server, tmp_path):
    check(case, fork_server, tmp_path)


def test_the_flags_of_a_row_of_plans_are_read_as_those_of_a_command(fork_server, tmp_path):
    """The row ends where the flags that only this command has are used, not where they are parsed."""
    flags = f"--config={TINY_CONFIG} --topology=v5e:1x1 --nocompare --text_tokens=0"
    plans = dict(rows=(("Tiny", "v5e-1", flags),), only=(), examples=1)
    config = f"ml_collections.ConfigDict({dict(stage='plan', plans=plans)})"
    written(tmp_path / "plans.py", f"import ml_collections\ndef get_config():\n    return {config}\n")
    outcome = fork_server.run("vkd_jax.plan", ["--config=plans.py", "--json=plans.json"], tmp_path)
    (row,) = json.loads((tmp_path / "plans.json").read_text())
    assert (outcome.status, row["slice"]) == (0, "v5e-1")
    assert row["error"].startswith("--answer_tokens=64, --text_tokens=0: ")
