"""Reward history of the training prompts: the baseline R-bar (VCRS), difficulty tiers, solvability.

R-bar(q) is the mean reward of the last `window` on-policy completions of a prompt, per variant (paper,
VCRS). Prompts are named by sample id, never by their text: two videos may share a question. Reads come
before a step's own rewards are fed in; replayed completions are never fed.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

from megatron_avatar.records import Trajectory, Variant

Tier = Literal["easy", "medium", "hard"]
TIERS: tuple[Tier, ...] = ("easy", "medium", "hard")
HARD_QUANTILE = 0.40  # of plain R-bar over the prompts seen
MEDIUM_QUANTILE = 0.75


class RewardTracker:
    """Everything known of past rewards in a stage; alike on every rank that was fed alike."""

    def __init__(self, window: int = 20) -> None:
        assert window >= 1, window
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.solved: set[str] = set()  # prompts solved at least once, in either variant
        self.solved_plain: set[str] = set()  # the same without a hint
        self._streaks: dict[str, int] = {}
        self._forget_rewards()

    def _forget_rewards(self) -> None:
        self._windows: dict[tuple[str, Variant], deque[float]] = {}
        self._means: dict[tuple[str, Variant], float] = {}  # of those that were asked for since they last moved
        self._count, self._mean, self._square_sum = 0, 0.0, 0.0  # Welford over all rewards
        self._ranks: dict[str, float] | None = None  # these two as they stand, None once a reward came in
        self._tiers: dict[str, Tier] | None = None

    # ---- feeding -------------------------------------------------------------------------------

    def update(self, sample_id: str, variant: Variant, rewards: Sequence[float], *, solved: bool) -> None:
        """Append one visit's on-policy rewards, after the step used R-bar; `solved`: one of its answers is right."""
        key = (sample_id, variant)
        for reward in rewards:
            self._append(key, reward)
        if solved:
            self.solved.add(sample_id)
        if variant == "plain":
            self._streaks[sample_id] = 0 if solved else self.streak(sample_id) + 1
            if solved:
                self.solved_plain.add(sample_id)

    def refill(self, trajectories: Iterable[Trajectory]) -> None:
        """Rebuild R-bar and spread from trajectories in order of age, rescored for a new stage."""
        self._forget_rewards()
        for trajectory in trajectories:
            self._append((trajectory.sample_id, trajectory.variant), trajectory.reward)

    def _append(self, key: tuple[str, Variant], reward: float) -> None:
        reward = float(reward)
        assert math.isfinite(reward), f"reward {reward} of {key}"
        self._windows.setdefault(key, deque(maxlen=self.window)).append(reward)
        self._count += 1
        delta = reward - self._mean
        self._mean += delta / self._count
        self._square_sum += delta * (reward - self._mean)
        self._means.pop(key, None)
        self._ranks = self._tiers = None

    # ---- reading -------------------------------------------------------------------------------

    def mean(self, sample_id: str, variant: Variant) -> float | None:
        """R-bar, the baseline of a prompt in a variant; None without history."""
        key = (sample_id, variant)
        if key not in self._means:
            rewards = self._windows.get(key)
            if not rewards:
                return None
            self._means[key] = math.fsum(rewards) / len(rewards)
        return self._means[key]

    @property
    def running_std(self) -> float:
        """Population standard deviation of all on-policy rewards of the stage so far (0 without any)."""
        return math.sqrt(self._square_sum / self._count) if self._count else 0.0

    def streak(self, sample_id: str) -> int:
        """Plain visits in a row, up to the last one, without a solved completion."""
        return self._streaks.get(sample_id, 0)

    def seen(self) -> list[str]:
        """Prompts with any history in this stage, sorted."""
        return sorted({sample_id for sample_id, _ in self._windows})

    def rank(self, sample_id: str) -> float | None:
        """Mid-rank in (0, 1) of a prompt's plain R-bar among all prompts seen plain; None if unseen."""
        return self._ranking().get(sample_id)

    def tier(self, sample_id: str) -> Tier | None:
        """The prompt's tier now: lowest 40 % of ranks hard, next 35 % medium, the rest easy."""
        rank = self.rank(sample_id)
        return None if rank is None else _tier_of(rank)

    def tiers(self) -> dict[str, Tier]:
        """Tier of every prompt that has a plain history."""
        ranks = self._ranking()
        if self._tiers is None:
            self._tiers = {sample_id: _tier_of(rank) for sample_id, rank in ranks.items()}
        return dict(self._tiers)

    def _ranking(self) -> dict[str, float]:
        if self._ranks is None:
            plain = [i for i, variant in self._windows if variant == "plain"]
            plain.sort(key=lambda i: (self.mean(i, "plain"), _tie_break(i)))
            self._ranks = {sample_id: (k + 0.5) / len(plain) for k, sample_id in enumerate(plain)}
        return self._ranks

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact: floats survive JSON bit for bit."""
        return {
            "windows": [[*key, list(rewards)] for key, rewards in self._windows.items()],
            "streaks": dict(self._streaks),
            "solved": sorted(self.solved),
            "solved_plain": sorted(self.solved_plain),
            "moments": [self._count, self._mean, self._square_sum],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._windows = {(i, v): deque(rewards, maxlen=self.window) for i, v, rewards in state["windows"]}
        self._streaks = dict(state["streaks"])
        self.solved, self.solved_plain = set(state["solved"]), set(state["solved_plain"])
        self._count, self._mean, self._square_sum = state["moments"]


def _tier_of(rank: float) -> Tier:
    return "hard" if rank < HARD_QUANTILE else "medium" if rank < MEDIUM_QUANTILE else "easy"


@lru_cache(maxsize=100_000)
def _tie_break(sample_id: str) -> bytes:
    return hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
