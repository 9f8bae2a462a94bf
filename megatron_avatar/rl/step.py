"""The algorithm's part of a step: prompts chosen, advantages given, rewards fed back.

Alike on every rank: nothing depends on how ranks share a step, and all randomness is keyed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_avatar.config.schema import RLConfig
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.records import Group, Trajectory, Variant
from megatron_avatar.rl.advantages import off_policy_advantages, on_policy_advantages, vanished
from megatron_avatar.rl.hints import HintPolicy
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.tracker import RewardTracker


@dataclass(frozen=True)
class Visit:
    """One prompt of a step: which sample, in which variant, and the key of its randomness.

    stands_for: visits of this prompt, hinted ones too, for which a plain one speaks.
    """

    sample_id: str
    variant: Variant
    key: str
    revisit: bool
    stands_for: int = 1


class Order(Protocol):
    """Where fresh prompts come from: a stage's samples in their turn."""

    def take(self, n: int) -> list[str]: ...


def choose_prompts(
    n: int, revisit_share: float, order: Order, tracker: RewardTracker, hints: HintPolicy | None,
    pool: Collection[str], hintable: Collection[str], key: tuple[object, ...],
) -> list[Visit]:
    """Choose n prompts of a step: fresh ones in loader order, the rest revisits of seen prompts
    that are hard now (paper supplement, "Stratified replay"). `pool` holds the stage's samples, `hintable` those
    that have a hint.

    A step revisits n * revisit_share prompts, rounded up or down so that the share holds in the mean: with
    one prompt a step, a quarter of the steps are revisits.
    """
    hard = sorted(i for i, tier in tracker.tiers().items() if tier == "hard" and i in pool)
    rng = keyed_rng(*key, "revisit")
    n_revisit = min(int(n * revisit_share + rng.random()), len(hard))
    revisits = list(rng.choice(hard, n_revisit, replace=False)) if n_revisit else []
    visits: list[Visit] = []
    seen: dict[str, int] = {}
    for index, sample_id in enumerate([*order.take(n - n_revisit), *map(str, revisits)]):
        occurrence = seen[sample_id] = seen.get(sample_id, -1) + 1
        variant: Variant = "plain"
        stands_for = 1
        if hints is not None:
            variant = hints.variant(sample_id, sample_id in hintable, ahead=occurrence)
            stands_for = hints.stands_for(sample_id, sample_id in hintable)
        visit_key = "/".join(map(str, (*key, sample_id, occurrence)))
        visits.append(Visit(sample_id, variant, visit_key, index >= n - n_revisit, stands_for))
    return visits


def turn_accuracy(visits: Sequence[Visit], by_visit: Mapping[int, list[Trajectory]]) -> float | None:
    """Accuracy of the prompts that came in their turn, as if none had been hinted; None where none was scored.

    `by_visit` maps a visit's place to its completions.

    Prompts that get hints are the hard ones, so each of their rare plain visits counts for all that it stands for
    (Horvitz and Thompson, 1952): right in the mean over steps, where hints stay for several such rounds, while a single
    step may exceed 1.
    """
    right, turns = 0.0, 0
    for k, visit in enumerate(visits):
        scores = [t.parts.get("accuracy", np.nan) for t in by_visit.get(k, [])]
        scores = [score for score in scores if not np.isnan(score)]
        if scores and not visit.revisit:
            turns += 1
            right += visit.stands_for * float(np.mean(scores)) * (visit.variant == "plain")
    return right / turns if turns else None


def rewards_of(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Rewards [n] float64."""
    return np.array([t.reward for t in trajectories], dtype=np.float64)


def assign_on_policy(
    groups: list[Group], tracker: RewardTracker, batch_mean: float, *, std_floor: float = 0.0
) -> int:
    """Set the advantages of fresh groups (paper Eq. 2); returns how many groups have vanished."""
    gone = 0
    for group in groups:
        rewards = rewards_of(group.trajectories)
        baseline = tracker.mean(group.prompt.sample_id, group.prompt.variant)
        group.advantages = on_policy_advantages(
            rewards, baseline=baseline, running_std=tracker.running_std, batch_mean=batch_mean, std_floor=std_floor
        )
        gone += vanished(rewards)
    return gone


def assign_off_policy(
    drawn: list[list[Trajectory]], tracker: RewardTracker, vcrs: bool, clip: float, *, sigma: float | None = None
) -> tuple[list[np.ndarray], float]:
    """Advantages of the step's whole off-policy batch, one array a replay group, and the clipped share.

    The baseline is R-bar of the prompt and variant; without VCRS, or for a prompt whose history was
    cleared, the mean of the off-policy batch. `sigma` is sigma_off; None takes the batch's own.
    """
    flat = [t for group in drawn for t in group]
    if not flat:
        return [], 0.0
    rewards = rewards_of(flat)
    means = [tracker.mean(t.sample_id, t.variant) if vcrs else None for t in flat]
    baselines = np.array([rewards.mean() if m is None else m for m in means])
    advantages, clipped = off_policy_advantages(rewards, baselines, sigma=sigma, clip=clip)
    return np.split(advantages, np.cumsum([len(g) for g in drawn])[:-1]), clipped


def draw_replay(
    buffer: ReplayBuffer | None, tracker: RewardTracker, rl: RLConfig, *, n: int, step: int, key: tuple[object, ...]
) -> tuple[list[list[Trajectory]], list[np.ndarray], float]:
    """A step's replay groups of n completions in all, their advantages, and the clipped share of these.

    sigma_off is that of the rewards in the buffer (`rl.replay.sigma` "buffer") or of the drawn ones ("batch", paper).
    """
    if buffer is None:
        return [], [], 0.0
    sigma = buffer.reward_std if rl.replay.sigma == "buffer" else None
    drawn = buffer.draw(n, rl.n_off, step, tracker.tiers(), tracker.mean,
                        tracker.running_std if sigma is None else sigma, "/".join(map(str, (*key, "replay"))))
    return drawn, *assign_off_policy(drawn, tracker, rl.vcrs, rl.advantage_clip, sigma=sigma)


def commit(
    visits: Sequence[Visit], by_visit: Mapping[int, list[Trajectory]], tracker: RewardTracker,
    hints: HintPolicy | None, buffer: ReplayBuffer | None, masked: Collection[tuple[int, int]] = (),
) -> None:
    """Feed a step's own rewards to tracker, hints and buffer: each visit once, a revisit of a prompt too.

    A visit without an entry in `by_visit` was set aside and doesn't count. `masked` names completions (visit, number in
    it) whose log-probabilities are in doubt: they aren't replayed.
    """
    made = [(visits[k], by_visit[k]) for k in sorted(by_visit) if by_visit[k]]
    for visit, rows in made:
        solved = any(t.parts["correct"] > 0 for t in rows)
        tracker.update(visit.sample_id, visit.variant, [t.reward for t in rows], solved=solved)
    if hints is not None:
        for visit, rows in made:
            hints.update(visit.sample_id, visit.variant, kl=float(np.mean([t.kl_ref for t in rows])))
    if buffer is not None:
        # Of a step that was skipped as not finite, what is finite itself can be replayed.
        fresh = [t for k in sorted(by_visit) for number, t in enumerate(by_visit[k])
                 if math.isfinite(t.kl_ref) and (k, number) not in masked]  # fmt: skip
        buffer.append(fresh, tracker.tiers())
