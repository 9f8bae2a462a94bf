"""Stratified replay (paper, "Stratified replay buffer"): which past completions are kept and drawn.

Every rank holds the same buffer and makes the same draw without a message or a file: nothing depends on
the order in which ranks gathered a step, and all randomness is keyed. Tiers belong to prompts and are
passed in as they stand now; a trajectory never remembers one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from megatron_avatar.config.schema import ReplayConfig
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.records import Trajectory, Variant
from megatron_avatar.rl.advantages import ADVANTAGE_CLIP, SIGMA_FLOOR
from megatron_avatar.rl.tracker import TIERS, Tier

UNRANKED: Tier = "medium"  # a prompt without plain history: nothing is known of its difficulty

Baseline = Callable[[str, Variant], float | None]


class ReplayBuffer:
    """Trajectories by serial number; a smaller serial is an older trajectory.

    A serial names one trajectory with one reward for good: rescored ones get new serials. That lets
    the store write each trajectory once.
    """

    def __init__(self, config: ReplayConfig, *, advantage_clip: float = ADVANTAGE_CLIP) -> None:
        self._config, self._advantage_clip = config, advantage_clip
        # Rounding the running sums keeps the tiers' capacities adding up to the whole.
        edges = np.rint(np.cumsum([0.0, *config.capacity_share]) * config.capacity).astype(int)
        self._capacity: dict[Tier, int] = dict(zip(TIERS, np.diff(edges).tolist(), strict=True))
        self.reset()

    def reset(self) -> None:
        """Forget everything, at a stage change."""
        self._rows: dict[int, Trajectory] = {}
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._rows)

    # ---- contents ------------------------------------------------------------------------------

    @property
    def trajectories(self) -> dict[int, Trajectory]:
        """Serial number to trajectory, oldest first: what the store writes."""
        return dict(self._rows)

    def restore(self, trajectories: Mapping[int, Trajectory]) -> None:
        """Take over what the store read."""
        self._rows = {serial: trajectories[serial] for serial in sorted(trajectories)}
        self._next_serial = max(self._rows, default=-1) + 1

    def append(self, trajectories: Iterable[Trajectory], tiers: Mapping[str, Tier]) -> None:
        """Add a step's trajectories, then cut every tier to its capacity, its own oldest first.

        Texts are dropped: the token ids hold them, and a trajectory stays at 8 bytes a token on disk.
        """
        for trajectory in sorted(trajectories, key=_content_order):
            assert math.isfinite(trajectory.reward) and math.isfinite(trajectory.kl_ref), trajectory
            self._add(replace(trajectory, text=""))
        excess = {tier: size - self._capacity[tier] for tier, size in self.tier_sizes(tiers).items()}
        for serial, trajectory in list(self._rows.items()):
            tier = tiers.get(trajectory.sample_id, UNRANKED)
            if excess[tier] > 0:
                excess[tier] -= 1
                del self._rows[serial]

    def rescore(self, score: Callable[[Mapping[str, float]], float]) -> None:
        """Recompute every reward from its stored parts, for a stage with other weights."""
        rows, self._rows = self._rows, {}
        for trajectory in rows.values():
            self._add(replace(trajectory, reward=score(trajectory.parts)))

    def _add(self, trajectory: Trajectory) -> None:
        self._rows[self._next_serial] = trajectory
        self._next_serial += 1

    def tier_sizes(self, tiers: Mapping[str, Tier]) -> dict[Tier, int]:
        """Trajectories a tier, as tiers stand now."""
        sizes: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        for trajectory in self._rows.values():
            sizes[tiers.get(trajectory.sample_id, UNRANKED)] += 1
        return sizes

    # ---- drawing -------------------------------------------------------------------------------

    def draw(
        self, n_completions: int, n_off: int, step: int, tiers: Mapping[str, Tier], baselines: Baseline,
        sigma: float, rng_key: str,
    ) -> list[list[Trajectory]]:
        """Replay groups of step `step`: up to `n_off` trajectories each, of one (prompt, variant).

        Groups are drawn until they hold `n_completions` trajectories (the last is cut to fit) or nothing
        is left; only trajectories of earlier steps count, no older than max_age, and at least
        min_fill of them. `baselines` gives R-bar and `sigma` the running standard deviation of rewards,
        for the priorities. Changes nothing; equal arguments give equal draws.
        """
        assert n_off >= 1, n_off
        max_age = self._config.max_age or math.inf
        rows = [t for t in self._rows.values() if 0 < step - t.step <= max_age]
        if len(rows) < max(self._config.min_fill, 1):
            return []
        rng = keyed_rng(rng_key)
        queues = self._queues(rows, self._sort_keys(rows, baselines, sigma, rng), tiers)

        drawn: list[list[Trajectory]] = []
        missing = n_completions
        while missing > 0 and any(queues.values()):
            for tier in self._tier_sequence(math.ceil(missing / n_off), queues, rng):
                group = queues[tier].pop(0)[: min(n_off, missing)]
                drawn.append(group)
                missing -= len(group)
                if missing == 0:
                    break
        return drawn

    def _sort_keys(
        self, rows: list[Trajectory], baselines: Baseline, sigma: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Keys [rows] whose descending order is the order of drawing without replacement.

        Log-weight plus Gumbel noise: sorting is then successive sampling with probability proportional
        to weight (exp(score / T), or 1 for uniform).
        """
        config = self._config
        if config.order == "fifo":
            return -np.arange(len(rows), dtype=np.float64)
        noise = rng.gumbel(size=len(rows))
        if config.order == "uniform":
            return noise
        assert config.order == "priority", config.order
        rbar = {key: baselines(*key) for key in {(t.sample_id, t.variant) for t in rows}}
        scale = max(sigma, SIGMA_FLOOR)
        scores = np.empty(len(rows))
        for k, t in enumerate(rows):
            baseline = rbar[t.sample_id, t.variant]
            advantage = 0.0 if baseline is None else (t.reward - baseline) / scale
            advantage = min(max(advantage, -self._advantage_clip), self._advantage_clip)
            scores[k] = config.w_reward * advantage - config.w_kl * t.kl_ref
        return scores / config.temperature + noise

    @staticmethod
    def _queues(
        rows: list[Trajectory], keys: np.ndarray, tiers: Mapping[str, Tier]
    ) -> dict[Tier, list[list[Trajectory]]]:
        """Groups a tier in order of drawing. A group stands where its first trajectory does, so that
        its weight is the sum of its trajectories' weights."""
        groups: dict[tuple[str, Variant], list[Trajectory]] = {}
        for k in np.argsort(-keys, kind="stable"):
            groups.setdefault((rows[k].sample_id, rows[k].variant), []).append(rows[k])
        queues: dict[Tier, list[list[Trajectory]]] = {tier: [] for tier in TIERS}
        for (sample_id, _), group in groups.items():
            queues[tiers.get(sample_id, UNRANKED)].append(group)
        return queues

    def _tier_sequence(
        self, count: int, queues: Mapping[Tier, list[list[Trajectory]]], rng: np.random.Generator
    ) -> list[Tier]:
        """Tiers of the next `count` groups (fewer when groups run out), in proportion to draw_share.

        A tier short of groups gives all it has and lends the rest of its share to the others, in
        proportion. Systematic rounding: each tier's share rounded down or up, and exact in the mean.
        """
        left = np.array([len(queues[tier]) for tier in TIERS])
        share = np.array(self._config.draw_share)
        count = min(count, int(left.sum()))
        quota = np.zeros(len(TIERS), int)
        lending = left > 0
        while True:
            weights = share * lending if (share * lending).any() else lending.astype(float)
            expected = (count - quota.sum()) * weights / max(weights.sum(), 1e-12)
            short = lending & (left <= expected)
            if not short.any():
                break
            quota[short], lending = left[short], lending & ~short
        edges = np.cumsum([0.0, *expected])
        edges[-1] = np.rint(edges[-1])
        quota += np.diff(np.floor(edges + rng.random()).astype(int))
        # Shuffled, so that no tier always comes last, where a group may be cut.
        return [TIERS[k] for k in rng.permutation(np.repeat(np.arange(len(TIERS)), quota))]


def _content_order(trajectory: Trajectory) -> tuple[int, bytes]:
    """Order of one append, whatever the order of gathering: by step, then by a hash of the tokens.

    Log-probabilities stay out: their last bits depend on the layout of the ranks, and the draws must not.
    """
    digest = hashlib.blake2b(f"{trajectory.sample_id}\0{trajectory.variant}\0".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(trajectory.completion.token_ids).tobytes())
    return trajectory.step, digest.digest()
