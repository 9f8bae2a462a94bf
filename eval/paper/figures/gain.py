"""The gain of TAS by completion length: AVATAR minus AVATAR w/o TAS on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.paper.figures import paper
from eval.paper.figures.entry import Entry, joined, partial_told, published, seeds_told, sources
from eval.paper.figures.folder import Folder, comparable
from eval.paper.figures.from_predictions import HELD_OUT, TITLES, Seeds, comparable_answers
from eval.scoring.cells import Scored, compare, scored
from eval.scoring.predictions import Prediction, read_predictions
from eval.scoring.stats import Estimate

TAS = {"avatar": ["components_avatar", "avatar"], "w/o TAS": ["components_wo_tas"]}
EDGES = (200, 400, 600)  # tokens: the paper's bins end there
PANELS = (("worldsense", "av_odyssey"), ("video_holmes", "mmvu"), (HELD_OUT,))


def tas_gain_by_length(folder: Folder) -> Entry:
    """Gain of TAS (AVATAR minus w/o TAS on the same items) by completion length."""
    name, title = "tas_gain_by_length", "Gain of TAS by completion length"
    chosen = comparable(folder, TAS)
    if len(chosen.trainings) < 2:
        reason = "AVATAR and AVATAR w/o TAS were not trained with the same updates and seeds"
        return Entry(name, title, None, reason=reason)
    panels, runs = {}, []
    for benchmarks in PANELS:
        answers = {b: found for b in benchmarks if len(found := comparable_answers(folder, chosen, b)) == 2}
        edges = None if benchmarks == (HELD_OUT,) else EDGES
        if bins := _gains([(found["avatar"], found["w/o TAS"]) for found in answers.values()], edges):
            panels[" + ".join(TITLES[b] for b in answers)] = bins
            runs += [r for found in answers.values() for by_seed in found.values() for r in by_seed.values()]
    figure = paper.gain_by_length(panels, "completion length, tokens")
    if figure is None:
        return Entry(name, title, None, reason="AVATAR and AVATAR w/o TAS were not evaluated on the same benchmark")
    caption = joined(
        "Accuracy of AVATAR minus that of AVATAR w/o TAS on the same items. Items are binned by their mean completion "
        "length over both systems and all seeds" + (", held-out samples at its quartiles" if any(
            r.meta["benchmark"] == HELD_OUT for r in runs) else "") + "; a bin includes its upper end.",
        "Long completions go with hard items, so a trend is not the effect of length alone. Bars: 95 % "
        f"intervals of the paired difference; n counts answers of all seeds. Both after {chosen.updates} updates.",
        seeds_told(runs), partial_told(runs), published(name),
    )  # fmt: skip
    return Entry(name, title, figure, caption, sources=sources(folder.out, chosen.trainings, runs))


def _gains(pairs: Sequence[tuple[Seeds, Seeds]], edges: Sequence[float] | None) -> dict[str, Estimate]:
    """Length bin -> paired difference, over the benchmarks of `pairs`; without `edges`, at the lengths' quartiles."""
    systems: list[dict[int, list[Prediction]]] = [{}, {}]
    for number, pair in enumerate(pairs):
        for lines, by_seed in zip(systems, pair, strict=True):
            for seed, run in by_seed.items():  # ids of two benchmarks may coincide
                lines.setdefault(seed, []).extend(
                    {**p, "id": f"{number}/{p['id']}"} for p in read_predictions(run.path) if run.scored.ids
                )
    return gain_bins(systems[0], systems[1], edges)


def gain_bins(
    first: Mapping[int, Sequence[Prediction]], second: Mapping[int, Sequence[Prediction]], edges: Sequence[float] | None
) -> dict[str, Estimate]:
    """Accuracy of `first` minus `second` (seed -> predictions) in bins of the items' mean completion length in tokens.

    `edges`: where the bins end, the last is open; None: quartiles of the lengths. Failed completions have no length;
    items without one are left out, and so are empty bins.
    """
    lengths: dict[str, list[float]] = {}
    for prediction in (p for system in (first, second) for lines in system.values() for p in lines):
        if prediction["error"] is None:
            lengths.setdefault(prediction["id"], []).append(prediction["tokens"])
    means = {item: float(np.mean(values)) for item, values in lengths.items()}
    if not means:
        return {}
    if edges is None:
        edges = np.unique(np.quantile(list(means.values()), [0.25, 0.5, 0.75])).tolist()
    names = _bin_names(edges)
    bins = {item: names[int(np.searchsorted(edges, mean, "left"))] for item, mean in means.items()}

    def binned(system: Mapping[int, Sequence[Prediction]]) -> dict[int, Scored]:
        kept = {seed: [p for p in lines if p["id"] in bins] for seed, lines in system.items()}
        return {seed: scored({**p, "groups": {"length": [bins[p["id"]]]}} for p in p_) for seed, p_ in kept.items()}

    ours, theirs = binned(first), binned(second)
    found = {name: compare(ours, theirs, {"metric": "accuracy"}, ("length", name)) for name in names}
    return {name: difference for name, difference in found.items() if difference is not None}


def _bin_names(edges: Sequence[float]) -> list[str]:
    """A bin holds its upper end."""
    ends = [f"{round(edge, 1):g}" for edge in edges]
    return [f"to {ends[0]}", *(f"{low}–{high}" for low, high in zip(ends, ends[1:], strict=False)), f"over {ends[-1]}"]
