"""How many seeds and items a study needs, so that a difference that counts is shown with 80 % power.

    python -m bench.power [--effect 3] [--seeds 5 8 10 12 16] [--items 400 630] [--questions 2] [--deviation D] [--json]

Right and wrong answers of two systems are drawn again and again: items differ in how hard they are and in which system
they suit, and each training of a system is a little better or worse than another. Each draw goes through the study's
own test (eval/scoring/stats.py) at 5 % divided by the number of questions, which is what Holm's method asks of the
first. power: the share of draws that show the effect; false: the share that show something where there is nothing.
How much trainings differ was measured in the first study (bench/results/study_first.json), see SEED; `--deviation` says
it anew, by how a difference of two systems was found to deviate from seed to seed over as many items.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.optimize import brentq
from scipy.special import expit

from bench.timing import JSON_HELP, is_default, report
from eval.scoring.stats import difference
from megatron_avatar.keyed import keyed_rng

RIGHT = 0.6  # share of the first system's answers that are right
ITEM = 2.0  # deviation of items, in logits: most are right, or wrong, with every seed
SUITED = 0.5  # of what an item has for one system alone
# Of a training, in logits. Over 396 items, differences of two systems deviate from seed to seed by 3.5 points, most
# of it by the chance in single answers. In the first study AVATAR - GRPO did so by 3.5, AVATAR - GRPO half by 2.5.
SEED = 0.1
LEVEL, REPETITIONS = 0.05, 400


def answers(
    seeds: int, items: int, effect: float, rng: np.random.Generator, seed: float = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [seeds, items] of two systems, 0 or 1; the second is right `effect` more often on the whole. `seed` is the
    deviation of a training, in logits."""
    hard = rng.normal(0, ITEM, items)
    drawn = []
    for share in (RIGHT, RIGHT + effect):
        suited, luck = rng.normal(0, SUITED, items), rng.normal(0, seed, (seeds, 1))
        drawn.append((rng.random((seeds, items)) < expit(_centre(share, seed) + hard + suited + luck)).astype(float))
    return drawn[0], drawn[1]


@cache
def _centre(share: float, seed: float) -> float:
    """The logit around which items and trainings vary when `share` of the answers are right."""
    deviation = (ITEM**2 + SUITED**2 + seed**2) ** 0.5
    nodes, weights = _nodes()
    return float(brentq(lambda x: weights @ expit(x + deviation * nodes) - share, -20, 20))


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of a normal distribution's mean."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return nodes, weights / weights.sum()


def seed_of(deviation: float, items: int) -> float:
    """The deviation of a training, in logits, with which a difference of two systems deviates by `deviation` from seed
    to seed over `items`. Raises ValueError where chance in single answers alone deviates by more."""
    nodes, weights = _nodes()
    right = expit(_centre(RIGHT, 0.0) + (ITEM**2 + SUITED**2) ** 0.5 * nodes)
    chance = float(weights @ (right * (1 - right)))  # of one answer; and how a share follows the logit
    left = deviation**2 / 2 - chance / items
    if deviation < 0 or left < 0:
        least = 100 * (2 * chance / items) ** 0.5
        raise ValueError(f"--deviation: over {items} items chance in single answers alone makes {least:.1f} points")
    return left**0.5 / chance


def power(seeds: int, items: int, effect: float, questions: int, repetitions: int, seed: float = SEED) -> float:
    """The share of drawn studies whose test shows the second system ahead (of no effect: either one)."""
    shown = 0
    for k in range(repetitions):
        first, second = answers(seeds, items, effect, keyed_rng("power", seeds, items, effect, k), seed)
        found = difference(second, first)
        shown += found.p < LEVEL / questions and (found.value > 0 or effect == 0)
    return shown / repetitions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--effect", type=float, default=3.0, help="the smallest difference that counts, in points")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 8, 10, 12, 16])
    parser.add_argument("--items", type=int, nargs="+", default=[400, 630])
    parser.add_argument("--questions", type=int, default=2, help="primary ones, among which Holm's method shares 5 %%")
    parser.add_argument("--deviation", type=float, help="of a difference from seed to seed, over --items, in points")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    args = parser.parse_args(arguments)
    if min(args.seeds) < 2 or min(args.items) < 30 or args.questions < 1 or not 0 < args.effect < 40:
        parser.error("write 2 seeds or more, 30 items or more, and an effect between 0 and 40 points")
    try:
        luck = {n: SEED if args.deviation is None else seed_of(args.deviation / 100, n) for n in args.items}
    except ValueError as error:
        parser.error(str(error))
    cells = [(seeds, items) for items in args.items for seeds in args.seeds]
    found = [
        {"seeds": seeds, "items": items,
         "power": power(seeds, items, args.effect / 100, args.questions, REPETITIONS, luck[items]),
         "false": power(seeds, items, 0.0, args.questions, REPETITIONS, luck[items])}
        for seeds, items in track(cells, "studies of each size", console=Console(stderr=True))
    ]  # fmt: skip
    enough = next((cell for cell in found if cell["power"] >= 0.8), None)
    asked = {name: getattr(args, name) for name in ("effect", "questions", "deviation")}
    result = {**asked, "cells": found, "first_enough": enough}
    report("power", result, as_json=args.json, keep=is_default(parser, args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
