"""Choosing a step's prompts, feeding its rewards back, and the advantages of its groups."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_avatar.config.schema import HintConfig, ReplayConfig, RLConfig
from megatron_avatar.data.loader import SampleOrder
from megatron_avatar.records import Completion, Group, Prompt, Sample, Trajectory
from megatron_avatar.rl.hints import HintPolicy
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.step import (
    Visit,
    assign_off_policy,
    assign_on_policy,
    choose_prompts,
    commit,
    draw_replay,
    turn_accuracy,
)
from megatron_avatar.rl.tracker import RewardTracker
from megatron_avatar.training.loop import Run

POOL = {f"p{k}": Sample(f"p{k}", "s", "train", "f", "?", "1", "numerical", hint="Count.") for k in range(20)}


def seen(window: int = 20) -> RewardTracker:
    """A tracker that knows all of the pool; p0 to p7, its lowest 40 %, are hard."""
    tracker = RewardTracker(window)
    for k, name in enumerate(POOL):
        tracker.update(name, "plain", [k / 20], solved=False)
    return tracker


def choose(n: int, share: float, step: int, tracker: RewardTracker, hints: HintPolicy | None = None) -> list:
    return choose_prompts(n, share, SampleOrder(POOL, 0, "s"), tracker, hints, POOL, POOL, (0, "s", step))


def trajectory(name: str, reward: float, step: int = 0, variant: str = "plain", **parts: float) -> Trajectory:
    completion = Completion(np.array([1]), np.zeros(1, np.float32), True)
    parts = {"accuracy": reward, "correct": float(reward == 1), **parts}
    return Trajectory(name, variant, completion, reward, parts, 0.0, "ref", "s", step, step)


@pytest.mark.parametrize(("n", "share"), [(1, 0.25), (8, 0.25), (6, 0.25), (3, 0.0), (2, 1.0)])
def test_revisits_are_hard_and_their_share_holds_in_the_mean(n, share):
    """Also with one prompt a step, where a rounded share would be none for ever."""
    tracker, counts = seen(), []
    hard = {name for name, tier in tracker.tiers().items() if tier == "hard"}
    for step in range(600):
        visits = choose(n, share, step, tracker)
        again = [v.sample_id for v in visits if v.revisit]
        assert len(visits) == n and len(set(again)) == len(again) and set(again) <= hard
        assert [v.sample_id for v in visits if not v.revisit] == SampleOrder(POOL, 0, "s").take(n - len(again))
        assert len({v.key for v in visits}) == n  # a prompt met twice in a step has randomness of its own
        counts.append(len(again))
    assert abs(np.mean(counts) - n * share) < 0.07 and np.ptp(counts) <= 1
    assert choose(n, share, 3, tracker) == choose(n, share, 3, tracker)


def test_without_history_every_prompt_is_fresh():
    assert not any(v.revisit for v in choose(8, 1.0, 0, RewardTracker()))


def test_accuracy_in_turn_leaves_out_revisits_and_what_was_set_aside():
    kinds = [("plain", False, 1), ("hinted", False, 4), ("plain", True, 1), ("hinted", True, 4), ("plain", False, 4),
             ("plain", False, 1), ("plain", False, 1)]  # fmt: skip
    visits = [Visit(f"p{k}", variant, str(k), revisit, stands_for)
              for k, (variant, revisit, stands_for) in enumerate(kinds)]  # fmt: skip
    scores = [[1, 0], [1, 1], [1, 1], [1, 1], [0, 0.25], [np.nan, 0.75]]  # of the last prompt nothing is there
    by_visit = {k: [trajectory(f"p{k}", 1.0, accuracy=score) for score in own]
                for k, own in enumerate(scores)}  # fmt: skip
    assert turn_accuracy(visits, by_visit) == pytest.approx((0.5 + 0 + 4 * 0.125 + 0.75) / 4)
    assert turn_accuracy(visits[2:4], by_visit) is None and turn_accuracy(visits, {}) is None


@pytest.mark.parametrize("plain_every", [1, 2, 4])
def test_accuracy_in_turn_is_that_of_all_prompts_though_the_hard_ones_are_hinted(plain_every):
    """Of ten prompts three succeed half of the time and get their hints; alone the plain visits would say 0.95."""
    tracker, names = RewardTracker(), [f"p{k}" for k in range(10)]
    hints, order = HintPolicy(HintConfig(patience=1, plain_every=plain_every), tracker), SampleOrder(names, 0, "s")
    found, rng, hinted = [], np.random.default_rng(0), 0
    for step in range(400):
        visits = choose_prompts(5, 0.4, order, tracker, hints, names, names, ("s", 0, step))
        by_visit = {}
        for k, visit in enumerate(visits):
            right = float(visit.sample_id not in names[:3] or visit.variant == "hinted" or rng.random() < 0.5)
            hinted += visit.variant == "hinted"
            by_visit[k] = [trajectory(visit.sample_id, right, step, visit.variant)]
        found.append(turn_accuracy(visits, by_visit))
        commit(visits, by_visit, tracker, hints, None)
    assert np.mean(found[50:]) == pytest.approx(0.85, abs=0.025) and (hinted > 300 or plain_every == 1)


def test_a_step_feeds_hints_that_nobody_uses_yet():
    """From an empty hint policy: a fourth visit without a solution brings the hint into the prompt."""
    tracker = seen(window=4)
    hints = HintPolicy(HintConfig(patience=4), tracker)
    for step in range(3):
        assert {v.variant for v in choose(20, 0.0, step, tracker, hints)} == {"plain"}
        commit([Visit("p0", "plain", "k", False)], {0: [trajectory("p0", 0.0, step)] * 4}, tracker, hints, None)
    variants = {v.sample_id: v.variant for v in choose(20, 0.0, 3, tracker, hints)}
    assert [name for name, variant in variants.items() if variant == "hinted"] == ["p0"]
    assert {v.variant for v in choose(20, 0.0, 3, tracker, None)} == {"plain"}


def test_a_fresh_visit_and_a_revisit_in_one_step_both_count():
    tracker = seen(window=4)
    before = tracker.streak("p0")
    visits = [Visit("p0", "plain", "k/0", False), Visit("p0", "plain", "k/1", True), Visit("p1", "plain", "k", False)]
    rows = {0: [trajectory("p0", 0.0)] * 2, 1: [trajectory("p0", 0.25)] * 2}  # the third was set aside
    buffer = ReplayBuffer(ReplayConfig())
    commit(visits, rows, tracker, None, buffer)
    assert tracker.streak("p0") == before + 2 and tracker.streak("p1") == 1
    assert tracker.mean("p0", "plain") == 0.125 and len(buffer) == 4
    commit(visits, {1: [trajectory("p0", 0.0), trajectory("p0", 1.0)]}, tracker, None, None)
    assert tracker.streak("p0") == 0 and "p0" in tracker.solved_plain


def test_what_was_masked_counts_and_is_not_replayed():
    tracker, buffer = seen(), ReplayBuffer(ReplayConfig())
    before = tracker.streak("p0")
    rows = {2: [trajectory("p0", 0.0), trajectory("p0", 0.5), trajectory("p0", 0.25)]}
    visits = [Visit(name, "plain", name, False) for name in ("p1", "p2", "p0")]
    commit(visits, rows, tracker, None, buffer, {(2, 1), (1, 0)})
    assert [t.reward for t in buffer.trajectories.values()] == [0.0, 0.25] and tracker.streak("p0") == before + 1


def test_a_draw_takes_the_spread_that_the_setting_names():
    tracker = seen()
    for sigma, scale in (("batch", np.std([0.0, 1.0])), ("buffer", np.std([0.0, 1.0, 0.1, 0.1, 0.1, 0.1]))):
        rl = RLConfig(replay=ReplayConfig(sigma=sigma, min_fill=1))
        buffer = ReplayBuffer(rl.replay)
        buffer.append([trajectory("p4", 0.0), trajectory("p4", 1.0)] + [trajectory("p2", 0.1)] * 4, {})
        drawn, advantages, _ = draw_replay(buffer, tracker, rl, n=4, step=5, key=("s",))
        assert [t.sample_id for t in drawn[0]] == ["p4", "p4"] and len(drawn) == 1, "p2's are as good as its R-bar"
        np.testing.assert_allclose(sorted(advantages[0]), [-0.2 / scale, 0.8 / scale], rtol=1e-5)


def test_small_groups_meet_the_baseline_of_their_own_variant():
    tracker = seen()
    tracker.update("p0", "hinted", [0.9], solved=True)
    groups = [
        Group(Prompt("p0", variant, np.zeros(1), np.zeros((3, 1))), [trajectory("p0", 0.5)])
        for variant in ("plain", "hinted")
    ] + [Group(Prompt("p1", "plain", np.zeros(1), np.zeros((3, 1))), [trajectory("p1", 1.0)] * 3)]
    scale = max(tracker.running_std, 0.1)
    assert assign_on_policy(groups, tracker, batch_mean=0.7) == 1  # three equal rewards; one completion never counts
    np.testing.assert_allclose([g.advantages[0] for g in groups], [0.5 / scale, -0.4 / scale, 0.0], rtol=1e-5)


def test_replayed_groups_meet_r_bar_or_without_vcrs_the_batch_mean():
    tracker = seen()
    drawn = [[trajectory("p4", 0.0), trajectory("p4", 1.0)], [trajectory("unseen", 0.5)]]
    sigma = np.std([0.0, 1.0, 0.5])
    (first, second), clipped = assign_off_policy(drawn, tracker, vcrs=True, clip=5.0)
    np.testing.assert_allclose(first, [-0.2 / sigma, 0.8 / sigma], rtol=1e-5)
    assert second[0] == 0.0 and clipped == 0.0  # no history: the mean of the batch
    (first, _), _ = assign_off_policy(drawn, tracker, vcrs=False, clip=5.0)
    np.testing.assert_allclose(first, [-0.5 / sigma, 0.5 / sigma], rtol=1e-5)
    assert assign_off_policy([], tracker, vcrs=True, clip=5.0) == ([], 0.0)


def test_replayed_completions_meet_the_prompt_that_they_were_made_with():
    """A hinted completion is replayed under the hinted prompt, also once the hint has been withdrawn."""
    asked = []

    def prompts(requests):
        asked.extend((sample.id, variant) for sample, variant in requests)
        return [Prompt(sample.id, variant, np.arange(3), np.zeros((3, 3))) for sample, variant in requests]

    run = SimpleNamespace(samples=POOL, tokens=lambda name, rows: len(rows), backend=SimpleNamespace(dp_rank=0),
                          prompts=prompts, update_media=lambda groups: [None] * len(groups))  # fmt: skip
    hinted = [replace(trajectory("p1", 0.5), variant="hinted"), replace(trajectory("p1", 1.0), variant="hinted")]
    drawn = [hinted, [trajectory("p1", 0.0)], [trajectory("p2", 0.0)]]
    groups, _ = Run.replay_groups(run, drawn, [np.zeros(len(d)) for d in drawn], [0])
    assert sorted(asked) == [("p1", "hinted"), ("p1", "plain"), ("p2", "plain")]
    assert all(t.variant == g.prompt.variant for g in groups for t in g.trajectories)
