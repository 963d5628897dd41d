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

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_follow_the_declared_layers():
    code = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(config_filename='pyproject.toml'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_has_a_layer():
    declared = set(re.findall(r"vkd_jax\.(\w+)", (ROOT / "pyproject.toml").read_text("utf-8")))
    homes = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert homes <= declared, "add the new package to [tool.importlinter] in pyproject.toml"


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
    modules = [module.removesuffix(".__init__") for module in modules if module != "vkd_jax.training.metric_writer"]
    loaded = loaded_after(*modules)
    assert "jax" in loaded
    assert not loaded & {"tensorflow", "tensorboard", "torch"}


def test_everything_is_installed(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assets = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    templates = list((PACKAGE / "reporting" / "templates").iterdir())
    assert assets and templates
    wanted = {path.relative_to(ROOT) for path in [*SOURCES, *assets, *templates]}
    assert wanted == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}


def repository_files(*suffixes: str) -> list[Path]:
    folders = ["perf", "colabs", "configs", "docs", "launch", "tests", "vkd_jax"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*"), ROOT / ".ci" / "run"]
    return sorted(path for path in files if path.is_file() and path.suffix in suffixes)


def test_no_file_is_long():
    files = repository_files(".py", ".sh")
    assert [path.name for path in files if len(path.read_text("utf-8").splitlines()) > 500] == []


def lines_of_functions(path: Path) -> dict[str, int]:
    """The number of lines of each function, without its docstring, the longest of a name."""
    lines = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            length = node.end_lineno - node.lineno + 1 - docstring
            lines[node.name] = max(length, lines.get(node.name, 0))
    return lines


def test_no_function_is_long():
    functions = {f"{p.name}:{name}": n for p in repository_files(".py") for name, n in lines_of_functions(p).items()}
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}


def test_nothing_is_left_to_do():
    word = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b")
    files = repository_files(".py", ".sh", ".md", ".toml", ".yaml", "")
    assert [path.name for path in files if word.search(path.read_text("utf-8"))] == []


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    (command,) = set(re.findall(r"pip install '\.\[test\]' [^`\n]*&& pytest[^`\n]*", readme))
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == command


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_constraints_pin_every_requirement_of_a_tested_python(version):
    lines = (ROOT / f"constraints/py{version.replace('.', '')}.txt").read_text("utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # nothing local, editable or from an address
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    setup = (ROOT / "setup.py").read_text("utf-8")
    required = re.findall(r'^ +f?"([\w-]+)>=', setup.split("install_requires=[")[1].split("]")[0], re.MULTILINE)
    assert len(required) > 20 and set(required) - pinned == {"tensorflow"}  # of machines other than Linux on x86
    assert f'"Programming Language :: Python :: {version}"' in setup
