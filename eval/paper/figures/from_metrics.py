"""The figures that come from the trainings' metrics.jsonl: 3, advantages, sample efficiency."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eval.paper.figures import paper
from eval.paper.figures.entry import Entry, joined, published, seeds_told, sources
from eval.paper.figures.folder import Folder, Training, comparable
from eval.paper.figures.series import (
    REACH_WINDOW,
    Band,
    Reach,
    advantage_counts,
    band,
    broken,
    completions_to_reach,
    series,
    stage_curve,
    stage_starts,
)

MAIN = ("grpo", "avatar")
HINTS = {
    "grpo": ["components_grpo", "grpo"],
    "components_wo_hints": ["components_wo_hints"],
    "avatar": ["components_avatar", "avatar"],
}
LOGGED = {
    "reward": "reward", "accuracy, prompts in turn": "accuracy/turn", "groups without a signal": "vanished",
    "tokens of a completion": "length", "hinted prompts of an update": "hints/visits",
}  # fmt: skip
COUNTS = ("tokens of a completion", "hinted prompts of an update")
BANDS = "Lines: means over seeds; bands: their range."


def shared_stages(trainings: Mapping[str, Mapping[int, Training]]) -> dict[str, float]:
    """Stage -> first step, if all runs went through the same stages at the same steps; else nothing."""
    starts = [stage_starts(run.records) for runs in trainings.values() for run in runs.values()]
    return starts[0] if starts and all(s == starts[0] for s in starts) else {}


def bands(
    trainings: Mapping[str, Mapping[int, Training]], key: str, stages: Mapping[str, float]
) -> dict[str, Band]:
    """System -> a metric over the updates, interrupted where a stage begins."""
    found = present({s: band([series(t.records, key) for t in runs.values()]) for s, runs in trainings.items()})
    return {system: broken(curve, stages.values()) for system, curve in found.items()}


def present(curves: Mapping[str, Band | None]) -> dict[str, Band]:
    """Those that are there."""
    return {name: curve for name, curve in curves.items() if curve is not None}


def solvability(folder: Folder) -> Entry:
    """Figure 3."""
    name, title = "figure3", "Training problems solved, with and without hints"
    chosen = comparable(folder, HINTS)
    stages = shared_stages(chosen.trainings)
    panels = {
        "with or without a hint in the prompt": bands(chosen.trainings, "solvability", stages),
        "from the plain prompt": bands(chosen.trainings, "solvability/plain", stages),
    }
    figure = paper.over_training(panels, "training problems solved", stages=stages)
    if figure is None:
        return Entry(name, title, None, reason="no training has logged solvability")
    absent = ["AVATAR w/o hints was not trained." if "components_wo_hints" not in chosen.trainings else ""]
    caption = joined(
        "Share of a stage's training problems that at least one sampled completion has solved (accuracy 0.5 or more), "
        "counted anew in each stage. On the left a completion counts that saw a hint, on the right only those that "
        "did not.",
        BANDS, seeds_told(chosen.trainings), *(chosen.notes or absent), published("figure3"),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, chosen.trainings))


def training(folder: Folder) -> Entry:
    """What the main systems log in training."""
    name, title = "training", "Over training"
    trainings = {system: runs for system in MAIN if (runs := folder.trainings(system))}
    stages = shared_stages(trainings)
    panels = {panel: bands(trainings, key, stages) for panel, key in LOGGED.items()}
    figure = paper.over_training(panels, "", stages=stages, counts=COUNTS)
    if figure is None:
        return Entry(name, title, None, reason="no training of GRPO or AVATAR has logged anything")
    caption = joined(
        "Each update by itself. The reward's parts and weights change with the stage. Groups without a signal: all "
        "rewards equal, among GRPO's eight fresh completions or AVATAR's four. AVATAR's reward is that of its revisits "
        "of hard prompts, too, and of hinted ones; accuracy is that of prompts in their turn, as if none had been "
        "hinted: a plain visit of a hinted prompt counts for those around it, so a single update may exceed 100 %.",
        BANDS, seeds_told(trainings),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, trainings))


def advantages(folder: Folder) -> Entry:
    """The histogram of advantages."""
    name, title = "advantages", "Distribution of advantages"
    trainings = {system: runs for system in MAIN if (runs := folder.trainings(system))}
    counts = {s: c for s, runs in trainings.items() if (c := advantage_counts([r.records for r in runs.values()]))}
    figure = paper.advantages(counts)
    if figure is None:
        return Entry(name, title, None, reason="no training of GRPO or AVATAR has logged advantages")
    caption = joined(
        "Advantages of all completions of the trainings, pooled over updates and seeds; the outermost bars hold what "
        "lies beyond them. Black: fresh completions of groups whose rewards are all equal; their advantage is zero and "
        "they teach nothing. Replayed completions are measured against their prompt's running mean.",
        seeds_told(trainings),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, trainings))


def sample_efficiency(folder: Folder) -> Entry:
    """Accuracy against unique completions, and how many AVATAR takes to GRPO's final one."""
    name, title = "sample_efficiency", "Accuracy against completions generated"
    trainings = {s: runs for s in ("grpo", "grpo_half", "avatar") if (runs := folder.trainings(s))}
    records = [t.records for runs in trainings.values() for t in runs.values()]
    stages = dict.fromkeys(stage for run in records for stage in stage_starts(run))
    panels = {stage: _by_completions(trainings, stage) for stage in stages}
    reached = reach(folder)
    figure = paper.sample_efficiency(panels, [r for _, r in reached])
    if figure is None:
        return Entry(name, title, None, reason="no training has logged accuracies and completions generated")
    caption = joined(
        f"Accuracy on prompts in their turn, as if none had been hinted, mean over {REACH_WINDOW} updates of a stage, "
        "against the completions generated in it.",
        "AVATAR's revisits are left out; a plain visit of a hinted prompt counts for those around it, too."
        * ("avatar" in trainings),
        BANDS, *told(reached), seeds_told(trainings), published("sample_efficiency"),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, trainings))


def _by_completions(trainings: Mapping[str, Mapping[int, Training]], stage: str) -> dict[str, Band]:
    """Runs are averaged update by update, and so are the completions generated until then."""
    found = {}
    for system, runs in trainings.items():
        curves = [stage_curve(t.records, stage, "accuracy/turn") for t in runs.values()]
        counts = band([(np.arange(len(c.completions)), c.completions) for c in curves])
        rewards = band([(np.arange(len(c.means)), c.means) for c in curves])
        if counts is not None and rewards is not None:
            found[system] = Band(counts.mean, rewards.mean, rewards.low, rewards.high, rewards.seeds)
    return found


def reach(folder: Folder) -> list[tuple[int, Reach]]:
    """(seed, Reach) for every stage: completions after which AVATAR first has GRPO's final accuracy."""
    avatar, grpo = folder.complete("avatar"), folder.complete("grpo")
    shared = sorted(avatar.keys() & grpo.keys())
    return [(s, found) for s in shared for found in completions_to_reach(avatar[s].records, grpo[s].records)]


def told(reached: list[tuple[int, Reach]]) -> list[str]:
    """One sentence a stage on who reached what after how many completions."""
    sentences = []
    for stage in dict.fromkeys(r.stage for _, r in reached):
        runs = [r for _, r in reached if r.stage == stage]
        rose = [r for r in runs if r.rose]
        there = [r for r in rose if r.completions is not None]
        place = f"Stage {stage.replace('_', '-')}" if stage else "Training"
        flat = f" (GRPO's own accuracy doesn't rise with {len(runs) - len(rose)} others)" * (len(rose) < len(runs))
        if not rose:
            sentences.append(f"{place}: GRPO's accuracy doesn't rise with any of {len(runs)} seeds.")
        elif there:
            took, share = np.mean([r.completions for r in there]), np.mean([r.share for r in there])
            of = "" if len(there) == len(runs) == 1 else f" with {len(there)} of {len(rose)} seeds, on average"
            sentences.append(
                f"{place}: AVATAR first reaches GRPO's final accuracy{of} after {took:,.0f} completions, {share:.0%} "
                f"of GRPO's{flat}."
            )
        else:
            sentences.append(
                f"{place}: AVATAR does not reach GRPO's final accuracy with any of {len(rose)} seeds{flat}."
            )
    if sentences:
        floor, cap = (min(r.floor / r.budget for _, r in reached), max(r.cap / r.budget for _, r in reached))
        sentences.append(
            f"Shares can only lie between {floor:.0%} (the first mean) and {cap:.0%} (all that AVATAR generates). A "
            "first passage favours the noisier curve: it is no test."
        )
    return sentences
