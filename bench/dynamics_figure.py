"""The figure of bench/dynamics.py: held-out success of the systems, a panel for each world."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.paper.figures.style import INK, styled

COLORS = {"GRPO half": "#c9a227", "GRPO": "#7a7a7a", "AVATAR": "#17407a"}  # by how a system's name begins


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure as SVG: one row a system, bars with their intervals."""
    worlds = result["worlds"]
    systems = max((list(found) for found in worlds.values()), key=len)
    with styled():
        figure = Figure(figsize=(3.1 * len(worlds) / 2 + 3, 10.5), layout="constrained")
        grid = figure.subplots(2, (len(worlds) + 1) // 2, sharey=True, squeeze=False).flatten()
        for axes, (name, found) in zip(grid, worlds.items(), strict=False):
            values = np.array([found[system]["final"] for system in found])
            low, high = np.array([found[system]["interval"] for system in found]).T
            colors = [next(c for start, c in COLORS.items() if system.startswith(start)) for system in found]
            axes.barh([systems.index(system) for system in found], 100 * values, 0.7, color=colors, edgecolor=INK,
                      linewidth=0.3, xerr=100 * np.maximum([values - low, high - values], 0),
                      error_kw={"linewidth": 0.7, "ecolor": INK})  # fmt: skip
            axes.set_yticks(range(len(systems)), systems)
            axes.set(title=name, xlim=(0, 102), xlabel="held-out success, %")
            axes.grid(visible=False, axis="y")
        for axes in grid[len(worlds) :]:
            axes.remove()
        grid[0].invert_yaxis()
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
