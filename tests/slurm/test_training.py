"""Real jobs on a real Slurm: training over two nodes, a stop signal, the requeue, and what the run comes to."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from tests.training import small

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
LAYOUT = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    small.make(folder)
    return folder


def submit(slurm, world: Path, out: Path, steps: int) -> str:
    settings = small.arguments(world, out, "parallel.tp=2", "checkpoint.every=2", "checkpoint.keep=9", steps=steps)
    settings.remove("recipe=tiny_avatar")
    log = f"--output={out.parent}/{out.name}.log"
    return slurm.submit(*LAYOUT, log, "slurm/tiny.sh", "recipe=tiny_avatar", *settings, cwd=ROOT)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def weights(out: Path) -> str:
    return hashlib.sha256((out / "export" / "localisation" / "model.safetensors").read_bytes()).hexdigest()


def test_trains_over_two_nodes_and_continues_bit_for_bit_after_usr1(slurm, world, tmp_path):
    whole = submit(slurm, world, tmp_path / "whole", 3)
    assert slurm.wait(whole, {"COMPLETED", "FAILED"}, 300) == "COMPLETED", (tmp_path / "whole.log").read_text()

    job = submit(slurm, world, tmp_path / "cut", 3)
    end = time.monotonic() + 200
    while steps_done(tmp_path / "cut") < 4:
        assert time.monotonic() < end, (tmp_path / "cut.log").read_text()
        time.sleep(0.1)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait(job, {"PENDING"}, 60)
    assert 4 <= steps_done(tmp_path / "cut") < 9, "the signal came too late to prove anything"
    assert slurm.wait(job, {"COMPLETED", "FAILED"}, 300) == "COMPLETED", (tmp_path / "cut.log").read_text()

    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    records = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
               for name in ("whole", "cut")]
    assert [r["step"] for r in records[1]] == list(range(1, 10))
    for one, other in zip(*records, strict=True):
        own = {k for k in one if not k.startswith("time") and k != "peak_rss_mib"}
        assert {k: one[k] for k in own} == {k: other[k] for k in own}
