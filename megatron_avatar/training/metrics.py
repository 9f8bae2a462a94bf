"""The metrics of a step, one flat dictionary; names are the keys of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from megatron_avatar.config.validate import REWARDS
from megatron_avatar.records import Group, Trajectory
from megatron_avatar.rl.advantages import dead
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.tracker import RewardTracker

ADVANTAGE_EDGES = np.linspace(-5.0, 5.0, 41)


def set_kl(groups: Sequence[Group], reference: Sequence[Sequence[np.ndarray]]) -> None:
    """Set each fresh trajectory's mean k3 to the reference, from the log-probabilities at generation."""
    for group, scores in zip(groups, reference, strict=True):
        for trajectory, ref in zip(group.trajectories, scores, strict=True):
            delta = np.clip(ref.astype(np.float64) - trajectory.completion.logprobs, -20, 20)
            trajectory.kl_ref = float(np.mean(np.exp(delta) - delta - 1))


def mean_or_none(values: Sequence[float] | np.ndarray) -> float | None:
    """Mean of the values that are not masked (NaN); None when there is none."""
    real = [v for v in values if not np.isnan(v)]
    return float(np.mean(real)) if real else None


def histogram(values: Sequence[float] | np.ndarray, edges: np.ndarray) -> list[int]:
    """Counts in the bins between `edges`; what lies beyond them counts in the outermost."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def rl_record(
    *, fresh: list[Trajectory], accuracy: float | None, drawn: list[list[Trajectory]], stats: dict,
    on_advantages: list[list[np.ndarray]], off_advantages: list[np.ndarray], clipped: float, vanished: float, step: int,
    tracker: RewardTracker, buffer: ReplayBuffer | None, visits: int, hinted: int, in_use: int, pool: Collection[str],
    completions_generated: int, lr: float, updates: int, own: Collection[str] = (),
) -> dict:
    """What a step of reinforcement learning logs; statistics are those of the whole step, over all ranks.

    own: names of rewards of the user's. accuracy: of the prompts in their turn, as if none had been hinted.
    """
    replayed = [t for group in drawn for t in group]
    tiers = tracker.tiers()
    sizes = buffer.tier_sizes(tiers) if buffer else {}
    rbar = [m for i in tracker.seen() if (m := tracker.mean(i, "plain")) is not None]
    on = [float(a) for rank in on_advantages for group in rank for a in group]
    tokens = max(float(stats["tokens"]), 1.0)
    on_tokens = max(float(stats["on_tokens"]), 1.0)
    squares = stats["off_weight_sq_sum"]
    surrogate = stats["surrogate_bins"] / np.maximum(stats["position_bins"], 1)
    off = np.concatenate(off_advantages) if off_advantages else np.zeros(0)
    off_tokens = max(float(stats["off_tokens"]), 1.0)
    return {
        "reward": mean_or_none([t.reward for t in fresh]),
        **{f"reward/{n}": mean_or_none([t.parts.get(n, np.nan) for t in fresh]) for n in (*REWARDS, *own)},
        "correct": mean_or_none([t.parts.get("correct", np.nan) for t in fresh]),
        "accuracy/turn": accuracy,
        "vanished": vanished,
        **{f"tier/{name}": int(sizes.get(name, 0)) for name in ("easy", "medium", "hard")},
        "rbar_hist": histogram(rbar, np.linspace(0, 1, 11)),
        "replay/size": len(buffer) if buffer else 0,
        "replay/completions": len(replayed),
        "replay/age": mean_or_none([step - t.step for t in replayed]),
        "replay/age_max": max((step - t.step for t in replayed), default=None),
        "replay/dead": dead(off) / len(off) if len(off) else None,
        "replay/advantage": mean_or_none(off),
        "replay/correct": mean_or_none([t.parts.get("correct", np.nan) for t in replayed]),
        "replay/ratio_max": float(stats["off_ratio_max"]) if len(off) else None,
        "replay/bounded_tokens": float(stats["off_bounded_tokens"]) / off_tokens if len(off) else None,
        "replay/ess": float(stats["off_weight_sum"] ** 2 / squares) if squares else None,
        "replay/clipped_advantages": clipped,
        "ratio/mean": float(stats["ratio_sum"]) / tokens,
        "ratio/max": float(stats["ratio_max"]),
        "clip_fraction": float(stats["clipped_tokens"]) / tokens,
        "kl": float(stats["kl_sum"]) / on_tokens,
        "entropy": float(stats["entropy_sum"]) / tokens,
        "length": mean_or_none([len(t.completion) for t in fresh]),
        "finished": mean_or_none([t.completion.finished for t in fresh]),
        "solvability": len(tracker.solved.intersection(pool)) / len(pool),
        "solvability/plain": len(tracker.solved_plain.intersection(pool)) / len(pool),
        "hints": in_use,
        "hints/visits": hinted,
        "hints/share": hinted / visits if visits else None,
        **{name: stats[name] for name in stats if name.startswith("logprob_error")},
        "loss": float(stats["loss"]),
        "grad_norm": stats["grad_norm"],
        "skipped": stats["skipped"],
        **{name: stats[name] for name in ("loss_scale", "overflows", "routing_flips") if name in stats},
        "lr": lr,
        "tokens": int(stats["tokens"]),
        "packed_tokens": stats["packed_tokens"],
        "imbalance": stats["imbalance"],
        **{name: updates * stats[name] for name in ("flops", "flops/done")},
        "completions_generated": completions_generated,
        "advantages": {
            "edges": ADVANTAGE_EDGES.tolist(), "on": histogram(on, ADVANTAGE_EDGES),
            "off": histogram(off, ADVANTAGE_EDGES),
        },
        "surrogate_position": [None if n == 0 else float(v) for v, n in zip(surrogate, stats["position_bins"],
                                                                           strict=True)],
    }
