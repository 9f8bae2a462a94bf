"""Held-out accuracy against the completions that a training generated, one point for each system."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from eval.paper.figures.entry import Entry, joined, partial_told, seeds_told, sources
from eval.paper.figures.folder import Folder, Training
from eval.paper.figures.style import FAINT, SERIES, percent, styled
from eval.paper.results import Run, check_comparable

BENCHMARK = "held_out"
KINDS = ("fresh, without hints and revisits", "fresh, with hints or revisits", "with replay")
SHORT = ((r"on_off_ratio_on(\d)_off(\d)", r"\1:\2"), (r"tas_lambda_lam_(.+)", r"λ \1"),
         (r"(components|curriculum|rewards|shaping)_(.+)", r"\2"))  # fmt: skip
FEWEST = 3
LEADER = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.4}
GAP = 0.026  # between two labels, of the axis' height

Systems = dict[str, tuple[dict[int, Training], dict[int, Run]]]


def by_completions(folder: Folder) -> Entry:
    """Accuracy of the systems against their generated completions, on seeds that all of them have."""
    name, title = "completions", "What generated completions buy"
    there = _systems(folder)
    seeds = _shared({name: {*runs} for name, (_, runs) in there.items()})
    found = {name: own for name, own in there.items() if {*seeds} <= {*own[1]}}
    if len(found) < FEWEST:
        return Entry(name, title, None, reason=f"fewer than {FEWEST} systems of reinforcement learning have answered "
                                               "the held-out samples with the same seeds")  # fmt: skip
    used = {name: {seed: trainings[seed] for seed in seeds} for name, (trainings, _) in found.items()}
    runs = [predictions[seed] for _, predictions in found.values() for seed in seeds]
    check_comparable(runs)
    points = {name: (round(np.mean([own[0][s].completions for s in seeds])), [_accuracy(own[1][s]) for s in seeds])
              for name, own in found.items()}  # fmt: skip
    figure = _draw(points, {name: _kind(by_seed[seeds[0]].folder) for name, by_seed in used.items()})
    caption = joined(
        "Each point: a system's accuracy on the held-out samples at its training's end, greedy and without hints, "
        "against the completions that it generated; updates differ, too. 5:3 is five fresh completions a prompt and "
        "three replayed ones. Points: means over seeds, strokes: their range.",
        seeds_told({name: seeds for name in points}), partial_told(runs),
        f"Without these seeds, so left out: {', '.join(sorted(there.keys() - found.keys()))}."
        * (len(found) < len(there)),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, used, runs))


def _systems(folder: Folder) -> Systems:
    """System -> its complete trainings and held-out predictions by seed, of those that generate and whose settings were
    kept; a link counts once."""
    found: Systems = {}
    for path in sorted((folder.out / "runs" / folder.family).glob("*")):
        own = {seed: t for seed, t in folder.complete(path.name).items()
               if t.system == path.name and "completions_generated" in t.records[-1]
               and (t.folder / "config.yaml").exists()}  # fmt: skip
        answers = folder.predictions(path.name, BENCHMARK)
        if seeds := own.keys() & answers.keys():
            found[path.name] = {s: own[s] for s in sorted(seeds)}, {s: answers[s] for s in sorted(seeds)}
    return found


def _shared(seeds: dict[str, set[int]]) -> list[int]:
    """Of every system's seeds those for which the systems that have all of them have the most runs together."""
    common = [seed for seed, _ in Counter(sorted(s for own in seeds.values() for s in own)).most_common()]
    sets = [common[: size + 1] for size in range(len(common))]
    return sorted(max(sets, key=lambda s: len(s) * sum({*s} <= own for own in seeds.values()), default=[]))


def _accuracy(run: Run) -> float:
    return float(np.mean(run.scored.scores["accuracy"]))


def _kind(training: Path) -> str:
    rl = OmegaConf.load(training / "config.yaml").rl
    return KINDS[2 if rl.n_off else 1 if rl.hints.enabled or rl.revisit_share else 0]


def _draw(points: dict[str, tuple[int, list[float]]], kinds: dict[str, str]) -> Figure:
    """points: system -> completions, accuracy by seed."""
    with styled():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for look, kind in zip((SERIES[1], SERIES[2], SERIES[0]), KINDS, strict=True):
            own = [points[name] for name in points if kinds[name] == kind]
            for completions, accuracy in own:
                axes.plot([completions] * 2, [min(accuracy), max(accuracy)], color=look.color, alpha=0.18, linewidth=1)
            if own:
                axes.plot([c for c, _ in own], [np.mean(a) for _, a in own], look.marker, color=look.color, label=kind)
        axes.set_xscale("log")
        counts = sorted({completions for completions, _ in points.values()})
        axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=30 if len(counts) > 6 else 0)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="generated completions", ylabel="held-out accuracy")
        axes.set_xlim(counts[0] / 1.15, counts[-1] * 1.9)
        axes.yaxis.set_major_formatter(percent)
        low, high = axes.get_ylim()
        for completions in counts:
            own = sorted((float(np.mean(a)), name) for name, (c, a) in points.items() if c == completions)
            places = spread([value for value, _ in own], GAP * (high - low))
            for (value, name), place in zip(own, places, strict=True):
                axes.annotate(_label(name), (completions, value), (completions * 1.05, place), fontsize=6.5,
                              va="center", arrowprops=LEADER)  # fmt: skip
        axes.legend(loc="lower right")
    return figure


def _label(system: str) -> str:
    return next((re.sub(long, short, system) for long, short in SHORT if re.fullmatch(long, system)), system)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, each block of them around the mean of its ascending `values`."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _ends(blocks[-2], gap)[1] + gap > _ends(blocks[-1], gap)[0]:
            last = blocks.pop()
            blocks[-1].extend(last)
    return [_ends(block, gap)[0] + gap * number for block in blocks for number in range(len(block))]


def _ends(block: Sequence[float], gap: float) -> tuple[float, float]:
    reach = gap * (len(block) - 1) / 2
    middle = sum(block) / len(block)
    return middle - reach, middle + reach
