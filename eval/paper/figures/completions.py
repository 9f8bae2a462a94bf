"""Held-out accuracy against the completions that a training generated, one point for each system."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eval.paper.figures.entry import Entry, joined, partial_told, seeds_told, sources
from eval.paper.figures.folder import Folder, Training
from eval.paper.figures.from_predictions import HELD_OUT
from eval.paper.figures.style import FAINT, SERIES, percent, styled
from eval.paper.results import Run, check_comparable

KINDS = ("fresh, without hints and revisits", "fresh, with hints or revisits", "with replay")
SHORT = ((r"on_off_ratio_on(\d)_off(\d)", r"\1:\2"), (r"tas_lambda_lam_(.+)", r"λ \1"),
         (r"(components|curriculum|rewards|shaping)_(.+)", r"\2"))  # fmt: skip
FEWEST = 3  # systems that make a comparison
LEADER = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.4}
GAP = 0.026  # between two labels, of the axis' height

Systems = dict[str, tuple[dict[int, Training], dict[int, Run]]]


def by_completions(folder: Folder) -> Entry:
    """Accuracy of the systems against their generated completions, on seeds that all of them have."""
    name, title = "completions", "What generated completions buy"
    there, kinds = _systems(folder)
    seeds = _shared({name: {*runs} for name, (_, runs) in there.items() if name in kinds})
    found = {name: own for name, own in there.items() if name in kinds and {*seeds} <= {*own[1]}}
    if len(found) < FEWEST:
        return Entry(name, title, None, reason=f"fewer than {FEWEST} systems of reinforcement learning have answered "
                                               "the held-out samples with the same seeds")  # fmt: skip
    used = {name: {seed: trainings[seed] for seed in seeds} for name, (trainings, _) in found.items()}
    runs = [predictions[seed] for _, predictions in found.values() for seed in seeds]
    check_comparable(runs)
    points = {name: (round(np.mean([own[0][s].completions for s in seeds])), [_accuracy(own[1][s]) for s in seeds])
              for name, own in found.items()}  # fmt: skip
    figure = _draw(points, kinds)
    caption = joined(
        "Each point: a system's accuracy on the held-out samples at its training's end, greedy and without hints, "
        "against the completions that it generated; updates differ, too. 5:3 is five fresh completions a prompt and "
        "three replayed ones. Points: means over seeds, strokes: their range.",
        seeds_told({name: seeds for name in points}), partial_told(runs),
        f"Without these seeds or readable settings, so left out: {', '.join(sorted(there.keys() - found.keys()))}."
        * (len(found) < len(there)),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, used, runs))


def _systems(folder: Folder) -> tuple[Systems, dict[str, str]]:
    """System -> its complete trainings and held-out predictions by seed, of those that generate, a link counted once;
    and what they do with replay, hints and revisits, of those whose settings can be read."""
    found: Systems = {}
    kinds = {}
    for path in sorted((folder.out / "runs" / folder.family).glob("*")):
        own = {seed: t for seed, t in folder.complete(path.name).items()
               if t.system == path.name and t.records[-1].get("completions_generated") is not None}  # fmt: skip
        answers = {seed: run for seed, run in folder.predictions(path.name, HELD_OUT).items() if run.scored.ids}
        if seeds := sorted(own.keys() & answers.keys()):
            found[path.name] = {s: own[s] for s in seeds}, {s: answers[s] for s in seeds}
            if (kind := _kind(own[seeds[0]].folder)) is not None:
                kinds[path.name] = kind
    return found, kinds


def _shared(seeds: dict[str, set[int]]) -> list[int]:
    """The seeds that FEWEST systems or more have all of, for which these have the most runs together; none: []."""
    sets: set[frozenset[int]] = set()
    for own in seeds.values():
        sets |= {frozenset(own)} | {one & own for one in sets}
    runs = {one: len(one) * number for one in sets if (number := sum(one <= own for own in seeds.values())) >= FEWEST}
    return sorted(max(runs, key=lambda one: (runs[one], sorted(one)), default=[]))


def _accuracy(run: Run) -> float:
    return float(np.mean(run.scored.scores["accuracy"]))


def _kind(training: Path) -> str | None:
    """Of KINDS, by the training's own settings; None where they aren't there, or not whole."""
    try:
        settings = OmegaConf.load(training / "config.yaml")
        n_off, hints, revisits = (OmegaConf.select(settings, f"rl.{key}", throw_on_missing=False)
                                  for key in ("n_off", "hints.enabled", "revisit_share"))  # fmt: skip
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):
        return None
    if None in (n_off, hints, revisits):
        return None
    return KINDS[2 if n_off else 1 if hints or revisits else 0]


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
            places = spread([value for value, _ in own], min(GAP, 1 / len(own)) * (high - low))
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
