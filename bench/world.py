"""The gate before any reinforcement learning: does the base see and hear what the ladder asks for, and copy that?

    python -m bench.world [--json] [--base FOLDER] [--limit N] [--answers FILE]

families: for each family of data_tools/ladder.py, on held-out clips that the base answers greedily: `evidence`, the
share of replies that tell every look of a question right, to the last word; `copied`, the share of right answers where
all looks stand there and are right; `chance`, of a guess. With FILE, answers that a cold start drew at temperature 1
(eval.run with benchmark=held_out n=8 temperature=1 on a set of size study): `full_looks`, the share that takes every
look before it answers, and `success_given_look`, the right ones among these. Intervals are Wilson's (95 %).

The exit status is 1 where a family has less than 90 % of evidence or 95 % of copies: what the base can't see and say
again, no reward can teach it, and its prompts would be noise. With the default arguments --json keeps
bench/results/world.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binomtest

from bench.timing import JSON_HELP, is_default, report
from data_tools.ladder import LADDER, draw_scene, said_looks
from data_tools.lessons import Shown, look, notes
from data_tools.pretrain import BASES, Example, film, told_right, turns
from eval.scoring.predictions import correct, family, read_predictions
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
from megatron_avatar.keyed import keyed_rng

EVIDENCE, COPIED = 0.90, 0.95
ROOT = Path(__file__).parents[1]
BASE = ROOT / BASES["omni"].folder
LIMIT = 200  # clips that each family is asked about
Share = dict[str, float | int]  # value, low, high, n


def share(hits: Sequence[bool]) -> Share | None:
    """The share of true ones with its Wilson interval; None without any."""
    if not len(hits):
        return None
    found = binomtest(int(sum(hits)), len(hits))
    low, high = found.proportion_ci(0.95, method="wilson")
    return {"value": float(found.statistic), "low": float(low), "high": float(high), "n": len(hits)}


def examples(builder: PromptBuilder, folder: Path, limit: int) -> Iterable[tuple[Example, list[str]]]:
    """Held-out clips, each with two lessons a family, evidence and answer, and those families' names."""
    (folder / "clips").mkdir(exist_ok=True)
    for tones in (False, True):
        names = [name for name in LADDER if (name == "tones") == tones]
        for k in range(limit):
            rng = keyed_rng("gate", tones, k)
            scene = draw_scene(rng, tones=tones)
            asked = [LADDER[name].ask(scene, rng) for name in names]
            lessons = [lesson for question in asked for lesson in (look(question), notes(question))]
            prompt = film(builder, folder, f"gate-{int(tones)}-{k}", Shown(scene, True))
            yield (prompt, turns(builder, lessons)), names


def ask_base(base: Path, limit: int, kind: str = "omni") -> dict[str, dict[str, Share | None]]:
    """Evidence and copies of every family, from a base of this `kind` (data_tools/pretrain.py, BASES). Raises
    ValueError for a folder that holds no such base."""
    try:
        model = BASES[kind].model.from_pretrained(base, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--base {base}: no weights of the tiny model ({str(error).splitlines()[0][:120]}); give a "
                         "folder that `make base` or an export has written") from None  # fmt: skip
    builder = PromptBuilder(load_tokenizer(base), model.config, BASES[kind].view, context=512)
    hits: dict[str, tuple[list[bool], list[bool]]] = {name: ([], []) for name in LADDER}
    with tempfile.TemporaryDirectory() as name:
        clips = track(examples(builder, Path(name), limit), "looking", total=2 * limit, console=Console(stderr=True))
        for example, names in clips:
            (flags,) = told_right(model, [example])
            for k, asked in enumerate(names):
                for lesson in (0, 1):
                    hits[asked][lesson].append(bool(flags[2 * k + lesson].all()))
    return {name: {"evidence": share(seen), "copied": share(said)} for name, (seen, said) in hits.items()}


def read_answers(path: Path) -> dict[str, dict[str, Share | None]]:
    """Full looks and their success, by family, from drawn answers. Raises ValueError for answers to other questions."""
    looked, right = defaultdict(list), defaultdict(list)
    for answer in read_predictions(path):
        if (name := family(answer)) not in LADDER:
            raise ValueError(f"--answers {path}: {name!r} is no family of the ladder; let eval.run answer a set that "
                             "data_tools.synthesize --size study has made")  # fmt: skip
        full = said_looks(answer["text"]) >= LADDER[name].looks
        looked[name].append(full)
        if full:
            right[name].append(bool(correct(answer)))
    return {name: {"full_looks": share(looked[name]), "success_given_look": share(right[name])} for name in LADDER}


def failures(families: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is below the gate, a line each."""
    return [
        f"{name}: {kind} {100 * found[kind]['value']:.1f} %, at least {100 * least:.0f} % are needed"
        for name, found in families.items()
        for kind, least in (("evidence", EVIDENCE), ("copied", COPIED))
        if found[kind]["value"] < least
    ]


def show(families: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    table = Table("family", "looks", "evidence", "copied", "full looks", "success given look", "chance", highlight=True)
    for name, found in families.items():
        parts = [found.get(key) for key in ("evidence", "copied", "full_looks", "success_given_look")]
        cells = [f"{100 * p['value']:.1f} ({100 * p['low']:.1f} to {100 * p['high']:.1f})" if p else "-" for p in parts]
        table.add_row(name, str(found["looks"]), *cells, f"{100 * found['chance']:.2g}")
    console.print("per cent, 95 % interval of Wilson; - is not measured")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=BASES, default="omni", help="the base's kind; omni3: a tiny Qwen3-Omni")
    parser.add_argument("--base", type=Path, help="by default where the family's base is kept, in assets")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"clips of each family ({LIMIT})")
    parser.add_argument("--answers", type=Path, help="a cold start's drawn answers, of eval.run")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    args = parser.parse_args(arguments)
    try:
        if args.limit < 1:
            raise ValueError(f"--limit {args.limit}: write 1 or more")
        drawn = read_answers(args.answers) if args.answers else {}
        seen = ask_base(args.base or ROOT / BASES[args.family].folder, args.limit, args.family)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    families = {
        name: {**seen[name], "full_looks": None, "success_given_look": None, **drawn.get(name, {}),
               "chance": rung.chance, "looks": rung.looks}
        for name, rung in LADDER.items()
    }  # fmt: skip
    failed = failures(families)
    if args.json:
        result = {"families": families, "passed": not failed, "failed": failed}
        report("world", result, as_json=True, keep=is_default(parser, args))
    else:
        show(families, Console())
    for line in failed:
        print(f"below the gate: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
