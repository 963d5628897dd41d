"""The shape of the package: which way imports point, what is light, what is installed, what is left over."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vkd_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vkd_jax"

# Imports point from right to left; the modules of one place may import each other.
ORDER = [
    {"types"},
    {"registry", "hosts", "hlo", "memory"},
    {"hub"},
    {"data"},
    {"models"},
    {"weights"},
    {"convert", "sharding"},
    {"losses"},
    {"saliency"},
    {"methods"},
    {"optim"},
    {"checkpoint"},
    {"progress"},
    {"train"},
    {"metrics"},
    {"answerer"},
    {"evaluate"},
    {"loaded", "blueprint", "arithmetic", "chips"},
    {"attacks"},
    {"workdir"},
    {"aot"},
    {"figures", "page"},
    {"report"},
    {"defaults"},
    {"comparison"},
    {"charts", "tables"},
    {"pipeline"},
    {"ask", "main"},
    {"compare", "plan"},
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}

# These load TensorFlow, which takes seconds: one module may.
TENSORFLOW = re.compile(r"(tensorflow|clu\.metric_writers|clu\.periodic_actions)(\.|$)")

SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str, module: str) -> set[str]:
    """Dotted names of everything that a module imports, by statement or by a registry's string."""
    found = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Dict):
            texts = [str(value.value) for value in node.values if isinstance(value, ast.Constant)]
            found |= {text.split(":")[0] for text in texts if re.fullmatch(r"vkd_jax(\.\w+)+(:\w+)?", text)}
    return found


def faults(source: str, module: str) -> list[str]:
    """What a module imports and must not."""
    home = module.split(".")[1]
    if home == "__init__":
        return [f"{module} imports {name}" for name in imports(source, module) - {"os", "jaxlib"}]
    wrong = []
    for name in sorted(imports(source, module)):
        target = name.split(".")[1] if name.startswith("vkd_jax.") else None
        if target in PLACE and PLACE[target] > PLACE[home]:
            wrong.append(f"{module} imports {name}, which comes after it")
        if TENSORFLOW.match(name) and home != "progress":
            wrong.append(f"{module} imports {name}, which only vkd_jax.progress may")
    return wrong


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize(
    ("source", "module", "fault"),
    [
        ("from vkd_jax import train", "vkd_jax.losses", "vkd_jax.train"),
        ("from vkd_jax.train import run", "vkd_jax.losses", "vkd_jax.train.run"),
        ("def f():\n    import vkd_jax.train", "vkd_jax.data.people", "vkd_jax.train"),
        ("from ..train import run", "vkd_jax.methods.vkd", "vkd_jax.train.run"),
        ("from .. import train", "vkd_jax.methods.__init__", "vkd_jax.train"),
        ("TABLE = {'x': 'vkd_jax.methods.x:X'}", "vkd_jax.models.llava", "vkd_jax.methods.x"),
        ("import tensorflow as tf", "vkd_jax.train", "tensorflow"),
        ("def f():\n    from clu import metric_writers", "vkd_jax.train", "clu.metric_writers"),
        ("import jax", "vkd_jax.__init__", "jax"),
    ],
)
def test_faults_are_seen(source, module, fault):
    (found,) = faults(source, module)
    assert f"imports {fault}" in found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vkd_jax import losses", "vkd_jax.train"),
        ("from . import layers", "vkd_jax.models.llava"),
        ("from ..types import Example", "vkd_jax.data.mllmu"),
        ("import tensorflow_datasets\nfrom clu import parameter_overview", "vkd_jax.train"),
        ("from clu import metric_writers", "vkd_jax.progress"),
    ],
)
def test_right_imports_pass(source, module):
    assert faults(source, module) == []


def test_every_module_has_its_place():
    homes = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert homes <= set(PLACE), "give each new module its place in ORDER"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_backward_and_only_progress_imports_tensorflow(path):
    assert faults(path.read_text(encoding="utf-8"), module_name(path)) == []


def loaded_after(*modules: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after it imported `modules`."""
    code = f"import {', '.join(modules)}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return set(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split())


def test_the_package_itself_is_light():
    assert not loaded_after("vkd_jax") & {"jax", "flax", "numpy", "transformers", "tensorflow", "torch"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", vkd_jax.__version__)


def test_nothing_loads_tensorflow_before_it_is_needed():
    modules = [module_name(path) for path in SOURCES]
    modules = [module.removesuffix(".__init__") for module in modules if module != "vkd_jax.progress"]
    loaded = loaded_after(*modules)
    assert "jax" in loaded
    assert not loaded & {"tensorflow", "tensorboard", "torch"}


def test_everything_is_installed(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assets = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT) for path in [*SOURCES, *assets]}
    assert wanted == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}


def repository_files(*suffixes: str) -> list[Path]:
    folders = ["benchmarks", "colabs", "configs", "docs", "launch", "tests", "vkd_jax"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*"), ROOT / ".ci" / "run"]
    return sorted(path for path in files if path.is_file() and path.suffix in suffixes)


def test_no_file_is_long():
    files = repository_files(".py", ".sh")
    assert [path.name for path in files if len(path.read_text("utf-8").splitlines()) > 520] == []


def test_nothing_is_left_to_do():
    word = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b")
    files = repository_files(".py", ".sh", ".md", ".toml", ".yaml", "")
    assert [path.name for path in files if word.search(path.read_text("utf-8"))] == []


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    (command,) = set(re.findall(r"pip install '\.\[test\]' && [^`\n]+", readme))
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == command
