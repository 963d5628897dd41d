"""How commands end: bad input, a platform that is missing, output that cannot be written."""

import errno
import os
import subprocess
import sys

import jax
import pytest

from vkd_jax.config import command_line
from vkd_jax.runtime import commands
from vkd_jax.types import UserError


@pytest.fixture(autouse=True)
def precision():
    """The setting of JAX_ENABLE_X64, which a command changes."""
    before = os.environ.get("JAX_ENABLE_X64")
    yield
    os.environ.pop("JAX_ENABLE_X64", None)
    if before is not None:
        os.environ["JAX_ENABLE_X64"] = before


def raises(error):
    @commands.guarded
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("the folder is missing."), "error: the folder is missing.\n"),
        (
            RuntimeError("Unable to initialize backend 'tpu': INTERNAL: no device"),
            "error: JAX_PLATFORMS=tpu: JAX finds no platform 'tpu' here; install what it requires (docs/tpu.md), or "
            "set another, such as JAX_PLATFORMS=cpu.\n",
        ),
        (RuntimeError("Unknown backend bogus"), "finds no platform 'bogus' here; "),
        (
            RuntimeError("Unable to initialize backend 'cpu': INVALID_ARGUMENT: no device"),
            "error: JAX cannot use the CPU (Unable to initialize backend 'cpu': INVALID_ARGUMENT: no device); correct "
            "JAX_NUM_CPU_DEVICES or XLA_FLAGS.\n",
        ),
        (
            PermissionError(errno.EPERM, "Operation not permitted", "run/report.md"),
            "error: run/report.md: the system refuses to use it (Operation not permitted); check the file,",
        ),
        (
            OSError(errno.EIO, "Input/output error", b"model/config.json"),
            "error: model/config.json: the system refuses",
        ),
    ],
)
def test_bad_input_and_a_missing_platform_are_one_sentence(error, sentence, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert raises(error)() == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_platform_for_gpus_that_is_missing_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "vkd_jax.ask", "--model=tiny_llava", "--question=Who?"],
        env={**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "JAX_PLATFORMS=cuda: JAX finds no platform 'cuda' here" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("a fault"), OSError(errno.EBADF, "a fault"), OSError("a fault")])
def test_other_errors_are_not_hidden(error):
    with pytest.raises(type(error), match="a fault"):
        raises(error)()


def test_a_command_computes_in_32_bits():
    jax.config.update("jax_enable_x64", True)
    try:
        assert commands.guarded(lambda: jax.numpy.ones(1).dtype.itemsize)() == 4
    finally:
        jax.config.update("jax_enable_x64", False)


SHOW = "from vkd_jax.config import command_line; command_line.show('x\\n' * {times}); print('went on')"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_bad_input():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SHOW.format(times=1)], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"error: the output cannot be written ({os.strerror(errno.ENOSPC)}); write it to another place.\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", SHOW.format(times=10**6)], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_shown_reaches_the_reader(capsys):
    command_line.show("two\nlines\x1b")
    assert capsys.readouterr().out == "two\nlines\\x1b\n"
