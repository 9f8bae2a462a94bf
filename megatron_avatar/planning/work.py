"""How much a step of a recipe has to do: tokens of prompts and completions, as the settings bound them.

Two prompts are counted with. The typical one shows one clip at the recipe's full number of frames and pixels, with the
sound of a clip that long, or to the families that plan with both a picture where that is longer: time is estimated from
it. The longest one fills what model.context leaves beside a completion, with pictures, sound and times in a typical
one's proportion: memory is planned for it. Completions are counted at rl.sampling.max_new_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_avatar.config.families import family_of
from megatron_avatar.config.schema import Config, DataConfig, StageConfig
from megatron_avatar.policy.micro_batches import plan_micro_batches
from megatron_avatar.policy.shape import Shape

QUESTION_TOKENS = 200  # chat template, question and choices: our assumption
STAMP_TOKENS = 9  # of a pair of frames, where its time is text: `<12.5 seconds>`, start and end


class Counts(NamedTuple):
    """A micro-batch: packed tokens, outputs (completion tokens), and the pairs of queries and keys that they see."""

    tokens: int
    outputs: int
    pairs: float


@dataclass(frozen=True)
class Work:
    """What one data-parallel rank does in a step of a stage, all of it at the typical or at the longest prompt.

    fresh: prompts it generates for; completions: how many each group has, fresh groups first; shows: what a prompt
    shows, in words.
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
    shows: str = ""

    def plan(self) -> list[list[tuple[int, list[int]]]]:
        """The micro-batches of an update, as the learner shares groups out: (group, its completions) of each."""
        lengths = [[self.completion] * count for count in self.completions]
        return plan_micro_batches([self.prompt] * len(lengths), lengths, self.budget)

    def counts(self) -> list[Counts]:
        """What each of them has to compute."""
        return [self._count([len(kept) for _, kept in members]) for members in self.plan()]

    def prompts_together(self) -> int:
        """The most prompts that one micro-batch of an update holds."""
        return max(map(len, self.plan()))

    def _count(self, members: list[int]) -> Counts:
        """Of groups with so many completions: a prompt's last token opens each completion; one alone is one segment."""
        prefix, length = self.prompt - 1, self.completion
        alone, own = _causal(prefix + length), _causal(length) + length * prefix
        pairs = sum(alone if n == 1 else _causal(prefix) + n * own for n in members)
        tokens = sum(prefix + n * length for n in members)
        return Counts(tokens, sum(members) * length, pairs)


def _causal(tokens: int) -> float:
    return tokens * (tokens + 1) / 2


def _fitted(visual: int, audio: int, stamps: int, room: int, longest: bool) -> tuple[int, int, int]:
    """Visual and audio tokens of a prompt that shows this much, and its length, within `room`: all is cut alike."""
    media = visual + audio + stamps
    prompt = room if longest else min(media + QUESTION_TOKENS, room)
    scale = max(0, prompt - QUESTION_TOKENS) / max(1, media)
    return round(scale * visual), round(scale * audio), prompt


def stage_work(config: Config, stage: StageConfig, shape: Shape, dp: int, *, longest: bool) -> Work:
    """A rank's share of a step; prompts that don't share out over dp ranks are rounded up."""
    data, rl, completion = config.data, config.rl, config.rl.sampling.max_new_tokens
    family, pairs, seen = family_of(shape.model_type), data.max_frames // 2, not data.blind
    clip, picture = pairs * (data.frame_max_pixels // family.token_pixels), data.image_max_pixels // family.token_pixels
    audio = round(data.max_frames / data.fps * family.audio_rate) if family.hears and not data.mute else 0
    stamps = pairs * STAMP_TOKENS if family.timestamps else 0
    shown = {"video": (seen * clip, audio, seen * stamps), "image": (seen * picture, 0, 0)}
    room = config.model.context - completion
    fitted = {kind: _fitted(*shown[kind], room, longest) for kind in family.planned}
    kind = max(fitted, key=lambda kind: fitted[kind])
    visual, audio, prompt = fitted[kind]
    prompts = -(-stage.prompts_per_step // dp)
    reinforced = stage.kind == "rl"
    counts = [rl.n_on if reinforced else 1] * prompts + [rl.n_off] * prompts * (reinforced and rl.n_off > 0)
    return Work(
        rl=reinforced, train_towers=stage.train_towers, visual=visual, audio=audio, prompt=prompt,
        completion=completion, fresh=prompts if reinforced else 0, completions=tuple(counts),
        budget=rl.tokens_per_micro_batch,
        shows=_clip(data, bool(audio)) if kind == "video" else "a picture",
    )  # fmt: skip


def _clip(data: DataConfig, sound: bool) -> str:
    """The typical clip in words: a longer one shows no more frames, but has more sound."""
    longer = "; longer ones have more sound" if sound else ""
    return (f"a clip of {data.max_frames / data.fps:g} s (data.max_frames={data.max_frames} at data.fps={data.fps:g}"
            f"{longer})")  # fmt: skip
