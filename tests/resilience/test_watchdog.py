"""Hung runs end with their last words, live ones don't; a stop signal of one rank is all ranks'."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_avatar.data.manifest import load_manifest
from tests.training.small import ROOT, arguments, make


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make(folder)
    return folder


def start(what: str, settings: list[str], ranks: int, marker: Path) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "AVATAR_STOPPED": str(marker)}
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen([sys.executable, "-m", "tests.training.disturbed", what, *settings], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env={**common, **(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})})
        for rank in range(ranks)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hung_rank_ends_all_with_stacks_and_last_words(world, tmp_path, ranks):
    out = tmp_path / "run"
    settings = arguments(world, out, "data.workers=0", "data.decode_deadline_s=5", "log.watchdog_s=12", steps=1)
    processes = start("hang", settings, ranks, tmp_path / "stopped")
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [76] * ranks, texts
    assert (tmp_path / "stopped").exists()
    stacks = sorted((out / "stacks").iterdir())
    assert [path.name.rpartition("-")[2] for path in stacks] == [f"rank_{rank:05d}.txt" for rank in range(ranks)]
    assert "in hang" in stacks[0].read_text() and "hang" in stacks[0].read_text()
    said = re.search(r"HUNG: rank 0 on \S+: step, step 1, stage visual, samples ([^ ,;]+)", texts[0])
    assert said and said[1] in {sample.id for sample in load_manifest(world / "data" / "manifest.jsonl")}, texts[0]
    if ranks == 2:
        assert "HUNG: rank 1" in texts[1] and "all_gather_object" in stacks[1].read_text()


@pytest.mark.slow
def test_a_stop_signal_of_one_rank_ends_the_others_generation(world, tmp_path):
    """Rank 0 would generate for minutes: twelve tokens, half a second each, in nine steps."""
    settings = arguments(world, tmp_path / "run", "rl.sampling.max_new_tokens=300", "model.context=1024", steps=3)
    began = time.monotonic()
    processes = start("terminate_rank_1", settings, 2, tmp_path / "stopped")
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and (tmp_path / "stopped").exists(), texts
    assert time.monotonic() - began < 90
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "the step was dropped"
