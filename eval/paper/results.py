"""The predictions of a reproduction, read and checked: OUT/predictions/FAMILY/SYSTEM/seed_S/BENCHMARK.PROTOCOL.jsonl.

What contradicts itself is refused, so that a number always belongs to one protocol and one data set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.scoring.cells import Scored, check_headline, scored
from megatron_avatar.config.schema import HOW_DECODED

# What must agree wherever numbers stand side by side. `settings` must agree inside a file alone: it is a hash that also
# holds the weights, so it differs with system and seed.
COMPARED = ("protocol", "control", "n", "temperature", "new_tokens", "context", "dtype", "aggregate")
STAGES = ("visual", "audio_visual", "localisation")
WHERE_KNOWN = ("prompts", "judges")  # older files don't say the one, and answers that wait for a judge have no other


@dataclass(frozen=True)
class Run:
    """One file of predictions with what its meta.json says; the predictions are read when they are asked for."""

    path: Path
    family: str
    system: str
    seed: int

    @property
    def name(self) -> str:
        return "/".join((self.family, self.system, f"seed_{self.seed}", self.path.name))

    @cached_property
    def meta(self) -> dict[str, Any]:
        """meta.json. ValueError if it lacks a key, or contradicts the place where it lies."""
        path = self.path.with_suffix(".meta.json")
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            control, samples = meta["control"], f"-g{meta['n']}" if meta["n"] > 1 else ""
            stem = f"{meta['benchmark']}.{meta['protocol']}{f'-{control}' if control else ''}{samples}"
            said = (meta["family"], meta["system"], meta["seed"], stem)
            data = meta["dataset"]
            for key in ("name", "fingerprint", "items", "expected"):
                data[key]
            for key in ("temperature", "settings", "quirks", "model"):
                meta[key]
            meta["aggregate"]["metric"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error!r}); run eval.run again") from None
        lies = (self.family, self.system, self.seed, self.path.stem)
        if said != lies:
            raise ValueError(f"{path} speaks of {said}, but lies where {lies} belongs; move it or evaluate anew")
        return meta

    @cached_property
    def scored(self) -> Scored:
        """Scores of all items that are there. ValueError naming file and line of what doesn't belong."""
        aggregate = self.meta["aggregate"]
        try:
            found = scored(self._lines())
            check_headline(found, aggregate)
            return found
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}: a line lacks what a table needs ({error!r}); score it anew") from None
        except ValueError as error:
            raise ValueError(error if str(self.path) in str(error) else f"{self.path}: {error}") from None

    def _lines(self) -> Iterator[dict[str, Any]]:
        wanted = {key: self.meta[key] for key in ("benchmark", "protocol", "settings")}
        seen: dict[tuple[str, int], int] = {}
        with open(self.path, encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                try:
                    line = json.loads(text)
                    key = (line["id"], line["k"])
                except (ValueError, KeyError, TypeError) as error:
                    if not text.endswith("\n"):
                        return  # still being written
                    raise ValueError(f"{self.path}, line {number}: no prediction ({error!r}); remove it") from None
                for name, value in wanted.items():
                    if line.get(name) != value:
                        raise ValueError(
                            f"{self.path}, line {number}: {name} {line.get(name)!r}, but {value!r} in its meta.json; "
                            "predictions of two kinds can't be mixed: evaluate anew"
                        )
                if seen.setdefault(key, number) != number:
                    raise ValueError(f"{self.path}, line {number}: {key} is also on line {seen[key]}; remove one")
                yield line

    @property
    def compared(self) -> dict[str, Any]:
        """What has to be the same for all numbers that are compared with this one's."""
        meta = self.meta
        media = {f"data.{key}": value for key, value in meta.get("data", {}).items() if key not in HOW_DECODED}
        data = {f"dataset.{key}": meta["dataset"][key] for key in ("name", "fingerprint")}
        known = {"prompts": meta.get("prompts"), "judges": sorted(self.scored.judges)}
        return {key: meta.get(key) for key in COMPARED} | data | media | {key: v for key, v in known.items() if v}


class Results:
    """All runs of a reproduction's folder, found by family, system and file name; each is read once. Evaluations that
    go on, or were interrupted, are not among them: `unfinished`."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        self.runs: dict[tuple[str, str, str], dict[int, Run]] = {}
        self.unfinished: list[Path] = []
        for path in sorted(self.out.glob("predictions/*/*/seed_*/*.jsonl")):
            family, system, seed = path.parts[-4:-1]
            if not (digits := re.fullmatch(r"seed_(\d+)", seed)):
                raise ValueError(f"{path.parent}: name the folder seed_0, seed_1, ...")
            if not path.with_suffix(".meta.json").exists():  # it comes with the last answer
                self.unfinished.append(path)
                continue
            path = path.resolve()  # a link stands for another system or seed that computes the same
            run = Run(path, family, path.parts[-3], int(path.parts[-2].removeprefix("seed_")))
            self.runs.setdefault((family, system, path.stem), {})[int(digits[1])] = run

    def tell_unfinished(self) -> None:
        """Name on standard error what is left out."""
        for path in self.unfinished:
            print(f"left out: {path}, whose evaluation goes on or was interrupted", file=sys.stderr)

    def find(self, family: str, system: str, benchmark: str, protocol: str) -> dict[int, Run]:
        """The runs by seed; none where nothing was evaluated."""
        return self.runs.get((family, system, f"{benchmark}.{protocol}"), {})

    def values(self, family: str, benchmark: str, group: str) -> list[str]:
        """What a benchmark's items are told apart by in this group (`stage`, `family`), the recipes' stages first."""
        one = next((next(iter(runs.values())) for (of, _, stem), runs in sorted(self.runs.items())
                    if of == family and stem.partition(".")[0] == benchmark and runs), None)  # fmt: skip
        found = {value for item in one.scored.groups.get(group, ()) for value in item} if one else set()
        return sorted(found, key=lambda value: (STAGES.index(value) if value in STAGES else len(STAGES), value))

    def updates(self, run: Run) -> int | None:
        """Training updates of the run's system, as its training says; None for what wasn't trained here."""
        path = self.out / "runs" / run.family / run.system / f"seed_{run.seed}" / "done.json"
        return json.loads(path.read_text()).get("steps") if path.is_file() else None


def check_comparable(runs: list[Run]) -> None:
    """ValueError naming two files and what sets them apart, unless all may stand in one column of a table."""
    for run in runs[1:]:
        first, other = runs[0].compared, run.compared
        apart = [key for key in first | other if first.get(key) != other.get(key)
                 and not (key in WHERE_KNOWN and (key not in first or key not in other))]  # fmt: skip
        if apart:
            values = ", ".join(f"{key} {first.get(key)!r} and {other.get(key)!r}" for key in apart)
            raise ValueError(f"{runs[0].path} and {run.path} can't stand in one column: {values}; evaluate one anew")
