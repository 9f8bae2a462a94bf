"""The fault suite's plan and its reader: a suite that sees no difference anywhere would prove nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.faults import PHASES, SIGNALS, plan
from bench.faults_reader import damage, differences, trajectories
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.resilience import checkpoint
from megatron_avatar.rl.replay.store import write_shards
from tests.resilience.test_checkpoint import Trainer


def test_sixty_kills_meet_every_phase_and_signal():
    pairs = plan(60, seed=0)
    phases, signals = Counter(p for p, _ in pairs), Counter(s for _, s in pairs)
    assert set(phases) == set(PHASES) and min(phases.values()) >= 6
    assert set(signals) == set(SIGNALS) and min(signals.values()) >= 18
    assert {phase for phase, _ in plan(10, seed=1)} == set(PHASES)


def make_run(out: Path, backend, *, logprob: float = -1.0, seed: int = 0, steps=(1, 2)) -> Path:
    completion = Completion(np.arange(5), np.full(5, logprob, np.float32), True)
    rows = {k: Trajectory(f"s{k}", "plain", completion, 0.5, {}, 0.0, "r", "visual", k, k) for k in range(3)}
    index = write_shards(out / "replay", rows, known={})
    trainer = Trainer(backend, seed=seed)
    torch.manual_seed(0)
    trainer.save(out, 2, replay=index, tracker={"a": 1})
    (out / "export" / "visual").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, out / "export" / "visual" / "model.safetensors")
    lines = [json.dumps({"step": step, "loss": 0.5, "time": step * seed, "time/step": 1.0}) for step in steps]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return out


def test_the_reader_sees_what_differs_and_only_that(backend, tmp_path):
    whole = make_run(tmp_path / "whole", backend)
    assert differences(whole, make_run(tmp_path / "same", backend)) == []
    assert any("trajectory" in d for d in differences(whole, make_run(tmp_path / "rows", backend, logprob=-2.0)))
    assert any(d.startswith("checkpoint policy") for d in differences(whole, make_run(tmp_path / "w", backend, seed=1)))
    assert "metrics have steps [1, 1, 2]" in differences(whole, make_run(tmp_path / "m", backend, steps=(1, 1, 2)))
    other = make_run(tmp_path / "other", backend)
    save_file({"w": torch.zeros(2)}, other / "export" / "visual" / "model.safetensors")
    state = max(other.glob("checkpoints/*")) / checkpoint.STATE
    state.write_text(state.read_text().replace('"a": 1', '"a": 2'))
    assert differences(whole, other) == ["export export/visual/model.safetensors", "state tracker"]
    assert damage(other) == ["step_00000002/state.json"]


@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_lost_trajectories_are_counted(backend, tmp_path, harm):
    run = make_run(tmp_path / "run", backend)
    assert trajectories(run)[:2] == (3, 0)
    (shard,) = (run / "replay").iterdir()
    shard.unlink() if harm == "remove" else shard.write_bytes(shard.read_bytes()[:-1] + b"\0\1")
    assert trajectories(run)[:2] == (3, 3)
