"""launch/: every command in a dry run, what a real run would call, and what happens on a host; nothing leaves here."""

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
VM, WHERE = "gcloud compute tpus tpu-vm", "--project=p --zone=us-central1-a"
ACCOUNT = "vkd@p.iam.gserviceaccount.com"
PROGRAM = ["--", "python", "-m", "vkd_jax.main", "--distributed", "--config", "configs/llava.py:7b"]
pytestmark = [
    pytest.mark.skipif(BASH is None, reason="there is no bash"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # ml_collections' way to read a config
]


@pytest.fixture
def nowhere(tmp_path):
    """A PATH with bash in it and nothing else: what is called by mistake is not found."""
    folder = tmp_path / "bash"
    folder.mkdir()
    (folder / "bash").symlink_to(BASH)
    return str(folder)


@pytest.fixture
def dry(nowhere, tmp_path):
    """Runs a script with --dry-run: (status, lines, what it complained of)."""

    def dry(script, *args, **variables):
        done = subprocess.run(
            [ROOT / "launch" / script, "--dry-run", *args],
            env={"PATH": nowhere, "PROJECT": "p", "TMPDIR": "/tmp", **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return dry


# ---- What is printed ----


@pytest.mark.parametrize(
    ("command", "variables", "lines"),
    [
        ("create", {}, [f"{VM} create vkd {WHERE} --accelerator-type=v5litepod-4 --version=v2-alpha-tpuv5-lite "
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
        ("status", {}, [f"{VM} describe vkd {WHERE} '--format=value(state)'",
                        f"{VM} ssh vkd {WHERE} --worker=all '--command=test -e vkd_jax || "
                        "{ echo no code yet: sync; exit; }; bash vkd_jax/launch/run_host.sh --status'"]),
        ("sync", {},
         [f"git -C {ROOT} bundle create --quiet /tmp/vkd_jax.bundle HEAD",
          f"{VM} scp /tmp/vkd_jax.bundle vkd:vkd_jax.bundle {WHERE} --worker=all",
          f"{VM} ssh vkd {WHERE} --worker=all '--command=git init --quiet vkd_jax && git -C vkd_jax fetch --quiet "
          "../vkd_jax.bundle HEAD && git -C vkd_jax checkout --quiet --force --detach FETCH_HEAD'"]),
        ("logs", {"WORKER": "3"}, [f"{VM} ssh vkd {WHERE} --worker=3 '--command=tail -n 100 -F vkd.log'"]),
        ("stop", {}, [f"{VM} ssh vkd {WHERE} --worker=all '--command=bash vkd_jax/launch/run_host.sh --stop'"]),
        ("delete", {}, [f"{VM} delete vkd {WHERE}"]),
        ("delete", {"QUEUED": "1"}, [f"gcloud compute tpus queued-resources delete vkd {WHERE} --force"]),
    ],
)  # fmt: skip
def test_what_a_dry_run_of_a_tpu_vm_prints(dry, command, variables, lines):
    assert dry("tpu_vm.sh", command, **variables) == (0, lines, "")


def test_what_a_dry_run_of_a_cluster_prints(dry):
    where = "--cluster=vkd --project=p --zone=us-central1-a"
    slice_of = "--tpu-type=v5litepod-16 --num-slices=1"
    assert dry("xpk.sh", "create") == (0, [f"xpk cluster create {where} {slice_of} --on-demand"], "")
    assert dry("xpk.sh", "create", SPOT="1")[1][0].endswith(" --spot")
    assert dry("xpk.sh", "run", *PROGRAM)[1] == [
        f"xpk workload create --workload=vkd-run {where} {slice_of} --base-docker-image=python:3.12 "
        f"--script-dir={ROOT} --max-restarts=10 '--command=exec bash launch/run_host.sh {' '.join(PROGRAM[1:])}'"
    ]
    assert dry("xpk.sh", "status")[1] == [f"xpk workload list {where}"]
    assert dry("xpk.sh", "logs", ZONE="us-east1-d")[1] == [
        "gcloud container clusters get-credentials vkd --project=p --region=us-east1",
        "kubectl logs --follow --tail=100 "
        "--selector=xpk.google.com/workload=vkd-run,batch.kubernetes.io/job-completion-index=0",
    ]
    assert dry("xpk.sh", "stop")[1] == [f"xpk workload delete --workload=vkd-run {where}"]
    assert dry("xpk.sh", "delete")[1] == [f"xpk cluster delete {where}"]


@pytest.mark.parametrize("words", [["a b", "it's", '"$HOME" `id`'], ["*", "", "\\", "--x=~;&"], ["plain/x:y=1,2"]])
def test_a_program_comes_through_as_it_was_given(dry, words):
    """Pasted into a shell here it gives one argument to gcloud; the shell there gives the words to the program."""
    _, (line,), _ = dry("tpu_vm.sh", "run", "--", "python", *words)
    *_, command = shlex.split(line)
    assert shlex.split(command.removeprefix("--command=")) == [
        "bash", "vkd_jax/launch/run_host.sh", "--detach", "python", *words
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "version"),
    [(f"v5litepod-{n}", "v2-alpha-tpuv5-lite") for n in (1, 4, 8, 16, 64, 256)]
    + [("v6e-1", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_the_version_goes_with_the_type(dry, kind, version):
    assert f"--version={version}" in dry("tpu_vm.sh", "create", TYPE=kind)[1][0].split()
    assert "--version=other" in dry("tpu_vm.sh", "create", TYPE=kind, VERSION="other")[1][0].split()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_a_script_may_be_called_from_its_own_folder(script):
    env = {"PATH": "", "PROJECT": "p"}
    done = subprocess.run([BASH, script, "create", "--dry-run"], cwd=ROOT / "launch", env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and b"create" in done.stdout


# ---- What is refused ----


@pytest.mark.parametrize(
    ("args", "variables", "part"),
    [
        (["tpu_vm.sh", "create"], {"PROJECT": ""}, "PROJECT is empty: set it to the id of your Google Cloud project"),
        (["xpk.sh", "run", *PROGRAM], {"PROJECT": ""}, "as in PROJECT=... launch/xpk.sh run."),
        (["tpu_vm.sh", "setup"], {}, "BUCKET is empty: set it to the name of the bucket"),
        (["tpu_vm.sh", "setup"], {"BUCKET": "gs://b"}, "BUCKET=gs://b cannot be: set it to the name of the bucket"),
        (["xpk.sh", "create"], {"PROJECT": "My Project"}, "PROJECT=My Project cannot be: set it to the id"),
        (["tpu_vm.sh", "create"], {"QUEUED": "0"}, "QUEUED=0: set it to 1, or leave it out."),
        (["xpk.sh", "create"], {"SPOT": "no"}, "SPOT=no: set it to 1, or leave it out."),
        (["tpu_vm.sh", "create"], {"ZONE": "us-west4"}, "ZONE=us-west4 is no zone: give one such as us-central1-a."),
        (["tpu_vm.sh", "run", "--", "python", "--dry-run"], {}, "--dry-run is ours, and stands before --."),
        (["tpu_vm.sh"], {}, "no command: give one of setup create status"),
        (["tpu_vm.sh", "make"], {}, "unknown command make"),
        (["tpu_vm.sh", "create", "delete"], {}, "two commands, create and delete"),
        (["tpu_vm.sh", "create", "--spot"], {}, "unknown flag --spot"),
        (["tpu_vm.sh", "create", *PROGRAM], {}, "create takes no program"),
        (["tpu_vm.sh", "run"], {}, "nothing to run: put it after --"),
        (["tpu_vm.sh", "create"], {"TYPE": "v9-1"}, "TYPE=v9-1 is not known"),
        (["tpu_vm.sh", "create"], {"TYPE": "v5litepod-5"}, "no size of v5litepod: give one of 1, 4, 8, 16"),
        (["tpu_vm.sh", "run", "--", "python"], {"TYPE": "v5p-16"}, "v5p-16 may have many hosts: add --distributed"),
        (["xpk.sh", "run", "--", "python"], {"TYPE": "v5litepod-8"}, "add --distributed"),
        (["xpk.sh", "create"], {"TYPE": "v5litepod-4"}, "XPK has no v5litepod-4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(dry, args, variables, part):
    status, lines, err = dry(*args, **variables)
    assert (status, lines) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err


def test_a_missing_sdk_is_said_before_anything_is_run(nowhere):
    env = {"PATH": nowhere, "PROJECT": "p"}
    done = subprocess.run([ROOT / "launch/tpu_vm.sh", "create"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "there is no gcloud on this machine" in done.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_help_names_every_command_and_every_variable(dry, script):
    text = (ROOT / "launch" / script).read_text()
    status, lines, _ = dry(script, "--help", PROJECT="")
    shown = {line.split()[0] for line in lines if re.match("  [a-zA-Z-]", line)}
    commands = re.search('read_command_line "(.*?)"', text)[1].split()
    variables = set(re.findall(r"\$\{([A-Z]+):-", text + (ROOT / "launch/common.sh").read_text()))
    variables -= {"TMPDIR", "COMMAND"} | ({"VERSION"} if script == "xpk.sh" else set())
    assert status == 0 and set(commands) | variables | {"PROJECT", "--dry-run", "--help"} <= shown


# ---- The page ----


def page():
    """The page's blocks, in order: (bash or text, content)."""
    text = (ROOT / "docs" / "tpu_pods.md").read_text()
    return re.findall(r"^```(bash|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The whole page, typed in one shell, for dry: ([what each block printed], the variables are set or it fails)."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "bash").symlink_to(BASH)
    others = "\n".join(
        f"{name}() {{ :; }}" for name in ("gcloud", "ssh-add", "mkdir")
    )  # seen here, and not by the scripts
    parts = [
        re.sub(r"(launch/\w+\.sh)(?! --dry-run)", r"\1 --dry-run", code) for kind, code in page() if kind == "bash"
    ]
    script = f"set -eu\ncd {ROOT}\n{others}\n" + "".join(f"{part}\necho '<end>'\n" for part in parts)
    env = {"PATH": str(folder), "TMPDIR": "/tmp", "HOME": str(folder)}
    done = subprocess.run([BASH, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split("<end>\n")[:-1]


def test_every_command_of_the_page_has_a_dry_run(rehearsal):
    codes = [code for kind, code in page() if kind == "bash"]
    calls = [len(re.findall("^.*launch/", code, re.MULTILINE)) for code in codes]
    assert sum(calls) > 20
    for said, count, code in zip(rehearsal, calls, codes, strict=True):
        assert len(said.splitlines()) >= count and bool(said) == bool(count), code


def test_what_the_page_says_is_printed_is_printed(rehearsal):
    seen, quoted = iter(rehearsal), 0
    for kind, content in page():
        if kind == "bash":
            last = next(seen)
        else:
            quoted += 1
            assert content == last
    assert quoted == 1


def test_a_real_run_calls_what_a_dry_run_prints(rehearsal, tmp_path):
    """The same page, not dry, with stand-ins that write down how they were called."""
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
    looks = "status --porcelain|rev-parse --is-shallow-repository|buckets describe|service-accounts describe"
    calls = [call for call in calls if not re.search(looks, " ".join(call))]  # which a dry run does not
    assert calls == [shlex.split(line) for said in rehearsal for line in said.splitlines()]


@pytest.fixture
def typed(tmp_path):
    """Runs a command of tpu_vm.sh with stand-ins of so much shell code: (its status, what they were asked, stderr)."""

    def typed(command, **stand_ins):
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "bash").symlink_to(BASH)
        for name, code in stand_ins.items():
            (tools / name).write_text(f'#!{BASH}\necho "${{0##*/}} $*" >> {tmp_path}/calls\n{code}\n')
            (tools / name).chmod(0o755)
        env = {"PATH": str(tools), "TMPDIR": "/tmp", "PROJECT": "p", "BUCKET": "b", "QUEUED": "1"}
        done = subprocess.run([ROOT / "launch/tpu_vm.sh", command], env=env, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text()
        return done.returncode, calls.splitlines(), done.stderr

    return typed


def test_setup_goes_on_where_it_broke_off(typed, tmp_path):
    """Bucket and account are there; the account is not known everywhere at first."""
    gcloud = f'[[ "$*" != *binding* || -e {tmp_path}/known ]]'
    status, calls, _ = typed("setup", gcloud=gcloud, sleep=f": > {tmp_path}/known")
    assert status == 0 and not any(" create " in call for call in calls)
    bindings = [call.rpartition("roles/")[2] for call in calls if "binding" in call]
    assert bindings == ["storage.objectAdmin"] * 2 + ["storage.legacyBucketReader"] and "sleep 10" in calls


def test_a_tpu_that_waits_in_the_queue_is_not_asked(typed):
    status, calls, _ = typed("status", gcloud="echo WAITING_FOR_RESOURCES")
    assert status == 0 and len(calls) == 1 and "queued-resources describe" in calls[0]


def test_a_shallow_clone_is_not_sent(typed):
    status, calls, err = typed("sync", git='[[ "$*" == *rev-parse* ]] && echo true; exit 0')
    assert status == 2 and "this clone is shallow" in err and "git fetch --unshallow" in err
    assert not any("bundle" in call for call in calls)


def test_the_programs_of_the_page_fit_their_tpu(rehearsal, monkeypatch):
    """Every config reads, the mesh takes all chips, batches divide over it, and the workdir outlives the TPU."""
    monkeypatch.chdir(ROOT)
    kind, programs = None, 0
    for line in "".join(rehearsal).splitlines():
        kind = (re.findall(r"--(?:accelerator|tpu)-type=(\S+)", line) or [kind])[-1]
        if "vkd_jax.main" not in line:
            continue
        words = shlex.split(shlex.split(line)[-1])
        argv = words[words.index("vkd_jax.main") :]
        values = flags.FlagValues()
        command_line.define(values)
        monkeypatch.setattr("sys.argv", argv)
        assert command_line.parse(argv, values) == ["vkd_jax.main"]
        config, chips = values.config, int(kind.split("-")[1])
        rest = chips // (config.mesh.data * config.mesh.tensor)
        shards = config.mesh.data * (rest if config.mesh.fsdp == -1 else config.mesh.fsdp)
        assert kind.startswith("v5litepod") and shards * config.mesh.tensor == chips
        sizes = [*config.train.batch_size.values(), *config.finetune.train.batch_size.values()]
        assert not [size for size in sizes if size % shards]
        assert values.distributed and values.workdir.startswith("gs://my-project-vkd/")
        programs += 1
    assert programs == 4


# ---- On a host ----


@pytest.fixture
def host(tmp_path):
    """Calls run_host.sh in a home of its own, with a python3 that only writes down what it was asked to install."""
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


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_a_host_installs_the_clone_and_becomes_the_program(host):
    out, err, status = host("bash", "-c", 'echo "$PWD|$1|${PATH%%:*}"; exit 7', "-", "it's one word")
    assert (status, err) == (7, "")
    assert out.splitlines()[-1] == f"{host.home}/vkd_jax|it's one word|{host.home}/venv/bin"
    said = (host.home / "installed").read_text().splitlines()
    assert said == [
        f"{host.home}/vkd_jax: -m uv --version",
        f"{host.home}/vkd_jax: -m uv venv --quiet --python 3.12 {host.home}/venv",
        f"{host.home}/vkd_jax: -m uv pip install --quiet --python {host.home}/venv/bin/python .[tpu]",
    ]


def test_sigterm_reaches_the_program(host):
    process = host(
        "bash", "-c", "trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep .05; done", wait=False
    )
    lines = iter(process.stdout.readline, "")
    assert any(line == "ready\n" for line in lines)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("saved\n", "") and process.returncode == 143


def test_a_detached_run_goes_on_is_alone_and_saves_when_it_is_stopped(host):
    log = host.home / "vkd.log"
    out, err, status = host(
        "--detach", "bash", "-c", "trap 'echo saved; exit' TERM; echo ready; while :; do sleep .05; done"
    )
    assert (status, err) == (0, "") and "started" in out
    until(lambda: log.exists() and log.read_text().endswith("\nready\n"))  # the command that it names has the word, too
    process = int((host.home / "vkd.lock").read_text())
    assert host("--status")[0].endswith(f"running, process {process}\n")
    for again in (["--detach", "true"], ["true"]):
        out, err, status = host(*again)
        assert (status, out) == (2, "") and f"process {process}; stop it first" in err and err.count("\n") == 1
    assert int((host.home / "vkd.lock").read_text()) == process
    assert host("--stop")[0].endswith("stopped\n") and log.read_text().endswith("saved\n")
    for command in ("--status", "--stop"):
        assert host(command)[0].endswith("no run is under way\n")


def test_a_run_that_will_not_stop_is_killed(host):
    host("--detach", "bash", "-c", "trap '' TERM; echo ready; while :; do sleep .05; done")
    until(lambda: (host.home / "vkd.log").read_text().endswith("\nready\n"))
    assert host("--stop", GRACE="0.2")[0].endswith("killed after 0.2 s; what it had not saved is lost\n")
    until(lambda: host("--status")[0].endswith("no run is under way\n"))


def test_what_installs_is_stopped_as_well(host):
    """The shell is at `uv` then, which holds the lock as it does."""
    tool = host.home.parent / "tools" / "python3"
    tool.write_text(f'#!{BASH}\n: > "$HOME/installed"\nwhile :; do sleep .05; done\n')
    host("--detach", "true")
    until((host.home / "installed").exists)
    assert host("--stop", GRACE="10")[0].endswith("stopped\n")
    assert host("--status")[0].endswith("no run is under way\n")


def test_what_is_sent_can_be_unpacked_twice(dry, tmp_path):
    """The commands of sync, with a small repository in the place of this one and a home of its own as the host."""
    _, (bundle, _, unpack), _ = dry("tpu_vm.sh", "sync", TMPDIR=str(tmp_path / "home"))
    source, home = tmp_path / "source", tmp_path / "home"
    home.mkdir()
    names = ["-c", "user.name=x", "-c", "user.email=x@y"]
    bundle = [str(source) if word == str(ROOT) else word for word in shlex.split(bundle)]
    for number in range(2):
        subprocess.run(["git", "init", "--quiet", source], check=True)
        (source / "file").write_text(str(number))
        subprocess.run(["git", "-C", source, "add", "file"], check=True)
        subprocess.run(["git", "-C", source, *names, "commit", "--quiet", "-m", "x"], check=True)
        subprocess.run(bundle, check=True)
        command = shlex.split(unpack)[-1].removeprefix("--command=")
        subprocess.run(command, shell=True, cwd=home, env=os.environ | {"HOME": str(home)}, check=True)
        assert (home / "vkd_jax" / "file").read_text() == str(number)
        (home / "vkd_jax" / "file").write_text("changed there")


# ---- The scripts themselves ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound(script):
    path = ROOT / "launch" / script
    text = path.read_text()
    subprocess.run([BASH, "-n", path], check=True)
    assert len(text.splitlines()) <= 150 and not re.search(r"\beval\b", text)
    if script != "common.sh":
        assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text


@pytest.mark.skipif(SHELLCHECK is None, reason="there is no shellcheck")
def test_shellcheck_finds_nothing():
    found = subprocess.run([SHELLCHECK, "-x", *(f"launch/{name}" for name in SCRIPTS)], cwd=ROOT, capture_output=True)
    assert found.returncode == 0, found.stdout.decode()
