"""Runs the package's commands in forks of one process that has imported everything: milliseconds, not seconds, each.

A child is a process of its own: whatever it does to memory, signals, threads or the interpreter ends with it, and one
that hangs is killed. The server never creates JAX's devices, which would start the threads that make a fork unsafe; a
child creates its own. Measured on two cores at commit e041e76: 5.5 s for the imports, once, then 0.05 s for a refused
setting and 2.0 s for an answer of `tiny_llava`.

    with ForkServer() as server:
        outcome = server.run("vkd_jax.ask", ["--model=tiny_llava", "--question=Who is it?"], folder)
"""

import dataclasses
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import faults
import shared_contexts

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "main",
    "ask",
    "compare",
    "plan",
    "requests",
    "verify",
)  # each is run as python -m would, so none may be imported before
MEMORY = 16 << 30  # bytes of address space that a child may map: an allocation of a hostile size fails at once
POLL_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: (
        int | None
    )  # exit status, minus the signal's number if one ended it, or None if it was killed after `seconds`
    stdout: str
    stderr: str
    seconds: float


class ForkServer:
    """The client of the server process, which the first command starts.

    Args:
        variables: further environment variables of the commands.
        packages: a folder of further packages.
    """

    def __init__(self, variables: Mapping[str, str] = MappingProxyType({}), packages: Path = ROOT):
        paths = os.pathsep.join(dict.fromkeys([str(packages), str(ROOT)]))
        self._environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | variables

        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server process, which holds about 1 GiB. The next command starts another one."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=60)
            self._process.stdout.close()
            self._process = None

    def run(
        self, module: str, args: list[str], folder: Path, seconds: float = 60.0, prepare: Sequence[Any] = ()
    ) -> Outcome:
        """Runs `python -m module args` in a folder, and kills it after so many seconds.

        Args:
            module: the module of the command, or the path of a program.
            args: its arguments.
            folder: its working directory.
            seconds: the limit of time.
            prepare: the name of a function of `faults` and its arguments, which the process calls first.
        """
        request = dict(module=module, args=args, folder=str(folder), seconds=seconds, prepare=list(prepare))
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def serve() -> None:
    """Imports the package, then runs the requests on stdin one after another."""
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    for path in sorted((ROOT / "vkd_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in COMMANDS:
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
    warm_up()
    shared_contexts.install()
    for line in sys.stdin:
        print(json.dumps(run_in_fork(json.loads(line))), flush=True)


def warm_up() -> None:
    """Imports what commands import late."""
    import transformers

    for name in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "CLIPImageProcessorPil", "LlavaConfig"):
        getattr(transformers, name)


def run_in_fork(request: dict) -> dict:
    """Runs one request, and returns its `Outcome` as a dict. Pipes take its output, also when a disk is full."""
    start = time.monotonic()
    pipes = [os.pipe() for _ in ("stdout", "stderr")]
    pid = os.fork()
    if pid == 0:
        os._exit(child(request, [write for _, write in pipes]))
    for read, write in pipes:
        os.close(write)
        os.set_blocking(read, False)
    texts, status = [bytearray(), bytearray()], None
    while status is None and time.monotonic() - start < request["seconds"]:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        for text, (read, _) in zip(texts, pipes, strict=True):
            drain(read, text)
        if status is None:
            time.sleep(POLL_SECONDS)
    try:
        os.killpg(pid, signal.SIGKILL)  # it is its own group, with the processes that it started
    except (ProcessLookupError, PermissionError):
        pass
    if status is None:
        os.waitpid(pid, 0)
    for read, _ in pipes:
        os.close(read)
    stdout, stderr = (text.decode("utf-8", "backslashreplace") for text in texts)
    return {"status": status, "stdout": stdout, "stderr": stderr, "seconds": round(time.monotonic() - start, 3)}


def drain(pipe: int, text: bytearray) -> None:
    """Reads what is in a pipe now."""
    try:
        while data := os.read(pipe, 1 << 16):
            text.extend(data)
    except BlockingIOError:
        pass


def child(request: dict, outputs: list[int]) -> int:
    """Runs the command in this process as the interpreter would, and returns the exit status."""
    os.setsid()
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((null, *outputs)):
        os.dup2(descriptor, number)
    sys.argv = [request["module"], *request["args"]]
    if request["prepare"]:
        name, *values = request["prepare"]
        getattr(faults, name)(*values)
    status = 1
    try:
        if request["module"].endswith(".py"):
            sys.path.insert(0, os.path.dirname(request["module"]))
            runpy.run_path(request["module"], run_name="__main__")
        else:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            status = stop.code or 0
        else:
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
