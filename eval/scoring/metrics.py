"""From an answer to scores, as the benchmarks' owners define them. Which metric scores what is said in eval/benchmarks.

A metric gets the answer (None: none was found) and the line that it belongs to: `gold`, `kind`, `choices`, `keep`,
`judged`. It returns values by name, the headline's first; None for one that waits for a judge.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from eval.asking.items import sample_of
from eval.scoring import open_answers
from megatron_avatar.rl.rewards import accuracy_reward
from megatron_avatar.rl.rewards.grade import THRESHOLD
from megatron_avatar.rl.rewards.numbers import quantity

Line = dict[str, Any]
Scores = dict[str, float | None]
Metric = Callable[[str | None, Line], Scores]
MRA_THRESHOLDS = np.linspace(0.5, 0.95, 10)
EXACT = 1 - 1e-3  # numbers that are right to three digits


def exact(answer: str | None, line: Line) -> Scores:
    """1 where the answer is the gold by training's rules (letter, number to 1e-3, expression, text)."""
    sample = sample_of(line)
    reward = accuracy_reward(answer, sample)
    return {"accuracy": float(reward >= THRESHOLD.get(sample.problem_type, EXACT))}


def equal(answer: str | None, line: Line) -> Scores:
    """1 where the answer is written like the gold, letters' case aside: `B.` is not `B`."""
    return {"accuracy": float(answer is not None and answer.lower() == line["gold"].lower())}


def same(answer: str | None, line: Line) -> Scores:
    """1 where the answer is the gold, character by character (published scripts)."""
    return {"accuracy": float(answer == line["gold"])}


def letter_set(answer: str | None, line: Line) -> Scores:
    """1 where the set of letters is the gold's."""
    return {"accuracy": float(_letters(answer) == _letters(line["gold"]))}


def letter_f1(answer: str | None, line: Line) -> Scores:
    """F1 of the two sets of letters (IntentBench, HumanOmniV2)."""
    said, gold = _letters(answer), _letters(line["gold"])
    return {"accuracy": 2 * len(said & gold) / (len(said) + len(gold)) if said else 0.0}


def mra(answer: str | None, line: Line) -> Scores:
    """Mean relative accuracy (VSI-Bench): share of thresholds t in 0.50, 0.55 ... 0.95 with a relative error of at most
    1 - t."""
    value, gold = _number(answer), float(line["gold"])
    if value is None:
        return {"accuracy": 0.0}
    error = abs(value - gold) / abs(gold) if gold else (0.0 if value == 0 else np.inf)
    return {"accuracy": float(np.mean(error <= 1 - MRA_THRESHOLDS))}


def counting(answer: str | None, line: Line) -> Scores:
    """AV-Counting: accuracy, oboa (off by at most one), mae, rmse. An error above max(2 gold, 100) counts as 2 gold.

    `rmse` is this item's error; its root of the mean square is taken over items.
    """
    scores = counting_uncapped(answer, line)
    gold, error = float(line["gold"]), scores["mae"]
    capped = 2 * gold if error > max(2 * gold, 100) else error
    return {**scores, "mae": capped, "rmse": capped}


def counting_uncapped(answer: str | None, line: Line) -> Scores:
    """The same without a cap (the published script). Without an answer the error is the gold, and nothing is right."""
    value, gold = _number(answer), float(line["gold"])
    error = abs((value or 0.0) - gold)
    right = value is not None
    return {"accuracy": float(right and error == 0), "oboa": float(right and error <= 1), "mae": error, "rmse": error}


def judged(answer: str | None, line: Line) -> Scores:
    """A language model's verdict, 0 or 1 (eval/scoring/ask.py); None until it was asked. An answer that is the gold to
    the letter doesn't need one."""
    if line.get("error") is not None:
        return {"accuracy": 0.0}
    return {"accuracy": 1.0 if answer == line["gold"] else line.get("judged")}


def open_answer(answer: str | None, line: Line) -> Scores:
    """1 where a phrase or number of the answer is the gold by MMMU's rules (Video-MMMU)."""
    return {"accuracy": float(bool(answer) and open_answers.same(answer or "", line["gold"]))}


def normalised(answer: str | None, line: Line) -> Scores:
    """MathVista: 1 where the answer, in the gold's form, is written like the gold. A letter stands for its option and
    other words for the option that is closest to them; an integer is cut off, a decimal rounded to `precision`."""
    if not answer:
        return {"accuracy": 0.0}
    gold, choices = line["gold"], line["choices"]
    if choices:
        gold, answer = choices[ord(gold) - ord("A")], _choice(answer, choices)
    elif line["kind"] == "number":
        value = _number(answer)
        if value is None:
            return {"accuracy": 0.0}
        whole = line["keep"]["answer_type"] == "integer"
        answer = str(int(value) if whole else round(value, int(line["keep"]["precision"])))
    return {"accuracy": float(answer.strip() == gold.strip())}


def normalised_extraction(answer: str | None, line: Line) -> Scores:
    """The same of what a language model read out of the reply; None until it was asked."""
    waits = line.get("extracted") is None and line.get("error") is None
    return {"accuracy": None} if waits else normalised(answer, line)


def _choice(answer: str, choices: list[str]) -> str:
    in_brackets = re.search(r"\(([a-zA-Z])\)", answer)
    letter = in_brackets[1].upper() if in_brackets else answer.strip()
    if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
        return choices[ord(letter) - ord("A")]
    return min(choices, key=lambda choice: Levenshtein.distance(letter, choice))


def _letters(text: str | None) -> set[str]:
    return {part.strip().strip("().").upper()[:1] for part in (text or "").split(",") if part.strip()}


def _number(text: str | None) -> float | None:
    """The only number in an answer, as training's rewards read it: digits or words, with a unit or without."""
    found = quantity(text) if text is not None else None
    return found.value if found is not None else None


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        exact, equal, same, letter_set, letter_f1, mra, counting, counting_uncapped, judged, open_answer,
        normalised, normalised_extraction,
    )
}  # fmt: skip
