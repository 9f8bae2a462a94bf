"""A work's micro-batches as tensors, for what is run on them: on the meta device, or to measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from megatron_avatar.planning.work import Work
from megatron_avatar.policy.groups import GroupBatch, pack_groups
from megatron_avatar.policy.lanes import READ_TOKENS
from megatron_avatar.records import Prompt


def pack(groups: Sequence[tuple[int, Sequence[int]]]) -> GroupBatch:
    """A batch of groups (prompt tokens, completions' tokens) without contents."""
    prompts = [Prompt("", "plain", np.zeros(p, np.int64), np.zeros((3, p), np.int64)) for p, _ in groups]
    return pack_groups(prompts, [[np.zeros(n, np.int64) for n in lengths] for _, lengths in groups])


def micro_batches(work: Work) -> list[GroupBatch]:
    """The micro-batches of an update, as the learner shares groups out; all their tokens are 0."""
    return [pack([(work.prompt, [work.completion] * len(kept)) for _, kept in members]) for members in work.plan()]


def reading_batch(work: Work) -> GroupBatch:
    """Prompts in one row, as generation reads them: as many as one turn takes."""
    return pack([(work.prompt, [1])] * min(work.fresh, max(1, READ_TOKENS // work.prompt)))


def seen_pairs(segments: Tensor) -> float:
    """Query-key pairs of a segment table [n, 4] (see groups.py): a segment causally itself, and its whole prefix."""
    length, prefix = segments[:, 1].double(), segments[:, 3].double()
    return float((length * (length + 1) / 2 + length * prefix).sum())
