"""From items to lines: the answers of one model, written as they come and continued where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from eval.asking.benchmark import Benchmark
from eval.asking.items import Item
from eval.scoring.predictions import Prediction, score_line
from megatron_avatar.files import append
from megatron_avatar.records import Sample

Answers = Callable[[Sequence[Sample]], list[list[Any]]]


def predict(
    answers: Answers,
    benchmark: Benchmark,
    items: Sequence[Item],
    samples: Sequence[Sample],
    out: Path,
    *,
    protocol: str,
    settings: str,
    chunk: int,
    n: int = 1,
    rank: int = 0,
    share: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Prediction]:
    """Answer the items that `out` lacks, `chunk` at a time; all predictions in the order of `items`.

    Rank 0 alone touches the file; `share` (an all-gather) tells the others what it holds. Predictions made under other
    `settings` are not mixed in: their file is renamed to `out`.old first.
    """
    known: dict[str, list[Prediction]] = on_first(rank, share, lambda: _resume(out, settings, n))
    missing = [(i, s) for i, s in zip(items, samples, strict=True) if i.id not in known]
    console = Console(stderr=True)
    for start in track(range(0, len(missing), chunk), out.stem, console=console, disable=rank != 0 or not missing):
        part = missing[start : start + chunk]
        asked = [(i, s) for i, s in part if not i.trouble]
        found = dict(zip([i.id for i, _ in asked], answers([s for _, s in asked]) if asked else [], strict=True))
        fresh = [_lines(benchmark, item, sample, protocol, settings, found.get(item.id)) for item, sample in part]
        known |= {item.id: lines for (item, _), lines in zip(part, fresh, strict=True)}
        on_first(rank, share, lambda fresh=fresh: _write(out, fresh))
    return [line for item in items for line in known[item.id]]


def _write(out: Path, fresh: list[list[Prediction]]) -> None:
    with open(out, "ab", buffering=0) as file:  # an item's completions in one write
        for lines in fresh:
            append(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _lines(
    benchmark: Benchmark, item: Item, sample: Sample, protocol: str, settings: str, found: list[Any] | None
) -> list[Prediction]:
    common = {"id": item.id, "benchmark": benchmark.name, "protocol": protocol, "settings": settings, "kind": item.kind,
              "gold": item.gold, "question": sample.question, "choices": list(item.choices), "letters": item.letters,
              "keep": item.keep, "groups": {name: list(values) for name, values in item.groups.items()}}  # fmt: skip
    if found is None:
        lines = [{"k": 0, "text": "", "tokens": 0, "finished": False, "error": item.trouble}]
    elif found[0].error is not None:
        lines = [{"k": 0, **asdict(found[0])}]
    else:
        lines = [{"k": k, **asdict(answer)} for k, answer in enumerate(found)]
    unheard = any(m.audio_in_video for m in item.media) and not any(m.audio_in_video for m in sample.media)
    return [score_line(benchmark, {**common, **line, "without_sound": unheard}) for line in lines]


def on_first(rank: int, share: Callable[[Any], list[Any]], work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0; its error is raised on all ranks, which would wait for one that is gone.

    ValueError for a user's mistake, a file that is missing too; OSError for what a repeat may find mended.
    """
    found, failed = None, None
    if rank == 0:
        try:
            found = work()
        except (ValueError, OSError) as error:
            again = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            failed = OSError if again else ValueError, str(error)
    found, failed = share((found, failed))[0]
    if failed is not None:
        kind, said = failed
        raise kind(said)
    return found


def _resume(out: Path, settings: str, n: int) -> dict[str, list[Prediction]]:
    """Predictions in `out` by item; a last item that a kill has cut short is taken out of the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        return {}
    known: dict[str, list[Prediction]] = {}
    seen: dict[tuple[str, int], int] = {}
    position = whole = 0
    with open(out, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                prediction = json.loads(line)
                other, key = prediction["settings"] != settings, (prediction["id"], prediction.get("k", 0))
                unanswered = prediction["error"] is not None
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{out}, line {number}: no prediction ({error!r}); remove the line or the file"
                ) from None
            if other:
                out.with_suffix(".meta.json").unlink(missing_ok=True)  # it speaks of the old ones
                out.replace(out.with_name(out.name + ".old"))
                return {}
            if seen.setdefault(key, number) != number:
                raise ValueError(f"{out}, line {number}: {key[0]!r} is also on line {seen[key]}, as where two "
                                 "evaluations write at once; remove one of them")  # fmt: skip
            known.setdefault(prediction["id"], []).append(prediction)
            position += len(line)
            if len(known[prediction["id"]]) == n or unanswered:
                whole = position
    known = {key: lines for key, lines in known.items() if len(lines) == n or lines[0]["error"] is not None}
    with open(out, "rb+") as file:
        file.truncate(whole)
    return known
