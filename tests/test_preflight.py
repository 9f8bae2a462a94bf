"""The pre-flight's judgements; what nodes do for real is tried in tests/slurm."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_avatar.policy import devices
from slurm import meeting, preflight


@pytest.fixture
def rank(monkeypatch, tmp_path):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0",
                        "SLURM_JOB_ID": "7", "AVATAR_NODES": "gold silver", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": str(port), "AVATAR_ENDED": str(tmp_path / "ended")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preflight, "leave_on_signals", lambda: None)
    return monkeypatch


def test_one_sound_node_passes(rank, tmp_path, capfd):
    assert preflight.main(tmp_path / "run", 0, 0.1) == 0
    assert "1 ranks, 0 GPUs a node, all-reduce good over gloo" in capfd.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def join(rank: int, port: int, work, seconds: tuple[float, float] | float, results) -> None:
    """One rank of four, in a process of its own. seconds: (JOIN_S, SAY_S), or how much faster the clock runs."""
    if isinstance(seconds, tuple):
        meeting.JOIN_S, meeting.SAY_S = seconds
    else:
        meeting.time = SimpleNamespace(monotonic=lambda: seconds * time.monotonic(), sleep=time.sleep)
    began, said = time.monotonic(), []

    def say(reason: str, own: bool) -> None:
        time.sleep(0.2)  # on its way
        said.append((reason, time.monotonic(), own))

    try:
        meeting.meet(rank, 4, "localhost", port, "7", work, lambda rank: f"rank {rank} on n{rank // 2}", say)
        reason, when, own = "", time.monotonic(), False
    except meeting.Missing:
        reason, when, own = said[0] if said else ("told to leave", time.monotonic(), False)
    results.put((rank, reason, began, when, own))


BEGUN = multiprocessing.get_context("fork").Barrier(3)


def die() -> None:
    BEGUN.wait()
    os._exit(1)


def look_on() -> None:
    BEGUN.wait()


def import_on() -> None:
    time.sleep(2.0)


def all_join(works: dict, port: int, *, join_s: float = 20.0, say_s: float = 0.3, faster: float = 0) -> dict:
    """Rank -> why it didn't join, when it began and ended, and whether that can't be another's end; without those that
    die."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=join, args=(rank, port, work, faster or (join_s, say_s), results), daemon=True)
                for rank, work in works.items()]  # fmt: skip
    for child in children:
        child.start()
    found = {}
    while len(found) < sum(work is not die for work in works.values()):
        rank, *rest = results.get(timeout=30)
        found[rank] = tuple(rest)
    for child in children:
        child.join(30)
    return found


@pytest.mark.parametrize("slow", [0, 3])
def test_a_slow_import_is_waited_for_and_named_meanwhile(rank, capfd, slow):
    """Far beyond the intervals at which it is spoken of, as 90 s on a cold file system are; also where it is the rank
    that all others wait for."""
    works = {k: (lambda k=k: time.sleep(2.0 if k == slow else 0.0)) for k in range(4)}
    found = all_join(works, int(os.environ["MASTER_PORT"]))
    assert {reason for reason, *_ in found.values()} == {""}, found
    assert all(ended >= found[slow][1] + 2.0 for _, _, ended, _ in found.values()), "nobody goes on without it"
    said = capfd.readouterr().err
    assert f"pre-flight: waiting for rank {slow} on n{slow // 2}, importing torch for " in said, said


def test_ninety_seconds_of_importing_pass_with_the_intervals_as_they_are(rank, capfd):
    """Twice as many, by a clock that runs 45 times as fast."""
    works = {k: (lambda k=k: time.sleep(4.0 if k == 3 else 0.0)) for k in range(4)}
    found = all_join(works, int(os.environ["MASTER_PORT"]), faster=45)
    assert {reason for reason, *_ in found.values()} == {""}, found
    lines = capfd.readouterr().err.splitlines()
    alone = [line for line in lines if "waiting for rank 3 on n1, importing torch for " in line]
    assert len(alone) >= 3, f"every quarter of a minute: {lines}"


def test_ranks_that_never_begin_or_die_are_named(rank, capfd):
    port = int(os.environ["MASTER_PORT"])
    found = all_join({0: lambda: None, 2: lambda: None}, port, join_s=1.0)
    assert "still waits for rank 1 on n0, not begun; rank 3 on n1, not begun" in found[0][0]
    assert found[2][0] == "told to leave" and found[0][3] is True
    found = all_join({0: lambda: None, 1: die, 2: look_on, 3: look_on}, port)
    assert "rank 1 on n0 ended while it imported torch" in found[0][0] and found[2][0] == found[3][0] == "told to leave"
    assert found[0][3] is False, "a stop signal may be behind it"
    assert found[0][2] < min(found[2][2], found[3][2]), "its words come first: srun ends it with the first that leaves"
    found = all_join({0: import_on, 1: die, 2: look_on, 3: look_on}, port)
    assert "rank 1 on n0 ended" in found[0][0] and found[0][2] < min(found[2][2], found[3][2]), "while it imports, too"
    found = all_join({2: lambda: None}, port, join_s=1.0, say_s=0.2)  # no rank 0
    assert "can't be reached for 1 s" in found[2][0]
    assert "its task may not have begun; a firewall looks the same" in capfd.readouterr().err


def test_a_node_that_stops_answering_is_named(rank, tmp_path, capfd):
    rank.setenv("SLURM_NTASKS", "2")
    rank.setattr(preflight, "DEADLINE_S", 2)
    assert preflight._together(tmp_path, 0, 0.1, 0, 2) == 1
    assert "no answer within 2 s from rank 1 on silver" in capfd.readouterr().err
    assert (tmp_path / "ended-1").exists(), "a preempted one ends, and does not stay silent"


@pytest.mark.parametrize(
    ("visible", "tasks", "own"),
    [(4, 4, [0, 1, 2, 3]), (8, 4, [0, 1, 2, 3]), (1, 4, [0, 0, 0, 0]), (1, 1, [0]), (4, 0, [0, 1, 2, 3]),
     (1, 0, [0, 0])],
)
def test_all_gpus_of_a_node_are_visible_or_a_ranks_own(monkeypatch, visible, tasks, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert [devices.own_device(k, tasks) for k in range(len(own))] == own


@pytest.mark.parametrize(("visible", "tasks", "rank"), [(0, 4, 0), (2, 4, 0), (3, 4, 3), (2, 0, 2)])
def test_too_few_gpus_are_refused(monkeypatch, visible, tasks, rank):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with pytest.raises(ValueError, match=f"{visible} GPUs are visible to process {rank} of its node"):
        devices.own_device(rank, tasks)


def test_a_gpu_is_one_ranks_alone(monkeypatch):
    gpus = iter([SimpleNamespace(name="A100", uuid=uuid) for uuid in ("a", "b", "a")])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: next(gpus))
    store = torch.distributed.HashStore()
    devices.claim(0, 0, store)
    devices.claim(0, 1, store)
    with pytest.raises(ValueError, match="rank 2 sees the GPU of another rank"):
        devices.claim(0, 2, store)


def test_missing_gpus_and_a_full_disk_are_named(rank, tmp_path, capfd):
    rank.setattr(preflight, "FREE_BYTES", 10**18)
    assert preflight.main(tmp_path, 2, 0.1) == 1
    said = capfd.readouterr().err
    assert f"pre-flight on {socket.gethostname()}, rank 0: 0 GPUs are visible to process 0 of its" in said
    assert "MiB free, below" in said and "TMPDIR" not in said and (tmp_path / "ended-1").exists()
    assert preflight.main(tmp_path, 0, 1e9) == 1
    assert "set TMPDIR, or lower cluster.tmp_gib" in capfd.readouterr().err
    rank.setattr(preflight, "FREE_BYTES", 0)
    assert preflight.main(tmp_path, 0, 0) == 0


def test_a_master_without_a_name_is_found_at_once(rank, tmp_path, capfd):
    rank.setenv("MASTER_ADDR", "no-such-node.invalid")
    assert preflight.main(tmp_path, 0, 0.1) == 1
    assert "no-such-node.invalid, doesn't resolve" in capfd.readouterr().err
    assert (tmp_path / "ended-1").exists(), "ranks that srun stops now tell that they were asked to leave"


def test_a_torch_that_cannot_be_read_is_no_port(rank, tmp_path, capfd):
    def broken() -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    rank.setattr(preflight, "_import_torch", broken)
    assert preflight.main(tmp_path, 0, 0.1) == 1 and (tmp_path / "ended-1").exists()
    assert "begin (OSError: libcudart.so.12: cannot open shared object file). Where" in capfd.readouterr().err


def test_a_port_that_is_taken_is_named(rank, tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        rank.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert preflight.main(tmp_path, 0, 0.1) == 1
    assert "can't be opened" in capfd.readouterr().err


def test_clocks_and_folders():
    assert preflight.skew(100.0, 97.0) == [] and "7 s behind" in preflight.skew(90.0, 97.0)[0]
    assert "must lie on a file system that all nodes share" in preflight.shared_folder(Path("/nowhere"), "x", 0.0)[0]
