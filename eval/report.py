"""The report of a run: comparison table, figures, clips with the systems' answers, and how it was measured.

    python -m eval.report runs/demo        # report.html, report.md and figures/ beside results.json

Nothing in it is written by hand: what was not measured says so; while the run goes on one line names what is to come.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from eval.paper.figures import style, training
from eval.paper.figures.series import WINDOW, Records, read_metrics, series
from eval.paper.figures.side_by_side import Clip, load_clip
from eval.scoring.predictions import Prediction, correct, majority_scores, read_predictions
from eval.scoring.stats import Difference, Estimate, estimates, paired_difference
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.records import Sample

SYSTEMS = ("base", "sft", "grpo", "avatar")
TRAINED = ("sft", "grpo", "avatar")
PAIRS = (("avatar", "grpo"), ("avatar", "sft"), ("grpo", "sft"), ("sft", "base"))
MISSING = "not measured"
SIGNIFICANT = 0.05

CAPTIONS = {
    "families": "Accuracy on the held-out samples by question family, with 95 % intervals.",
    "curves": f"Training, step by step. Thin: as measured; bold: mean over {WINDOW} steps.",
    "solvability": "Share of a stage's training prompts that at least one completion has solved.",
    "advantages": "Advantages of all completions of the run. A group whose rewards are all equal piles up at zero.",
    "surrogate_position": "Mean absolute surrogate of a token by its place. Temporal shaping raises both ends by "
    "construction: this checks the mechanism, not a benefit.",
    "tiers": "The replay buffer by the tier that each completion's prompt is in at that step.",
    "replay": "What was replayed: how much of it could teach nothing, how much was right, its age, and its largest "
    "ratio, which the dual clip bounds in the loss.",
    "health": "Groups without a signal, distance from the reference, entropy and length.",
    "step_time": "Where a step's time goes, averaged over the run.",
    "sft_loss": "Loss of the cold start.",
}


@dataclass
class Measurements:
    """What a run's folder holds; whatever is absent stays empty.

    predictions and estimates by system; metrics by training run; quarantined as (where, sample id, reason). `growing`:
    systems may have answered unlike samples by now; such pairs aren't compared yet.
    """

    root: Path
    results: dict[str, Any]
    predictions: dict[str, list[Prediction]]
    metrics: dict[str, Records]
    quarantined: list[tuple[str, str, str]] = field(default_factory=list)
    growing: bool = False

    @cached_property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        return {name: estimates(predictions) for name, predictions in self.predictions.items()}

    @cached_property
    def floor(self) -> dict[str, float]:
        return majority_scores(next(iter(self.predictions.values()), []))

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        have = self.predictions
        pairs = [(a, b) for a, b in PAIRS if a in have and b in have]
        if self.growing:
            ids = {name: {p["id"] for p in found} for name, found in have.items()}
            pairs = [(a, b) for a, b in pairs if ids[a] == ids[b]]
        return {(a, b): paired_difference(have[a], have[b]) for a, b in pairs}


def measurements(root: Path) -> Measurements:
    """Read a run's folder. Raises ValueError naming the file and line of damaged predictions."""
    root = Path(root)
    files = {name: root / "eval" / name / "held_out.ours.jsonl" for name in SYSTEMS}
    predictions = {name: read_predictions(file) for name, file in files.items() if file.exists()}
    predictions = {name: found for name, found in predictions.items() if found}
    set_aside = []
    for name in TRAINED:
        for sample_id, reason in sorted(_read_json(root / name / "done.json").get("quarantined", {}).items()):
            set_aside.append((f"training {name}", sample_id, str(reason)))
    for name, found in predictions.items():
        set_aside += [(f"evaluation of {name}", p["id"], p["error"]) for p in found if p["error"] is not None]
    return Measurements(
        root=root,
        results=_read_json(root / "results.json"),
        predictions=predictions,
        metrics={name: read_metrics(root / name / "metrics.jsonl") for name in TRAINED},
        quarantined=set_aside,
    )


def verdict(found: Measurements) -> str:
    """One honest sentence on AVATAR against GRPO, from the paired test and nothing else."""
    difference = found.differences.get(("avatar", "grpo"))
    if difference is None:
        return f"AVATAR against GRPO: {MISSING}."
    if difference.p >= SIGNIFICANT:
        judgement = "this run does not tell the two apart"
    else:
        judgement = f"AVATAR is {'ahead of' if difference.value > 0 else 'behind'} GRPO in this run"
    points = [f"{100 * value:+.1f}" for value in (difference.value, difference.low, difference.high)]
    return (
        f"On the same {difference.n} held-out samples AVATAR answers "
        f"{percent(found.estimates['avatar']['overall'].value)} correctly and GRPO "
        f"{percent(found.estimates['grpo']['overall'].value)}: a difference of {points[0]} points "
        f"(95 % interval {points[1]} to {points[2]}, paired test p {p_value(difference.p)}), so {judgement}. "
        "The interval is over samples; it says nothing about other seeds."
    )


def effort(found: Measurements) -> str:
    """One sentence on updates and completions generated."""
    steps, generated = found.results.get("steps"), found.results.get("completions_generated") or {}
    if steps is None or not {"grpo", "avatar"} <= generated.keys():
        return f"Updates and completions generated: {MISSING}."
    grpo, avatar = generated["grpo"], generated["avatar"]
    share = f", {100 * abs(1 - avatar / grpo):.0f} % {'fewer' if avatar <= grpo else 'more'}" if grpo else ""
    return f"Both made {steps} updates. GRPO generated {grpo:,} completions for them, AVATAR {avatar:,}{share}."


def partial(found: Measurements) -> list[str]:
    """Of systems that have answered fewer samples than another: `GRPO 12 of 24`."""
    most = max(map(len, found.predictions.values()), default=0)
    return [f"{style.NAMES[n]} {len(p)} of {most}" for n, p in found.predictions.items() if len(p) < most]


def coming(found: Measurements, clips: int, figures: int) -> str:
    """What a report that grows doesn't have yet, `figures` of them, in one sentence."""
    lacking = [style.NAMES[name] for name in SYSTEMS if name not in found.predictions]
    parts = [f"the accuracy of {', '.join(lacking)}"] if lacking else []
    parts += [] if ("avatar", "grpo") in found.differences else ["AVATAR against GRPO"]
    parts += [] if clips else ["clips to see and hear"]
    parts += [f"{figures} more figure{'s' * (figures > 1)}"] if figures else []
    return f"Still to come: {'; '.join([*parts, 'what the run took'])}."


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def table(found: Measurements) -> tuple[list[str], list[tuple[str, list[Estimate | None], float | None]]]:
    """Columns (overall, then families), and for each system its name, estimates, and share in the format."""
    columns = list(dict.fromkeys(name for system in found.estimates.values() for name in system)) or ["overall"]
    rows = []
    for system in SYSTEMS:
        predictions = found.predictions.get(system, [])
        cells = [found.estimates.get(system, {}).get(column) for column in columns]
        in_format = sum(p["format"] for p in predictions) / len(predictions) if predictions else None
        rows.append((style.NAMES[system], cells, in_format))
    return columns, rows


def facts(found: Measurements) -> list[tuple[str, str]]:
    """Name and value of what the run measured about itself."""
    results = found.results
    generated, wall = results.get("completions_generated") or {}, results.get("wall_s") or {}
    peak, machine = results.get("peak_rss_mib"), results.get("machine") or {}
    known = [
        ("seed", results.get("seed")),
        ("updates of each RL run", results.get("steps")),
        *((f"completions generated, {style.NAMES[name]}", generated.get(name)) for name in ("grpo", "avatar")),
        *((f"time, {style.NAMES.get(name, name)}", wall.get(name)) for name in ("data", *TRAINED)),
        ("time, evaluations", sum(s for name, s in wall.items() if name.startswith("eval")) or None),
        ("time from first to last, parts side by side", wall.get("in all")),
        ("time of processors, all processes", results.get("processor_s")),
        *shares(found.metrics.get("avatar", [])),
        ("peak memory, all processes", None if peak is None else f"{peak:,.0f} MiB"),
        ("machine", ", ".join(f"{key} {value}" for key, value in machine.items()) or None),
        *((name, version) for name, version in (results.get("versions") or {"versions": None}).items()),
    ]
    return [(name, _fact(name, value)) for name, value in known]


def shares(records: Records) -> list[tuple[str, str | None]]:
    """What AVATAR's visits and its replay came to: means over the steps that have them, and the extremes."""
    means = {
        "hinted, of AVATAR's visits": "hints/share",
        "without a signal, of AVATAR's groups": "vanished",
        "without an advantage, of the replayed": "replay/dead",
        "right, of the replayed": "replay/correct",
        "bounded by the dual clip, of replayed tokens": "replay/bounded_tokens",
    }
    told: list[tuple[str, str | None]] = []
    for words, key in means.items():
        values = series(records, key)[1]
        told.append((words, percent(float(values.mean())) if len(values) else None))
    ages, ratios = (series(records, f"replay/{key}")[1] for key in ("age_max", "ratio_max"))
    told.append(("oldest replayed completion", f"{ages.max():.0f} steps" if len(ages) else None))
    told.append(("largest ratio of a replayed token", f"{ratios.max():.1f}" if len(ratios) else None))
    return told


def _fact(name: str, value: Any) -> str:
    if value is None:
        return MISSING
    if name.startswith("time"):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def judged(found: Measurements) -> str | None:
    """The system whose right and wrong answers choose the clips: the furthest that was measured."""
    return next((name for name in reversed(SYSTEMS) if name in found.predictions), None)


def clips(found: Measurements) -> list[Clip]:
    """Of each stage the first held-out sample with a video that the furthest system got right, and the first that it
    got wrong, in the manifest's order."""
    manifest = found.root / "data" / "manifest.jsonl"
    if not manifest.exists() or (chooses := judged(found)) is None:
        return []
    answers = {name: {p["id"]: p for p in found.predictions.get(name, [])} for name in SYSTEMS}
    first: dict[tuple[str, bool], Sample] = {}
    stages: dict[str, None] = {}
    for sample in load_manifest(manifest, check_media=False):
        answer = answers[chooses].get(sample.id)
        if answer is not None and any(m.kind == "video" for m in sample.media):
            first.setdefault((sample.stage, correct(answer) == 1), sample)
            stages.setdefault(sample.stage)
    return [
        load_clip(sample, manifest.parent, [(style.NAMES[name], answers[name].get(sample.id)) for name in SYSTEMS
                                            if not found.growing or sample.id in answers[name]],
                  f"{stage}, the first that {style.NAMES[chooses]} answered {'right' if right else 'wrong'}")
        for stage in stages for right in (True, False) if (sample := first.get((stage, right))) is not None
    ]  # fmt: skip


def render(root: Path, *, growing: bool = False, stopped: bool = False, seed: int | None = None) -> None:
    """Write report.html (self-contained), report.md and figures/ into the run's folder. `growing`: the run of this
    `seed` goes on, and the page in a browser loads itself again, unless the run was `stopped` before its end."""
    root = Path(root)
    found = measurements(root)
    found.growing = growing
    differences = [(f"{style.NAMES[a]} − {style.NAMES[b]}", d) for (a, b), d in found.differences.items()]
    drawn = training.draw(found.metrics, found.estimates, found.floor)
    elements = style.save(drawn, root / "figures")
    columns, rows = table(found)
    shown, known = clips(found), facts(found)
    if growing:
        rows = [row for row, system in zip(rows, SYSTEMS, strict=True) if system in found.predictions]
        known = [(name, value) for name, value in known if value != MISSING]
    values = {
        "verdict": verdict(found),
        "effort": "" if growing and "steps" not in found.results else effort(found),
        "seed": found.results.get("seed", MISSING if seed is None else seed),
        "columns": columns,
        "rows": rows,
        "floor": found.floor,
        "differences": differences,
        "partial": partial(found) if growing else [],
        "figures": [(name, CAPTIONS[name]) for name in drawn],
        "svg": {name: Markup(element) for name, element in elements.items()},
        "unmeasured": [] if growing else [CAPTIONS[name] for name in CAPTIONS if name not in drawn],
        "coming": coming(found, len(shown), len(CAPTIONS) - len(drawn)) if growing else "",
        "clips": shown,
        "judged": style.NAMES.get(judged(found) or "", MISSING),
        "facts": known,
        "quarantined": found.quarantined,
        "n": max(map(len, found.predictions.values()), default=0),
        "missing": MISSING,
        "growing": growing,
        "stopped": stopped,
    }
    for name, escaped in (("report.html", True), ("report.md", False)):
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=escaped, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {"percent": percent, "p_value": p_value, "cell": _cell}
        text = environment.get_template(f"{name}.j2").render(values)
        aside = root / f".{name}"
        aside.write_text(text, encoding="utf-8")
        aside.replace(root / name)  # a browser may be reading


def _cell(text: Any) -> str:
    """Foreign text for one cell of a Markdown table: on one line, as code, so that nothing in it is read as markup."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{line}`" if line else "(empty)"


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print results.json's accuracy table."""
    systems = results["systems"]
    rows = list(dict.fromkeys(name for scores in systems.values() for name in scores))
    grid = Table(title="held-out accuracy, %")
    grid.add_column("")
    for system in systems:
        grid.add_column(style.NAMES.get(system, system), justify="right")
    for row in rows:
        values = [scores.get(row) for scores in systems.values()]
        grid.add_row(row, *["–" if v is None else str(v) if row == "n" else f"{100 * v:.1f}" for v in values])
    console.print(grid)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m eval.report RUN_FOLDER", file=sys.stderr)
        return 2
    root = Path(arguments[0])
    if not root.is_dir():
        print(f"error: {root}: no such folder; run make demo first, or name a run's folder", file=sys.stderr)
        return 2
    try:
        render(root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(root / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
