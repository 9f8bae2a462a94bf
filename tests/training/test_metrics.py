"""What a step logs of its rollout and its replay, against sums made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_avatar.config.schema import ReplayConfig
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.tracker import RewardTracker
from megatron_avatar.training import metrics

STATS = {
    "tokens": 40.0, "on_tokens": 10.0, "off_tokens": 30.0, "off_weight_sum": 6.0, "off_weight_sq_sum": 12.0,
    "off_ratio_max": 7.5, "off_bounded_tokens": 3.0, "ratio_sum": 50.0, "ratio_max": 7.5, "clipped_tokens": 4.0,
    "kl_sum": 2.0, "entropy_sum": 20.0, "loss": 0.5, "grad_norm": 1.0, "skipped": False, "logprob_error": 1.0,
    "packed_tokens": 50, "flops": 3.0, "flops/done": 4.0,
    "imbalance": 1.0, "surrogate_bins": np.ones(20), "position_bins": np.full(20, 2.0),
}  # fmt: skip


def trajectory(name: str, step: int, reward: float, correct: float, variant: str = "plain") -> Trajectory:
    parts = {"format": 1.0, "accuracy": reward, "correct": correct}
    completion = Completion(np.zeros(3, np.int64), np.zeros(3, np.float32), True)
    return Trajectory(name, variant, completion, reward, parts, 0.0, "s", "s", step, step)


def test_a_step_is_described_by_what_it_did():
    fresh = [trajectory("a", 9, 1.0, 1.0), trajectory("a", 9, 0.5, 0.0)]
    drawn = [[trajectory("b", 2, 1.0, 1.0), trajectory("b", 4, 0.0, 0.0)], [trajectory("c", 8, 0.2, 0.0)]]
    off = [np.array([1.5, 0.0], np.float32), np.array([-0.5], np.float32)]
    record = metrics.rl_record(
        fresh=fresh, accuracy=1.0, drawn=drawn, stats=STATS, on_advantages=[[np.array([1.0, -1.0])]],
        off_advantages=off, clipped=0.25, vanished=0.5, step=9, tracker=RewardTracker(),
        buffer=ReplayBuffer(ReplayConfig()), visits=4, hinted=1, in_use=2, pool=["a", "b"], completions_generated=80,
        lr=1e-6, updates=2,
    )  # fmt: skip
    found = {key.removeprefix("replay/"): value for key, value in record.items() if key.startswith("replay/")}
    assert found == {
        "size": 0, "completions": 3, "age": pytest.approx((7 + 5 + 1) / 3), "age_max": 7, "ess": 3.0,
        "clipped_advantages": 0.25, "dead": pytest.approx(1 / 3), "advantage": pytest.approx(1 / 3),
        "correct": pytest.approx(1 / 3), "ratio_max": 7.5, "bounded_tokens": 0.1,
    }  # fmt: skip
    assert (record["flops"], record["flops/done"]) == (6.0, 8.0), "of all updates of the rollout"
    assert record["hints/share"] == 0.25 and record["hints/visits"] == 1
    assert record["kl"] == 0.2, "over fresh tokens, not over all of them"
    assert record["entropy"] == 0.5 and record["ratio/mean"] == 1.25 and record["clip_fraction"] == 0.1
    assert record["reward"] == record["reward/accuracy"] == 0.75 and record["correct"] == 0.5
    assert record["accuracy/turn"] == 1.0 and record["reward/judge"] is None and "reward/correct" not in record
    assert sum(record["advantages"]["off"]) == 3 and sum(record["advantages"]["on"]) == 2
