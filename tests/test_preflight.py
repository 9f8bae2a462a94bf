"""The pre-flight's judgements; what nodes do for real is tried in tests/slurm."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from slurm import preflight


@pytest.fixture
def rank(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0",
                        "AVATAR_NODES": "gold silver", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preflight, "leave_on_signals", lambda: None)
    return monkeypatch


def test_one_sound_node_passes(rank, tmp_path, capfd):
    assert preflight.main(tmp_path / "run", 0) == 0
    assert "1 ranks, 0 GPUs a node, all-reduce good" in capfd.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_a_node_that_never_answers_is_named(rank, tmp_path, capfd):
    rank.setenv("SLURM_NTASKS", "2")
    rank.setattr(preflight, "DEADLINE_S", 2)
    began = time.monotonic()
    assert preflight.main(tmp_path, 0) == 2
    assert "no answer within 2 s from rank 1 on silver" in capfd.readouterr().err
    assert time.monotonic() - began < 10


def test_missing_gpus_and_a_full_disk_are_named(rank, tmp_path, capfd):
    rank.setattr(preflight, "FREE_BYTES", 10**18)
    assert preflight.main(tmp_path, 2) == 2
    said = capfd.readouterr().err
    assert f"pre-flight on {socket.gethostname()}, rank 0: 0 GPUs are visible, 2 processes need one each" in said
    assert "MiB free, below" in said


def test_a_master_without_a_name_is_found_at_once(rank, tmp_path, capfd):
    rank.setenv("MASTER_ADDR", "no-such-node.invalid")
    assert preflight.main(tmp_path, 0) == 2
    assert "no-such-node.invalid, doesn't resolve" in capfd.readouterr().err


def test_a_port_that_is_taken_is_named(rank, tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        rank.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert preflight.main(tmp_path, 0) == 2
    assert "can't be opened" in capfd.readouterr().err


def test_clocks_and_folders():
    assert preflight.skew(100.0, 97.0) == [] and "7 s behind" in preflight.skew(90.0, 97.0)[0]
    assert "must lie on a file system that all nodes share" in preflight.shared_folder(Path("/nowhere"), "x", 0.0)[0]
