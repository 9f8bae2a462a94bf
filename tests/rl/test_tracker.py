import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.rl.tracker import RewardTracker

visit = st.tuples(
    st.sampled_from(["a", "b", "c", "d"]), st.sampled_from(["plain", "hinted"]),
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=4),
)


def feed(tracker: RewardTracker, visits: list) -> None:
    for sample_id, variant, outcomes in visits:
        tracker.update(sample_id, variant, [r for r, _ in outcomes], solved=any(right for _, right in outcomes))


@settings(deadline=None)
@given(st.lists(visit, max_size=30), st.integers(1, 7))
def test_history_is_that_of_the_visits(visits: list, window: int) -> None:
    tracker = RewardTracker(window)
    feed(tracker, visits)
    for sample_id in "abcd":
        for variant in ("plain", "hinted"):
            rewards = [r for i, v, outcomes in visits if (i, v) == (sample_id, variant) for r, _ in outcomes]
            expected = np.mean(rewards[-window:]) if rewards else None
            assert tracker.mean(sample_id, variant) == (expected if expected is None else pytest.approx(expected))
        plain = [any(right for _, right in o) for i, v, o in visits if (i, v) == (sample_id, "plain")]
        assert tracker.streak(sample_id) == (plain[::-1].index(True) if True in plain else len(plain))
        assert (sample_id in tracker.solved_plain) == any(plain)
    everything = [r for _, _, outcomes in visits for r, _ in outcomes]
    assert tracker.running_std == pytest.approx(np.std(everything) if everything else 0.0, abs=1e-9)
    assert tracker.solved == {i for i, _, o in visits if any(right for _, right in o)}
    assert tracker.seen() == sorted({i for i, _, _ in visits})


@settings(deadline=None)
@given(st.lists(visit, max_size=20), st.lists(visit, max_size=10))
def test_state_survives_json_exactly(before: list, after: list) -> None:
    tracker = RewardTracker(5)
    feed(tracker, before)
    state = json.dumps(tracker.state_dict())
    resumed = RewardTracker(5)
    feed(resumed, after)  # whatever it held before is gone
    resumed.load_state_dict(json.loads(state))
    feed(tracker, after)
    feed(resumed, after)
    assert resumed.state_dict() == tracker.state_dict()
    assert resumed.tiers() == tracker.tiers() and resumed.running_std == tracker.running_std


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60), st.randoms())
def test_tiers_follow_quantiles_in_any_order(rewards: list[float], random) -> None:
    items = [(f"p{k}", r) for k, r in enumerate(rewards)]
    tiers = []
    for _ in range(2):
        tracker = RewardTracker()
        feed(tracker, [(i, "plain", [(r, False)]) for i, r in items])
        feed(tracker, [("only-hinted", "hinted", [(0.0, False)])])
        tiers.append(tracker.tiers())
        random.shuffle(items)
    assert tiers[0] == tiers[1] and len(tiers[0]) == len(rewards)  # ties too; hinted history alone has no tier
    assert tracker.tier("only-hinted") is None and tracker.rank("only-hinted") is None
    order = ("hard", "medium", "easy")
    sizes, n = Counter(tiers[0].values()), len(rewards)
    assert abs(sizes["hard"] - 0.4 * n) <= 0.5 and abs(sizes["easy"] - 0.25 * n) <= 0.5
    by_reward = sorted((r, order.index(tiers[0][i])) for i, r in items)
    assert all(a[1] <= b[1] for a, b in zip(by_reward, by_reward[1:], strict=False) if a[0] < b[0])
    assert all(tracker.tier(i) == tier for i, tier in tiers[0].items())


def test_ties_are_not_broken_by_name() -> None:
    tracker = RewardTracker()
    feed(tracker, [(f"p{k:03}", "plain", [(0.5, False)]) for k in range(200)])
    hard = {i for i, tier in tracker.tiers().items() if tier == "hard"}
    assert len(hard) == 80 and 20 < sum(i < "p100" for i in hard) < 60


def test_tiers_move_with_later_visits() -> None:
    tracker = RewardTracker()
    feed(tracker, [("low", "plain", [(0.1, False)]), ("high", "plain", [(0.9, True)])])
    assert tracker.tiers() == {"low": "hard", "high": "easy"}
    feed(tracker, [("low", "plain", [(1.0, True)] * 20)])
    assert tracker.tiers() == {"low": "easy", "high": "hard"}


def test_reset_forgets_everything() -> None:
    tracker = RewardTracker()
    feed(tracker, [("a", "plain", [(1.0, True)])])
    tracker.tiers()
    tracker.reset()
    assert tracker.state_dict() == RewardTracker().state_dict()
    assert tracker.tiers() == {} and tracker.mean("a", "plain") is None


def test_refill_rebuilds_baselines_but_keeps_streaks() -> None:
    tracker = RewardTracker(window=2)
    feed(tracker, [("a", "plain", [(0.9, False)] * 3)])
    completion = Completion(np.ones(1, np.int64), np.zeros(1, np.float32), True)
    tracker.refill([Trajectory("a", "plain", completion, r, {}, 0.0, "ref", "s", 0, 0) for r in (0.0, 0.2, 0.4)])
    assert tracker.mean("a", "plain") == pytest.approx(0.3)
    assert tracker.running_std == pytest.approx(np.std([0.0, 0.2, 0.4]))
    assert tracker.streak("a") == 1
