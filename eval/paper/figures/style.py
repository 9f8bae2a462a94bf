"""The one visual style of all figures, told apart in grey by lightness, line, marker and hatch, and how to save."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#22272e"  # text and axes
FAINT = "#8b949e"


@dataclass(frozen=True)
class Look:
    """How a system is drawn: its name, and color, line, marker and hatch, of which no two systems share all."""

    name: str
    color: str
    line: str | tuple = "-"
    marker: str = "o"
    hatch: str = ""


# Lightness falls from base to avatar.
LOOKS = {
    "base": Look("base", "#d0d4d9", ":", "v"),
    "sft": Look("SFT", "#9cc3e6", "-.", "D", "\\\\"),
    "grpo": Look("GRPO", "#d9822b", "--", "s", "//"),
    "grpo_half": Look("GRPO, half the updates", "#b9a37a", (0, (1, 1)), "X", "xx"),
    "components_wo_hints": Look("AVATAR w/o hints", "#3f8f6b", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "^", ".."),
    "avatar": Look("AVATAR", "#2a5a9b", "-", "o"),
}
NAMES = {system: look.name for system, look in LOOKS.items()}
# Lines that are no systems (benchmarks, question families), in this order.
SERIES = (
    Look("", "#17407a", "-", "o"),
    Look("", "#d9822b", "--", "s"),
    Look("", "#3f8f6b", "-.", "^"),
    Look("", "#8b6fb0", ":", "D"),
    Look("", "#7a828c", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
    Look("", "#c9a227", (0, (1, 1)), "X"),
)

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
    "lines.markersize": 4,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "pdf.fonttype": 42,  # text stays text in the PDF
}


@contextmanager
def styled():
    """Everything drawn inside has the style."""
    with rc_context(STYLE):
        yield


def percent(value: float, _: int = 0) -> str:
    """A share as an axis label."""
    return f"{100 * value:.0f} %"


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an `<svg>` element; `salt` keeps the ids of several on one page apart."""
    buffer = io.StringIO()
    with styled(), rc_context({"svg.hashsalt": salt}):  # ticks are made when it is saved
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figures: Mapping[str, Figure], folder: Path, kinds: tuple[str, ...] = ("svg", "png")) -> dict[str, str]:
    """Write NAME.svg and, by `kinds`, NAME.pdf and NAME.png into the folder; returns the `<svg>` elements by name."""
    folder.mkdir(parents=True, exist_ok=True)
    elements = {name: to_svg(figure, name) for name, figure in figures.items()}
    for name, element in elements.items():
        (folder / f"{name}.svg").write_text(element, encoding="utf-8")
        with styled():
            if "pdf" in kinds:  # without a date: the same numbers give the same bytes
                figures[name].savefig(folder / f"{name}.pdf", facecolor="white", metadata={"CreationDate": None})
            if "png" in kinds:
                figures[name].savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    return elements


def shade(lightness: float) -> tuple[float, float, float]:
    """From white (1) to the palette's dark blue (0)."""
    dark = np.array([0x17, 0x40, 0x7A]) / 255
    return tuple(dark + (1 - dark) * lightness)


def grid(panels: int, columns: int, *, size: tuple[float, float] = (3.0, 2.5), **shared: bool) -> tuple[Figure, list]:
    """A figure with `panels` axes of `size` inches in rows of at most `columns`; call inside `styled`."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten().tolist()
    for spare in axes[panels:]:
        spare.remove()
    for index in range(max(0, panels - columns), panels):  # the lowest of each column names the axis
        axes[index].xaxis.set_tick_params(labelbottom=True)
    return figure, axes[:panels]


def legend_above(figure: Figure, axes: list, columns: int = 4) -> None:
    """One legend for all panels, above them, without repetition."""
    entries = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(columns, len(entries)),
                      handlelength=3.2)  # fmt: skip
