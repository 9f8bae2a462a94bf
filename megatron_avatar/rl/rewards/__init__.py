"""The rewards of a prompt's completions, and their weighted sum (paper, rewards).

Parts are raw values in [0, 1] by name (format, accuracy, self, judge, and those of own.py); NaN marks a masked part,
whose weight the other parts share in proportion. Beside them stands `correct`, which is no reward: 1 where evaluation
calls the answer right.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from megatron_avatar.config.validate import REWARDS
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.accuracy import accuracy_reward, canonical
from megatron_avatar.rl.rewards.agreement import self_rewards
from megatron_avatar.rl.rewards.format import format_reward, parse
from megatron_avatar.rl.rewards.grade import grade, is_right, read_answer
from megatron_avatar.rl.rewards.judge import CRITERIA, Judge, RuleJudge, judge_reward, judge_rewards

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
    "judge_rewards",
    "parse",
    "read_answer",
    "score_group",
    "self_rewards",
    "weigh_group",
]


def score_group(
    sample: Sample, texts: Sequence[str], weights: dict[str, float], verdicts: Sequence[float] | None = None, *,
    numerical: str = "graded", self_reward: str = "right", own: Mapping[str, Sequence[float]] | None = None,
) -> list[tuple[float, dict[str, float]]]:
    """Reward and parts of each completion in `texts`, all on-policy completions of one prompt.

    The parts always hold format, accuracy and correct (the tracker and the logs need them whatever their weight),
    and self and judge where their weight is above 0. `verdicts` are the judge's rewards, NaN where it has none.
    `self_reward` "right": agreement counts only where the majority is right, or where accuracy has no weight;
    "majority": always (the paper). `own`: verdicts of rewards of one's own by name. Raises ValueError for
    unusable weights.
    """
    check_weights(weights, own or {})
    answers = [parse(text)[1] for text in texts]
    parts = [
        {"format": format_reward(text), "accuracy": accuracy_reward(answer, sample, numerical=numerical)}
        for text, answer in zip(texts, answers, strict=True)
    ]
    for text, part in zip(texts, parts, strict=True):
        part["correct"] = _correct(sample, text, part["accuracy"])
    if weights.get("judge", 0) > 0:
        for part, verdict in zip(parts, verdicts or [math.nan] * len(texts), strict=True):
            part["judge"] = verdict
    for name, values in (own or {}).items():
        for part, value in zip(parts, values, strict=True):
            part[name] = value
    named = [None if answer is None else canonical(answer, sample) for answer in answers]
    return weigh_group(parts, named, weights, self_reward=self_reward)


def weigh_group(
    parts: list[dict[str, float]], answers: Sequence[str | None], weights: dict[str, float], *, self_reward: str
) -> list[tuple[float, dict[str, float]]]:
    """A group's rewards out of its parts, which get `self` from the answers here where it has a weight.

    A part that is masked in one completion is masked in all of them: its weight goes to the other parts, and those
    that were scored would else compete with one that was measured by another rule.
    """
    if weights.get("self", 0) > 0:
        checked = self_reward == "right" and weights.get("accuracy", 0) > 0
        votes = self_rewards(answers, [part["correct"] > 0 for part in parts] if checked else None)
        for part, vote in zip(parts, votes, strict=True):
            part["self"] = vote
    masked = {name for part in parts for name, value in part.items() if math.isnan(value)}
    for part in parts:
        part.update(dict.fromkeys(masked, math.nan))
    return [(combine(part, weights), part) for part in parts]


def _correct(sample: Sample, text: str, accuracy: float) -> float:
    """What `grade` calls right: 1 or 0. An answer between tags is the one that `accuracy` is of."""
    return float(is_right(accuracy, sample)) if "<answer>" in text else grade(sample, text)["correct"]


def combine(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted mean, in [0, 1], of the parts that are there and not masked; 0 if none of them has weight.

    With weights that sum to one this is the paper's weighted sum, a masked part's weight shared out.
    """
    present = {name: w for name, w in weights.items() if w > 0 and not math.isnan(parts.get(name, math.nan))}
    total = sum(present.values())
    return sum(weight * parts[name] for name, weight in present.items()) / total if total else 0.0


def check_weights(weights: dict[str, float], own: Collection[str] = ()) -> None:
    """Raises ValueError for a reward that doesn't exist, or a negative or infinite weight."""
    for name, weight in weights.items():
        if name not in (*REWARDS, *own):
            raise ValueError(f"rewards: no reward is named {name!r}; choose from {', '.join((*REWARDS, *own))}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"rewards.{name}: the weight is {weight}, but must be 0 or above and finite")
