"""How much a step of a recipe has to do: tokens of prompts and completions, as the settings bound them.

Two prompts are counted with. The typical one shows one clip at the recipe's full number of frames and pixels, with the
sound of a clip that long, or one picture to a model that doesn't hear: time is estimated from it. The longest one fills
what model.context leaves beside a completion, with pictures and sound in the proportion of the typical one: memory is
planned for it. Completions are counted at rl.sampling.max_new_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_avatar.config.schema import Config, StageConfig
from megatron_avatar.policy.architecture import PolicyConfig, hears
from megatron_avatar.policy.groups import GroupBatch, pack_groups, plan_micro_batches
from megatron_avatar.policy.lanes import READ_TOKENS
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

    def micro_batches(self) -> list[GroupBatch]:
        """The micro-batches of an update, as the learner shares groups out; all their tokens are 0."""
        return [pack([(self.prompt, [self.completion] * len(kept)) for _, kept in members]) for members in self._plan()]

    def prompts_together(self) -> int:
        """The most prompts that one micro-batch of an update holds."""
        return max(map(len, self._plan()))

    def _plan(self) -> list[list[tuple[int, list[int]]]]:
        lengths = [[self.completion] * count for count in self.completions]
        return plan_micro_batches([self.prompt] * len(lengths), lengths, self.budget)

    def reading_batch(self) -> GroupBatch:
        """Prompts in one row, as generation reads them: as many as one turn takes."""
        return pack([(self.prompt, [1])] * min(self.fresh, max(1, READ_TOKENS // self.prompt)))


def pack(groups: Sequence[tuple[int, Sequence[int]]]) -> GroupBatch:
    """A batch of groups (prompt tokens, completions' tokens) without contents."""
    prompts = [Prompt("", "plain", np.zeros(p, np.int64), np.zeros((3, p), np.int64)) for p, _ in groups]
    return pack_groups(prompts, [[np.zeros(n, np.int64) for n in lengths] for _, lengths in groups])


def stage_work(config: Config, stage: StageConfig, hf_config: PolicyConfig, dp: int, *, longest: bool) -> Work:
    """A rank's share of a step; prompts that don't share out over dp ranks are rounded up."""
    data, rl, completion = config.data, config.rl, config.rl.sampling.max_new_tokens
    clip = data.max_frames // 2 * (data.frame_max_pixels // TOKEN_PIXELS)
    visual = 0 if data.blind else clip if hears(hf_config) else data.image_max_pixels // TOKEN_PIXELS
    seconds = data.max_frames / data.fps
    audio = round(seconds * AUDIO_TOKENS_A_SECOND) if hears(hf_config) and not data.mute else 0
    room = config.model.context - completion
    prompt = room if longest else min(visual + audio + QUESTION_TOKENS, room)
    if visual + audio:  # what of the media the prompt's length leaves room for
        scale = max(0, prompt - QUESTION_TOKENS) / (visual + audio)
        visual, audio = round(scale * visual), round(scale * audio)
    prompts = -(-stage.prompts_per_step // dp)
    reinforced = stage.kind == "rl"
    counts = [rl.n_on if reinforced else 1] * prompts + [rl.n_off] * prompts * (reinforced and rl.n_off > 0)
    return Work(
        rl=reinforced, train_towers=stage.train_towers, visual=visual, audio=audio, prompt=prompt,
        completion=completion, fresh=prompts if reinforced else 0, completions=tuple(counts),
        budget=rl.tokens_per_micro_batch,
    )  # fmt: skip
