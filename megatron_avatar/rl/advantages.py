"""Advantages of fresh completions (group norm) and of replayed ones (against R-bar, paper VCRS).

n is the number of fresh completions of one prompt, m that of the whole step's replayed completions.
"""

from __future__ import annotations

import numpy as np

GROUP_EPSILON = 1e-4
SIGMA_FLOOR = 0.1
ADVANTAGE_CLIP = 5.0
MIN_GROUP = 3  # below, the group norm degenerates: n = 1 gives 0, n = 2 a constant
EQUAL = 1e-9  # rewards in [0, 1] closer than this differ by rounding alone


def vanished(rewards: np.ndarray) -> bool:
    """Whether a group's rewards [n] are all equal, so that its group-normed advantages are zero.

    Groups below three completions never count: their baseline is R-bar.
    """
    return len(rewards) >= MIN_GROUP and bool(np.ptp(rewards) <= EQUAL)


def on_policy_advantages(
    rewards: np.ndarray, *, baseline: float | None, running_std: float, batch_mean: float, std_floor: float = 0.0
) -> np.ndarray:
    """Advantages [n] float32 of one prompt's fresh completions.

    For n >= 3 the group norm (R - mean) / (max(std, std_floor) + 1e-4) with the sample standard deviation (paper,
    GRPO advantage, where the floor is 0: any difference then counts in full, a judge's noise too). Below,
    (R - baseline) / max(running_std, 0.1), where `baseline` is R-bar of the prompt and, for a prompt without history
    (None), `batch_mean`.
    """
    rewards = np.asarray(rewards, np.float64)
    assert np.isfinite(rewards).all(), f"rewards {rewards}"
    if vanished(rewards):
        advantages = np.zeros_like(rewards)
    elif len(rewards) >= MIN_GROUP:
        advantages = (rewards - rewards.mean()) / (max(float(rewards.std(ddof=1)), std_floor) + GROUP_EPSILON)
    else:
        centre = batch_mean if baseline is None else baseline
        advantages = (rewards - centre) / max(running_std, SIGMA_FLOOR)
    return advantages.astype(np.float32)


def dead(advantages: np.ndarray) -> int:
    """How many of some completions have no advantage, and so no gradient."""
    return int(np.count_nonzero(np.abs(advantages) <= EQUAL / SIGMA_FLOOR))


def off_policy_advantages(
    rewards: np.ndarray, baselines: np.ndarray, *, sigma: float | None = None, sigma_floor: float = SIGMA_FLOOR,
    clip: float = ADVANTAGE_CLIP,
) -> tuple[np.ndarray, float]:
    """Advantages [m] float32 of the step's whole off-policy batch, across ranks, and the clipped share.

    (R - R-bar) / max(sigma_off, floor), clipped to +-clip (paper, VCRS advantage). sigma_off is `sigma`, or where
    that is None the population standard deviation of `rewards` [m] (the paper's). `baselines` [m] holds R-bar of each
    completion's prompt and variant (the batch mean without VCRS). An empty batch gives ([0], 0.0).
    """
    rewards, baselines = np.asarray(rewards, np.float64), np.asarray(baselines, np.float64)
    assert rewards.shape == baselines.shape and np.isfinite(rewards - baselines).all(), (rewards, baselines)
    if not len(rewards):
        return np.zeros(0, np.float32), 0.0
    raw = (rewards - baselines) / max(float(rewards.std()) if sigma is None else sigma, sigma_floor)
    return np.clip(raw, -clip, clip).astype(np.float32), float(np.mean(np.abs(raw) > clip))
