"""Judges score how well a completion describes what is seen and heard (paper, rewards).

A judge gives each of four criteria a score in [0, 1], or NaN where it has no verdict: a missing verdict
masks, it is never a zero. `RuleJudge` is the judge of the synthetic data, whose scenes are known; for real
video there is http_judge.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from megatron_avatar.records import Sample

CRITERIA = ("audio_grounding_score", "visual_id_score", "location_acc_score", "caption_corr_score")


class Judge(Protocol):
    def score(self, sample: Sample, texts: Sequence[str], pictures: Sequence[bytes]) -> list[dict[str, float]]:
        """For each completion one value for each of CRITERIA: in [0, 1], or NaN where the judge has no verdict.

        `pictures`: JPEGs of what the policy saw, in order of time.
        """
        ...


def judge_rewards(judge: Judge, sample: Sample, texts: Sequence[str], pictures: Sequence[bytes] = ()) -> list[float]:
    """The judge's reward of each completion; NaN where it has no verdict."""
    return [judge_reward(scores) for scores in judge.score(sample, texts, pictures)]


class RuleJudge:
    """Reads what a good completion says from `sample.scene["judge"]`:

        {criterion: {"expect": [words or phrases], "contradict": [words or phrases]}}

    A criterion scores the share of its expected words that the completion contains (whole words,
    case-folded, each counted once), and 0 as soon as it contains a contradicting one, so that a completion
    that names every colour contradicts itself. A criterion that expects nothing has no verdict.
    """

    def score(self, sample: Sample, texts: Sequence[str], pictures: Sequence[bytes] = ()) -> list[dict[str, float]]:
        rules = (sample.scene or {}).get("judge", {})
        spoken = map(_words, texts)
        return [{criterion: _verdict(rules.get(criterion, {}), said) for criterion in CRITERIA} for said in spoken]


def judge_reward(scores: dict[str, float]) -> float:
    """Mean over the criteria that have a verdict; NaN (masked) when none has."""
    verdicts = [score for score in scores.values() if not math.isnan(score)]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


def _verdict(rule: dict[str, list[str]], said: str) -> float:
    expected = {_words(phrase) for phrase in rule.get("expect", ())}
    if not expected:
        return math.nan
    if any(_words(phrase) in said for phrase in rule.get("contradict", ())):
        return 0.0
    return sum(phrase in said for phrase in expected) / len(expected)


def _words(text: str) -> str:
    """The words of a text, case-folded, each between single spaces: phrases are found with `in`."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])
