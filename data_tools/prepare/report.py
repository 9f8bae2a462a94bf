"""What was prepared, in counts of bounded size: report.md with two pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_avatar.files import replacing, writing
from megatron_avatar.records import Sample

BINS = 64  # of token lengths up to the context
SIDES = (112, 224, 360, 480, 720, 1080, 2160)
SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


class Report:
    """Counts of samples, of media (each content once) and of refusals."""

    def __init__(self, context: int):
        self.context, self.width = context, -(-context // BINS)
        self.samples = 0
        self.groups: Counter[tuple[str, str, str]] = Counter()
        self.codecs: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.clips: Counter[bool] = Counter()  # with sound or without
        self.silent = 0  # tracks and sounds in which nothing is heard
        self.tokens: Counter[int] = Counter()  # by bin
        self.longest = 0
        self.refused: Counter[str] = Counter()

    def keep(self, sample: Sample, tokens: int, media: Iterable[dict[str, Any]]) -> None:
        self.samples += 1
        self.groups[sample.stage, sample.split, sample.problem_type] += 1
        self.tokens[tokens // self.width] += 1
        self.longest = max(self.longest, tokens)
        for fact in media:
            self.codecs[f"{fact['kind']}: {fact['codec']}"] += 1
            if "seconds" in fact:
                self.seconds[_class(fact["seconds"], SECONDS, "s")] += 1
            if "height" in fact:
                self.sides[_class(max(fact["height"], fact["width"]), SIDES, "px")] += 1
            self.silent += fact.get("silent", False)
            if fact["kind"] == "video":
                self.clips[fact["sound"]] += 1

    def reject(self, kind: str) -> None:
        self.refused[kind] += 1

    def worst(self) -> str:
        return ", ".join(f"{kind} ({count})" for kind, count in self.refused.most_common(3)) or "an empty input"

    def write(self, out: Path) -> None:
        clips = self.clips.total()
        heard = f"{self.clips[True]} of {clips} clips have sound ({self.clips[True] / clips:.0%})." if clips else ""
        silent = f"{self.silent} sounds or tracks are silent from beginning to end." if self.silent else ""
        parts = [
            "# What was prepared",
            f"{self.samples} samples kept, {self.refused.total()} rows refused (each named in rejected.jsonl).",
            _table(("stage", "split", "problem type", "samples"), [(*k, n) for k, n in sorted(self.groups.items())]),
            "## Refused rows", _table(("reason", "rows"), self.refused.most_common()),
            "## Media, each content once", heard, silent, _table(("codec", "media"), self.codecs.most_common()),
            _table(("longer side", "media"), _ordered(self.sides, SIDES, "px")),
            _table(("length", "media"), _ordered(self.seconds, SECONDS, "s")),
            "## Prompts", f"The longest has {self.longest} tokens; the context is {self.context}.",
            "![tokens](tokens.png)", "![seconds](seconds.png)",
        ]  # fmt: skip
        with replacing(out / "report.md") as file:
            file.write("\n\n".join(part for part in parts if part) + "\n")
        tokens = [(f"{k * self.width}", self.tokens[k]) for k in range(max(self.tokens, default=0) + 1)]
        _bars(out / "tokens.png", tokens, f"prompt tokens (context {self.context})", "samples")
        _bars(out / "seconds.png", _ordered(self.seconds, SECONDS, "s"), "length of clips and sounds", "media")


def _class(value: float, limits: tuple[int, ...], unit: str) -> str:
    for limit in limits:
        if value <= limit:
            return f"up to {limit} {unit}"
    return f"above {limits[-1]} {unit}"


def _ordered(counts: Counter[str], limits: tuple[int, ...], unit: str) -> list[tuple[str, int]]:
    names = [f"up to {limit} {unit}" for limit in limits] + [f"above {limits[-1]} {unit}"]
    return [(name, counts[name]) for name in names if counts[name]]


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) if len(lines) > 2 else "none"


def _bars(path: Path, counts: list[tuple[str, int]], what: str, of: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.bar(range(len(counts)), [count for _, count in counts], width=0.9)
    step = max(1, len(counts) // 8)
    axes.set_xticks(range(0, len(counts), step), [name for name, _ in counts[::step]], rotation=20, ha="right")
    axes.set(xlabel=what, ylabel=of)
    with writing(path):
        figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
