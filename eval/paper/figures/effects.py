"""The study's questions as one picture: each difference with its interval, on unseen clips, on the hardest of them, and
on the prompts that training saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from eval.paper.figures.entry import Entry, joined
from eval.paper.figures.style import FAINT, LOOKS, styled

NAME, TITLE = "effects", "What helps, in points of accuracy"
ROW = 0.36  # inches
STARTS = ("sft", "base")  # what all are far above: on their scale the other differences couldn't be read


def effects(found: Sequence[dict[str, Any]], parts: Sequence[str]) -> Entry:
    """`found`: the effects of eval/paper/study.py; `parts` of the held-out set, the last of which stands beside all."""
    measured = [effect for effect in found if effect["found"] and not effect["unequal"]]
    shown = [effect for effect in measured if effect["second"] not in STARTS] or measured
    if not shown:
        return Entry(NAME, TITLE, None, reason="no two systems of a question have answered the held-out samples")
    hardest = parts[-1] if len(parts) > 1 else None
    with styled():
        figure = Figure(figsize=(7.2, 1.1 + ROW * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=FAINT, linewidth=1)
        rows = [_row(axes, place, effect, hardest) for place, effect in enumerate(shown)]
        axes.set_yticks(range(len(shown)), [effect["text"] for effect in shown])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("difference, percentage points")
        names = ("unseen clips", f"of them {(hardest or '').replace('_', ' ')}", "trained prompts")
        drawn = {name: mark for row in rows for name, mark in zip(names, row, strict=True) if mark is not None}
        if len(drawn) > 1:
            marks = [name for name in names if name in drawn]
            axes.legend([drawn[name] for name in marks], marks, ncols=3, loc="lower center", bbox_to_anchor=(0.3, 1.0))
    seeds = sorted({effect["found"]["seeds"] for effect in shown})
    caption = joined(
        "Each line: the first system minus the second, greedy answers without hints; intervals of 95 % over seeds and",
        "samples, not adjusted for the number of questions.",
        "The differences to where training began are in the table." * (len(shown) < len(measured)),
        f"{seeds[0]} to {seeds[-1]} seeds." if len(seeds) > 1 else f"{seeds[0]} seeds.",
    )
    return Entry(NAME, TITLE, figure, caption, sources={"systems": {}, "protocol": "ours", "files": ["study.json"]})


def _row(axes: Any, place: int, effect: dict[str, Any], hardest: str | None) -> list[Any]:
    """The marks of one question: on unseen clips, on the hardest part, on trained prompts; None where not asked."""
    drawn: list[Any] = []
    for shift, system, numbers in ((-0.2, "avatar", effect["found"]), (0.05, "grpo", effect["by_stage"].get(hardest)),
                                   (0.27, "components_wo_hints", effect["trained"])):  # fmt: skip
        if not numbers:
            drawn.append(None)
            continue
        look, value = LOOKS[system], numbers["value"]
        reach = [[max(value - numbers["low"], 0)], [max(numbers["high"] - value, 0)]]
        drawn.append(axes.errorbar(value, place + shift, xerr=reach, color=look.color, marker=look.marker, capsize=2,
                                   linewidth=1.4, linestyle="none"))  # fmt: skip
    return drawn
