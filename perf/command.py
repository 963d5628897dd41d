"""What the programs of this folder have in common: their command line, taking turns, and where figures go."""

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

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone need not be installed

from vkd_jax.runtime import files, malloc, provenance

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
ROOT = Path(__file__).parents[1]


def run(
    document: str,
    measure: Callable[..., Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    **options: tuple[Any, str] | tuple[Any, str, Sequence[str]],
) -> None:
    """Measures as the command line asks, prints the table, and writes the figures as JSON if asked to.

    Args:
        document: of the program.
        measure: function of the options to the figures, in JSON's types.
        table: of the figures with command, commit, device and versions, in Markdown.
        **options: by name (default, help) or (default, help, choices).
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    for name, (default, meaning, *choices) in options.items():
        kind = dict(type=type(default), choices=[*choices[0]] if choices else None)
        parser.add_argument(f"--{name}", default=default, help=f"{meaning} (default: {default})", **kind)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = vars(parser.parse_args())
    malloc.keep_freed_memory()  # as in a run; whatever else is measured in this process has it, too
    file = given.pop("json")
    shown = [f"--{name}={value}" for name, value in given.items() if value != options[name][0]]
    tunables = os.environ.get("GLIBC_TUNABLES")  # how memory is handed out changes what is measured
    tuned = [f"GLIBC_TUNABLES={tunables}"] if tunables else []
    source = {
        "command": shlex.join([*tuned, "python", f"perf/{Path(sys.argv[0]).name}", *shown]),
        "commit": provenance.commit(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "versions": {name: metadata.version(name) for name in ("jax", "torch", "transformers") if name in sys.modules},
    }
    found = {**source, **measure(**given)}
    found["device"] = jax.devices()[0].device_kind  # asked last: what is measured may be another process, and its chip
    print(table(found))
    if file:
        files.write_bytes(file, (json.dumps(found, indent=1) + "\n").encode())


def processor() -> str:
    """The processor's name and its widest vectors, where Linux tells; libraries differ in what they make of either."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    names = re.findall(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)[:1]
    vectors = [name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if re.search(rf"\b{flag}\b", text)]
    return ", ".join([*names, *vectors[:1]])


def by_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each takes, so often; one after the other, so that what else the machine does falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, once in runs.items():
            before = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - before)
    return seconds
