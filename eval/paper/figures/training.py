"""The figures of one training run and its held-out answers: what the demo's report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from eval.paper.figures.paper import advantages, mark_stages, position
from eval.paper.figures.series import Records, advantage_counts, position_band, running_mean, series, stage_starts
from eval.paper.figures.style import INK, LOOKS, percent, shade, styled
from eval.scoring.stats import Estimate

TIERS = {"easy": "#cfe3f5", "medium": "#7fb0dc", "hard": "#17407a"}
PARTS = ("decode", "towers", "generate", "reward", "logprobs", "update", "checkpoint")


def curves(runs: Mapping[str, Records], panels: Mapping[str, str], columns: int = 2) -> Figure | None:
    """One panel for each metric (key -> title), one line for each run: measured values faint, a running mean bold.

    Held-out evaluations (eval/...) are few and shown as they are.
    None if no run has measured any of them.
    """
    panels = {key: title for key, title in panels.items() if any(len(series(r, key)[0]) for r in runs.values())}
    if not panels:
        return None
    rows = math.ceil(len(panels) / columns)
    with styled():
        figure = Figure(figsize=(4.3 * min(columns, len(panels)), 2.5 * rows), layout="constrained")
        grid = figure.subplots(rows, min(columns, len(panels)), squeeze=False).flatten()
        for axes, (key, title) in zip(grid, panels.items(), strict=False):
            for name, records in runs.items():
                look, (steps, values) = LOOKS[name], series(records, key)
                if key.startswith("eval/"):
                    axes.plot(steps, values, look.line, color=look.color, marker="o", markersize=3)
                elif len(steps):
                    axes.plot(steps, values, color=look.color, alpha=0.3, linewidth=0.8)
                    axes.plot(steps, running_mean(values), look.line, color=look.color, label=look.name)
            axes.set_title(title)
            mark_stages(axes, stage_starts(next(iter(runs.values()))))
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes in grid[: len(panels)]:
            axes.set_xlabel("step")
        if len(runs) > 1:
            grid[0].legend()
    return figure


def tiers(records: Records) -> Figure | None:
    """Completions in the replay buffer by tier, over the steps."""
    records = [r for r in records if all(isinstance(r.get(f"tier/{tier}"), int | float) for tier in TIERS)]
    if not records:
        return None
    with styled():
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.subplots()
        sizes = [[r[f"tier/{tier}"] for r in records] for tier in TIERS]
        axes.stackplot([r["step"] for r in records], sizes, labels=list(TIERS), colors=list(TIERS.values()))
        axes.set(xlabel="step", ylabel="completions in the buffer")
        mark_stages(axes, stage_starts(records))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def family_bars(systems: Mapping[str, Mapping[str, Estimate]], floor: Mapping[str, float]) -> Figure | None:
    """Accuracy by family with intervals; a dash marks what the most frequent answer alone would reach."""
    names = list(dict.fromkeys(family for estimates in systems.values() for family in estimates))
    if not names:
        return None
    with styled():
        figure = Figure(figsize=(8.8, 3.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(systems)
        for index, (system, estimates) in enumerate(systems.items()):
            look = LOOKS[system]
            shown = [(place, estimates[name]) for place, name in enumerate(names) if name in estimates]
            places = [place + (index - (len(systems) - 1) / 2) * width for place, _ in shown]
            values = np.array([e.value for _, e in shown])
            errors = [values - [e.low for _, e in shown], [e.high for _, e in shown] - values]
            axes.bar(
                places, values, width * 0.92, yerr=np.maximum(errors, 0), label=look.name, color=look.color,
                hatch=look.hatch, edgecolor=INK, linewidth=0.5, error_kw={"linewidth": 0.8, "ecolor": INK},
            )  # fmt: skip
        for place, name in enumerate(names):
            if name in floor:
                label = "most frequent answer" if place == 0 else None
                axes.hlines(floor[name], place - 0.45, place + 0.45, colors=INK, linestyles=(0, (4, 2)), label=label)
        axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 6 else 0, parse_math=False)
        axes.set(ylim=(0, 1.02), ylabel="accuracy", xlim=(-0.6, len(names) - 0.4))
        axes.yaxis.set_major_formatter(percent)
        axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def step_time(runs: Mapping[str, Records]) -> Figure | None:
    """Mean seconds of a step by what they were spent on; the rest is what no timer covers."""
    shown = {}
    for name, records in runs.items():
        seconds = {part: _mean(records, f"time/{part}") for part in (*PARTS, "step")}
        if seconds["step"]:
            seconds["rest"] = max(0.0, seconds.pop("step") - sum(seconds.values()))
            shown[name] = seconds
    if not shown:
        return None
    with styled():
        figure = Figure(figsize=(8.8, 0.9 + 0.55 * len(shown)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(shown))
        shades = np.linspace(0.9, 0.25, len(PARTS))
        for index, part in enumerate((*PARTS, "rest")):
            values = np.array([seconds[part] for seconds in shown.values()])
            color = "none" if part == "rest" else shade(shades[index])
            hatch = "//" if part == "rest" else ("", "\\\\")[index % 2]
            places = range(len(shown))
            look = {"color": color, "hatch": hatch, "edgecolor": INK, "linewidth": 0.4}
            axes.barh(places, values, 0.6, left=left, label=part, **look)
            left += values
        axes.set_yticks(range(len(shown)), [LOOKS[name].name for name in shown])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds a step")
        axes.legend(ncols=len(PARTS) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1, fontsize=8)
    return figure


def draw(
    metrics: Mapping[str, Records], systems: Mapping[str, Mapping[str, Estimate]], floor: Mapping[str, float]
) -> dict[str, Figure]:
    """All figures that the measurements allow, by name. `metrics` holds runs (sft, grpo, avatar) by name."""
    reinforced = {name: metrics[name] for name in ("grpo", "avatar") if metrics.get(name)}
    figures = {
        "families": family_bars(systems, floor),
        "curves": curves(
            reinforced,
            {
                "reward": "Reward (weights change with the stage)",
                "reward/accuracy": "Accuracy of sampled answers",
                "reward/format": "Format",
                "eval/overall": "Held-out accuracy during training",
            },
        ),
        "solvability": curves(reinforced, {"solvability": "Share of the stage's prompts solved at least once"}, 1),
        "advantages": advantages({n: counts for n, r in reinforced.items() if (counts := advantage_counts([r]))}),
        "surrogate_position": position({"": {n: b for n, r in reinforced.items() if (b := position_band([r]))}}, {}),
        "tiers": tiers(metrics.get("avatar", [])),
        "replay": curves(
            {name: metrics[name] for name in ("avatar",) if metrics.get(name)},
            {
                "replay/dead": "Replayed completions without an advantage",
                "replay/correct": "Right ones among the replayed",
                "replay/age_max": "Oldest replayed completion (steps)",
                "replay/ratio_max": "Largest ratio of a replayed token",
            },
        ),
        "health": curves(
            reinforced,
            {
                "vanished": "Groups without a signal (all rewards equal)",
                "kl": "KL to the reference",
                "entropy": "Entropy of a token (nats)",
                "length": "Completion length (tokens)",
            },
        ),
        "step_time": step_time(reinforced),
        "sft_loss": curves({"sft": metrics.get("sft", [])}, {"loss": "SFT loss (nats a token)"}, 1),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _mean(records: Records, key: str) -> float:
    values = series(records, key)[1]
    return float(values.mean()) if len(values) else 0.0
