"""A step of a finished run again: equal, or what differs; the run's folder stays as it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_avatar.training.replay_step import checkpoint_before
from tests.training.small import arguments, train

SETTINGS = ("checkpoint.every=2", "checkpoint.keep=9", "eval.every=4", "eval.samples=2")


@pytest.fixture(scope="module")
def run(world) -> Path:
    assert train(*arguments(world, world / "run", *SETTINGS, steps=2)).returncode == 0
    return world / "run"


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*")
            if p.is_file()}


@pytest.mark.slow
def test_any_step_comes_out_equal_and_a_changed_one_is_named(world, run):
    before = content(run)
    done = train(*arguments(world, run, *SETTINGS, "replay_step=5", steps=2))  # the third stage's first, from step 4
    assert done.returncode == 0, done.stderr
    assert "from step_00000004 to step 5" in done.stderr and "step 5: equal" in done.stderr
    assert done.stderr.count("reward 0.") >= 4, "what was said, and what it earned"
    assert content(run) == before

    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[5])
    record["grad_norm"] *= 1.5
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines[:5], json.dumps(record)]))
    done = train(*arguments(world, run, *SETTINGS, "replay_step=6", steps=2))
    assert done.returncode == 1, done.stderr
    assert "step 5: equal" in done.stderr and "step 6 differs" in done.stderr and "grad_norm" in done.stderr
    assert "3.3e-01" in done.stderr


@pytest.mark.slow
def test_what_cannot_be_repeated_is_refused(world, run):
    done = train(*arguments(world, run, *SETTINGS, "replay_step=7", steps=2))
    assert done.returncode == 2 and "has steps 1 to 6" in done.stderr


def test_a_copy_beside_the_checkpoints_is_none(tmp_path):
    (tmp_path / "checkpoints" / "step_00000010.bak").mkdir(parents=True)
    assert checkpoint_before(tmp_path, 11, SimpleNamespace(all_gather_object=lambda value: [value])) is None
