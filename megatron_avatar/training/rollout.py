"""Choosing a step's prompts, generating and scoring their completions, building its groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_avatar.data.loader import MediaLoader, SampleOrder
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.policy.backend import Backend
from megatron_avatar.records import Completion, Group, Prompt, Sample, Trajectory, Variant
from megatron_avatar.rl.advantages import off_policy_advantages, on_policy_advantages, vanished
from megatron_avatar.rl.hints import HintPolicy
from megatron_avatar.rl.tracker import RewardTracker
from megatron_avatar.training.balance import deal, loads_of


@dataclass(frozen=True)
class Visit:
    """One prompt of a step: which sample, in which variant, and the key of its randomness."""

    sample_id: str
    variant: Variant
    key: str
    revisit: bool


def choose_prompts(
    n: int, revisit_share: float, order: SampleOrder, tracker: RewardTracker, hints: HintPolicy | None,
    samples: dict[str, Sample], key: tuple[object, ...],
) -> list[Visit]:
    """Choose n prompts of a step: fresh ones in loader order, the rest revisits of seen prompts
    that are hard now (paper supplement, "Stratified replay"). Equal on every rank.

    A step revisits n * revisit_share prompts, rounded up or down so that the share holds in the mean: with
    one prompt a step, a quarter of the steps are revisits.
    """
    hard = sorted(i for i, tier in tracker.tiers().items() if tier == "hard" and i in samples)
    rng = keyed_rng(*key, "revisit")
    n_revisit = min(int(n * revisit_share + rng.random()), len(hard))
    revisits = list(rng.choice(hard, n_revisit, replace=False)) if n_revisit else []
    visits, seen = [], {}
    for index, sample_id in enumerate([*order.take(n - n_revisit), *map(str, revisits)]):
        occurrence = seen[sample_id] = seen.get(sample_id, -1) + 1
        variant = hints.variant(sample_id, samples[sample_id].hint is not None) if hints is not None else "plain"
        visit_key = "/".join(map(str, (*key, sample_id, occurrence)))
        visits.append(Visit(sample_id, variant, visit_key, index >= n - n_revisit))
    return visits


def plain_completions(visits: Sequence[Visit], by_visit: Mapping[int, list[Trajectory]]) -> list[Trajectory]:
    """Those of prompts that came in their turn and without a hint; `by_visit` maps a visit's place to its own."""
    plain = (k for k, visit in enumerate(visits) if visit.variant == "plain" and not visit.revisit)
    return [trajectory for k in plain for trajectory in by_visit.get(k, [])]


def share_visits(visits: Sequence[Visit], fresh_owners: Sequence[int], tokens: Mapping[str, int], dp: int) -> list[int]:
    """Data-parallel rank of each visit: fresh prompts have theirs, revisits even out the tokens by sample id."""
    costs = [tokens[v.sample_id] for v in visits]
    owners = list(fresh_owners[: sum(not v.revisit for v in visits)])
    fresh, again = costs[: len(owners)], costs[len(owners) :]
    return owners + deal(again, loads_of(fresh, owners, dp))


def load_prompts(
    loader: MediaLoader, backend: Backend, requests: list[tuple[Sample, Variant]]
) -> list[Prompt | None]:
    """Decoded prompts in the order asked for; None for a quarantined sample, on all ranks of a model replica alike.

    Called by all ranks together: a deadline may have passed on one rank of a replica only.
    """
    prompts = loader.get(requests)
    if backend.tp * backend.pp == 1:
        return prompts
    for replica, gone in backend.all_gather_object((backend.dp_rank, [p is None for p in prompts])):
        if replica == backend.dp_rank:
            prompts = [None if lost else p for p, lost in zip(prompts, gone, strict=True)]
    return prompts


def make_groups(
    prompts: list[Prompt], completions: list[list[Completion]], decode: Callable[[np.ndarray], str],
    *, stage: str, step: int, version: int, ref_id: str,
) -> list[Group]:
    """The step's fresh groups, not scored yet: `Scoring` fills in reward and parts, `metrics.set_kl` kl_ref."""
    groups = []
    for prompt, rows in zip(prompts, completions, strict=True):
        trajectories = [
            Trajectory(
                sample_id=prompt.sample_id, variant=prompt.variant, completion=row, reward=math.nan, parts={},
                kl_ref=0.0, ref_id=ref_id, stage=stage, step=step, policy_version=version, text=decode(row.token_ids),
            )
            for row in rows
        ]
        groups.append(Group(prompt, trajectories, on_policy=np.ones(len(rows), bool)))
    return groups


def rewards_of(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Rewards [n] float64."""
    return np.array([t.reward for t in trajectories], dtype=np.float64)


def assign_on_policy(groups: list[Group], tracker: RewardTracker, batch_mean: float) -> int:
    """Set the advantages of fresh groups (paper Eq. 2); returns how many groups have vanished."""
    gone = 0
    for group in groups:
        rewards = rewards_of(group.trajectories)
        baseline = tracker.mean(group.prompt.sample_id, group.prompt.variant)
        group.advantages = on_policy_advantages(
            rewards, baseline=baseline, running_std=tracker.running_std, batch_mean=batch_mean
        )
        gone += vanished(rewards)
    return gone


def assign_off_policy(
    drawn: list[list[Trajectory]], tracker: RewardTracker, vcrs: bool, clip: float
) -> tuple[list[np.ndarray], float]:
    """Advantages of the step's whole off-policy batch, one array a replay group, and the clipped share.

    The baseline is R-bar of the prompt and variant; without VCRS, or for a prompt whose history was
    cleared, the mean of the off-policy batch.
    """
    flat = [t for group in drawn for t in group]
    if not flat:
        return [], 0.0
    rewards = rewards_of(flat)
    means = [tracker.mean(t.sample_id, t.variant) if vcrs else None for t in flat]
    baselines = np.array([rewards.mean() if m is None else m for m in means])
    advantages, clipped = off_policy_advantages(rewards, baselines, clip=clip)
    return np.split(advantages, np.cumsum([len(g) for g in drawn])[:-1]), clipped
