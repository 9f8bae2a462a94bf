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
from typing import Any

import numpy as np

from megatron_avatar.config.schema import ReplayConfig
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.records import Completion, Trajectory, Variant
from megatron_avatar.rl.advantages import ADVANTAGE_CLIP, EQUAL, SIGMA_FLOOR
from megatron_avatar.rl.tracker import TIERS, Tier

UNRANKED: Tier = "medium"  # a prompt without plain history: nothing is known of its difficulty

COLUMNS = {"serial": np.int64, "group": np.int64, "step": np.int64, "reward": np.float64, "kl": np.float64}

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
        """Forget everything."""
        self._rows: dict[int, Trajectory] = {}
        self._next_serial = 0
        self._names: list[tuple[str, Variant]] = []  # of the groups, by number
        self._numbers: dict[tuple[str, Variant], int] = {}
        # What a draw asks of every trajectory, in the order of _rows: a loop over 10,000 objects a step is slow.
        self._columns = {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}

    def __len__(self) -> int:
        return len(self._rows)

    # ---- contents ------------------------------------------------------------------------------

    @property
    def trajectories(self) -> dict[int, Trajectory]:
        """Serial number to trajectory, oldest first: what the store writes."""
        return dict(self._rows)

    def restore(self, trajectories: Mapping[int, Trajectory]) -> None:
        """Take over what the store read."""
        self.reset()
        self._add({serial: trajectories[serial] for serial in sorted(trajectories)})

    def append(self, trajectories: Iterable[Trajectory], tiers: Mapping[str, Tier]) -> None:
        """Add a step's trajectories, then cut every tier to its capacity, its own oldest first.

        Texts are dropped, as the token ids hold them, and ids take four bytes: a trajectory stays at 8 bytes a token,
        in memory and on disk.
        """
        fresh = []
        for trajectory in sorted(trajectories, key=_content_order):
            assert math.isfinite(trajectory.reward) and math.isfinite(trajectory.kl_ref), trajectory
            completion = trajectory.completion
            completion = Completion(completion.token_ids.astype(np.int32), completion.logprobs, completion.finished)
            fresh.append(Trajectory(**{**vars(trajectory), "completion": completion, "text": ""}))
        self._add(dict(enumerate(fresh, self._next_serial)))
        if len(self) <= min(self._capacity.values()):
            return
        tier_of, stays = self._tier_of(tiers), np.ones(len(self), bool)
        for tier, capacity in enumerate(self._capacity.values()):
            of_tier = np.flatnonzero(tier_of == tier)
            stays[of_tier[: max(len(of_tier) - capacity, 0)]] = False  # its oldest
        for serial in self._columns["serial"][~stays].tolist():
            del self._rows[serial]
        self._columns = {name: column[stays] for name, column in self._columns.items()}

    def rescore(self, score: Callable[[Mapping[str, float]], float]) -> None:
        """Recompute every reward from its stored parts, for a stage with other weights."""
        rows, start = list(self._rows.values()), self._next_serial
        self.reset()
        self._next_serial = start
        self._add({start + k: replace(t, reward=score(t.parts)) for k, t in enumerate(rows)})

    def _add(self, rows: Mapping[int, Trajectory]) -> None:
        """Take in trajectories by serial number, younger than all that are held."""
        if not rows:
            return
        groups = []
        for trajectory in rows.values():
            name = trajectory.sample_id, trajectory.variant
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
            groups.append(self._numbers[name])
        fresh: dict[str, list[Any]] = {
            "serial": list(rows), "group": groups, "step": [t.step for t in rows.values()],
            "reward": [t.reward for t in rows.values()], "kl": [t.kl_ref for t in rows.values()],
        }  # fmt: skip
        self._columns = {
            name: np.concatenate([column, np.array(fresh[name], column.dtype)])
            for name, column in self._columns.items()
        }
        self._rows.update(rows)
        self._next_serial = fresh["serial"][-1] + 1

    def _tier_of(self, tiers: Mapping[str, Tier]) -> np.ndarray:
        """Tier [rows] of every trajectory as tiers stand now, as its place in TIERS."""
        of_group = [TIERS.index(tiers.get(sample_id, UNRANKED)) for sample_id, _ in self._names]
        return np.array(of_group, int)[self._columns["group"]]

    def tier_sizes(self, tiers: Mapping[str, Tier]) -> dict[Tier, int]:
        """Trajectories a tier, as tiers stand now."""
        return dict(zip(TIERS, np.bincount(self._tier_of(tiers), minlength=len(TIERS)).tolist(), strict=True))

    @property
    def reward_std(self) -> float:
        """Population standard deviation of the rewards held now (0 without any): sigma_off that a step's few groups
        can't make small by chance."""
        return float(np.std(self._columns["reward"])) if self._rows else 0.0

    # ---- drawing -------------------------------------------------------------------------------

    def draw(
        self, n_completions: int, n_off: int, step: int, tiers: Mapping[str, Tier], baselines: Baseline,
        sigma: float, rng_key: str,
    ) -> list[list[Trajectory]]:
        """Replay groups of step `step`: up to `n_off` trajectories each, of one (prompt, variant).

        Groups are drawn until they hold `n_completions` trajectories (the last is cut to fit) or nothing
        is left; only trajectories of earlier steps count, no older than max_age, and at least
        min_fill of them. With `live`, only those of them whose reward differs from R-bar as it is now: any other
        has no advantage, as all of a group whose rewards were equal and that was met once. `baselines` gives R-bar
        and `sigma` the standard deviation of rewards, for the order. Changes nothing; equal arguments give equal
        draws.
        """
        assert n_off >= 1, n_off
        columns, max_age = self._columns, self._config.max_age or math.inf
        age = step - columns["step"]
        rows = np.flatnonzero((0 < age) & (age <= max_age))
        if len(rows) < max(self._config.min_fill, 1):
            return []
        rng = keyed_rng(rng_key)
        group_of = columns["group"][rows]
        rbar = np.full(len(self._names), math.nan)
        for group in set(group_of.tolist()):
            mean = baselines(*self._names[group])
            rbar[group] = math.nan if mean is None else mean
        gaps = columns["reward"][rows] - rbar[group_of]  # NaN without history
        keys = self._sort_keys(columns["kl"][rows], gaps / max(sigma, SIGMA_FLOOR), rng)
        order = np.argsort(-keys, kind="stable")
        if self._config.live:
            order = order[~(np.abs(gaps[order]) <= EQUAL)]
        # A group stands where its first trajectory does, so that its weight is the sum of its trajectories' weights.
        present, first = np.unique(group_of[order], return_index=True)
        queues: dict[Tier, list[int]] = {tier: [] for tier in TIERS}
        for group in present[np.argsort(first)].tolist():
            queues[tiers.get(self._names[group][0], UNRANKED)].append(group)

        drawn: list[list[Trajectory]] = []
        taken = dict.fromkeys(TIERS, 0)
        missing = n_completions
        while missing > 0 and any(taken[tier] < len(queues[tier]) for tier in TIERS):
            left = {tier: len(queues[tier]) - taken[tier] for tier in TIERS}
            for tier in self._tier_sequence(math.ceil(missing / n_off), left, rng):
                group = queues[tier][taken[tier]]
                taken[tier] += 1
                members = order[group_of[order] == group][: min(n_off, missing)]
                drawn.append([self._rows[k] for k in columns["serial"][rows[members]].tolist()])
                missing -= len(members)
                if missing == 0:
                    break
        return drawn

    def _sort_keys(self, kl: np.ndarray, advantages: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Keys [rows] whose descending order is the order of drawing without replacement, from the stored `kl` [rows]
        and the `advantages` [rows] under today's R-bar (NaN: unknown).

        Log-weight plus Gumbel noise: sorting is then successive sampling with probability proportional to weight:
        |A|^(1/T) for advantage, exp(score / T) for priority, 1 for uniform.
        """
        config = self._config
        if config.order == "fifo":
            return -np.arange(len(kl), dtype=np.float64)
        noise = rng.gumbel(size=len(kl))
        if config.order == "uniform":
            return noise
        clipped = np.clip(advantages, -self._advantage_clip, self._advantage_clip)
        if config.order == "advantage":
            # Without a baseline nothing is known, and one deviation stands for it; without an advantage it comes last.
            size = np.abs(np.where(np.isnan(clipped), 1.0, clipped))
            return np.log(np.maximum(size, EQUAL)) / config.temperature + noise
        assert config.order == "priority", config.order
        scores = config.w_reward * np.where(np.isnan(clipped), 0.0, clipped) - config.w_kl * kl
        return scores / config.temperature + noise

    def _tier_sequence(
        self, count: int, groups_left: Mapping[Tier, int], rng: np.random.Generator
    ) -> list[Tier]:
        """Tiers of the next `count` groups (fewer when groups run out), in proportion to draw_share.

        A tier short of groups gives all it has and lends the rest of its share to the others, in
        proportion. Systematic rounding: each tier's share rounded down or up, and exact in the mean.
        """
        left = np.array([groups_left[tier] for tier in TIERS])
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
    digest.update(trajectory.completion.token_ids.astype(np.int64).tobytes())
    return trajectory.step, digest.digest()
