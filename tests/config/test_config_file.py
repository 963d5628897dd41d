"""Config files that raise, or return no config: one sentence that names the file as it was given."""

import sys

import pytest
from absl import flags

from vkd_jax import main
from vkd_jax.config import command_line

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections

FIELD = """
import numpy as np
from vkd_jax.config import defaults

def get_config():
    config = defaults.base()
    config.train.steps = {}
    return config
"""


@pytest.fixture
def parse(monkeypatch, capsys):
    """Parses flags that are wrong, and returns what is printed on stderr."""

    def parse(*args):
        argv = ["main", *args]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config file that was read before
        values = flags.FlagValues()
        main.define(values)
        with pytest.raises(SystemExit, match="^2$"):
            command_line.parse(argv, values)
        return capsys.readouterr().err

    return parse


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["it cannot be read (No such file or directory); pass a config file."]),
        (
            "def get_config():\n    return 1 / 0",
            ["the file raised ZeroDivisionError: division by zero; correct the file."],
        ),
        ("def get_config():\n    raise ValueError('two\\nlines')", ["the file raised ValueError: two lines; correct"]),
        ("def get_config():\n    raise TypeError('no')", ["the file raised TypeError: no; correct"]),
        ("def get_config():\n    return None.steps", ["the file raised AttributeError", "steps"]),
        ("def get_config(:", ["the file raised SyntaxError"]),
        (
            "def get_config():\n    return {'train': {'steps': 1}}",
            ["returned a value of the type dict, not a config with a"],
        ),
        ("def get_config():\n    pass", ["get_config() returned None, not a config with a field `stage`; see"]),
        ("def get_config():\n    yield", ["get_config() returned a value of the type generator, not a config"]),
        ("async def get_config():\n    pass", ["get_config() returned a value of the type coroutine, not a config"]),
        ("import vkd_jax.nothing", ["the file raised ImportError", "nothing"]),
        ("get_config = 5", ["get_config() cannot be called with no argument ('int' object is not callable); see"]),
        ("def get_config(a):\n    pass", ["get_config() cannot be called with no argument (get_config() missing 1"]),
        ("get_cfg = 5", ["the file has no function get_config(); see configs/tiny.py."]),
        ("open('/no/file')", ["the file raised", "[Errno 2] No such file or directory: '/no/file'; correct the file."]),
        ("def get_config():\n    open('/no/file')", ["the file raised FileNotFoundError: [Errno 2] No such file"]),
        (FIELD.format("'2'"), ["the field 'steps' has the value '2' of the type str; give one of the type int."]),
        (FIELD.format("np.int64(2)"), ["the field 'steps' has the value '2' of the type numpy.int64; give one of"]),
        ("from vkd_jax.types import UserError\nraise UserError('no model.')", ["no model."]),
        ("from absl import flags\nraise flags.Error('no flag')", ["the file raised Error: no flag; correct the file."]),
        ("exit('not today')", ["the file raised SystemExit: not today; correct the file."]),
    ],
)
def test_wrong_config_files_are_refused(parse, tmp_path, text, parts):
    config = tmp_path / "config.py"
    if text is not None:
        config.write_text(text.replace("import vkd_jax.nothing", "from vkd_jax import nothing"))
    for override in ([], ["--config.train.steps=3"]):
        err = parse(f"--config={config}", *override)
        assert err.startswith(f"error: --config={config}: ") and err.count("\n") == 1
        assert all(part in err for part in parts), err


def test_the_text_after_the_colon_is_named_if_the_config_takes_none(parse, tmp_path):
    (tmp_path / "config.py").write_text("def get_config():\n    pass")
    assert "config.py:5: get_config() cannot be called with the text after" in parse(f"--config={tmp_path}/config.py:5")
