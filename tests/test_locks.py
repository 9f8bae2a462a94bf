"""Locks of outputs and files written whole, with real processes, a real limit of file size and a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar import locks
from megatron_avatar.files import append, is_machines, replacing, step_folders
from megatron_avatar.locks import Busy, held

HOLD = """
import sys, time
from pathlib import Path
from megatron_avatar.locks import held
with held(Path(sys.argv[1]), "another tool"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_comes_second_is_told_by_whom_and_a_kill_frees_the_lock(holder, tmp_path):
    with pytest.raises(Busy, match=rf"lock is held by another tool \(process {holder.pid} on .*same command again"):
        with held(tmp_path / "lock", "this"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(tmp_path / "lock", "this"):
        assert "this (process" in (tmp_path / "lock").read_text()
    assert not list(tmp_path.iterdir())


def test_who_waits_gets_it_after_the_other_and_no_third_with_it(holder, tmp_path):
    order = []

    def wait():
        with held(tmp_path / "lock", "waiting", wait=True):
            order.append("in")
            with pytest.raises(Busy, match="waiting"):
                held(tmp_path / "lock", "third").__enter__()

    thread = threading.Thread(target=wait)
    thread.start()
    while len(os.listdir(f"/proc/{os.getpid()}/task")) < 2:
        pass
    order.append("ends")
    holder.communicate("")  # its end deletes the file that the other has opened
    thread.join(20)
    assert order == ["ends", "in"] and not list(tmp_path.iterdir())


def test_without_locks_of_the_file_system_the_file_says_who(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(descriptor, how):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path / "shared")):
            raise OSError(errno.ENOLCK, "No locks available")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    path, claim = tmp_path / "shared" / "lock", tmp_path / "shared" / "lock.claim"
    with held(path, "first"):
        with pytest.raises(Busy, match="first"):
            held(path, "second").__enter__()
    assert not list(path.parent.iterdir())
    claim.write_text(f"{locks.socket.gethostname()}\nsomebody dead")
    with held(path, "first"):
        assert "first" in claim.read_text()
    claim.write_text("another-node\nits tool (process 1)")
    with pytest.raises(Busy, match=r"held by its tool \(process 1\).*or delete .*lock.claim if that no longer runs"):
        held(path, "first").__enter__()
    assert claim.exists()


def test_only_the_process_that_took_the_lock_holds_it(tmp_path):
    """A program that was started while it was held doesn't keep it."""
    with held(tmp_path / "lock", "first"):
        child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    with held(tmp_path / "lock", "second"):
        child.kill()
    child.wait()


def add(path, text):
    with open(path, "ab", buffering=0) as file:
        append(file, text)


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.text(st.characters(codec="utf-8"), max_size=40))
def test_what_is_written_is_what_was_given(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("files")
    with replacing(folder / "a") as file:
        file.write(first)
    add(folder / "a", second)
    assert (folder / "a").read_bytes() == (first + second).encode() and os.listdir(folder) == ["a"]


@pytest.fixture
def small_files():
    """At most 64 KiB a file, in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_beyond_a_limit_nothing_is_left_and_nothing_lost(tmp_path, small_files):
    path = tmp_path / "a"
    add(path, "begun\n")
    with pytest.raises(OSError, match="make room, or raise the limit") as error:
        add(path, "x" * 2**17)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path)) and is_machines(error.value)
    with pytest.raises(OSError, match="make room") as error, replacing(path) as file:
        file.write("x" * 2**17)
    assert error.value.filename == str(path)
    add(path, "ended\n")
    assert path.read_text() == "begun\nended\n" and os.listdir(tmp_path) == ["a"]


def test_an_error_of_the_writers_own_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path / "a") as file:
        file.write("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_only_checkpoints_are_steps(tmp_path):
    for name in ("step_00000010", "step_00000002", "step_00000010.bak", "step_3", ".unfinished_00000011", "step_x"):
        (tmp_path / name).mkdir()
    assert list(step_folders(tmp_path)) == [2, 10] and step_folders(tmp_path)[10].name == "step_00000010"
    assert step_folders(tmp_path / "none") == {}


def test_a_decoders_error_is_no_machines():
    for number in (errno.EIO, errno.ENOENT, errno.ENAMETOOLONG, errno.ENOMEM):
        assert not is_machines(av.error.OSError(number, "x"))
    assert is_machines(OSError(errno.EIO, "x")) and is_machines(av.error.OSError(errno.ENOSPC, "x"))
    assert is_machines(ModuleNotFoundError("x")) and not is_machines(ValueError("x"))
    assert is_machines(MemoryError()) and not is_machines(av.error.MemoryError(errno.ENOMEM, "a header claims it"))
