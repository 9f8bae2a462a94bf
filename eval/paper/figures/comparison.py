"""Figure 8: what GRPO and AVATAR wrote on one clip."""

from __future__ import annotations

from pathlib import Path

from eval.asking.items import read_prepared
from eval.paper.figures.entry import Entry, joined, published, sources
from eval.paper.figures.folder import Folder
from eval.paper.figures.from_predictions import HELD_OUT, MAIN, TITLES
from eval.paper.figures.side_by_side import first_with_sound, fragment, load_clip, side_by_side
from eval.paper.figures.style import NAMES
from eval.scoring.predictions import read_predictions
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.records import Sample


def comparison(folder: Folder) -> Entry:
    """Figure 8."""
    name, title = "figure8", "GRPO and AVATAR on one clip"
    for benchmark in ("worldsense", HELD_OUT):
        found = {system: folder.predictions(system, benchmark) for system in MAIN}
        seeds = sorted(set.intersection(*map(set, found.values())))
        root, samples = _samples(folder, benchmark)
        if seeds and samples:
            break
    else:
        reason = "GRPO and AVATAR have answered neither WorldSense nor the held-out samples with one seed"
        return Entry(name, title, None, reason=reason)
    runs = [by_seed[seeds[0]] for by_seed in found.values()]
    answers = {s: {p["id"]: p for p in read_predictions(run.path)} for s, run in zip(found, runs, strict=True)}
    sample = first_with_sound(samples, list(answers.values()))
    if sample is None:
        return Entry(name, title, None, reason="no item that both answered shows a video with sound")
    clip = load_clip(sample, root, [(NAMES[s], by_id[sample.id]) for s, by_id in answers.items()])
    caption = joined(
        f"{sample.id}, the first of {TITLES[benchmark]} in their own order that has a video with sound, whatever the "
        f"systems made of it; seed {seeds[0]}, the lowest that both have. Greedy answers as written.", published(name),
    )  # fmt: skip
    return Entry(name, title, side_by_side(clip), caption, sources=sources(folder.out, {}, runs), page=fragment(clip))


def _samples(folder: Folder, benchmark: str) -> tuple[Path, list[Sample]]:
    """A benchmark's questions in their own order, and the folder of their media; none where they are not there."""
    manifest, prepared = folder.out / "data" / "manifest.jsonl", folder.out / "benchmarks" / benchmark
    if benchmark == HELD_OUT:
        return manifest.parent, load_manifest(manifest, check_media=False) if manifest.exists() else []
    if not (prepared / "dataset.json").exists():
        return prepared, []
    items = read_prepared(prepared).items
    return prepared, [
        Sample(i.id, TITLES[benchmark], "", ", ".join(v for values in i.groups.values() for v in values), i.question,
               i.gold, "other", i.choices, i.media) for i in items
    ]  # fmt: skip
