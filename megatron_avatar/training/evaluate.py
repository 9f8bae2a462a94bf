"""Answers of the policy to samples: the held-out evaluation in training, and eval/'s engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.data.loader import MediaLoader
from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.records import Sample
from megatron_avatar.resilience.stopping import StopSignal
from megatron_avatar.rl.rewards import grade
from megatron_avatar.training.rollout import load_prompts


@dataclass(frozen=True)
class Answer:
    """One completion: `tokens` counts its tokens, the end token included; `finished` is False where the limit cut it.
    `error` says why there is none."""

    text: str = ""
    tokens: int = 0
    finished: bool = False
    error: str | None = None


@torch.no_grad()
def answers(
    policy: OmniPolicy, backend: Backend, builder: PromptBuilder, loader: MediaLoader, samples: Sequence[Sample],
    *, sampling: SamplingConfig, n: int = 1, greedy: bool = True, seed: int = 0, batch: int = 16,
    stop: StopSignal | None = None,
) -> list[list[Answer]]:
    """n answers to each sample, in the order given, on every rank. All ranks call it together.

    Drawn answers depend on (seed, sample id, number) alone. A quarantined sample's answers carry its reason. Raises
    GenerationStopped on all ranks when any of them was told to `stop`.
    """
    mine = list(samples[backend.dp_rank :: backend.dp])
    found: dict[str, list[Answer]] = {}
    for start in range(0, -(-len(samples) // backend.dp), batch):  # as often on every rank
        part = mine[start : start + batch]
        prompts = load_prompts(loader, backend, [(s, "plain") for s in part])
        loader.prefetch([(s, "plain") for s in mine[start + batch : start + 2 * batch]])
        alive = [p for p in prompts if p is not None]
        media = policy.embed_media(alive) if alive else []
        keys = ["greedy" if greedy else f"{seed}/evaluation/{p.sample_id}" for p in alive]

        def complete(alive: list = alive, media: list = media, keys: list[str] = keys) -> list:
            return generate(policy, alive, n, sampling, keys, media=media, stop=stop, greedy=greedy)

        rows = iter(stop.guard(complete, backend) if stop is not None else complete())
        for sample, prompt in zip(part, prompts, strict=True):
            if prompt is None:
                found[sample.id] = [Answer(error=loader.quarantined.get(sample.id, "not decoded"))] * n
            else:
                found[sample.id] = [Answer(builder.decode(c.token_ids), len(c), c.finished) for c in next(rows)]
    by_id = {key: value for rank in backend.all_gather_object_dp(found) for key, value in rank.items()}
    return [by_id[s.id] for s in samples]


def evaluate(
    policy: OmniPolicy, backend: Backend, builder: PromptBuilder, loader: MediaLoader, samples: Sequence[Sample],
    *, max_new_tokens: int, batch: int = 16, stop: StopSignal | None = None,
) -> list[float]:
    """Whether the greedy answer to each sample is right (0 or 1); a quarantined sample counts as wrong."""
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    found = answers(policy, backend, builder, loader, samples, sampling=sampling, batch=batch, stop=stop)
    return [0.0 if a.error else grade(s, a.text)["correct"] for s, (a,) in zip(samples, found, strict=True)]
