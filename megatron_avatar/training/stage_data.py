"""Which samples a stage draws from, and how long their prompts are: from the manifest, before a file is opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_avatar.config.schema import Config, StageConfig
from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.planning.prospects import Pool, never
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import own
from megatron_avatar.training.sft import check_traces

log = logging.getLogger(__name__)


def stage_split(stage: StageConfig) -> str:
    return "sft" if stage.kind == "sft" else "train"


def stage_samples(samples: Mapping[str, Sample], stage: StageConfig) -> dict[str, Sample]:
    """The samples that a stage trains on, by id."""
    split = stage_split(stage)
    return {i: s for i, s in samples.items() if s.split == split and s.stage in stage.data}


def held_out_samples(samples: Mapping[str, Sample], stage: StageConfig, limit: int) -> list[Sample]:
    """At most `limit` of the stage's held-out samples, spread over the manifest: its families come in turn."""
    held = [s for s in samples.values() if s.split == "eval" and s.stage in stage.data]
    count = min(limit, len(held))
    return [held[k * len(held) // count] for k in range(count)]


def check_stages(config: Config, samples: Mapping[str, Sample]) -> None:
    """Raise ValueError for a stage without samples, traces or held-out samples where it needs them, or with a reward of
    one's own that fails on its first sample."""
    manifest = config.data.manifest
    found: dict[str, Pool] = {}
    for name, stage in config.stages.items():
        own_samples = stage_samples(samples, stage)
        if not own_samples:
            raise ValueError(
                f"{manifest}: no sample for stages.{name}: it needs stage in {stage.data} and "
                f"split '{stage_split(stage)}'; prepare that data or correct stages.{name}.data"
            )
        if stage.kind == "sft":
            check_traces(own_samples.values())
        for reward, place in config.rl.rewards.items():
            if stage.rewards.get(reward):
                own.try_on(reward, place, next(iter(own_samples.values())))
        if stage.rewards.get("judge") and not config.judge.endpoint and not any(s.scene for s in own_samples.values()):
            log.warning("stages.%s weighs the judge, but the rule-based one knows synthetic scenes only: this part is "
                        "masked and its weight goes to the others; name a server with judge.endpoint", name)
        if stage.kind == "rl":
            found[name] = Pool(len(own_samples), sum(bool(s.hint) for s in own_samples.values()))
        if config.eval.every and not held_out_samples(samples, stage, config.eval.samples):
            raise ValueError(
                f"{manifest}: no sample has split 'eval' and a stage in {stage.data}, so eval.every="
                f"{config.eval.every} has nothing to evaluate: prepare that data or write eval.every=0"
            )
    for problem in never(config, found):
        log.warning("%s", problem)


def measure_lengths(
    config: Config, samples: Mapping[str, Sample], builder: PromptBuilder
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Prompt tokens of every sample (with its hint, where there is one), and by stage the packed tokens expected of
    its group.

    Raises ValueError for a prompt that leaves no room for a completion or trace, before anything is decoded.
    """
    context, rl = config.model.context, config.rl
    prompt_tokens: dict[str, int] = {}
    expected: dict[str, dict[str, int]] = {}
    for name, stage in config.stages.items():
        estimates = expected[name] = {}
        for sample in stage_samples(samples, stage).values():
            length = prompt_tokens.get(sample.id) or builder.length(sample, "hinted" if sample.hint else "plain")
            room, traced = rl.sampling.max_new_tokens, sample.trace if stage.kind == "sft" else None
            if traced:
                room = len(builder.completion_ids(traced))
            if length + room > context:
                raise ValueError(
                    f"{config.data.manifest}: sample {sample.id} has a prompt of {length} tokens and needs "
                    f"{room} for its {'trace' if traced else 'completion'}, but model.context={context}. Media are "
                    "never truncated: lower data.max_frames or data.frame_max_pixels, or leave the sample out"
                )
            prompt_tokens[sample.id] = length
            # Until they are there, completions count half of what they may have.
            estimates[sample.id] = length + (room if traced else rl.n_on * room // 2)
    return prompt_tokens, expected
