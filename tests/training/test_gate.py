"""The gate on generation against training: a shift by one position stops a run before it learns from it."""

import dataclasses
import signal
from pathlib import Path

import pytest

from megatron_avatar.config import load_config
from megatron_avatar.policy import backend as backends
from megatron_avatar.training import learner, loop, telemetry
from tests.training.small import ROOT, arguments, make


@pytest.fixture
def backend():
    config = load_config(["recipe=tiny_avatar", "model.path=x", "data.manifest=y"])
    handlers = {number: signal.getsignal(number) for number in telemetry.StopSignal.SIGNALS}
    yield backends.start(config.parallel)
    backends.stop()
    for number, handler in handlers.items():  # the run in this process took them
        signal.signal(number, handler)


def test_a_shift_by_one_position_stops_the_run(tmp_path: Path, backend, monkeypatch):
    make(tmp_path)
    base = ROOT / "assets" / "tiny_base"
    config = load_config([*arguments(tmp_path, tmp_path / "run", f"model.path={base}", "data.workers=0", steps=1)])
    pack = learner.pack_groups

    def shifted(*args):
        batch = pack(*args)
        return dataclasses.replace(batch, positions=batch.positions + (~batch.is_prompt))

    monkeypatch.setattr(learner, "pack_groups", shifted)
    with pytest.raises(learner.LogprobMismatch, match="No update was applied"):
        loop.train(config, backend)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
