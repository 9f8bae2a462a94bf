"""Curves out of metrics.jsonl: one run's series, several seeds as a band, and when one curve reaches another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_avatar.rl.advantages import on_policy_advantages
from megatron_avatar.rl.shaping import temporal_weights

Records = list[dict[str, Any]]
WINDOW = 9  # steps of the running mean
REACH_WINDOW = 15  # steps whose mean is compared with another system's final accuracy (docs/study.md)
BINS = 20  # places of a completion, as training logs them


def read_metrics(path: Path) -> Records:
    """The steps of a metrics.jsonl; none if there is no file, and without a last line that a kill has cut."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def series(records: Records, key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Values of a metric against `x`, without the steps that did not measure it (absent, null or not finite)."""
    points = [(r[x], r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    places, values = zip(*points, strict=True) if points else ((), ())
    return np.array(places, float), np.array(values, float)


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean over the last `window` values, over fewer at the start."""
    return np.array([values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)])


def stage_starts(records: Records) -> dict[str, float]:
    """Stage -> its first step."""
    starts: dict[str, float] = {}
    for record in records:
        starts.setdefault(record.get("stage", ""), record["step"])
    return starts


@dataclass(frozen=True)
class Band:
    """A curve over seeds: x [n]; their mean; low and high, their range or the bounds of an interval; [n] each."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band | None:
    """Mean and range of several seeds' (x, y) at every x that all of them measured; None where there is none.

    Where one seed is behind the others, the curve ends with it: a mean over fewer seeds would jump.
    """
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    common = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    if not common:
        return None
    table = np.array([[dict(zip(x.tolist(), y, strict=True))[place] for place in common] for x, y in curves], float)
    return Band(np.array(common), table.mean(axis=0), table.min(axis=0), table.max(axis=0), len(curves))


def broken(curve: Band, starts: Iterable[float]) -> Band:
    """The curve with a gap before each stage's first step, for what is counted anew there."""
    cuts = np.unique([np.searchsorted(curve.x, start) for start in starts])
    cuts = cuts[(cuts > 0) & (cuts < len(curve.x))]
    parts = (np.insert(part.astype(float), cuts, np.nan) for part in (curve.x, curve.mean, curve.low, curve.high))
    return Band(*parts, curve.seeds)


@dataclass(frozen=True)
class Reach:
    """How many completions one system took, in one stage, to reach another's final accuracy.

    start, target: the other's smoothed accuracy in its first whole window and at the stage's end; budget: the
    completions it generated in the stage; completions: those until the first smoothed accuracy at or above the target,
    None where that never happened; floor and cap: the fewest and most that could have been found.
    """

    stage: str
    start: float
    target: float
    budget: int
    completions: int | None
    floor: int
    cap: int

    @property
    def rose(self) -> bool:
        """Whether the other learned anything in the stage that could be reached."""
        return self.target > self.start

    @property
    def share(self) -> float | None:
        """completions / budget."""
        return None if self.completions is None else self.completions / self.budget


def completions_to_reach(
    records: Records, other: Records, key: str = "accuracy/turn", window: int = REACH_WINDOW
) -> list[Reach]:
    """For every stage of both runs: completions after which `records` first reaches `other`'s final smoothed `key`.

    Values are means over `window` steps of one stage (the first whole window onwards) and completions count from the
    stage's start: an earlier stage has other, easier prompts, and would be reached without having learnt anything.
    """
    found = []
    for stage in stage_starts(other):
        ours, theirs = (stage_curve(run, stage, key, window) for run in (records, other))
        if len(ours.means) < window or len(theirs.means) < window:
            continue
        target = float(theirs.means[-1])
        reached = np.flatnonzero(ours.means[window - 1 :] >= target - 1e-12)
        completions = int(ours.completions[window - 1 + reached[0]]) if len(reached) else None
        start, budget, cap = float(theirs.means[window - 1]), int(theirs.completions[-1]), int(ours.completions[-1])
        floor = int(ours.completions[window - 1])
        found.append(Reach(stage, start, target, budget, completions, floor, cap))
    return found


@dataclass(frozen=True)
class StageCurve:
    """A metric in one stage: completions generated since its start, and the running mean; [steps] each."""

    completions: np.ndarray
    means: np.ndarray


def stage_curve(records: Records, stage: str, key: str, window: int = REACH_WINDOW) -> StageCurve:
    """The metric `key` in a stage of a run; empty where its first step doesn't know it, as an earlier release's."""
    before = [r["completions_generated"] for r in records if r["step"] < stage_starts(records).get(stage, -math.inf)]
    own = [r for r in records if r.get("stage", "") == stage]
    completions, values = series(own if own and key in own[0] else [], key, "completions_generated")
    return StageCurve(completions - (before[-1] if before else 0), running_mean(values, window))


def position_band(runs: Sequence[Records]) -> Band | None:
    """Mean |surrogate| of a token by place (bin centres), over the steps of each seed; a bin without tokens is NaN."""
    bins = [mean_bins([r.get("surrogate_position") for r in records]) for records in runs]
    return band([((np.arange(len(b)) + 0.5) / len(b), b) for b in bins if b is not None])


def group_position(
    groups: Sequence[tuple[Sequence[float], Sequence[int]]], shaping: tuple[str, float], bins: int = BINS
) -> np.ndarray | None:
    """Mean |A_i w_t| of a token by place [bins] over sampled groups, each (rewards, lengths in tokens) of one prompt.

    Advantages are those of the group (METHOD: on-policy), the ratio is 1; tokens of groups without a signal count as 0.
    A bin without tokens is NaN; None without groups.
    """
    sums, counts = np.zeros(bins), np.zeros(bins)
    for rewards, lengths in groups:
        scores = np.asarray(rewards, float)
        advantages = on_policy_advantages(scores, baseline=None, running_std=0.0, batch_mean=float(scores.mean()))
        for advantage, length in zip(advantages, lengths, strict=True):
            place = np.minimum(np.arange(length) / max(length - 1, 1) * bins, bins - 1).astype(int)
            weights = temporal_weights(length, *shaping).numpy()
            sums += np.bincount(place, abs(float(advantage)) * weights, bins)
            counts += np.bincount(place, minlength=bins)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan) if groups else None


def mean_bins(steps: Sequence[Sequence[float | None] | None]) -> np.ndarray | None:
    """Mean over steps of a metric that is a list of bins; a bin that no step measured is NaN."""
    table = np.array([[math.nan if v is None else v for v in step] for step in steps if step], float)
    if table.size == 0 or np.isnan(table).all():
        return None
    measured = ~np.isnan(table)
    return np.where(measured, table, 0).sum(axis=0) / np.where(measured.any(axis=0), measured.sum(axis=0), math.nan)


@dataclass(frozen=True)
class Advantages:
    """Counts of completions by advantage between `edges`: fresh ones, replayed ones, and of the fresh ones those in
    groups whose rewards are all equal (`vanished`, their advantage is exactly zero)."""

    edges: np.ndarray
    on: np.ndarray
    off: np.ndarray
    vanished: float

    @property
    def total(self) -> float:
        return float(self.on.sum() + self.off.sum())

    @property
    def vanished_share(self) -> float:
        """Share of the fresh completions that carry no signal."""
        return self.vanished / max(1.0, float(self.on.sum()))


def advantage_counts(runs: Sequence[Records]) -> Advantages | None:
    """The advantages of all completions of some runs (seeds), pooled; None where none was logged."""
    steps = [r for records in runs for r in records if r.get("advantages")]
    if not steps:
        return None
    on, off = (np.sum([r["advantages"][part] for r in steps], axis=0) for part in ("on", "off"))
    vanished = sum((r.get("vanished") or 0.0) * sum(r["advantages"]["on"]) for r in steps)
    return Advantages(np.array(steps[-1]["advantages"]["edges"]), on, off, vanished)

