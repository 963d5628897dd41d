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
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ("main", "ask", "compare", "plan")  # each is run as python -m would, so none may be imported before
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
    """The client of the server process, which it starts and stops."""

    def __enter__(self) -> "ForkServer":
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(self, module: str, args: list[str], folder: Path, seconds: float = 60.0) -> Outcome:
        """Runs `python -m module args` in a folder, and kills it after so many seconds."""
        logs = [folder / ".stdout", folder / ".stderr"]
        request = dict(module=module, args=args, folder=str(folder), logs=[str(log) for log in logs], seconds=seconds)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        stdout, stderr = (log.read_bytes().decode("utf-8", "backslashreplace") for log in logs)
        for log in logs:
            log.unlink()
        return Outcome(answer["status"], stdout, stderr, answer["seconds"])


def serve() -> None:
    """Imports the package, then runs the requests on stdin one after another."""
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    for path in sorted((ROOT / "vkd_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in COMMANDS:
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run_in_fork(json.loads(line))), flush=True)


def warm_up() -> None:
    """Imports what commands import late."""
    import transformers

    for name in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "CLIPImageProcessorPil", "LlavaConfig"):
        getattr(transformers, name)


def run_in_fork(request: dict) -> dict:
    """Runs one request, and returns its status and its seconds."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os._exit(child(request))
    status = None
    while status is None and time.monotonic() - start < request["seconds"]:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(POLL_SECONDS)
    try:
        os.killpg(pid, signal.SIGKILL)  # it is its own group, with the processes that it started
    except (ProcessLookupError, PermissionError):
        pass
    if status is None:
        os.waitpid(pid, 0)
    return {"status": status, "seconds": round(time.monotonic() - start, 3)}


def child(request: dict) -> int:
    """Runs the command in this process as the interpreter would, and returns the exit status."""
    os.setsid()
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDONLY)
    logs = [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for log in request["logs"]]
    for number, descriptor in enumerate((null, *logs)):
        os.dup2(descriptor, number)
    sys.argv = [request["module"], *request["args"]]
    status = 1
    try:
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
