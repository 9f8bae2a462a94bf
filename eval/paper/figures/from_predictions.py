"""The figures that come from predictions: 1, 2, 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.paper.figures import paper
from eval.paper.figures.entry import Entry, joined, partial_told, published, seeds_told, sources
from eval.paper.figures.folder import Comparable, Folder, Training, comparable
from eval.paper.figures.from_metrics import MAIN, bands, present, shared_stages
from eval.paper.figures.series import BINS, Band, band, group_position, position_band
from eval.paper.figures.training import family_bars
from eval.paper.results import Run, check_comparable
from eval.scoring.cells import cell
from eval.scoring.predictions import Prediction, read_predictions
from eval.scoring.stats import Estimate

TITLES = {
    "omnibench": "OmniBench", "dailyomni": "DailyOmni", "av_odyssey": "AV-Odyssey", "video_holmes": "Video-Holmes",
    "mmvu": "MMVU", "tomato": "TOMATO", "worldsense": "WorldSense", "held_out": "held-out samples",
}  # fmt: skip
AUDIO_VISUAL, VIDEO = ("omnibench", "dailyomni", "av_odyssey"), ("video_holmes", "mmvu", "tomato")
HELD_OUT = "held_out"
STAGE = "stage"  # held_out's breakdown
INTERVALS = "Bars: 95 % intervals over items and seeds."

# A sweep's own member first, then the system of the same configuration outside it.
ON_OFF = {str(off): [f"on_off_ratio_on{8 - off}_off{off}"] for off in range(8)}
ON_OFF["0"].append("components_wo_off_policy")
ON_OFF["4"].append("avatar")
LAMBDA = {lam: [f"tas_lambda_lam_{lam}"] for lam in ("0", "0.05", "0.1", "0.3", "0.5", "1.0", "2.0")}
LAMBDA["0"].append("components_wo_tas")
LAMBDA["0.3"].append("avatar")

BETWEEN = "training, between the tags"
BETWEEN_TAGS = ("shaping_between_tags", "components_tas_between_tags")

Seeds = dict[int, Run]


def position(folder: Folder) -> Entry:
    """Figure 1, from training and from sampled groups."""
    name, title = "figure1", "Per-token surrogate against the place in the completion"
    trainings = {system: runs for system in MAIN if (runs := folder.trainings(system))}
    shaping = {s: weights for s, runs in trainings.items() if (weights := next(iter(runs.values())).shaping)}
    panels = _by_span(folder, trainings)
    (benchmark, runs), used = _grouped(folder, shaping), []
    told = "Drawn from training alone: no groups were sampled."
    if benchmark:
        place = f"sampled groups, {TITLES[benchmark]}"
        panels[place] = present({s: _group_band(by_seed, shaping[s]) for s, by_seed in runs.items()})
        used = [run for by_seed in runs.values() for run in by_seed.values()]
        check_comparable(used)
        told = joined(
            f"Sampled groups: several completions of each item of {TITLES[benchmark]} at temperature 1, |advantage in "
            "the group × w_t|, with the reward 0.5 accuracy + 0.5 format and the ratio 1.",
            seeds_told(used), partial_told(used),
        )  # fmt: skip
    figure = paper.position(panels, shaping)
    if figure is None:
        return Entry(name, title, None, reason="no training has logged its surrogate, and no groups were sampled")
    caption = joined(
        "Mean absolute surrogate of a token in bins of its place t / (L − 1). Training: all tokens of the updates, "
        "fresh and replayed, with the ratios of the update, averaged over updates.",
        "Between the tags: places count over the reasoning and the answer alone." * bool(panels[BETWEEN]),
        seeds_told(trainings), told,
        "Points: means over seeds, strokes: their range; lines: the weighting w_t at the points' mean level. The shape "
        "holds by construction: it checks the mechanism, not a benefit. Completions with fewer tokens than there are "
        "bins fill only some of them, which leaves a comb.", published(name),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, trainings, used))


def _by_span(folder: Folder, trainings: Mapping[str, Mapping[int, Training]]) -> dict[str, dict[str, Band]]:
    """Training's panels: AVATAR weighted over the whole completion, and between the tags, where a sweep has it."""
    swept = next((runs for name in BETWEEN_TAGS if (runs := folder.trainings(name))), {})
    panels = {}
    for panel, span in {"training": "completion", BETWEEN: "between_tags"}.items():
        own = {s: [t.records for t in runs.values() if t.span == span] for s, runs in trainings.items()}
        if panel == BETWEEN and not own.get("avatar"):
            own["avatar"] = [t.records for t in swept.values()]
        panels[panel] = present({s: position_band(records) for s, records in own.items() if records})
    return panels


def _grouped(folder: Folder, shaping: Mapping[str, Any]) -> tuple[str, dict[str, Seeds]]:
    """The benchmark whose items were sampled in groups, and the predictions of the systems whose weighting is known."""
    for benchmark in ("video_holmes", HELD_OUT):
        found = {s: runs for s in shaping if (runs := folder.predictions(s, benchmark, "-g8"))}
        if found:
            return benchmark, found
    return "", {}


def _group_band(by_seed: Seeds, shaping: tuple[str, float]) -> Band | None:
    places = (np.arange(BINS) + 0.5) / BINS
    found = [group_position(_groups(run), shaping) for run in by_seed.values()]
    return band([(places, bins) for bins in found if bins is not None])


def _groups(run: Run) -> list[tuple[list[float], list[int]]]:
    """(rewards, lengths) of each item's completions; items with a failed or not yet graded one are left out."""
    metric, by_item = run.meta["aggregate"]["metric"], dict[str, list[Prediction]]()
    for prediction in read_predictions(run.path):
        by_item.setdefault(prediction["id"], []).append(prediction)
    whole = [g for g in by_item.values() if all(p["error"] is None and p["scores"][metric] is not None for p in g)]
    rewards = [[0.5 * p["scores"][metric] + 0.5 * p["format"] for p in group] for group in whole]
    return [(r, [p["tokens"] for p in group]) for r, group in zip(rewards, whole, strict=True)]


def on_off_ratio(folder: Folder) -> Entry:
    """Figure 2."""
    lines = [{TITLES[b]: (b, None)} for b in (*AUDIO_VISUAL, *VIDEO)]
    panels = {next(iter(line)): line for line in lines} | {
        "held-out samples": {"": (HELD_OUT, None)}, **_stage_panels(folder, ON_OFF),
    }  # fmt: skip
    return _sweep(folder, "figure2", "Accuracy against the on/off-policy ratio", ON_OFF, panels,
                  "replayed completions of 8", "4")  # fmt: skip


def tas_lambda(folder: Folder) -> Entry:
    """Figure 4."""
    panels = {
        "audio-visual": {TITLES[b]: (b, None) for b in AUDIO_VISUAL},
        "video reasoning": {TITLES[b]: (b, None) for b in VIDEO},
        **_stage_panels(folder, LAMBDA),
    }
    return _sweep(folder, "figure4", "Accuracy against λ of TAS", LAMBDA, panels, "λ (not to scale)", "0.3")


Lines = dict[str, tuple[str, tuple[str, str] | None]]  # line -> benchmark, breakdown


def _stage_panels(folder: Folder, candidates: Mapping[str, Sequence[str]]) -> dict[str, Lines]:
    """A panel for each stage of the held-out samples that any candidate has answered."""
    runs = [r for names in candidates.values() for s in names for r in folder.predictions(s, HELD_OUT).values()]
    stages = dict.fromkeys(value for run in runs for values in run.scored.groups[STAGE] for value in values)
    return {f"held-out, {stage.replace('_', '-')}": {"": (HELD_OUT, (STAGE, stage))} for stage in stages}


def _sweep(
    folder: Folder, name: str, title: str, candidates: Mapping[str, Sequence[str]], panels: Mapping[str, Lines],
    xlabel: str, marked: str,
) -> Entry:  # fmt: skip
    chosen, used = comparable(folder, candidates), dict[str, list[Run]]()
    drawn: dict[str, dict[str, dict[str, Estimate]]] = {}
    for panel, lines in panels.items():
        for line, (benchmark, breakdown) in lines.items():
            found = comparable_answers(folder, chosen, benchmark)
            used[benchmark] = [run for by_seed in found.values() for run in by_seed.values()]
            cells = {setting: _cell(by_seed, breakdown) for setting, by_seed in found.items()}
            if cells := {setting: estimate for setting, estimate in cells.items() if estimate is not None}:
                drawn.setdefault(panel, {})[line] = cells
    if not any(len(cells) > 1 for lines in drawn.values() for cells in lines.values()):
        return Entry(name, title, None, reason="fewer than two settings were trained alike and evaluated")
    figure = paper.sweep(drawn, list(candidates), xlabel, marked)
    runs = [run for found in used.values() for run in found]
    absent = [s for s in candidates if all(s not in cells for lines in drawn.values() for cells in lines.values())]
    notes = chosen.notes or ([f"Settings not measured: {', '.join(absent)}."] if absent else [])
    caption = joined(
        f"All settings after {chosen.updates} updates. Grey: the method's own setting.", INTERVALS,
        "All answer the same items, so differences are more certain than the bars alone suggest.",
        seeds_told({"": {run.seed for run in runs}}), *notes, partial_told(runs), published(name),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, chosen.trainings, runs))


def comparable_answers(folder: Folder, chosen: Comparable, benchmark: str) -> dict[str, Seeds]:
    """Label -> predictions by seed of the trainings that compare, of the seeds that all labels with any have.

    ValueError where two contradict each other.
    """
    answered = {label: folder.predictions(chosen.system(label), benchmark) for label in chosen.trainings}
    seeds = set(chosen.seeds).intersection(*(by_seed for by_seed in answered.values() if by_seed))
    found = {label: {s: by_seed[s] for s in sorted(seeds)} for label, by_seed in answered.items() if by_seed and seeds}
    check_comparable([run for by_seed in found.values() for run in by_seed.values()])
    return found


def _cell(by_seed: Seeds, breakdown: tuple[str, str] | None = None) -> Estimate | None:
    runs = {seed: run.scored for seed, run in by_seed.items()}
    return cell(runs, next(iter(by_seed.values())).meta["aggregate"], breakdown)


def over_training(folder: Folder) -> Entry:
    """Figure 5."""
    name, title = "figure5", "Accuracy over training"
    trainings = {system: runs for system in MAIN if (runs := folder.trainings(system))}
    panels, runs = {}, []
    for benchmark in (*AUDIO_VISUAL, *VIDEO, HELD_OUT):
        curves = {}
        for system, trained in trainings.items():
            steps = _at_steps(folder, system, trained, benchmark)
            cells = {step: _cell(by_seed) for step, by_seed in steps.items()}
            if len(cells) > 1 and None not in cells.values():
                curves[system] = _cells_band(cells, len(next(iter(steps.values()))))
                runs += [run for by_seed in steps.values() for run in by_seed.values()]
        panels[TITLES[benchmark]] = curves
    stages = shared_stages(trainings)
    logged = panels["held-out samples of the stage, in training"] = bands(trainings, "eval/overall", stages)
    check_comparable_each(runs)
    figure = paper.over_training(panels, "accuracy", stages=stages, markers=True)
    if figure is None:
        return Entry(name, title, None, reason="no checkpoint inside a training was evaluated")
    caption = joined(
        "Greedy answers of checkpoints; update 0 is the cold start that both begin from. Bands: 95 % "
        f"intervals over items and seeds. {seeds_told([run for run in runs if run.system in MAIN])}" if runs else "",
        "In training: the running stage's own held-out samples, so the curve begins anew with each stage; means over "
        f"seeds, bands their range. {seeds_told(trainings)}" if logged else "",
        partial_told(runs), published(name),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, trainings, runs))


def families(folder: Folder) -> Entry:
    """Accuracy of the main systems on every family of held-out questions."""
    name, title = "families", "Accuracy by family of questions"
    systems = ("base", "sft", "grpo", "grpo_half", "avatar")
    runs = {system: found for system in systems if (found := folder.predictions(system, HELD_OUT))}
    used = [run for by_seed in runs.values() for run in by_seed.values()]
    check_comparable(used)
    names = dict.fromkeys(value for run in used for values in run.scored.groups["family"] for value in values)
    cells = {s: {f: c for f in names if (c := _cell(by_seed, ("family", f)))} for s, by_seed in runs.items()}
    figure = family_bars(cells, {}) if cells else None
    if figure is None:
        return Entry(name, title, None, reason="no held-out samples were answered")
    caption = joined("Held-out samples.", INTERVALS, seeds_told(used), partial_told(used))
    return Entry(name, title, figure, caption, sources=sources(folder.out, {}, used))


def check_comparable_each(runs: Sequence[Run]) -> None:
    """ValueError if two runs on one benchmark contradict each other."""
    for benchmark in dict.fromkeys(run.meta["benchmark"] for run in runs):
        check_comparable([run for run in runs if run.meta["benchmark"] == benchmark])


def _at_steps(folder: Folder, system: str, trained: Mapping[int, Training], benchmark: str) -> dict[int, Seeds]:
    """Update -> predictions by seed, of the seeds that have all of them: cold start, checkpoints, end."""
    steps = folder.checkpoints(system, benchmark)
    if not steps:
        return {}
    last = {s: run for s, run in folder.predictions(system, benchmark).items() if s in trained}
    if last:
        steps[max(trained[seed].updates for seed in last)] = last
    if start := folder.predictions("sft", benchmark):
        steps[0] = start
    seeds = sorted(set.intersection(*map(set, steps.values())))
    return {step: {s: by_seed[s] for s in seeds} for step, by_seed in sorted(steps.items())} if seeds else {}


def _cells_band(cells: Mapping[int, Estimate], seeds: int) -> Band:
    values = np.array([(e.value, e.low, e.high) for e in cells.values()]).T
    return Band(np.array(list(cells), float), *values, seeds)
