"""vkd COMMAND [--FLAG=VALUE ...]

The console command: `vkd unlearn ...` is `python -m vkd_jax.main ...` with the same flags, and so on; see `COMMANDS`.
"""

import dataclasses
import runpy
import sys
from collections.abc import Sequence

import vkd_jax
from vkd_jax import messages
from vkd_jax.config import command_line
from vkd_jax.runtime import imports


@dataclasses.dataclass(frozen=True)
class Command:
    """A module of this package that runs as a command, with one example."""

    module: str
    help: str
    example: str


COMMANDS = {
    "unlearn": Command(
        "vkd_jax.main",
        "Unlearn people from a model, evaluate and attack the result, and write a report.",
        "vkd unlearn --config configs/tiny.py --workdir /tmp/vkd-tiny",
    ),
    "ask": Command(
        "vkd_jax.ask",
        "Ask a model a question, with or without an image.",
        'vkd ask --model tiny_llava --question "What color is a banana?"',
    ),
    "demo": Command(
        "vkd_jax.demo",
        "Ask two models side by side in a browser, and let an attacker bring the answer back.",
        "vkd demo --before tiny_llava --after /tmp/vkd-tiny/unlearned",
    ),
    "verify": Command(
        "vkd_jax.verify",
        "Compare a model with transformers on PyTorch, or with its certificate.",
        "vkd verify tiny_llava",
    ),
    "push": Command(
        "vkd_jax.checkpoints.push",
        "Upload an unlearned model to the Hugging Face Hub, with its card and certificate.",
        "vkd push /tmp/vkd-tiny ORG/NAME --private",
    ),
    "report": Command(
        "vkd_jax.runs.rebuild_report",
        "Write the report of a finished run again, with the current version.",
        "vkd report /tmp/vkd-tiny",
    ),
    "compare": Command(
        "vkd_jax.compare",
        "Compare methods that are tuned alike, over several seeds.",
        "vkd compare --config configs/tiny.py:runs=compare --workdir /tmp/vkd-compare",
    ),
    "requests": Command(
        "vkd_jax.requests",
        "Forget people who ask one after another, with a ledger of what was done.",
        "vkd requests add requests.jsonl --forget 017,023",
    ),
    "plan": Command(
        "vkd_jax.plan",
        "Compile the training step for TPUs that are not there, and say whether it fits.",
        "vkd plan --config configs/llava.py:7b --topology v5e:2x2",
    ),
}


def usage() -> str:
    """What the command prints about itself."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {c.help}\n  {'':{width}}    {c.example}" for name, c in COMMANDS.items()]
    about = (vkd_jax.__doc__ or "").splitlines()[:1]  # python -OO removes docstrings
    return "\n".join(
        [
            ": ".join([f"vkd {vkd_jax.__version__}", *about]),
            "",
            "Commands:",
            *rows,
            "",
            "vkd COMMAND --help shows the flags of a command, and vkd --version the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command as `python -m` does, which ends with SystemExit; returns the exit status if none was run.

    Args:
        arguments: the name of the command and its flags; those of the process by default.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("--help", "-h", "help"):
        command_line.show(usage())
        return 0
    if name == "--version":
        command_line.show(vkd_jax.__version__)
        return 0
    if name not in COMMANDS:
        problem = f"{name}: unknown command" if name else "no command is given"
        return command_line.bad_input(f"{problem}. Available: {messages.choices(COMMANDS)}; vkd --help explains them.")
    imports.begin()
    sys.argv = [f"vkd {name}", *rest]
    runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)
    return 0
