"""Settings of the command line that change nothing."""

import dataclasses
import sys

import pytest
from absl import flags

from vkd_jax import main
from vkd_jax.config.schema import RunConfig
from vkd_jax.config.unused import warn_of_unused
from vkd_jax.runs import dry_run

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
CONFIG = RunConfig().override("attacks.names=leak")


@pytest.mark.parametrize(
    ("stage", "name", "reason"),
    [
        ("unlearn", "finetune.train.steps", "config.stage=unlearn does not fine-tune"),
        ("all", "finetune.train.steps", ""),
        ("unlearn", "train.steps", ""),
        ("audit", "train.steps", "config.stage=audit does not unlearn"),
        ("finetune", "method.blocks", "config.stage=finetune does not unlearn"),
        ("retain_only", "attacks.names", "config.stage=retain_only attacks no model"),
        ("audit", "attacks.leak.wrong", ""),
        ("audit", "attacks.relearn.steps", "config.attacks.names='leak' does not name relearn"),
        ("audit", "attacks.seed", ""),
        ("audit", "model.path", ""),
    ],
)
def test_settings_that_the_run_does_not_use_are_a_warning(stage, name, reason, caplog):
    warn_of_unused(dataclasses.replace(CONFIG, stage=stage), ["seed", name])
    assert caplog.messages == ([f"--config.{name} changes nothing: {reason}."] if reason else [])


def test_the_command_warns_of_them(monkeypatch, caplog, capsys, tmp_path):
    argv = ["main", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    argv += ["--config.finetune.train.steps=5", "--config.seed=3"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(dry_run, "describe", lambda *_: "described")
    values = flags.FlagValues()
    main.define(values)
    assert main.main(main.command_line.parse(argv, values), values) == 0
    assert "--config.finetune.train.steps changes nothing: config.stage=unlearn does not fine-tune." in caplog.text
    assert capsys.readouterr().out == "described\n"
