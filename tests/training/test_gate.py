"""What ends a run before it learns from it: a shift by one position, and numbers that stay not finite."""

import dataclasses
import json
import math
import signal

import numpy as np
import pytest

from megatron_avatar.config import load_config
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.resilience import stopping
from megatron_avatar.training import learner, loop
from megatron_avatar.training.guard import LogprobMismatch
from tests.training.small import ROOT, arguments


@pytest.fixture
def backend():
    config = load_config(["recipe=tiny_avatar", "model.path=x", "data.manifest=y"])
    handlers = {number: signal.getsignal(number) for number in stopping.StopSignal.SIGNALS}
    yield backends.start(config.parallel)
    backends.stop()
    for number, handler in handlers.items():  # the run in this process took them
        signal.signal(number, handler)


@pytest.mark.parametrize(("dtype", "logged", "said"), [
    ("float32", 0, "rl.guard.exact=1.05.* No update was applied"),
    ("bfloat16", 2, "rl.guard.stop=1.1 in 3 steps in a row"),
])  # fmt: skip
def test_a_shift_by_one_position_stops_the_run(world, tmp_path, backend, monkeypatch, caplog, dtype, logged, said):
    """At once in float32, within three steps in half precision, where rounding alone stays below 1.02."""
    base = ROOT / "assets" / "tiny_base"
    settings = (f"model.path={base}", f"model.dtype={dtype}", "checkpoint.every=1")
    pack = learner.pack_groups

    def shifted(*args):
        batch = pack(*args)
        return dataclasses.replace(batch, positions=batch.positions + (batch.prompt_ids < 0))

    monkeypatch.setattr(learner, "pack_groups", shifted)
    words = "data.instruction='Give <think> </think> <answer> </answer>'"
    for more in ((), ("continue_changed=true", words)):  # continued, it counts on, and notices other words
        with pytest.raises(LogprobMismatch, match=said):
            loop.train(load_config([*arguments(world, tmp_path / "run", *settings, *more, steps=4)]), backend)
        assert ("goes on in other words" in caplog.text) == (logged > 0 and bool(more))
        path = tmp_path / "run" / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert len(records) == logged
        for record in records:
            assert record["logprob_error"] > 1.1 and record["logprob_error/max"] > record["logprob_error"]
            means, tokens = (record["logprob_error/entropy"][key] for key in ("mean", "tokens"))
            total = sum(mean * count for mean, count in zip(means, tokens, strict=True) if count)
            assert total / sum(tokens) == pytest.approx(record["logprob_error"])


def test_updates_that_are_not_finite_are_recorded_and_end_the_run_after_three(world, tmp_path, backend, monkeypatch):
    base = ROOT / "assets" / "tiny_base"
    config = load_config([*arguments(world, tmp_path / "run", f"model.path={base}", "checkpoint.every=1", steps=3)])
    del config.stages["audio_visual"], config.stages["localisation"]
    forward = OmniPolicy.forward
    monkeypatch.setattr(OmniPolicy, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.nan)

    def records() -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    for _ in range(2):  # anew, and continued after two skipped updates
        with pytest.raises(learner.NonFiniteUpdates, match="3 updates in a row were skipped.* None was applied"):
            loop.train(config, backend)
        assert [(r["step"], r["skipped"], r["loss"], r["logprob_error"]) for r in records()] == [
            (step, True, None, None) for step in (1, 2)
        ]
    monkeypatch.undo()
    loop.train(config, backend)
    assert not records()[2]["skipped"] and records()[2]["replay/size"] == 4 * config.rl.n_on  # of this step alone


@pytest.mark.parametrize("updates", [1, 2])
def test_a_rollout_is_used_so_often_and_the_gate_asks_once(world, tmp_path, backend, monkeypatch, updates):
    """After the first update the policy is another one: what it differs by is learning, and its ratios say so."""

    def opposed(groups, *_, **__) -> int:
        for group in groups:
            group.advantages = np.array([1, -1, 1, -1], np.float32)
        return 0

    monkeypatch.setattr(loop, "assign_on_policy", opposed)
    applied = []
    step = learner.Learner._step
    monkeypatch.setattr(learner.Learner, "_step", lambda *args: applied.append(1) or step(*args))
    config = load_config([*arguments(world, tmp_path / "run", f"model.path={ROOT / 'assets' / 'tiny_base'}",
                                     f"rl.updates_per_rollout={updates}", "optim.lr=0.05", "optim.schedule=constant",
                                     "optim.warmup_fraction=0", steps=1)])  # fmt: skip
    del config.stages["audio_visual"], config.stages["localisation"]
    loop.train(config, backend)
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(applied) == updates and record["completions_generated"] == 4 * 4 and not record["skipped"]
    assert (record["ratio/max"] > 1.5) == (updates == 2), "of the last update, far beyond what the gate lets pass"
    assert record["logprob_error"] == pytest.approx(1, abs=1e-5), "of the first"
