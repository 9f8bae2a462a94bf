"""How much a step of a recipe has to do: tokens of prompts and completions, as the settings bound them.

Two prompts are counted with. The typical one shows one clip (or picture) at the recipe's full number of frames and
pixels, with the sound of a clip that long: time is estimated from it. The longest one fills what model.context leaves
beside a completion: memory is planned for it. Completions are counted at rl.sampling.max_new_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_avatar.config.schema import Config, StageConfig
from megatron_avatar.policy.architecture import PolicyConfig, hears
from megatron_avatar.policy.groups import GroupBatch, pack_groups, plan_micro_batches
from megatron_avatar.records import Prompt

QUESTION_TOKENS = 200  # chat template, question and choices: our assumption
TOKEN_PIXELS = 28 * 28  # pixels that become one visual token
AUDIO_TOKENS_A_SECOND = 25


@dataclass(frozen=True)
class Work:
    """What one data-parallel rank does in a step of a stage, all of it at the typical or at the longest prompt.

    fresh: prompts it generates for; completions: how many each group has, fresh groups first.
    """

    rl: bool
    train_towers: bool
    visual: int
    audio: int
    prompt: int
    completion: int
    fresh: int
    completions: tuple[int, ...]
    budget: int

    @property
    def micro_batches(self) -> list[tuple[int, int, int]]:
        """(packed tokens, completion tokens, completions) of each micro-batch, as the learner shares them out."""
        lengths = [[self.completion] * count for count in self.completions]
        plan = plan_micro_batches([self.prompt] * len(lengths), lengths, self.budget)
        counts = [(len(members), sum(len(kept) for _, kept in members)) for members in plan]
        return [(n * (self.prompt - 1) + rows * self.completion, rows * self.completion, rows) for n, rows in counts]

    def largest_batch(self) -> GroupBatch:
        """The micro-batch with the most tokens, packed; all its tokens are 0."""
        lengths = [[self.completion] * count for count in self.completions]
        plan = plan_micro_batches([self.prompt] * len(lengths), lengths, self.budget)
        members = max(plan, key=lambda members: sum(self.prompt - 1 + self.completion * len(k) for _, k in members))
        return pack([(self.prompt, [self.completion] * len(kept)) for _, kept in members])

    def prompts_batch(self) -> GroupBatch:
        """The fresh prompts in one row, as generation reads them."""
        return pack([(self.prompt, [1])] * self.fresh)


def pack(groups: Sequence[tuple[int, Sequence[int]]]) -> GroupBatch:
    """A batch of groups (prompt tokens, completions' tokens) without contents."""
    prompts = [Prompt("", "plain", np.zeros(p, np.int64), np.zeros((3, p), np.int64)) for p, _ in groups]
    return pack_groups(prompts, [[np.zeros(n, np.int64) for n in lengths] for _, lengths in groups])


def stage_work(config: Config, stage: StageConfig, hf_config: PolicyConfig, dp: int, *, longest: bool) -> Work:
    """A rank's share of a step; prompts that don't share out over dp ranks are rounded up."""
    data, rl, completion = config.data, config.rl, config.rl.sampling.max_new_tokens
    visual = 0 if data.blind else max(
        data.max_frames // 2 * (data.frame_max_pixels // TOKEN_PIXELS), data.image_max_pixels // TOKEN_PIXELS
    )  # fmt: skip
    seconds = data.max_frames / data.fps
    audio = round(seconds * AUDIO_TOKENS_A_SECOND) if hears(hf_config) and not data.mute else 0
    room = config.model.context - completion
    prompt = room if longest else min(visual + audio + QUESTION_TOKENS, room)
    prompts = -(-stage.prompts_per_step // dp)
    reinforced = stage.kind == "rl"
    counts = [rl.n_on if reinforced else 1] * prompts + [rl.n_off] * prompts * (reinforced and rl.n_off > 0)
    return Work(
        rl=reinforced, train_towers=stage.train_towers, visual=visual, audio=audio, prompt=prompt,
        completion=completion, fresh=prompts if reinforced else 0, completions=tuple(counts),
        budget=rl.tokens_per_micro_batch,
    )  # fmt: skip
