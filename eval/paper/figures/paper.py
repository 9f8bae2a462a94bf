"""The paper's figures as functions of plain data; each gives a Figure, or None where its data are empty."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from eval.paper.figures.series import Advantages, Band, Reach
from eval.paper.figures.style import FAINT, INK, LOOKS, SERIES, Look, grid, legend_above, percent, styled
from eval.scoring.stats import Estimate
from megatron_avatar.rl.shaping import temporal_weights

Bands = Mapping[str, Mapping[str, Band]]  # panel -> system -> curve
FINE = 401  # points of a drawn weighting


def position(panels: Bands, shaping: Mapping[str, tuple[str, float]]) -> Figure | None:
    """Figure 1: mean absolute per-token surrogate against the place t' in the completion, in bins.

    `shaping` holds (shape, lam) by system: a thin line shows each weighting w_t at the level of the measured mean, the
    form that the points must have by construction (METHOD: token advantage A_{i,t} = w_t A_i).
    """
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    with styled():
        figure, axes = grid(len(panels), 2, size=(4.3, 2.9))
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            for system, curve in curves.items():
                look = LOOKS[system]
                joined = "" if system in shaping else look.line
                panel.plot(curve.x, curve.mean, marker=look.marker, color=look.color, linestyle=joined, label=look.name)
                if curve.seeds > 1:
                    panel.vlines(curve.x, curve.low, curve.high, color=look.color, linewidth=0.8)
                if system in shaping:
                    place, expected = _weighting(curve, *shaping[system])
                    panel.plot(place, expected, linestyle=look.line, color=look.color, linewidth=1.0,
                               label=f"{look.name}, weighting")  # fmt: skip
            panel.set(title=title, xlabel="t / (L − 1), place in the completion", ylabel="mean |surrogate| of a token")
            panel.set(xlim=(0, 1), ylim=(0, 1.12 * max(np.nanmax(c.high) for c in curves.values()) or 1))
        legend_above(figure, axes)
    return figure


def _weighting(curve: Band, shape: str, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Places in [0, 1] and w_t there, scaled so that its mean over the measured bins is the curve's."""
    weights, place = temporal_weights(FINE, shape, lam).double().numpy(), np.linspace(0, 1, FINE)
    measured = np.isfinite(curve.mean)
    return place, weights * curve.mean[measured].mean() / np.interp(curve.x[measured], place, weights).mean()


def sweep(
    panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], settings: Sequence[str], xlabel: str, marked: str
) -> Figure | None:
    """Figures 2 and 4: accuracy against a setting, with intervals; panel -> line -> setting -> Estimate.

    Settings stand at equal distances in the order of `settings`; `marked` is the method's own.
    """
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    several = any(len(lines) > 1 for lines in panels.values())
    with styled():
        figure, axes = grid(len(panels), 2 if len(panels) in (2, 4) else 3, size=(3.1, 2.5))
        for panel, (title, lines) in zip(axes, panels.items(), strict=True):
            panel.axvline(settings.index(marked), color=FAINT, linewidth=5, alpha=0.25)
            for index, (name, estimates) in enumerate(lines.items()):
                look = SERIES[names.index(name) % len(SERIES) if several else 0]
                shift = 0.16 * (index - (len(lines) - 1) / 2)  # side by side, so that intervals stay apart
                places = [settings.index(s) + shift for s in settings if s in estimates]
                _intervals(panel, places, [estimates[s] for s in settings if s in estimates], look, name)
            panel.set(title=title, xlabel=xlabel, xlim=(-0.5, len(settings) - 0.5))
            panel.set_xticks(range(len(settings)), settings)
            panel.yaxis.set_major_formatter(percent)
        axes[0].set_ylabel("accuracy")
        if several:
            legend_above(figure, axes)
    return figure


def _intervals(axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], look: Look, label: str) -> None:
    values, below, above = _around(estimates)
    axes.errorbar(places, values, [below, above], label=label, color=look.color, linestyle=look.line,
                  marker=look.marker, elinewidth=0.9, capsize=2)  # fmt: skip


def _around(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, and how far their intervals reach below and above them."""
    values, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
    return values, np.maximum(values - low, 0), np.maximum(high - values, 0)


def over_training(
    panels: Bands, ylabel: str, *, stages: Mapping[str, float] | None = None, markers: bool = False,
    counts: Collection[str] = (),
) -> Figure | None:  # fmt: skip
    """Figures 3 and 5, and what training logs: shares over training as lines in bands, in the panels `counts` numbers;
    thin lines where a stage begins."""
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    with styled():
        size = (4.6, 3.0) if len(panels) < 3 else (3.1, 2.5)
        figure, axes = grid(len(panels), 2 if len(panels) in (2, 4) else 3, size=size)
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            for system, curve in curves.items():
                draw_band(panel, curve, LOOKS[system], markers)
            panel.set(title=title, xlabel="update")
            if title not in counts:
                panel.yaxis.set_major_formatter(percent)
            panel.margins(y=0.12)  # room for the stages' names
            mark_stages(panel, stages or {})
        axes[0].set_ylabel(ylabel)
        legend_above(figure, axes)
    return figure


def draw_band(axes: Axes, curve: Band, look: Look, markers: bool = False) -> None:
    """The mean as a line, and the band around it."""
    few = np.isfinite(curve.mean).sum() < 8  # which a line alone may not show, broken at stages
    shown = {"marker": look.marker} if markers or few else {}
    axes.plot(curve.x, curve.mean, linestyle=look.line, color=look.color, label=look.name, **shown)
    if np.nansum(curve.high - curve.low) > 0:
        axes.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.15, linewidth=0)
        for edge in (curve.low, curve.high) if markers else ():  # wide bands overlap: told apart in grey
            axes.plot(curve.x, edge, linestyle=look.line, color=look.color, linewidth=0.5)


def mark_stages(axes: Axes, starts: Mapping[str, float]) -> None:
    """A thin line where a stage begins (stage -> first step), with its name above the panel's end of it."""
    if len(starts) < 2:
        return
    for stage, step in starts.items():
        axes.axvline(step - 0.5, color=FAINT, linewidth=0.7, zorder=0)
        axes.annotate(
            stage.replace("_", "-"), (step, 1), xycoords=("data", "axes fraction"), xytext=(2, -2), va="top",
            textcoords="offset points", fontsize=7, color=INK, alpha=0.75,
        )  # fmt: skip


def advantages(systems: Mapping[str, Advantages]) -> Figure | None:
    """Distribution of advantages; those of vanished groups, which are zero and teach nothing, stand out in black."""
    if not systems:
        return None
    with styled():
        figure, axes = grid(len(systems), 2, size=(4.3, 2.8), sharey=True)
        tallest = 0.0
        for panel, (system, found) in zip(axes, systems.items(), strict=True):
            look, total = LOOKS[system], max(1.0, found.total)
            zero = np.zeros(len(found.on))  # their bin is the one that begins at zero
            zero[np.searchsorted(found.edges, 0.0, "right") - 1] = found.vanished
            parts = (
                (zero, {"color": INK}),
                (np.maximum(found.on - zero, 0), {"color": look.color}),
                (found.off, {"color": "#ffffff", "hatch": "////"}),
            )
            bottom = np.zeros(len(zero))
            for counts, style in parts:
                if counts.any():
                    panel.bar(found.edges[:-1], counts / total, np.diff(found.edges), bottom=bottom, align="edge",
                              edgecolor=look.color, linewidth=0.6, **style)  # fmt: skip
                    bottom = bottom + counts / total
            tallest = max(tallest, float(bottom.max()))
            without = f"{percent(found.vanished_share)} of the fresh without a signal"
            panel.set(title=f"{look.name}: {without}", xlabel="advantage")
            panel.yaxis.set_major_formatter(percent)
        axes[0].set(ylabel="share of completions", ylim=(0, 1.05 * tallest or 1))
        replayed = Patch(facecolor="#ffffff", edgecolor=INK, hatch="////")
        handles = [Patch(facecolor=INK), Patch(facecolor=FAINT), replayed]
        labels = ["zero: all rewards of the group equal", "fresh", "replayed"]
        figure.legend(handles, labels, loc="outside upper center", ncols=3 if len(systems) > 1 else 2)
    return figure


def gain_by_length(panels: Mapping[str, Mapping[str, Estimate]], xlabel: str) -> Figure | None:
    """Gain of TAS by completion length: panel -> bin -> paired difference of accuracy, with intervals."""
    panels = {title: bins for title, bins in panels.items() if bins}
    if not panels:
        return None
    with styled():
        figure, axes = grid(len(panels), 2, size=(4.3, 2.7), sharey=True)
        for panel, (title, bins) in zip(axes, panels.items(), strict=True):
            values, below, above = _around(list(bins.values()))
            panel.bar(range(len(bins)), 100 * values, 0.62, color=LOOKS["sft"].color, edgecolor=INK, linewidth=0.5)
            panel.errorbar(range(len(bins)), 100 * values, [100 * below, 100 * above], linestyle="", color=INK,
                           elinewidth=0.9, capsize=3)  # fmt: skip
            panel.axhline(0, color=INK, linewidth=0.8)
            panel.set_xticks(range(len(bins)), [f"{name}\nn = {e.n}" for name, e in bins.items()])
            panel.set(title=title, xlabel=xlabel)
        axes[0].set_ylabel("AVATAR − w/o TAS, points")
    return figure


def sample_efficiency(panels: Bands, reached: Sequence[Reach]) -> Figure | None:
    """Smoothed accuracy on prompts in their turn against unique completions generated; x of a band counts completions.

    The mean target of a stage is a dotted line, a stroke on it where each seed of AVATAR first gets there.
    """
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    with styled():
        alone = len(panels) == 1  # room for the legend
        figure, axes = grid(len(panels), 3, size=(4.6, 3.2) if alone else (3.3, 2.8))
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            for system, curve in curves.items():
                draw_band(panel, curve, LOOKS[system])
            if here := [reach for reach in reached if reach.stage == title]:
                target = float(np.mean([reach.target for reach in here]))
                panel.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="GRPO's final accuracy")
                places = [reach.completions for reach in here if reach.completions is not None]
                panel.plot(places, [target] * len(places), "|", color=INK, markersize=9,
                           label="AVATAR first there, each seed")  # fmt: skip
            panel.set(title=title.replace("_", "-"), xlabel="completions generated in the stage")
        axes[0].set_ylabel("accuracy")
        legend_above(figure, axes, columns=2 if alone else 4)
    return figure
