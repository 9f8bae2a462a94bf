"""Does anything of a run earn the format reward? A policy that never writes the tags has nothing to learn from."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.records import Trajectory

STEPS = 50


class FormatWatch:
    """Looks at a run's first 50 steps of reinforcement learning; says once that none of them earned the reward."""

    def __init__(self) -> None:
        self.steps = self.completions = self.finished = self.earned = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)

    def see(self, fresh: Sequence[Trajectory], data: DataConfig) -> str:
        """Count a step's completions; the warning at the last step that is watched, else nothing."""
        if self.steps >= STEPS:
            return ""
        self.steps += 1
        self.completions += len(fresh)
        self.finished += sum(t.completion.finished for t in fresh)
        self.earned += sum(t.parts["format"] > 0 for t in fresh)
        return self._remedy(data) if self.steps == STEPS and self.completions and not self.earned else ""

    def _remedy(self, data: DataConfig) -> str:
        asks = "the policy doesn't follow data.instruction" if data.instruction else (
            "data.instruction is empty, so no prompt asks for the tags: write one (the default does)")  # fmt: skip
        cut = 1 - self.finished / self.completions
        longer = f"; {cut:.0%} of them were cut off: raise rl.sampling.max_new_tokens" if cut > 0.1 else ""
        return (
            f"NO FORMAT REWARD IN {STEPS} STEPS: none of {self.completions} completions was one <think>…</think> and "
            f"one <answer>…</answer>, so that no answer can be rewarded. Stop the run: {asks}{longer}; or begin with a "
            "cold start (recipe=sft_7b, then model.path=the folder that it exports)"
        )
