"""Tests of the launch scripts: dry runs, the calls of real runs to stand-in programs, and runs on a simulated host."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from vkd_jax.config import command_line

ROOT = Path(__file__).parents[1]
SCRIPTS = ["tpu_vm.sh", "xpk.sh", "run_host.sh", "common.sh"]
BASH = shutil.which("bash")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
VM, LOCATION = "gcloud compute tpus tpu-vm", "--project=p --zone=us-central1-a"
ACCOUNT = "vkd@p.iam.gserviceaccount.com"
PROGRAM = ["--", "python", "-m", "vkd_jax.main", "--distributed", "--config", "configs/llava.py:7b"]
pytestmark = [
    pytest.mark.skipif(BASH is None, reason="bash is not installed"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # of ml_collections
]


@pytest.fixture
def bash_only_path(tmp_path):
    """A PATH that contains only bash, so that an unexpected call of another program fails."""
    folder = tmp_path / "bash"
    folder.mkdir()
    (folder / "bash").symlink_to(BASH)
    return str(folder)


@pytest.fixture
def dry_run(bash_only_path, tmp_path):
    """Runs a script with --dry-run and returns (exit status, lines of stdout, stderr)."""

    def dry_run(script, *args, **variables):
        process = subprocess.run(
            [ROOT / "launch" / script, "--dry-run", *args],
            env={"PATH": bash_only_path, "PROJECT": "p", "TMPDIR": "/tmp", **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return process.returncode, process.stdout.splitlines(), process.stderr

    return dry_run


# ---- Dry runs ----


@pytest.mark.parametrize(
    ("command", "variables", "lines"),
    [
        ("create", {}, [f"{VM} create vkd {LOCATION} --accelerator-type=v5litepod-4 --version=v2-alpha-tpuv5-lite "
                        f"--service-account={ACCOUNT}"]),
        ("create", {"SPOT": "1", "TYPE": "v4-8", "NAME": "mine", "ACCOUNT": "a@b"},
         [f"{VM} create mine --project=p --zone=us-central2-b --accelerator-type=v4-8 --version=tpu-ubuntu2204-base "
          "--service-account=a@b --spot"]),
        ("create", {"SPOT": "1", "QUEUED": "1", "TYPE": "v6e-8"},
         ["gcloud compute tpus queued-resources create vkd --node-id=vkd --project=p --zone=us-east5-b "
          f"--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --service-account={ACCOUNT} --spot"]),
        ("setup", {"BUCKET": "b", "ZONE": "us-west4-a"},
         ["gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com --project=p",
          "gcloud storage buckets create gs://b --project=p --location=us-west4 --uniform-bucket-level-access",
          "gcloud iam service-accounts create vkd --project=p",
          f"gcloud storage buckets add-iam-policy-binding gs://b --member=serviceAccount:{ACCOUNT} "
          "--role=roles/storage.objectAdmin",
          f"gcloud storage buckets add-iam-policy-binding gs://b --member=serviceAccount:{ACCOUNT} "
          "--role=roles/storage.legacyBucketReader"]),
        ("status", {}, [f"{VM} describe vkd {LOCATION} '--format=value(state)'",
                        f"{VM} ssh vkd {LOCATION} --worker=all '--command=test -e vkd_jax || "
                        "{ echo no code yet: run sync; exit; }; bash vkd_jax/launch/run_host.sh --status'"]),
        ("sync", {},
         [f"git -C {ROOT} bundle create --quiet /tmp/vkd_jax.bundle HEAD",
          f"{VM} scp /tmp/vkd_jax.bundle vkd:vkd_jax.bundle {LOCATION} --worker=all",
          f"{VM} ssh vkd {LOCATION} --worker=all '--command=git init --quiet vkd_jax && git -C vkd_jax fetch --quiet "
          "../vkd_jax.bundle HEAD && git -C vkd_jax checkout --quiet --force --detach FETCH_HEAD'"]),
        ("logs", {"WORKER": "3"}, [f"{VM} ssh vkd {LOCATION} --worker=3 '--command=tail -n 100 -F vkd.log'"]),
        ("stop", {}, [f"{VM} ssh vkd {LOCATION} --worker=all '--command=bash vkd_jax/launch/run_host.sh --stop'"]),
        ("delete", {}, [f"{VM} delete vkd {LOCATION}"]),
        ("delete", {"QUEUED": "1"}, [f"gcloud compute tpus queued-resources delete vkd {LOCATION} --force"]),
    ],
)  # fmt: skip
def test_dry_run_of_tpu_vm_prints_its_commands(dry_run, command, variables, lines):
    assert dry_run("tpu_vm.sh", command, **variables) == (0, lines, "")


def test_dry_run_of_xpk_prints_its_commands(dry_run):
    cluster = "--cluster=vkd --project=p --zone=us-central1-a"
    tpu_slice = "--tpu-type=v5litepod-16 --num-slices=1"
    assert dry_run("xpk.sh", "create") == (0, [f"xpk cluster create {cluster} {tpu_slice} --on-demand"], "")
    assert dry_run("xpk.sh", "create", SPOT="1")[1][0].endswith(" --spot")
    assert dry_run("xpk.sh", "run", *PROGRAM)[1] == [
        f"xpk workload create --workload=vkd-run {cluster} {tpu_slice} --base-docker-image=python:3.12 "
        f"--script-dir={ROOT} --max-restarts=10 '--command=exec bash launch/run_host.sh {' '.join(PROGRAM[1:])}'"
    ]
    assert dry_run("xpk.sh", "status")[1] == [f"xpk workload list {cluster}"]
    assert dry_run("xpk.sh", "logs", ZONE="us-east1-d")[1] == [
        "gcloud container clusters get-credentials vkd --project=p --region=us-east1",
        "kubectl logs --follow --tail=100 "
        "--selector=xpk.google.com/workload=vkd-run,batch.kubernetes.io/job-completion-index=0",
    ]
    assert dry_run("xpk.sh", "stop")[1] == [f"xpk workload delete --workload=vkd-run {cluster}"]
    assert dry_run("xpk.sh", "delete")[1] == [f"xpk cluster delete {cluster}"]


@pytest.mark.parametrize("words", [["a b", "it's", '"$HOME" `id`'], ["*", "", "\\", "--x=~;&"], ["plain/x:y=1,2"]])
def test_words_of_the_program_survive_both_shells(dry_run, words):
    """The local shell passes the command to gcloud as one argument; the host's shell splits it into the same words."""
    _, (line,), _ = dry_run("tpu_vm.sh", "run", "--", "python", *words)
    *_, command = shlex.split(line)
    assert shlex.split(command.removeprefix("--command=")) == [
        "bash", "vkd_jax/launch/run_host.sh", "--detach", "python", *words
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "version"),
    [(f"v5litepod-{n}", "v2-alpha-tpuv5-lite") for n in (1, 4, 8, 16, 64, 256)]
    + [("v6e-1", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_software_version_follows_the_tpu_type(dry_run, kind, version):
    assert f"--version={version}" in dry_run("tpu_vm.sh", "create", TYPE=kind)[1][0].split()
    assert "--version=other" in dry_run("tpu_vm.sh", "create", TYPE=kind, VERSION="other")[1][0].split()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_scripts_run_from_their_own_folder(script):
    env = {"PATH": "", "PROJECT": "p"}
    process = subprocess.run([BASH, script, "create", "--dry-run"], cwd=ROOT / "launch", env=env, capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"") and b"create" in process.stdout


# ---- Errors ----


@pytest.mark.parametrize(
    ("args", "variables", "excerpt"),
    [
        (["tpu_vm.sh", "create"], {"PROJECT": ""}, "PROJECT is empty: set it to the id of your Google Cloud project"),
        (["xpk.sh", "run", *PROGRAM], {"PROJECT": ""}, "as in PROJECT=... launch/xpk.sh run."),
        (["tpu_vm.sh", "setup"], {}, "BUCKET is empty: set it to the name of the bucket"),
        (["tpu_vm.sh", "setup"], {"BUCKET": "gs://b"}, "BUCKET=gs://b is invalid: set it to the name of the bucket"),
        (["xpk.sh", "create"], {"PROJECT": "My Project"}, "PROJECT=My Project is invalid: set it to the id"),
        (["tpu_vm.sh", "create"], {"QUEUED": "0"}, "QUEUED=0 is invalid: set it to 1, or omit it."),
        (["xpk.sh", "create"], {"SPOT": "no"}, "SPOT=no is invalid: set it to 1, or omit it."),
        (["tpu_vm.sh", "create"], {"ZONE": "us-west4"}, "ZONE=us-west4 is not a zone: set it to one such as"),
        (["tpu_vm.sh", "run", "--", "python", "--dry-run"], {}, "--dry-run is a flag of launch/tpu_vm.sh: pass it"),
        (["tpu_vm.sh"], {}, "no command: pass one of setup create status"),
        (["tpu_vm.sh", "make"], {}, "unknown command make"),
        (["tpu_vm.sh", "create", "delete"], {}, "two commands, create and delete"),
        (["tpu_vm.sh", "create", "--spot"], {}, "unknown flag --spot"),
        (["tpu_vm.sh", "create", *PROGRAM], {}, "create takes no program"),
        (["tpu_vm.sh", "run"], {}, "no program to run: pass it after --"),
        (["tpu_vm.sh", "create"], {"TYPE": "v9-1"}, "TYPE=v9-1 is unknown"),
        (["tpu_vm.sh", "create"], {"TYPE": "v5litepod-5"}, "not a size of v5litepod. Available sizes: 1, 4, 8, 16"),
        (["tpu_vm.sh", "run", "--", "python"], {"TYPE": "v5p-16"}, "v5p-16 may have several hosts: add --distributed"),
        (["xpk.sh", "run", "--", "python"], {"TYPE": "v5litepod-8"}, "add --distributed"),
        (["xpk.sh", "create"], {"TYPE": "v5litepod-4"}, "XPK does not support v5litepod-4"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_status_2(dry_run, args, variables, excerpt):
    status, lines, err = dry_run(*args, **variables)
    assert (status, lines) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1 and excerpt in err


def test_missing_sdk_is_an_error(bash_only_path):
    env = {"PATH": bash_only_path, "PROJECT": "p"}
    process = subprocess.run([ROOT / "launch/tpu_vm.sh", "create"], env=env, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert "there is no gcloud on this machine" in process.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_help_lists_every_command_and_variable(dry_run, script):
    text = (ROOT / "launch" / script).read_text()
    status, lines, _ = dry_run(script, "--help", PROJECT="")
    shown = {line.split()[0] for line in lines if re.match("  [a-zA-Z-]", line)}
    commands = re.search('read_command_line "(.*?)"', text)[1].split()
    variables = set(re.findall(r"\$\{([A-Z]+):-", text + (ROOT / "launch/common.sh").read_text()))
    variables -= {"TMPDIR", "COMMAND"} | ({"VERSION"} if script == "xpk.sh" else set())
    assert status == 0 and set(commands) | variables | {"PROJECT", "--dry-run", "--help"} <= shown


# ---- The documentation page ----


def page():
    """Returns the code blocks of the page in order, as (language, content)."""
    text = (ROOT / "docs" / "tpu.md").read_text()
    return re.findall(r"^```(bash|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Runs all bash blocks of the page in one shell as dry runs; returns the output of each block."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "bash").symlink_to(BASH)
    # Functions of this shell, which the scripts do not inherit.
    stubs = "\n".join(f"{name}() {{ :; }}" for name in ("gcloud", "ssh-add", "mkdir"))
    blocks = [
        re.sub(r"(launch/\w+\.sh)(?! --dry-run)", r"\1 --dry-run", code) for kind, code in page() if kind == "bash"
    ]
    script = f"set -eu\ncd {ROOT}\n{stubs}\n" + "".join(f"{block}\necho '<end>'\n" for block in blocks)
    env = {"PATH": str(folder), "TMPDIR": "/tmp", "HOME": str(folder)}
    process = subprocess.run([BASH, "-c", script], env=env, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    return process.stdout.split("<end>\n")[:-1]


def test_every_launch_command_of_the_page_has_a_dry_run(rehearsal):
    codes = [code for kind, code in page() if kind == "bash"]
    calls = [len(re.findall("^.*launch/", code, re.MULTILINE)) for code in codes]
    assert sum(calls) > 20
    for output, count, code in zip(rehearsal, calls, codes, strict=True):
        assert len(output.splitlines()) >= count and bool(output) == bool(count), code


def test_outputs_quoted_on_the_page_are_real(rehearsal):
    outputs, quoted = iter(rehearsal), 0
    for kind, content in page():
        if kind == "bash":
            output = next(outputs)
        else:
            quoted += 1
            assert content == output
    assert quoted == 1


def test_real_runs_call_what_dry_runs_print(rehearsal, tmp_path):
    """Runs the commands of the page with stand-in programs that record their arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_in = f'#!{BASH}\n{{ printf "%s\\0" "${{0##*/}}" "$@"; printf "\\n\\0"; }} >> {tmp_path}/calls\n'
    stand_in += 'case "$*" in *"queued-resources describe"*) echo ACTIVE ;; *"s describe "*) exit 1 ;; esac\n'
    for name in ("gcloud", "xpk", "kubectl", "git", "ssh-add"):
        (tools / name).write_text(stand_in)
        (tools / name).chmod(0o755)
    (tools / "bash").symlink_to(BASH)
    codes = [code.replace(" --dry-run", "") for kind, code in page() if kind == "bash"]
    launches = "".join(line for code in codes for line in code.splitlines(True) if re.match("export|.*launch/", line))
    script = f"set -eu\ncd {ROOT}\n{launches}"
    env = {"PATH": str(tools), "TMPDIR": "/tmp", "HOME": str(tmp_path)}
    subprocess.run([BASH, "-c", script], env=env, check=True)
    calls = [call.split("\0")[:-1] for call in (tmp_path / "calls").read_text().split("\n\0")[:-1]]
    queries = "status --porcelain|rev-parse --is-shallow-repository|buckets describe|service-accounts describe"
    calls = [call for call in calls if not re.search(queries, " ".join(call))]  # dry runs omit them
    assert calls == [shlex.split(line) for output in rehearsal for line in output.splitlines()]


@pytest.fixture
def real_run(tmp_path):
    """Runs a command of tpu_vm.sh with stand-in programs (name=shell code); returns (exit status, calls, stderr)."""

    def real_run(command, **stand_ins):
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "bash").symlink_to(BASH)
        for name, code in stand_ins.items():
            (tools / name).write_text(f'#!{BASH}\necho "${{0##*/}} $*" >> {tmp_path}/calls\n{code}\n')
            (tools / name).chmod(0o755)
        env = {"PATH": str(tools), "TMPDIR": "/tmp", "PROJECT": "p", "BUCKET": "b", "QUEUED": "1"}
        process = subprocess.run([ROOT / "launch/tpu_vm.sh", command], env=env, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text()
        return process.returncode, calls.splitlines(), process.stderr

    return real_run


def test_setup_resumes_after_an_interruption(real_run, tmp_path):
    """The bucket and the account exist, and the first binding fails since the account is not visible yet."""
    gcloud = f'[[ "$*" != *binding* || -e {tmp_path}/known ]]'
    status, calls, _ = real_run("setup", gcloud=gcloud, sleep=f": > {tmp_path}/known")
    assert status == 0 and not any(" create " in call for call in calls)
    bindings = [call.rpartition("roles/")[2] for call in calls if "binding" in call]
    assert bindings == ["storage.objectAdmin"] * 2 + ["storage.legacyBucketReader"] and "sleep 10" in calls


def test_status_does_not_contact_a_queued_tpu(real_run):
    status, calls, _ = real_run("status", gcloud="echo WAITING_FOR_RESOURCES")
    assert status == 0 and len(calls) == 1 and "queued-resources describe" in calls[0]


def test_sync_rejects_a_shallow_clone(real_run):
    status, calls, err = real_run("sync", git='[[ "$*" == *rev-parse* ]] && echo true; exit 0')
    assert status == 2 and "this clone is shallow" in err and "git fetch --unshallow" in err
    assert not any("bundle" in call for call in calls)


def test_programs_of_the_page_fit_their_tpu(rehearsal, monkeypatch):
    """Each config is valid, the mesh has all chips, batches divide over it, and the workdir is in the bucket."""
    monkeypatch.chdir(ROOT)
    tpu_type, programs = None, 0
    for line in "".join(rehearsal).splitlines():
        tpu_type = (re.findall(r"--(?:accelerator|tpu)-type=(\S+)", line) or [tpu_type])[-1]
        if "vkd_jax.main" not in line:
            continue
        words = shlex.split(shlex.split(line)[-1])
        argv = words[words.index("vkd_jax.main") :]
        values = flags.FlagValues()
        command_line.define(values)
        monkeypatch.setattr("sys.argv", argv)
        assert command_line.parse(argv, values) == ["vkd_jax.main"]
        config, chips = values.config, int(tpu_type.split("-")[1])
        remaining = chips // (config.mesh.data * config.mesh.tensor)
        shards = config.mesh.data * (remaining if config.mesh.fsdp == -1 else config.mesh.fsdp)
        assert tpu_type.startswith("v5litepod") and shards * config.mesh.tensor == chips
        sizes = [*config.train.batch_size.values(), *config.finetune.train.batch_size.values()]
        assert not [size for size in sizes if size % shards]
        assert values.distributed and values.workdir.startswith("gs://my-project-vkd/")
        programs += 1
    assert programs == 4


# ---- Hosts ----


@pytest.fixture
def host(tmp_path):
    """Calls run_host.sh in a temporary home, with a stand-in python3 that records its arguments."""
    tools, home, clone = tmp_path / "tools", tmp_path / "home", tmp_path / "home" / "vkd_jax"
    for folder in (tools, home / "venv" / "bin", clone / "launch"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "run_host.sh", clone / "launch")
    (tools / "python3").write_text(f'#!{BASH}\necho "$PWD: $*" >> "$HOME/installed"\n')
    (tools / "python3").chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(home), "VENV": str(home / "venv")}

    def call(*args, wait=True, **variables):
        words = [BASH, "vkd_jax/launch/run_host.sh", *args]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen(words, cwd=home, env=env | variables, **pipes)
        return (*process.communicate(timeout=60), process.returncode) if wait else process

    call.home = home
    yield call
    call("--stop", GRACE="1")


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_host_installs_the_clone_and_executes_the_program(host):
    out, err, status = host("bash", "-c", 'echo "$PWD|$1|${PATH%%:*}"; exit 7', "-", "it's one word")
    assert (status, err) == (7, "")
    assert out.splitlines()[-1] == f"{host.home}/vkd_jax|it's one word|{host.home}/venv/bin"
    calls = (host.home / "installed").read_text().splitlines()
    assert calls == [
        f"{host.home}/vkd_jax: -m uv --version",
        f"{host.home}/vkd_jax: -m uv venv --quiet --python 3.12 {host.home}/venv",
        f"{host.home}/vkd_jax: -m uv pip install --quiet --python {host.home}/venv/bin/python .[tpu]",
    ]


def test_program_receives_sigterm(host):
    process = host(
        "bash", "-c", "trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done", wait=False
    )
    lines = iter(process.stdout.readline, "")
    assert any(line == "ready\n" for line in lines)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("saved\n", "") and process.returncode == 143


def test_detached_run_continues_excludes_others_and_saves_when_stopped(host):
    log = host.home / "vkd.log"
    out, err, status = host(
        "--detach", "bash", "-c", "trap 'echo saved; exit' TERM; echo ready; while :; do sleep 0.05; done"
    )
    assert (status, err) == (0, "") and "started" in out
    # The log also has the command, which contains "ready".
    wait_until(lambda: log.exists() and log.read_text().endswith("\nready\n"))
    process = int((host.home / "vkd.lock").read_text())
    assert host("--status")[0].endswith(f"running, process {process}\n")
    for again in (["--detach", "true"], ["true"]):
        out, err, status = host(*again)
        assert (status, out) == (2, "") and f"process {process}; stop it first" in err and err.count("\n") == 1
    assert int((host.home / "vkd.lock").read_text()) == process
    assert host("--stop")[0].endswith("stopped\n") and log.read_text().endswith("saved\n")
    for command in ("--status", "--stop"):
        assert host(command)[0].endswith("no run is under way\n")


def test_run_that_ignores_sigterm_is_killed(host):
    host("--detach", "bash", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    wait_until(lambda: (host.home / "vkd.log").read_text().endswith("\nready\n"))
    assert host("--stop", GRACE="0.2")[0].endswith("killed after 0.2 s; unsaved state is lost\n")
    wait_until(lambda: host("--status")[0].endswith("no run is under way\n"))


def test_stop_ends_the_installation_as_well(host):
    """During the installation uv inherits the lock from the shell."""
    tool = host.home.parent / "tools" / "python3"
    tool.write_text(f'#!{BASH}\n: > "$HOME/installed"\nwhile :; do sleep 0.05; done\n')
    host("--detach", "true")
    wait_until((host.home / "installed").exists)
    assert host("--stop", GRACE="10")[0].endswith("stopped\n")
    assert host("--status")[0].endswith("no run is under way\n")


def test_sync_updates_an_existing_copy(dry_run, tmp_path):
    """Runs the commands of sync twice, with a small repository as the clone and a temporary home as the host."""
    _, (bundle, _, unpack), _ = dry_run("tpu_vm.sh", "sync", TMPDIR=str(tmp_path / "home"))
    source, home = tmp_path / "source", tmp_path / "home"
    home.mkdir()
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    bundle = [str(source) if word == str(ROOT) else word for word in shlex.split(bundle)]
    for number in range(2):
        subprocess.run(["git", "init", "--quiet", source], check=True)
        (source / "file").write_text(str(number))
        subprocess.run(["git", "-C", source, "add", "file"], check=True)
        subprocess.run(["git", "-C", source, *identity, "commit", "--quiet", "-m", "x"], check=True)
        subprocess.run(bundle, check=True)
        command = shlex.split(unpack)[-1].removeprefix("--command=")
        subprocess.run(command, shell=True, cwd=home, env=os.environ | {"HOME": str(home)}, check=True)
        assert (home / "vkd_jax" / "file").read_text() == str(number)
        (home / "vkd_jax" / "file").write_text("changed there")


# ---- Style ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_short_and_executable(script):
    path = ROOT / "launch" / script
    text = path.read_text()
    subprocess.run([BASH, "-n", path], check=True)
    assert len(text.splitlines()) <= 150 and not re.search(r"\beval\b", text)
    if script != "common.sh":
        assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_reports_nothing():
    command = [SHELLCHECK, "-x", *(f"launch/{name}" for name in SCRIPTS)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert process.returncode == 0, process.stdout.decode()
