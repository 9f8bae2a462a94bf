import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.rl.advantages import dead, off_policy_advantages, on_policy_advantages, vanished

reward = st.floats(0, 1).map(lambda r: round(r, 6))
UNUSED = {"baseline": 0.2, "running_std": 0.3, "batch_mean": 0.9}


@given(st.lists(reward, min_size=3, max_size=16))
def test_group_norm_is_the_sample_z_score(rewards: list[float]) -> None:
    scale = statistics.stdev(rewards) + 1e-4
    expected = [(r - statistics.fmean(rewards)) / scale for r in rewards]
    advantages = on_policy_advantages(np.array(rewards), **UNUSED)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    assert abs(advantages.sum()) < 1e-4
    # Neither history nor the rest of the batch matters to a full group.
    other = on_policy_advantages(np.array(rewards), baseline=None, running_std=9.0, batch_mean=-1.0)
    np.testing.assert_array_equal(advantages, other)


@given(st.floats(0, 1), st.integers(3, 16))
def test_equal_rewards_vanish_exactly(value: float, n: int) -> None:
    rewards = np.full(n, value)
    rewards[0] += 1e-16  # the rounding of a weighted sum
    assert vanished(rewards)
    assert not on_policy_advantages(rewards, **UNUSED).any()
    rewards[0] += 0.01
    assert not vanished(rewards) and on_policy_advantages(rewards, **UNUSED).all()


@pytest.mark.parametrize("rewards", [[0.7], [0.7, 0.7], [0.1, 0.9]])
def test_small_groups_use_history(rewards: list[float]) -> None:
    values = np.array(rewards)
    assert not vanished(values)
    np.testing.assert_allclose(on_policy_advantages(values, **UNUSED), (values - 0.2) / 0.3, rtol=1e-6)
    without = on_policy_advantages(values, baseline=None, running_std=0.01, batch_mean=0.4)
    np.testing.assert_allclose(without, (values - 0.4) / 0.1, rtol=1e-6)  # batch mean, floored scale
    zero = on_policy_advantages(values, baseline=0.0, running_std=1.0, batch_mean=0.4)
    np.testing.assert_allclose(zero, values, rtol=1e-6)  # a baseline of 0 is a history


@given(st.lists(st.tuples(reward, reward), min_size=1, max_size=40))
def test_off_policy_matches_its_formula(pairs: list[tuple[float, float]]) -> None:
    rewards, baselines = map(np.array, zip(*pairs, strict=True))
    scale = max(statistics.pstdev(rewards.tolist()), 0.1)
    raw = [(r - b) / scale for r, b in pairs]
    advantages, share = off_policy_advantages(rewards, baselines)
    np.testing.assert_allclose(advantages, np.clip(raw, -5, 5), atol=1e-5)
    assert advantages.dtype == np.float32 and share == pytest.approx(np.mean(np.abs(raw) > 5), abs=1e-9)


def test_equal_off_policy_rewards_stay_bounded() -> None:
    advantages, share = off_policy_advantages(np.ones(4), np.array([0.0, 0.6, 0.9, 1.0]))
    np.testing.assert_allclose(advantages, [5, 4, 1, 0], atol=1e-6)
    assert share == 0.25
    unfloored, _ = off_policy_advantages(np.ones(4), np.full(4, 0.6), sigma_floor=1e-4, clip=1e9)
    assert unfloored.max() > 1000  # what the floor is there for


def test_sigma_belongs_to_the_whole_batch() -> None:
    """One-sample slices would all be floored: another scale than the step's."""
    rewards, baselines = np.array([0.0, 1.0, 0.0, 1.0]), np.full(4, 0.5)
    whole, _ = off_policy_advantages(rewards, baselines)
    sliced = np.concatenate([off_policy_advantages(rewards[k : k + 1], baselines[k : k + 1])[0] for k in range(4)])
    np.testing.assert_allclose(whole, [-1, 1, -1, 1])
    assert np.abs(sliced - whole).min() > 1


def test_an_empty_off_policy_batch() -> None:
    advantages, share = off_policy_advantages(np.zeros(0), np.zeros(0))
    assert advantages.shape == (0,) and share == 0.0


@given(st.lists(reward, min_size=3, max_size=16), st.floats(0, 0.5))
def test_a_floor_bounds_what_little_differences_count(rewards: list[float], floor: float) -> None:
    """The paper's formula above the floor; below it a judge's noise stays noise."""
    values = np.array(rewards)
    scale = max(statistics.stdev(rewards), floor) + 1e-4
    advantages = on_policy_advantages(values, **UNUSED, std_floor=floor)
    np.testing.assert_allclose(advantages, (values - values.mean()) / scale, atol=1e-5)
    np.testing.assert_array_equal(on_policy_advantages(values, **UNUSED, std_floor=0.0),
                                  on_policy_advantages(values, **UNUSED))  # fmt: skip


def test_noise_in_an_otherwise_equal_group() -> None:
    """Four alike but for a judge's hundredth of weight 0.3."""
    values = np.array([0.8, 0.8, 0.8, 0.803])
    assert on_policy_advantages(values, **UNUSED)[-1] > 1.4
    assert on_policy_advantages(values, **UNUSED, std_floor=0.05)[-1] < 0.05


@given(st.lists(st.tuples(reward, reward), min_size=1, max_size=20), st.floats(0.01, 1))
def test_off_policy_takes_the_spread_it_is_given(pairs: list[tuple[float, float]], sigma: float) -> None:
    rewards, baselines = map(np.array, zip(*pairs, strict=True))
    advantages, _ = off_policy_advantages(rewards, baselines, sigma=sigma)
    np.testing.assert_allclose(advantages, np.clip((rewards - baselines) / max(sigma, 0.1), -5, 5), atol=1e-5)


def test_one_old_group_of_failures_is_no_batch() -> None:
    """Its own spread is nothing, so its floor would make four full negatives of it; the buffer's is not."""
    rewards, baselines = np.full(4, 0.2), np.full(4, 0.45)
    np.testing.assert_allclose(off_policy_advantages(rewards, baselines)[0], -2.5, rtol=1e-6)
    assert (off_policy_advantages(rewards, baselines, sigma=0.35)[0] > -0.75).all()


def test_what_counts_as_dead() -> None:
    assert dead(np.array([0.0, 1e-12, -1e-9, 1e-3, -2.0], np.float32)) == 3
