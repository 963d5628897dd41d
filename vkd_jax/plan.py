"""vkd plan --config configs/llava.py:7b --topology v5e:2x2 [--json FILE]

`python -m vkd_jax.plan` is the same command.

Compiles the training step of a config for TPUs, on any machine, and prints its requirements: bytes per chip by kind,
FLOPs by part and pass, bytes sent between chips, the minimum time by the chip's published figures, and whether it fits.
The step of GradDiff on all weights, the usual baseline, is planned as well. No array is created and nothing is
downloaded; libtpu, which contains the compiler, is required: pip install '.[tpu]'.

vkd plan --config configs/plans.py --json docs/results/plans.json

plans the rows of the table in docs/planner.md. Each row is written as soon as it is known, an interrupted command
resumes where it stopped, and a program that was compiled once is not compiled again.

Topologies: v5e:1x1, v5e:2x2, v5e:4x4, v5e:8x8, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:1x1, v6e:2x4, and others that the
compiler knows. Exit status: 0 on success, 2 on bad input, 130 if stopped by Ctrl-C.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.planner import page, table
from vkd_jax.planner.abstract_step import Lengths
from vkd_jax.planner.plan import plan
from vkd_jax.runtime import commands, files, json_files, outputs, storage
from vkd_jax.types import UserError


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --config, --topology, --json, the lengths of the questions and --compare."""
    command_line.define(values)
    flags.DEFINE_string("topology", "v5e:2x2", "The chips and their topology, e.g. v5e:2x2.", flag_values=values)
    flags.DEFINE_string("json", None, "A file to write all figures to.", flag_values=values)
    flags.DEFINE_integer("text_tokens", Lengths.text, "Tokens per example, without image tokens.", flag_values=values)
    flags.DEFINE_integer("answer_tokens", Lengths.answer, "Tokens of the row's answer.", flag_values=values)
    flags.DEFINE_boolean("compare", True, "Whether to plan GradDiff on all weights as well.", flag_values=values)


def plan_values(values: flags.FlagValues) -> dict[str, Any]:
    """Plans the step that parsed flags describe."""
    lengths = Lengths(values.text_tokens, values.answer_tokens)
    return plan(RunConfig.from_config_dict(values.config), values.topology, lengths, values.compare)


def plan_flags(arguments: str) -> dict[str, Any]:
    """Plans the step that a line of flags describes; bad input is returned as {"error": message}."""
    values, argv = flags.FlagValues(), sys.argv
    define(values)
    try:
        # ml_collections reads overrides from there. The name of the program stays: absl has filed the flags under it.
        sys.argv = [argv[0], *arguments.split()]
        command_line.parse(sys.argv, values)
        return plan_values(values)
    except UserError as error:
        return {"error": str(error)}
    finally:
        sys.argv = argv


def _json_file(name: str) -> Path:
    """The file to write a plan to.

    Raises:
        UserError: it has something else than a plan.
    """
    file = outputs.check_file(storage.resolve(name), "--json", outputs.JSON_OBJECT)
    if file.exists() and file.stat().st_size and not json_files.read_json(file).keys() >= {"topology", "steps"}:
        raise UserError(f"--json={name}: the file exists and has no plan, which would replace it; pass another name.")
    return file


@commands.guarded
def run(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the command, and returns its exit status."""
    if len(argv) > 1:
        return command_line.unexpected(argv[1])
    if values.config is None:
        return command_line.bad_input("pass --config FILE, e.g. configs/llava.py:7b.")
    jax.config.update("jax_platforms", "cpu")  # leaves a local accelerator to other processes
    jax.config.update("jax_enable_compilation_cache", False)  # programs for other chips cannot be loaded here
    with storage.write_errors("--json"):
        if "plans" in values.config:
            if not values.json:
                raise UserError("this config is a table of plans: pass --json FILE for its rows.")
            file = outputs.check_file(storage.resolve(values.json), "--json", outputs.JSON_LIST)
            table.write(values.config, file, plan_flags)
            return 0
        file = _json_file(values.json) if values.json else None
        results = plan_values(values)
        if file:
            files.write_bytes(file, (json.dumps(results, indent=1) + "\n").encode())
    command_line.show(page.render(results))
    return 0


if __name__ == "__main__":
    define()
    app.run(run, flags_parser=command_line.parse)
