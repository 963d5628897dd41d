"""Flags, config files and workdirs that cannot be right."""

import os

import pytest
from hostile_cases import Case, check, config_file, request, settings, snapshot, written


def base_and(change):
    """A config file that changes the base config."""
    return config_file(
        "from vkd_jax.config import defaults\n\n\ndef get_config():\n    config = defaults.base()\n"
        f"    {change}\n    return config\n"
    )


def section_deleted(name):
    return base_and(f"del config['{name}']")


def workdir(make, *args):
    """A workdir that something else is in the place of."""

    def prepare(folder):
        make(folder / "run")
        return settings(*args)(folder)

    return prepare


def damaged_config(content):
    """A workdir with answers, whose config is damaged."""

    def make(path):
        written(path / "answers" / "vanilla.jsonl", "")
        written(path / "config.json", content)

    return make


def in_the_place_of(name):
    """A file in the place of a folder of a run, or a folder in the place of a file."""

    def make(path):
        target = path / name
        target.mkdir(parents=True) if target.suffix else written(target, "x")

    kind = "is a folder" if "." in name else "is a file"
    return Case(f"in the place of {name.replace('/', ' ')}", workdir(make), (f"run/{name}", kind, "remove it"))


PLACES = (
    "adapter", "answers", "attacks", "attacks/relearn", "base", "data", "judge", "portraits", "report", "retain_only",
    "train", "train/checkpoints", "train/vanilla", "train/vanilla/checkpoints", "unlearned", "vanilla",
    "answers/vanilla.jsonl", "attacks/relearn/unlearned.jsonl", "config.json", "inputs.json", "log.txt",
    "manifest.json", "portraits/Otto.png", "records.json", "report.md", "report/losses.png", "results.json",
    "timing.json", "train/metrics.jsonl",
)  # fmt: skip


def prompts(content):
    """A file of prompt wordings."""

    def prepare(folder):
        written(folder / "prompts.json", content)
        return settings("--config.eval.prompts=prompts.json")(folder)

    return prepare


def cache(name):
    """A file is in the place of the folder of cached data, or of one that leads to it."""
    return request(lambda folder: written(folder.parent / "cache", "x"), f"--config.data.cache={name}")


SECTIONS = ("model", "data", "mesh", "eval", "attacks", "method", "train", "finetune", "seed")


def config_at(make, name="config.py"):
    """The path of a config that something else is in the place of."""
    return lambda folder: (make(folder / "config.py"), [f"--config={name}", "--workdir=run"])[1]


LINKED = (
    "config.json", "inputs.json", "records.json", "timing.json", "lock.json", "log.txt", "results.json", "report.md",
    "report.html", "report", "report/losses.png", "answers", "answers/vanilla.jsonl", "attacks/relearn", "data",
    "train", "train/metrics.jsonl", "train/checkpoints", "train/checkpoints/2", "base", "vanilla", "unlearned",
    "unlearned/model.safetensors", "portraits", "features", "judge/vanilla.jsonl",
)  # fmt: skip


def linked(name):
    """A name in the workdir is a link to a folder elsewhere, or to a file that a run would write there."""

    def make(path):
        (path / name).parent.mkdir(parents=True)
        written(path / "config.json", {}) if name != "config.json" else None
        elsewhere = path.parent / "elsewhere"
        elsewhere.mkdir()
        os.symlink(elsewhere / "file" if "." in name else elsewhere, path / name)

    return Case(
        f"link as {name.replace('/', ' ')}", workdir(make), (f"run/{name} is a link to", "elsewhere", "--workdir")
    )


CASES = [
    # Config files that never end, or that are none.
    Case("named pipe as a config", config_at(os.mkfifo), ("--config=config.py", "not a regular file")),
    Case("named pipe with arguments", config_at(os.mkfifo, "config.py:runs=x"), ("config.py", "not a regular file")),
    Case("folder as a config", config_at(os.mkdir), ("--config=config.py", "not a regular file")),
    Case("name of a config too long", config_at(lambda _: None, "x" * 300), ("--config=xxx", "too long")),
    Case("missing config and its field", settings("--config=x.py"), ("--config=x.py", "No such file")),
    Case(
        "config.json of a run",
        config_at(lambda path: written(path, {"stage": "audit", "model": {"create": False}, "method": {}})),
        ("--config=config.py: it is the JSON of a run, and --config takes a Python file", "see configs/tiny.py"),
    ),
    Case("JSON as a config", config_at(lambda path: written(path, '{"a": 1}')), ("it is a JSON file", "Python file")),
    # Flags of libraries, and flags with two values.
    *(
        Case(f"flag {flag}", settings(flag), ("--" + flag.partition("=")[0].strip("-"), "flag"), seconds=20)
        for flag in ("--flagfile=nothing", "-flagfile=/dev/zero", "--undefok=wrkdir", "--run_with_pdb", "--v=3")
    ),
    Case("two configs", lambda _: ["--config", "a.py", "--config=b.py"], ("--config is given twice", "a.py", "b.py")),
    Case("two workdirs", settings("--workdir=a", "--workdir=b"), ("--workdir is given twice",)),
    Case(
        "two values in two spellings",
        settings("--config.train.steps=1", "--config.train['steps']=2"),
        ("--config.train['steps'] is given twice, as 1 and 2",),
    ),
    Case("two values of a field", settings("--config.seed=1", "--config.seed=2"), ("--config.seed is given twice",)),
    Case(
        "both values of a switch", settings("--dry_run", "--nodry_run"), ("--dry_run is given twice", "true", "false")
    ),
    Case("switch that is a text", settings("--config.model.quantize=", "--dry_run=maybe"), ("--dry_run=maybe", "true")),
    Case("field that is maybe", settings("--config.data.symlinks=maybe"), ("symlinks=maybe", "true or false")),
    # Judges that are no model.
    Case(
        "judge that does not exist",
        settings("--config.eval.judge=a/b/c"),
        ("--config.eval.judge=a/b/c", "no model folder"),
    ),
    Case(
        "judge that is an empty folder",
        lambda folder: ((folder / "empty").mkdir(), settings("--config.eval.judge=empty")(folder))[1],
        ("--config.eval.judge=empty", "config.json"),
    ),
    # Values out of range; test_ranges.py has one of each field.
    Case("negative cap", settings("--config.method.cap=-1"), ("method.cap", "-1")),
    Case("mask keeps twice as much", settings("--config.method.mask_keep=2"), ("method.mask_keep", "2")),
    Case("negative weight", settings("--config.method.weight_forget_ce=-1"), ("method.weight_forget_ce", "-1")),
    Case("weight that is nan", settings("--config.method.weight_forget_ce=nan"), ("method.weight_forget_ce", "nan")),
    Case(
        "learning rate that is infinite", settings("--config.train.learning_rate=inf"), ("train.learning_rate", "inf")
    ),
    Case("negative samples", settings("--config.method.fisher_samples=-1"), ("method.fisher_samples", "-1")),
    Case("negative questions", settings("--config.eval.max_items=-5"), ("eval.max_items", "-5")),
    Case("negative seed", settings("--config.seed=-1"), ("seed", "-1")),
    Case("seed of 64 bits", settings("--config.seed=18446744073709551616"), ("seed",)),
    Case(
        "seed of people out of range",
        settings("--config.data.source=", "--config.data.people=99999999999999999999"),
        ("people",),
    ),
    Case("seed of questions out of range", settings("--config.eval.seed=99999999999999999999999"), ("eval.seed",)),
    Case("seed of attacks out of range", settings("--config.attacks.seed=99999999999999999999999"), ("attacks.seed",)),
    Case("10^18 microbatches", settings("--config.train.microbatches=1000000000000000000"), ("microbatches",)),
    # Flags.
    Case("unknown section", settings("--config.trian.steps=1"), ("trian",)),
    Case("unknown field", settings("--config.train.stps=1"), ("stps",)),
    Case("unknown field of control characters", settings("--config.train.\x1b[2J=1"), ("is not the name of a field",)),
    Case("10^18 steps", settings(f"--config.train.steps={10**18}"), ("train.steps",)),
    Case("10^300 epochs", settings("--config.train.epochs=1e300"), ("train.epochs",)),
    Case("text for a number", settings("--config.train.steps=many"), ("train.steps", "many")),
    Case("text of 10000 letters", settings("--config.train.steps=" + "x" * 10_000), ("train.steps",)),
    Case("section for a number", settings("--config.train.steps.x=1"), ("steps",)),
    Case("unknown flag", settings("--wrkdir=x"), ("wrkdir",)),
    Case("surrogate in a flag", settings("--config.data.source=\udcff"), ("data",)),
    Case("attack of control characters", settings("--config.attacks.names=\x1b[2J"), ("attacks.names",)),
    Case("attack of 10000 letters", settings("--config.attacks.names=" + "x" * 10_000), ("attacks.names",)),
    Case("protocol of 10000 letters", settings("--config.eval.protocol=" + "x" * 10_000), ("eval.protocol",)),
    Case("method of 10000 letters", settings("--config.method.name=" + "x" * 10_000), ("method.name",)),
    Case(
        "model name of 10000 letters", snapshot(lambda rows: rows, "--config.model.path=" + "x" * 10_000), ("too long",)
    ),
    Case(
        "prompts that are missing",
        settings("--config.eval.prompts=nothing.json"),
        ("--config.eval.prompts=nothing.json", "no file"),
    ),
    *(
        Case(f"prompts: {content[:20]}", prompts(content), ("--config.eval.prompts=prompts.json", *words))
        for content, words in (
            ("[]", ("object",)),
            ("{", ("JSON",)),
            ('{"leter": "x"}', ("leter", "Available")),
            ('{"letter": "{question}"}', ("letter", "{options}")),
            ('{"cloze": 3}', ("cloze", "{question}")),
        )
    ),
    Case("a tap twice", settings("--config.method.taps=('features','features')"), ("method.taps", "different")),
    Case(
        "a rate twice",
        settings("--config.attacks.names=relearn", "--config.attacks.relearn.rates=(1.0,1)"),
        ("attacks.relearn.rates", "different"),
    ),
    Case("all attacks and one", settings("--config.attacks.names=all,leak"), ("attacks.names", "alone")),
    Case(
        "suite without its source",
        settings("--config.eval.general=pope", "--config.eval.general_source=pope="),
        ("eval.general_source", "pope=", "one source"),
    ),
    Case(
        "suite with two sources",
        settings("--config.eval.general=pope", "--config.eval.general_source=pope=x,pope=y"),
        ("eval.general_source", "pope=y", "one source"),
    ),
    # Folders of data and models, by their fields.
    Case("cache that is a file", cache("cache"), ("--config.data.cache",), lacks=("--workdir",)),
    Case("cache below a file", cache("cache/below"), ("--config.data.cache",), lacks=("--workdir",)),
    Case("absent model", request(lambda _: None, "--config.model.path=nothing"), ("--config.model.path=nothing",)),
    Case(
        "absent retain-only model",
        request(lambda _: None, "--config.model.path=tiny_llava", "--config.model.retain_only=nothing"),
        ("--config.model.retain_only=nothing",),
    ),
    # Config files.
    Case("get_config returns None", config_file("def get_config():\n    return None\n"), ("get_config", "None")),
    Case("get_config returns a number", config_file("def get_config():\n    return 3\n"), ("get_config",)),
    Case("get_config returns a dict", config_file("def get_config():\n    return {'stage': 'all'}\n"), ("get_config",)),
    Case(
        "get_config returns an empty config",
        config_file("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()\n"),
        ("get_config",),
    ),
    Case(
        "get_config raises",
        config_file("def get_config():\n    raise RuntimeError('no \\x1b[2J config')\n"),
        ("RuntimeError", "config"),
    ),
    Case(
        "get_config raises 10000 letters",
        config_file("def get_config():\n    raise RuntimeError('x' * 10_000)\n"),
        ("RuntimeError",),
    ),
    Case("get_config calls itself", config_file("def get_config():\n    return get_config()\n"), ("RecursionError",)),
    *(
        Case(f"get_config {raised}", config_file(f"def get_config():\n    {raised}\n"), ("--config", word))
        for raised, word in (
            ("raise SystemExit", "SystemExit"),
            ("raise SystemExit(0)", "SystemExit"),
            ("raise SystemExit(['x'])", "SystemExit"),
            ("exit('no config today')", "no config today"),
            ("raise GeneratorExit", "GeneratorExit"),
            ("raise BaseException('x')", "BaseException"),
        )
    ),
    Case("config file that exits", config_file("import sys\nsys.exit(0)\n"), ("--config", "SystemExit")),
    Case("no get_config", config_file("x = 1\n"), ("--config=", "the file has no function get_config()")),
    Case("config file with an error", config_file("def get_config(:\n"), ("SyntaxError",)),
    Case("config file with NUL", config_file("x = '\0'\n"), ("config",)),
    Case(
        "config file that is no UTF-8",
        lambda folder: (written(folder / "c.py", b"\xff\xfe"), ["--config=c.py", "--workdir=run"])[1],
        ("config",),
    ),
    Case("missing config file", lambda _: ["--config=nothing.py", "--workdir=run"], ("nothing.py",)),
    Case("folder as a config file", lambda _: ["--config=.", "--workdir=run"], ("config",)),
    *(Case(f"no section {name}", section_deleted(name), (name,)) for name in SECTIONS),
    Case("section that is a number", base_and("config.unlock(); config.train = 3"), ("train",)),
    Case("field of another type", base_and("config.train.batch_size = dict(forget='many', retain=1)"), ("batch_size",)),
    Case("field that is a function", base_and("config.model.create = dict(text=lambda: 3)"), ("model",)),
    Case("unknown argument", settings("--config=nowhere/tiny.py:nonsense"), ("tiny.py",)),
    # Workdirs.
    Case("empty name of a workdir", settings("--workdir="), ("--workdir is empty",)),
    Case("file as a workdir", workdir(lambda path: written(path, "x")), ("run", "file")),
    Case("workdir below a file", workdir(lambda path: written(path, "x"), "--workdir=run/below"), ("run",)),
    Case("workdir that links to nothing", workdir(lambda path: os.symlink("nothing/there", path)), ("run", "link")),
    Case("workdir that links to itself", workdir(lambda path: os.symlink("run", path)), ("run", "link")),
    Case("workdir of a long name", settings("--workdir=" + "x" * 300), ("name", "long")),
    Case("workdir of a long path", settings("--workdir=" + "x/" * 3000), ("name", "long")),
    Case("folder of somebody else", workdir(lambda path: written(path / "thesis.tex", "x")), ("run", "not empty")),
    Case("named pipe as a workdir", workdir(os.mkfifo), ("run",)),
    Case("workdir below a device", settings("--workdir=/dev/null/run"), ("/dev/null",)),
    Case("workdir in the kernel's folder", settings("--workdir=/proc/run"), ("/proc/run",)),
    Case("workdir of an unknown address", settings("--workdir=ftp://x/y"), ("ftp",)),
    *map(in_the_place_of, PLACES),
    *map(linked, LINKED),
    Case("config that is a list", workdir(damaged_config([])), ("config.json",)),
    Case("config that is half", workdir(damaged_config('{"seed": 0')), ("config.json",)),
    Case("empty config", workdir(damaged_config("")), ("config.json",)),
    Case("config that is no UTF-8", workdir(damaged_config(b"\xff")), ("config.json",)),
    Case("config nested deeply", workdir(damaged_config("[" * 100_000)), ("config.json",)),
]


@pytest.mark.parametrize("case", [Case(**{**vars(c), "command": "main"}) for c in CASES], ids=str)
def test_setting_is_refused(case, fork_server, tmp_path):
    check(case, fork_server, tmp_path)
