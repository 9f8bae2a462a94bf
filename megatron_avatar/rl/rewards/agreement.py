"""The self-consistency reward: agreement with the majority of a prompt's completions (paper, rewards)."""

from __future__ import annotations

import math
from collections import Counter

from megatron_avatar.rl.rewards.accuracy import normalise


def self_rewards(answers: list[str | None]) -> list[float]:
    """1 for each answer that equals the most frequent one, else 0; one value for each completion.

    `answers` are those of all on-policy completions of one prompt, wherever they were generated; None is a
    completion without a readable answer: it never votes and never agrees. A tie has no majority (0 for
    all). A single completion has nobody to agree with: NaN, masked.
    """
    if len(answers) < 2:
        return [math.nan] * len(answers)
    keys = [None if answer is None else normalise(answer) for answer in answers]
    ranking = Counter(key for key in keys if key is not None).most_common(2)
    if not ranking or (len(ranking) == 2 and ranking[0][1] == ranking[1][1]):
        return [0.0] * len(keys)
    return [float(key == ranking[0][0]) for key in keys]
