"""The rewards of a prompt's completions, and their weighted sum (paper, rewards).

Parts are raw values in [0, 1] by name (format, accuracy, self, judge); NaN marks a masked part, whose
weight the other parts share in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_avatar.config.validate import REWARDS
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.accuracy import accuracy_reward, canonical
from megatron_avatar.rl.rewards.agreement import self_rewards
from megatron_avatar.rl.rewards.format import format_reward, parse
from megatron_avatar.rl.rewards.grade import grade, read_answer
from megatron_avatar.rl.rewards.judge import CRITERIA, Judge, RuleJudge, judge_reward

__all__ = [
    "CRITERIA",
    "REWARDS",
    "Judge",
    "RuleJudge",
    "accuracy_reward",
    "combine",
    "format_reward",
    "grade",
    "judge_reward",
    "parse",
    "read_answer",
    "score_group",
    "self_rewards",
]


def score_group(
    sample: Sample, texts: list[str], weights: dict[str, float], judge: Judge | None = None, *,
    pictures: Sequence[bytes] = (), numerical: str = "graded",
) -> list[tuple[float, dict[str, float]]]:
    """Reward and parts of each completion in `texts`, all on-policy completions of one prompt.

    The parts always hold format and accuracy (the tracker and the logs need them whatever their weight),
    and self and judge where their weight is above 0; `pictures` are for the judge. Raises ValueError for unusable
    weights.
    """
    check_weights(weights)
    answers = [parse(text)[1] for text in texts]
    parts = [
        {"format": format_reward(text), "accuracy": accuracy_reward(answer, sample, numerical=numerical)}
        for text, answer in zip(texts, answers, strict=True)
    ]
    if weights.get("self", 0) > 0:
        votes = self_rewards([None if answer is None else canonical(answer, sample) for answer in answers])
        for part, vote in zip(parts, votes, strict=True):
            part["self"] = vote
    if weights.get("judge", 0) > 0:
        verdicts = [math.nan] * len(texts) if judge is None else map(judge_reward, judge.score(sample, texts, pictures))
        for part, verdict in zip(parts, verdicts, strict=True):
            part["judge"] = verdict
    return [(combine(part, weights), part) for part in parts]


def combine(parts: dict[str, float], weights: dict[str, float]) -> float:
    """Weighted mean, in [0, 1], of the parts that are there and not masked; 0 if none of them has weight.

    With weights that sum to one this is the paper's weighted sum, a masked part's weight shared out.
    """
    present = {name: w for name, w in weights.items() if w > 0 and not math.isnan(parts.get(name, math.nan))}
    total = sum(present.values())
    reward = sum(weight * parts[name] for name, weight in present.items()) / total if total else 0.0
    return min(1.0, max(0.0, reward))  # a sum of rounded weights may pass 1 by one ulp


def check_weights(weights: dict[str, float]) -> None:
    """Raises ValueError for a reward that doesn't exist, or a negative or infinite weight."""
    for name, weight in weights.items():
        if name not in REWARDS:
            raise ValueError(f"rewards: no reward is named {name!r}; choose from {', '.join(REWARDS)}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"rewards.{name}: the weight is {weight}, but must be 0 or above and finite")
