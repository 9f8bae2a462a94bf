"""The self-consistency reward: agreement with the majority of a prompt's completions (paper, rewards)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from megatron_avatar.rl.rewards.accuracy import normalise


def self_rewards(answers: Sequence[str | None], right: Sequence[bool] | None = None) -> list[float]:
    """1 for each answer that equals the most frequent one, else 0; one value for each completion.

    `answers` are those of all on-policy completions of one prompt, wherever they were generated; None is a
    completion without a readable answer: it never votes and never agrees. A tie has no majority (0 for
    all). A single completion has nobody to agree with: NaN, masked.

    With `right`, which says of each answer whether it is, agreement counts only where the majority is right, and is
    masked for the whole group elsewhere: else a few that agree on a wrong answer earn as much as one that is right.
    """
    if len(answers) < 2:
        return [math.nan] * len(answers)
    keys = [None if answer is None else normalise(answer) for answer in answers]
    ranking = Counter(key for key in keys if key is not None).most_common(2)
    majority = None if not ranking or (len(ranking) == 2 and ranking[0][1] == ranking[1][1]) else ranking[0][0]
    if right is not None and not any(r and key == majority is not None for key, r in zip(keys, right, strict=True)):
        return [math.nan] * len(keys)
    return [float(key == majority is not None) for key in keys]
