"""A reproduction's folder as the figures read it: trainings and predictions by seed, and which of them compare."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf

from eval.paper.figures.series import Records, read_metrics
from eval.paper.results import Results, Run

PROTOCOL = "ours"
FAMILIES = ("omni_7b", "omni_3b", "vl_7b", "tiny")


def families(out: Path) -> list[str]:
    """The model families that a reproduction's folder holds; ValueError for none."""
    there = [family for family in FAMILIES if any((out / kind / family).is_dir() for kind in ("runs", "predictions"))]
    if not there:
        raise ValueError(f"{out} holds no runs/FAMILY or predictions/FAMILY; name a reproduction's folder")
    return there


@dataclass(frozen=True)
class Training:
    """One training run."""

    system: str
    seed: int
    folder: Path

    @cached_property
    def records(self) -> Records:
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def complete(self) -> bool:
        return (self.folder / "done.json").exists()

    @cached_property
    def updates(self) -> int:
        """Updates made, so far if it goes on."""
        if self.complete:
            return int(json.loads((self.folder / "done.json").read_text(encoding="utf-8"))["steps"])
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def completions(self) -> int:
        """Completions generated, so far if it goes on."""
        return int(self.records[-1]["completions_generated"]) if self.records else 0

    @cached_property
    def shaping(self) -> tuple[str, float] | None:
        """(shape, lam) of its temporal weighting; None where no configuration was kept."""
        path = self.folder / "config.yaml"
        if not path.exists():
            return None
        shaping = OmegaConf.load(path).rl.shaping
        return str(shaping.shape), float(shaping.lam)

    @cached_property
    def span(self) -> str:
        """What its temporal weighting runs over: completion (also where no configuration says), or between_tags."""
        path = self.folder / "config.yaml"
        return str(OmegaConf.load(path).rl.shaping.get("span", "completion")) if path.exists() else "completion"


class Folder:
    """OUT of one reproduction, and one model family in it."""

    def __init__(self, out: Path, family: str) -> None:
        self.out, self.family = Path(out).resolve(), family
        self.results = Results(self.out)

    def trainings(self, system: str) -> dict[int, Training]:
        """Seed -> training run, of those that have logged something.

        A folder that is a link, since another system computes the same, counts as that system.
        """
        folders = {seed: path.resolve() for seed, path in _seeds(self.out / "runs" / self.family / system).items()}
        found = {seed: Training(folder.parent.name, seed, folder) for seed, folder in folders.items()}
        return {seed: training for seed, training in found.items() if training.records}

    def complete(self, system: str) -> dict[int, Training]:
        """Those trainings that have come to their end."""
        return {seed: training for seed, training in self.trainings(system).items() if training.complete}

    def predictions(self, system: str, benchmark: str, control: str = "") -> dict[int, Run]:
        """Seed -> predictions under protocol `ours`; `control`: "-g8" and the like."""
        found = self.results.find(self.family, system, benchmark, PROTOCOL + control)
        real = {seed: run.path.resolve().parent.parent.name for seed, run in found.items()}  # where a link leads
        return {
            seed: run if real[seed] == system else self.predictions(real[seed], benchmark, control)[seed]
            for seed, run in found.items()
        }

    def checkpoints(self, system: str, benchmark: str) -> dict[int, dict[int, Run]]:
        """Step -> seed -> predictions of the checkpoints inside training, ascending."""
        found: dict[int, dict[int, Run]] = {}
        for seed, folder in _seeds(self.out / "predictions" / self.family / system).items():
            for path in folder.glob(f"step_*/{benchmark}.{PROTOCOL}.jsonl"):
                step = int(path.parent.name.removeprefix("step_"))
                if path.with_suffix(".meta.json").exists():
                    found.setdefault(step, {})[seed] = Run(path, self.family, system, seed)
        return dict(sorted(found.items()))


def _seeds(folder: Path) -> dict[int, Path]:
    found = {re.fullmatch(r"seed_(\d+)", path.name): path for path in folder.glob("seed_*")}
    return {seed: path for seed, path in sorted((int(match[1]), path) for match, path in found.items() if match)}


@dataclass(frozen=True)
class Comparable:
    """Systems that may stand in one figure: label -> trainings by seed, all of `updates` and of the same seeds.

    `notes` name what was left out of the figure, and why.
    """

    trainings: dict[str, dict[int, Training]]
    updates: int
    notes: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        return sorted(next(iter(self.trainings.values()), {}))

    def system(self, label: str) -> str:
        return next(iter(self.trainings[label].values())).system


def comparable(folder: Folder, candidates: Mapping[str, Sequence[str]]) -> Comparable:
    """For each label the first of its candidate systems that was trained as long as the others.

    Sweeps and ablations may make fewer updates with fewer seeds than the main systems: what is compared has the number
    of updates that most labels share (then the most runs, then the most updates), and the seeds that all of them share.
    """
    found = {system: folder.trainings(system) for names in candidates.values() for system in names}

    def at(updates: int) -> dict[str, dict[int, Training]]:
        same = {system: {s: t for s, t in runs.items() if t.updates == updates} for system, runs in found.items()}
        first = {label: next((same[n] for n in names if same[n]), {}) for label, names in candidates.items()}
        chosen = {label: runs for label, runs in first.items() if runs}
        seeds = set.intersection(*map(set, chosen.values())) if chosen else set()
        return {label: {s: t for s, t in runs.items() if s in seeds} for label, runs in chosen.items() if seeds}

    lengths = {training.updates for runs in found.values() for training in runs.values()}
    if not lengths:
        return Comparable({}, 0)
    updates = max(lengths, key=lambda n: (len(at(n)), sum(map(len, at(n).values())), n))
    chosen, notes = at(updates), []
    for label, names in candidates.items():
        others = sorted({training.updates for system in names for training in found[system].values()})
        if label not in chosen and others:
            made = " and ".join(map(str, others))
            notes.append(f"{label} is left out: its runs made {made} updates, the others {updates}.")
    return Comparable(chosen, updates, notes)
