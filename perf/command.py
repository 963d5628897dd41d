"""The command line, timing and output that the timing scripts of this folder share."""

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that scripts run from a clone that is not installed

from vkd_jax.runtime import files, malloc, provenance

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX shares the GPU with PyTorch
ROOT = Path(__file__).parents[1]


def run(
    document: str,
    measure: Callable[..., Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    **options: tuple[Any, str] | tuple[Any, str, Sequence[str]],
) -> None:
    """Parses the command line, measures, prints the table, and writes the results as JSON if --json is set.

    Args:
        document: the docstring of the script.
        measure: function of the options that returns the results as JSON values.
        table: function that renders the results, with command, commit, device and versions, as Markdown.
        **options: the options by name, each as (default, help) or (default, help, choices).
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    for name, (default, meaning, *choices) in options.items():
        kind = dict(type=type(default), choices=[*choices[0]] if choices else None)
        parser.add_argument(f"--{name}", default=default, help=f"{meaning} (default: {default})", **kind)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    arguments = vars(parser.parse_args())
    malloc.keep_freed_memory()  # as in a run; it applies to PyTorch in this process as well
    file = arguments.pop("json")
    changed = [f"--{name}={value}" for name, value in arguments.items() if value != options[name][0]]
    tunables = os.environ.get("GLIBC_TUNABLES")  # settings of the allocator change the timings
    environment = [f"GLIBC_TUNABLES={tunables}"] if tunables else []
    source = {
        "command": shlex.join([*environment, "python", f"perf/{Path(sys.argv[0]).name}", *changed]),
        "commit": provenance.commit(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "versions": {name: metadata.version(name) for name in ("jax", "torch", "transformers") if name in sys.modules},
    }
    results = {**source, **measure(**arguments)}
    results["device"] = jax.devices()[0].device_kind  # last, since a measured child process may need the device
    print(table(results))
    if file:
        files.write_bytes(file, (json.dumps(results, indent=1) + "\n").encode())


def processor() -> str:
    """The name of the processor and its widest vector instructions, as far as Linux reports them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    names = re.findall(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)[:1]
    vectors = [name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if re.search(rf"\b{flag}\b", text)]
    return ", ".join([*names, *vectors[:1]])


def time_interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times several functions in alternation, so that other load on the machine affects all of them alike.

    Args:
        functions: the functions by name.
        rounds: the number of calls of each.

    Returns:
        The seconds of each call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds
