"""Supervised fine-tuning on reasoning traces: a group of one completion a prompt."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.records import Completion, Group, Prompt, Sample, Trajectory


def check_traces(samples: Iterable[Sample]) -> None:
    """Raises ValueError naming the first sample without a trace."""
    for sample in samples:
        if not sample.trace:
            raise ValueError(
                f"sample {sample.id}: key 'trace' is empty, but supervised fine-tuning needs a trace: write one, or "
                "take the sample out of split 'sft'"
            )


def sft_groups(prompts: list[Prompt], samples: dict[str, Sample], builder: PromptBuilder) -> list[Group]:
    """One group of one a prompt, the completion being the sample's trace."""
    groups = []
    for prompt in prompts:
        sample = samples[prompt.sample_id]
        assert sample.trace, "check_traces comes first"
        ids = builder.completion_ids(sample.trace)
        completion = Completion(ids, np.zeros(len(ids), np.float32), finished=True)
        trajectory = Trajectory(sample.id, prompt.variant, completion, 0.0, {}, 0.0, "", sample.stage, 0, 0)
        groups.append(Group(prompt, [trajectory], np.zeros(1, np.float32), np.ones(1, bool)))
    return groups
