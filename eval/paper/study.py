"""Does the method work, in small? The questions of docs/study.md, answered from a reproduction's tiny family.

Pure over eval/paper/results.py and metrics.jsonl; what was not run is said to be not measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from eval.paper.figures.folder import Folder
from eval.paper.figures.from_metrics import reach
from eval.paper.figures.series import series
from eval.paper.results import Run, check_comparable
from eval.scoring.cells import cell, compare
from eval.scoring.stats import Difference, Estimate, holm

FAMILY, BENCHMARK, PROTOCOL, BREAKDOWN = "tiny", "held_out", "ours", "stage"
TRAINED = "ours-trained"  # the same, of the prompts that training saw
LEVEL = 0.05
FIRST = 15  # updates: how a training begins


@dataclass(frozen=True)
class Question:
    """One effect: `first` minus `second`. Questions of one family of tests are adjusted together, measured or not.

    equal: what the two have to have the same of for the comparison to be one, "updates" or "completions".
    """

    text: str
    first: str
    second: str
    tests: str
    equal: str = ""


QUESTIONS = (
    Question("AVATAR against GRPO, equal updates", "avatar", "grpo", "primary", "updates"),
    Question("AVATAR against GRPO, equal generated completions", "avatar", "grpo_half", "primary", "completions"),
    Question("GRPO against its cold start", "grpo", "sft", "secondary"),
    Question("AVATAR against its cold start", "avatar", "sft", "secondary"),
    Question("the cold start against the base", "sft", "base", "secondary"),
    Question("AVATAR stopped after GRPO's seconds, against GRPO", "avatar@70", "grpo", "secondary"),
    Question("AVATAR against GRPO at half of beta", "avatar", "components_grpo_beta_matched", "controls", "updates"),
    Question("AVATAR against GRPO, two updates on half of the rollouts", "avatar", "grpo_two_updates", "controls",
             "completions"),
    Question("AVATAR against the same with revisits and hints", "avatar", "grpo_two_updates_hints", "controls",
             "completions"),
    Question("AVATAR against AVATAR as published", "avatar", "components_published", "controls", "updates"),
    Question("revisits alone: GRPO with them against GRPO", "components_grpo_revisits", "components_grpo", "controls",
             "updates"),
    Question("replay: against w/o off-policy", "components_avatar", "components_wo_off_policy", "parts", "updates"),
    Question("shaping: against w/o TAS", "components_avatar", "components_wo_tas", "parts", "updates"),
    Question("running baseline: against w/o VCRS", "components_avatar", "components_wo_vcrs", "parts", "updates"),
    Question("hints: against w/o hints", "components_avatar", "components_wo_hints", "parts", "updates"),
    Question("revisits: against w/o revisits", "avatar", "wo_revisits", "parts", "updates"),
    Question("AVATAR w/o replay against GRPO, equal updates and completions", "fresh", "grpo_half", "fresh", "updates"),
    Question("AVATAR against itself w/o replay, equal completions", "avatar", "fresh", "afterwards", "completions"),
    Question("hints, w/o replay: against w/o hints", "fresh", "fresh_wo_hints", "fresh parts", "updates"),
    Question("revisits, w/o replay: against w/o revisits", "fresh", "fresh_wo_revisits", "fresh parts", "updates"),
    Question("shaping, w/o replay: against w/o shaping", "fresh", "fresh_wo_shaping", "fresh parts", "updates"),
)
# Seeds, as in slurm/profiles/tiny.yaml, and fresh.yaml.
PLANNED = {"primary": 16, "secondary": 16, "controls": 5, "parts": 5, "fresh": 13, "afterwards": 13, "fresh parts": 13}
PLANNED_SWEEP = 3
SWEEPS = {
    "tas_lambda": [f"tas_lambda_lam_{lam}" for lam in ("0", "0.05", "0.1", "0.3", "0.5", "1.0", "2.0")],
    "on_off_ratio": [f"on_off_ratio_on{n}_off{8 - n}" for n in range(8, 0, -1)],
}
COURSE = ("grpo", "grpo_half", "avatar", "components_published", "components_wo_hints")
TRAINED_SYSTEMS = (
    "sft", "grpo_half", "grpo", "grpo_two_updates", "grpo_two_updates_hints", "avatar", "components_wo_off_policy",
    "components_wo_tas", "components_wo_vcrs", "components_wo_hints", "wo_revisits", "fresh", "fresh_wo_hints",
    "fresh_wo_revisits", "fresh_wo_shaping",
)  # fmt: skip
PUBLISHED_BEST = {"tas_lambda": "tas_lambda_lam_0.3", "on_off_ratio": "on_off_ratio_on4_off4"}


def study(out: Path) -> dict[str, Any]:
    """parts of the held-out set, effects, accuracy on trained prompts, sweeps, the trainings' course, completions to
    reach GRPO, solvability."""
    folder = Folder(out, FAMILY)
    parts = folder.results.values(FAMILY, BENCHMARK, BREAKDOWN)
    return {
        "parts": parts,
        "effects": _effects(folder, parts),
        "trained": _trained(folder),
        "sweeps": {name: _sweep(folder, name, members) for name, members in SWEEPS.items()},
        "course": _course(folder),
        "reach": [{"seed": seed, **asdict(found), "share": found.share, "rose": found.rose}
                  for seed, found in reach(folder)],
        "solvability": _last(folder, ("grpo", "components_wo_hints", "components_avatar", "avatar"), "solvability"),
    }


def _runs(folder: Folder, system: str, protocol: str = PROTOCOL) -> dict[int, Run]:
    """The predictions by seed; of `system@60` those of update 60, of held-out samples alone."""
    name, _, step = system.partition("@")
    if step:
        return folder.checkpoints(name, BENCHMARK).get(int(step), {}) if protocol == PROTOCOL else {}
    return folder.results.find(FAMILY, name, BENCHMARK, protocol)


def _effects(folder: Folder, stages: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    wholes: dict[str, Difference | None] = {}
    for question in QUESTIONS:
        first, second = _runs(folder, question.first), _runs(folder, question.second)
        check_comparable([*first.values(), *second.values()])
        seeds = sorted(first.keys() & second.keys())
        if len({run.path for run in [*first.values(), *second.values()]}) == 2:  # copies of one run are one seed
            seeds = seeds[:1]
        whole = wholes[question.text] = _difference(first, second, seeds)
        parts = {seed: _points(_difference(first, second, [seed])) for seed in seeds}
        own = _runs(folder, question.first, TRAINED), _runs(folder, question.second, TRAINED)
        check_comparable([run for runs in own for run in runs.values()])
        found.append({
            **asdict(question), "seeds": seeds, "updates": _updates(folder, (question.first, question.second)),
            "found": _points(whole), "by_seed": {seed: part["value"] for seed, part in parts.items() if part},
            "trained": _points(_difference(*own, sorted(own[0].keys() & own[1].keys()))),
            "by_stage": {stage: _points(_difference(first, second, seeds, stage)) for stage in stages},
            "unequal": _unequal(folder, question),
        })  # fmt: skip
    for tests in {entry["tests"] for entry in found}:
        own = [entry for entry in found if entry["tests"] == tests]
        for entry, p in zip(own, holm([entry["found"].get("p", 1.0) for entry in own]), strict=True):
            if entry["found"]:
                entry["found"] |= {"holm": p, "visible": 100 * wholes[entry["text"]].visible(LEVEL / len(own))}
        for entry in own:
            entry["word"] = entry["unequal"] or _word(entry["found"], PLANNED[tests])
    return found


def _trained(folder: Folder) -> dict[str, dict[str, Any]]:
    """System -> accuracy on the prompts that training saw, and on held-out samples, of the seeds that have both."""
    found = {}
    for system in TRAINED_SYSTEMS:
        runs = {kind: _runs(folder, system, kind) for kind in (TRAINED, PROTOCOL)}
        seeds = sorted(runs[TRAINED].keys() & runs[PROTOCOL].keys())
        if len({runs[PROTOCOL][seed].path for seed in seeds}) == 1:  # links to one run
            del seeds[1:]
        if seeds:
            found[system] = {"seeds": len(seeds)} | {
                name: _points(cell({s: runs[kind][s].scored for s in seeds}, runs[kind][seeds[0]].meta["aggregate"]))
                for name, kind in (("trained", TRAINED), ("held_out", PROTOCOL))
            }
    return found


def _unequal(folder: Folder, question: Question) -> str:
    """What speaks against the comparison: other numbers of updates or of completions than it says; "" for nothing."""
    if not question.equal:
        return ""
    first, second = ({getattr(t, question.equal) for t in folder.complete(name).values()}
                     for name in (question.first, question.second))  # fmt: skip
    if not first or not second or first == second:
        return ""
    told = [", ".join(map(str, sorted(counts))) for counts in (first, second)]
    return f"not comparable: {told[0]} and {told[1]} {question.equal}"


def _difference(
    first: dict[int, Run], second: dict[int, Run], seeds: list[int], stage: str | None = None
) -> Difference | None:
    if not seeds:
        return None
    aggregate = first[seeds[0]].meta["aggregate"]
    parts = [{seed: runs[seed].scored for seed in seeds} for runs in (first, second)]
    return compare(*parts, aggregate, (BREAKDOWN, stage) if stage else None)


def _points(found: Estimate | None) -> dict[str, Any]:
    """An estimate in percentage points; {} where nothing was measured."""
    if found is None:
        return {}
    scaled = {key: 100 * getattr(found, key) for key in ("value", "low", "high")}
    return {**scaled, "n": found.n, "seeds": found.seeds, **({"p": found.p} if isinstance(found, Difference) else {})}


def _word(found: dict[str, Any], planned: int) -> str:
    """shown, reversed, not shown: an interval without zero and an adjusted p below 5 %, or nothing. One seed says
    nothing of others, whatever its samples say; and none is spoken of before all `planned` ones are there."""
    if not found:
        return "not measured"
    if found["seeds"] == 1:
        return "one seed: no test"
    if found["seeds"] < planned:
        return f"{found['seeds']} of {planned} seeds so far"
    if found["holm"] >= LEVEL or found["low"] <= 0 <= found["high"]:
        return "not shown"
    return "shown" if found["value"] > 0 else "reversed"


def _sweep(folder: Folder, name: str, members: list[str]) -> dict[str, Any]:
    """Accuracy of every member, and whether the best one differs from the worst: an interval without zero, and an
    adjusted p below 5 % after Holm over all pairs, since both are picked by what was measured."""
    runs = {member: found for member in members if (found := _runs(folder, member))}
    accuracy = {
        member: _points(cell({s: r.scored for s, r in own.items()}, next(iter(own.values())).meta["aggregate"]))
        for member, own in runs.items()
    }
    if len(runs) < 2:
        return {"members": accuracy, "word": "not measured"}
    best, *_, worst = ranked = sorted(runs, key=lambda member: -accuracy[member]["value"])
    pairs = {(a, b): _difference(runs[a], runs[b], sorted(runs[a].keys() & runs[b].keys()))
             for a, b in combinations(ranked, 2)}  # fmt: skip
    adjusted = dict(zip(pairs, holm([pair.p if pair else 1.0 for pair in pairs.values()]), strict=True))
    extreme = pairs[best, worst]
    differ = extreme is not None and extreme.low > 0 and adjusted[best, worst] < LEVEL
    steps = np.diff([accuracy[member]["value"] for member in runs])
    monotone = bool((steps >= 0).all() or (steps <= 0).all()) if len(runs) == len(members) else None
    return {
        "members": accuracy, "measured": len(runs), "planned": len(members), "best": best, "worst": worst,
        "published_best": PUBLISHED_BEST[name],
        "monotone": monotone, "extremes": {**_points(extreme), "holm": adjusted[best, worst]},
        "word": _sweep_word(differ, min(map(len, runs.values())), len(runs) == len(members)),
    }  # fmt: skip


def _sweep_word(differ: bool, seeds: int, whole: bool) -> str:
    if seeds < PLANNED_SWEEP:
        return f"{seeds} of {PLANNED_SWEEP} seeds so far"
    if not whole:
        return "members are missing"
    return "best and worst differ" if differ else "no difference is shown"


def _course(folder: Folder) -> dict[str, dict[str, Any]]:
    """System -> how its complete trainings went, means over seeds: shares of groups without a signal (at first: the
    FIRST updates), of hinted visits, of replayed completions without an advantage; seconds and completions."""
    found = {}
    for system in COURSE:
        trainings = list(folder.complete(system).values())
        if not trainings:
            continue

        def mean(key: str, first: int | None = None, of: list[Any] = trainings) -> float | None:
            values = [series(t.records, key)[1][:first] for t in of]
            return float(np.mean([v.mean() for v in values if len(v)])) if any(map(len, values)) else None

        found[system] = {
            "seeds": len(trainings), "vanished": mean("vanished"), "vanished_at_first": mean("vanished", FIRST),
            "hinted": mean("hints/visits"), "dead": mean("replay/dead"), "seconds": mean("time/step"),
            "completions": sorted({t.completions for t in trainings}),
        }  # fmt: skip
    return found


def _last(folder: Folder, systems: tuple[str, ...], key: str) -> dict[str, dict[int, dict[str, float]]]:
    """System -> seed -> stage -> the metric at the stage's end, of the trainings that are complete."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for system in systems:
        for seed, training in folder.complete(system).items():
            ends = {r["stage"]: r[key] for r in training.records if r.get(key) is not None}
            if ends:
                found.setdefault(system, {})[seed] = ends
    return found


def _updates(folder: Folder, systems: tuple[str, ...]) -> dict[str, list[int]]:
    """Updates of each system; of `system@70` those 70."""
    named = [system.partition("@") for system in systems]
    return {name: [int(step)] if step else sorted({t.updates for t in folder.trainings(name).values()})
            for name, _, step in named}  # fmt: skip
