"""Locks of folders: one process at a time, stale locks, and locks in a bucket."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from vkd_jax.runtime import locks, storage
from vkd_jax.types import UserError


def other(**changes):
    """The lock of a running process of this host, this one's parent, with changes."""
    pid = os.getppid()
    return locks.owner("main --workdir x") | {"pid": pid, "started": locks.process_start(pid)} | changes


def ended():
    process = subprocess.Popen(["true"])
    start = locks.process_start(process.pid)
    process.wait()
    return {"pid": process.pid, "started": start or "earlier"}


STALE = {
    "the process has ended": lambda: other(**ended()),
    "its number was reused": lambda: other(started="an earlier boot/1"),
    "another host was lost": lambda: other(host="elsewhere", renewed=time.time() - locks.EXPIRES - 1),
    "another host, no time": lambda: other(host="elsewhere", renewed=None),
    "no owner": lambda: {},
    "no object": lambda: [1],
}


@pytest.mark.parametrize("case", STALE)
def test_stale_locks_are_taken_over_and_released(tmp_path, case):
    (tmp_path / locks.FILE).write_text(json.dumps(STALE[case]()))
    with locks.hold(tmp_path, "the command"):
        lock = json.loads((tmp_path / locks.FILE).read_text())
        assert (lock["pid"], lock["host"], lock["command"]) == (os.getpid(), socket.gethostname(), "the command")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_the_lock_of_a_running_process_is_respected(tmp_path, host):
    text = json.dumps(other(host=host))
    (tmp_path / locks.FILE).write_text(text)
    words = rf"is used by process {os.getppid()} on {host} since 20.* \(main --workdir x\)\. Wait until it ends"
    with pytest.raises(UserError, match=words), locks.hold(tmp_path, ""):
        raise AssertionError("both hold the lock")
    assert (tmp_path / locks.FILE).read_text() == text


def test_the_lock_of_a_container_of_the_same_name_is_respected_while_it_is_renewed(tmp_path):
    """A process of another container cannot be seen, so that it may still run."""
    lock = other(namespace="pid:[1]", pid=ended()["pid"])
    (tmp_path / locks.FILE).write_text(json.dumps(lock))
    with pytest.raises(UserError, match="is used by process"), locks.hold(tmp_path, ""):
        raise AssertionError("both hold the lock")
    late = {"renewed": time.time() - locks.EXPIRES - 1}
    for changes in (late, {"namespace": None}, {"started": "an earlier boot/1"}):
        assert locks.is_stale(lock | changes)


HERE = json.dumps(socket.gethostname()).encode()


@pytest.mark.parametrize(
    "text",
    [
        b'{"pid": \xff',
        b'{"host": "elsewhere", "pid": 1, "renewed": NaN}',
        b'{"host": "elsewhere", "pid": 1, "renewed": 1e999}',
        b'{"host": "elsewhere", "pid": 1, "renewed": 32503680000}',
        b'{"host": "elsewhere", "pid": 1, "renewed": 1' + b"0" * 400 + b"}",
        b'{"host": ' + HERE + b', "pid": 1' + b"0" * 30 + b', "started": null}',
    ],
)
def test_a_damaged_lock_is_stale(text, tmp_path):
    (tmp_path / locks.FILE).write_bytes(text)
    with locks.hold(tmp_path, ""):
        assert json.loads((tmp_path / locks.FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "a folder"), (os.mkfifo, "not a regular file")])
def test_what_is_in_place_of_the_lock_is_named(tmp_path, make, kind):
    make(tmp_path / locks.FILE)
    with pytest.raises(UserError, match=rf"lock\.json is {kind}.*remove it"), locks.hold(tmp_path, ""):
        raise AssertionError("held")


def test_blocks_of_one_process_may_be_nested(tmp_path):
    with locks.hold(tmp_path, "outer"):
        with locks.hold(tmp_path, "inner"):
            pass
        assert json.loads((tmp_path / locks.FILE).read_text())["command"] == "outer"
    with pytest.raises(ZeroDivisionError), locks.hold(tmp_path, ""):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_lock_is_renewed_and_a_lost_one_is_not_deleted(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(locks.logging, "error", lambda text, *values: messages.append(text % values))
    ticks = iter([False, False, True])
    file, name = storage.VersionedFile(tmp_path / locks.FILE), str(tmp_path / locks.FILE)
    version = locks._acquire(file, name, "", str(tmp_path))
    first = json.loads((tmp_path / locks.FILE).read_text())["renewed"]

    class Event:
        def wait(self, seconds):
            return next(ticks)

    locks._renew(file, name, version, "", Event())
    assert json.loads((tmp_path / locks.FILE).read_text())["renewed"] > first and not messages
    (tmp_path / locks.FILE).write_text(json.dumps(other()))
    ticks = iter([False])
    locks._renew(file, name, version, "", Event())
    locks._release(file)
    assert "was taken over" in messages[0] and (tmp_path / locks.FILE).exists()


@pytest.mark.parametrize("folder", ["..", "../there", "../here/../there", "link/.."])
def test_a_path_may_lead_through_other_folders(tmp_path, monkeypatch, folder):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    with locks.hold(Path(folder), "x"):
        assert (Path(folder) / locks.FILE).is_file()
    assert not list(tmp_path.rglob(locks.FILE))


def test_of_two_writers_of_one_version_only_the_first_succeeds(tmp_path):
    one, two = (storage.VersionedFile(tmp_path / "x.json") for _ in range(2))
    (text, version), (_, same) = one.read(), two.read()
    assert text is None and one.write(b"1", version) is not None
    assert two.write(b"2", same) is None and two.read()[0] == b"1"
    assert two.write(None, same) is None and (tmp_path / "x.json").read_bytes() == b"1"
    assert two.write(None, two.read()[1]) is not None and not list(tmp_path.iterdir())
