"""The documentation: it builds, the README stays short, and every how-to of docs/extending.md runs as written."""

import ast
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra docs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "extending" / "index.html").is_file()


def links(text):
    """Relative targets of the Markdown links and images of a page, outside code."""
    text = re.sub(r"^( {4}|```.*?^```).*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", target)]


def anchors(page):
    """The anchors of a page's headings, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


PAGES = [*ROOT.glob("*.md"), *(page for page in ROOT.glob("docs/**/*.md") if page.parent.name != "api")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    dead = []
    for link in links(page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_places_that_the_page_on_architecture_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    (table,) = re.findall(r"^## Where to find things\n\n(.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    files = {name: ROOT / "vkd_jax" / name for name in re.findall(r"`([\w/]+\.py)`", table) if "METHOD" not in name}
    assert len(files) > 8 and [name for name, file in files.items() if not file.is_file()] == []
    named = re.findall(r"`([\w.]+)`(?: and `(\w+)`)? in `([\w/]+\.py)`", table)
    assert len(named) > 5
    for *names, file in named:
        code = "" if "METHOD" in file else files[file].read_text("utf-8")
        parts = [part for name in names for part in name.split(".") if part] if code else []
        assert [part for part in parts if not re.search(rf"(def|class) {part}\b", code)] == [], file


def test_the_page_on_configuration_names_every_argument_and_its_values(capsys, get_config):
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    for file in ("llava.py", "tiny.py"):
        with pytest.raises(SystemExit):
            get_config(file, "help")
        usage = capsys.readouterr().out.partition("\nFields, set by")[0]
        for key, values in re.findall(r"^(\w+): .*\n((?:  .*\n?)+)", usage, re.MULTILINE):
            (row,) = re.findall(rf"^\| `{key}` \| (.*)$", page, re.MULTILINE)
            missing = [value for value in re.findall(r"^  (\S+)", values, re.MULTILINE) if f"`{value}`" not in row]
            assert missing == [], (file, key)


def howtos():
    """The titled blocks of docs/extending.md: {title: code}."""
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    return dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL))


@pytest.fixture
def extended(monkeypatch):
    """Every how-to of docs/extending.md followed: its file imported, its line added to the registry."""
    from vkd_jax import models, registry
    from vkd_jax.evaluation import metrics

    tables = {name: getattr(registry, name) for name in ("BENCHMARKS", "METHODS", "ATTACKS")}
    tables |= {"METRICS": metrics.METRICS, "MODELS": models.MODELS}
    files = {}
    for title, code in howtos().items():
        file, _, table = title.partition(" ")
        assert (ROOT / file).exists() == bool(table), "a how-to adds new files and lines of registries that exist"
        if table:
            for name, target in ast.literal_eval(f"{{{code}}}").items():
                monkeypatch.setitem(tables[table], name, target)
        else:
            files[file.removesuffix(".py").replace("/", ".")] = code
    for name, code in files.items():
        module = types.ModuleType(name, code)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, name, "exec"), module.__dict__)
    return sys.modules


def test_a_benchmark_is_added_as_documented(extended, tmp_path, get_config):
    from vkd_jax import benchmarks
    from vkd_jax.types import UserError

    benchmark = benchmarks.create("badges", {"forget": 2})
    sets = benchmarks.read(benchmark, tmp_path, finetune=True)
    assert {name: [e.person for e in rows] for name, rows in sets.items()} == {
        "forget": ["ann", "bob"], "retain": ["cleo", "dan"],
        "finetune_forget": ["ann", "bob"], "finetune_retain": ["cleo", "dan"],
    }  # fmt: skip
    assert get_config("llava.py", "benchmark=badges").data.benchmark == "badges"
    with pytest.raises(UserError, match="forget: 9"):
        benchmarks.create("badges", {"forget": 9})


def test_a_method_is_added_as_documented(extended, tiny_model, get_config):
    import jax
    import numpy as np

    from vkd_jax import methods
    from vkd_jax.models.base import bind

    assert get_config("llava.py", "method=uniform").method.name == "uniform"
    method = methods.create("uniform", {"train": "visual"})
    assert set(method.losses()) == {"forget", "retain"}
    benchmark = extended["vkd_jax.benchmarks.badges"].Badges()
    batch = tiny_model.encode([benchmark.row(person, "chat")[0] for person in ("ann", "bob")]).batch(np.arange(2))
    model = bind(tiny_model.graphdef, tiny_model.params)
    loss, metrics = jax.jit(lambda batch: method.losses()["forget"](model, batch))(batch)
    assert loss > 0 and metrics["forget_kl"] == loss


def test_an_attack_is_added_as_documented(extended):
    from vkd_jax import attacks
    from vkd_jax.benchmarks.mllmu import Mllmu

    benchmark = extended["vkd_jax.benchmarks.badges"].Badges()
    questions = benchmark.row("ann", "classification")

    class Subject:
        model, asked, sets = None, {"forget": questions, "test": questions}, Mllmu.EVAL_SETS

        @staticmethod
        def with_role(*roles):
            return [s.name for s in Mllmu.EVAL_SETS if s.role in roles]

        @staticmethod
        def ask_sets(model, sets):
            assert {questions[0].image_id for questions in sets.values()} == {"ann/0/flipped"}
            keys = ("id", "person", "question", "answer")
            answers = {key: getattr(questions[0], key) for key in keys}
            return [{"set": name, "prediction": "ann", "correct": True, **answers} for name in sets]

    attack = attacks.create("mirror", {})
    cells = attack.summarize({"unlearned": attack.run(Subject)})
    assert [(cell.model, cell.variant, cell.set, cell.mean, cell.n) for cell in cells] == [
        ("unlearned", "flipped", "forget", 1.0, 1), ("unlearned", "flipped", "test", 1.0, 1)
    ]  # fmt: skip


def test_a_metric_is_added_as_documented(extended):
    from vkd_jax.evaluation import metrics

    metric = metrics.get("answer_words")
    assert metric.value({"task": "generation", "prediction": "a tall man"}) == 3
    assert metric.value({"task": "cloze", "prediction": "a tall man"}) is None


def test_a_model_family_is_added_as_documented(extended, tiny_config):
    from vkd_jax import models
    from vkd_jax.checkpoints import hf
    from vkd_jax.models import base
    from vkd_jax.runtime import mesh

    family = models.module_for("normed_llava")
    _, shapes = base.abstract_model(lambda rngs: family.Model(tiny_config, rngs=rngs))
    assert shapes["projector/norm/scale"].shape == (tiny_config.vision.width,)
    names = hf.tensor_names(family, tiny_config, shapes)  # raises unless every parameter has a row
    assert {slot.path for slot in names.values()} == set(shapes)
    mesh.check_rules(family.SHARDING, shapes)


def test_the_figures_of_the_decision_page_are_those_of_the_pages_that_it_cites():
    read = {name: (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("decide", "planner", "results")}
    memory = re.findall(r"([\d.]+) GiB", read["decide"])
    shares = re.findall(r"([\d.]+) %", read["decide"].partition("## Which chip")[0])
    assert len(memory) >= 10 and len(shares) >= 5
    assert [x for x in memory if not re.search(rf"(?<![\d.]){re.escape(x)}(?!\d)", read["planner"])] == []
    assert [x for x in shares if f"{x} %" not in read["results"] and f"{x} |" not in read["results"]] == []
