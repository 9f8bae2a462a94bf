"""The figures of a run, from metrics.jsonl and predictions, in one style that survives a grey printer."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.score import Estimate

Records = list[dict[str, Any]]

INK = "#22272e"  # text and axes
FAINT = "#8b949e"
# Lightness falls from base to avatar, and lines and hatches differ too.
COLORS = {"base": "#d0d4d9", "sft": "#9cc3e6", "grpo": "#d9822b", "avatar": "#2a5a9b"}
LINES = {"base": ":", "sft": "-.", "grpo": "--", "avatar": "-"}
HATCHES = {"base": "", "sft": "\\\\", "grpo": "//", "avatar": ""}
TIERS = {"easy": "#cfe3f5", "medium": "#7fb0dc", "hard": "#17407a"}
NAMES = {"base": "base", "sft": "SFT", "grpo": "GRPO", "avatar": "AVATAR"}
WINDOW = 9  # steps of the running mean
PARTS = ("decode", "towers", "generate", "reward", "logprobs", "update", "checkpoint")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def read_metrics(path: Path) -> Records:
    """The steps of a metrics.jsonl; none if there is no file, and without a last line that a kill has cut."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, without the steps that did not measure it (absent, null or not finite)."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, float), np.array(values, float)


def curves(runs: Mapping[str, Records], panels: Mapping[str, str], columns: int = 2) -> Figure | None:
    """One panel for each metric (key -> title), one line for each run: measured values faint, a running mean bold.

    Held-out evaluations (eval/...) are few and shown as they are.
    None if no run has measured any of them.
    """
    panels = {key: title for key, title in panels.items() if any(len(series(r, key)[0]) for r in runs.values())}
    if not panels:
        return None
    rows = math.ceil(len(panels) / columns)
    with _style():
        figure = Figure(figsize=(4.3 * min(columns, len(panels)), 2.5 * rows), layout="constrained")
        grid = figure.subplots(rows, min(columns, len(panels)), squeeze=False).flatten()
        for axes, (key, title) in zip(grid, panels.items(), strict=False):
            for name, records in runs.items():
                steps, values = series(records, key)
                if key.startswith("eval/"):
                    axes.plot(steps, values, LINES[name], color=COLORS[name], marker="o", markersize=3)
                elif len(steps):
                    axes.plot(steps, values, color=COLORS[name], alpha=0.3, linewidth=0.8)
                    axes.plot(steps, running_mean(values), LINES[name], color=COLORS[name], label=NAMES[name])
            axes.set_title(title)
            _mark_stages(axes, next(iter(runs.values())))
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes in grid[: len(panels)]:
            axes.set_xlabel("step")
        if len(runs) > 1:
            grid[0].legend()
    return figure


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean over the last `window` values, over fewer at the start."""
    return np.array([values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)])


def advantages(runs: Mapping[str, Records]) -> Figure | None:
    """Distribution of advantages over a run's completions; a group whose rewards are all equal piles up at zero."""
    runs = {name: records for name, records in runs.items() if any(r.get("advantages") for r in records)}
    if not runs:
        return None
    with _style():
        figure = Figure(figsize=(4.3 * len(runs), 2.6), layout="constrained")
        for axes, (name, records) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
            steps = [r["advantages"] for r in records if r.get("advantages")]
            edges = np.array(steps[-1]["edges"])
            counts = {part: np.sum([s[part] for s in steps], axis=0) for part in ("on", "off")}
            total = max(1, sum(int(c.sum()) for c in counts.values()))
            bottom = np.zeros(len(edges) - 1)
            for part, label, hatch in (("on", "fresh", ""), ("off", "replayed", "////")):
                if counts[part].any():
                    axes.bar(
                        edges[:-1], counts[part] / total, np.diff(edges), bottom=bottom, align="edge", label=label,
                        color=COLORS[name] if part == "on" else "#ffffff", edgecolor=COLORS[name], hatch=hatch,
                        linewidth=0.6,
                    )  # fmt: skip
                    bottom = bottom + counts[part] / total
            axes.set(title=NAMES[name], xlabel="advantage", ylabel="share of completions")
            axes.legend()
    return figure


def surrogate_position(runs: Mapping[str, Records]) -> Figure | None:
    """Mean |surrogate| of a token against its place in the completion, each run relative to its own mean."""
    bins = {name: _mean_bins([r.get("surrogate_position") for r in records]) for name, records in runs.items()}
    bins = {name: values for name, values in bins.items() if values is not None}
    if not bins:
        return None
    with _style():
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for name, values in bins.items():
            place = (np.arange(len(values)) + 0.5) / len(values)
            shown = values / np.nanmean(values) if np.nanmean(values) else values
            axes.plot(place, shown, LINES[name], marker="o", markersize=3, color=COLORS[name], label=NAMES[name])
        axes.set(xlabel="place in the completion (0 first token, 1 last)", ylabel="mean |surrogate| / its mean")
        axes.legend()
    return figure


def _mean_bins(steps: Sequence[Sequence[float | None] | None]) -> np.ndarray | None:
    table = np.array([[math.nan if v is None else v for v in step] for step in steps if step], float)
    if table.size == 0 or np.isnan(table).all():
        return None
    measured = ~np.isnan(table)
    return np.where(measured, table, 0).sum(axis=0) / np.where(measured.any(axis=0), measured.sum(axis=0), math.nan)


def tiers(records: Records) -> Figure | None:
    """Completions in the replay buffer by tier, over the steps."""
    records = [r for r in records if all(isinstance(r.get(f"tier/{tier}"), int | float) for tier in TIERS)]
    if not records:
        return None
    with _style():
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.subplots()
        sizes = [[r[f"tier/{tier}"] for r in records] for tier in TIERS]
        axes.stackplot([r["step"] for r in records], sizes, labels=list(TIERS), colors=list(TIERS.values()))
        axes.set(xlabel="step", ylabel="completions in the buffer")
        _mark_stages(axes, records)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def family_bars(systems: Mapping[str, Mapping[str, Estimate]], floor: Mapping[str, float]) -> Figure | None:
    """Accuracy by family with intervals; a dash marks what the most frequent answer alone would reach."""
    names = list(dict.fromkeys(family for estimates in systems.values() for family in estimates))
    if not names:
        return None
    with _style():
        figure = Figure(figsize=(8.8, 3.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(systems)
        for index, (system, estimates) in enumerate(systems.items()):
            shown = [(place, estimates[name]) for place, name in enumerate(names) if name in estimates]
            places = [place + (index - (len(systems) - 1) / 2) * width for place, _ in shown]
            values = np.array([e.value for _, e in shown])
            errors = [values - [e.low for _, e in shown], [e.high for _, e in shown] - values]
            axes.bar(
                places, values, width * 0.92, yerr=np.maximum(errors, 0), label=NAMES[system], color=COLORS[system],
                hatch=HATCHES[system], edgecolor=INK, linewidth=0.5, error_kw={"linewidth": 0.8, "ecolor": INK},
            )  # fmt: skip
        for place, name in enumerate(names):
            if name in floor:
                label = "most frequent answer" if place == 0 else None
                axes.hlines(floor[name], place - 0.45, place + 0.45, colors=INK, linestyles=(0, (4, 2)), label=label)
        axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 6 else 0, parse_math=False)
        axes.set(ylim=(0, 1.02), ylabel="accuracy", xlim=(-0.6, len(names) - 0.4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
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
    with _style():
        figure = Figure(figsize=(8.8, 0.9 + 0.55 * len(shown)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(shown))
        shades = np.linspace(0.9, 0.25, len(PARTS))
        for index, part in enumerate((*PARTS, "rest")):
            values = np.array([seconds[part] for seconds in shown.values()])
            color = "none" if part == "rest" else _blue(shades[index])
            hatch = "//" if part == "rest" else ("", "\\\\")[index % 2]
            places = range(len(shown))
            look = {"color": color, "hatch": hatch, "edgecolor": INK, "linewidth": 0.4}
            axes.barh(places, values, 0.6, left=left, label=part, **look)
            left += values
        axes.set_yticks(range(len(shown)), [NAMES[name] for name in shown])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds a step")
        axes.legend(ncols=len(PARTS) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1, fontsize=8)
    return figure


def waveform(samples: np.ndarray, rate: int) -> Figure:
    """The envelope of a sound [n] over its seconds."""
    with _style():
        figure = Figure(figsize=(6.4, 0.9), layout="constrained")
        axes = figure.subplots()
        columns = np.array_split(samples, min(len(samples), 600))
        seconds = np.linspace(0, len(samples) / rate, len(columns))
        lows, highs = [c.min() for c in columns], [c.max() for c in columns]
        axes.fill_between(seconds, lows, highs, color=COLORS["avatar"], linewidth=0.3, edgecolor=COLORS["avatar"])
        axes.set(ylim=(-1, 1), yticks=[], xlim=(0, max(len(samples) / rate, 1e-3)))
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
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
        "advantages": advantages(reinforced),
        "surrogate_position": surrogate_position(reinforced),
        "tiers": tiers(metrics.get("avatar", [])),
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


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an `<svg>` element; `salt` keeps the ids of several on one page apart."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figures: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Write NAME.png and NAME.svg into the folder; returns the `<svg>` elements by name."""
    folder.mkdir(parents=True, exist_ok=True)
    elements = {name: to_svg(figure, name) for name, figure in figures.items()}
    for name, element in elements.items():
        figures[name].savefig(folder / f"{name}.png", dpi=150, facecolor="white")
        (folder / f"{name}.svg").write_text(element, encoding="utf-8")
    return elements


@contextmanager
def _style():
    with rc_context(STYLE):
        yield


def _mark_stages(axes: Axes, records: Records) -> None:
    """A thin line where a stage begins, with its name."""
    stages: dict[str, float] = {}
    for record in records:
        stages.setdefault(record.get("stage", ""), record["step"])
    if len(stages) < 2:
        return
    for stage, step in stages.items():
        axes.axvline(step - 0.5, color=FAINT, linewidth=0.7)
        axes.annotate(
            stage.replace("_", "-"), (step, 1), xycoords=("data", "axes fraction"), xytext=(2, -2), va="top",
            textcoords="offset points", fontsize=7, color=FAINT,
        )  # fmt: skip


def _mean(records: Records, key: str) -> float:
    values = series(records, key)[1]
    return float(values.mean()) if len(values) else 0.0


def _blue(lightness: float) -> tuple[float, float, float]:
    """From white (1) to the palette's dark blue (0)."""
    dark = np.array([0x17, 0x40, 0x7A]) / 255
    return tuple(dark + (1 - dark) * lightness)
