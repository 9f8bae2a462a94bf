"""Greedy answers of the policy on samples: the held-out evaluation in training, and eval/'s engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.data.loader import MediaLoader
from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import grade
from megatron_avatar.training.rollout import load_prompts
from megatron_avatar.training.stopping import StopSignal


@torch.no_grad()
def evaluate(
    policy: OmniPolicy, backend: Backend, builder: PromptBuilder, loader: MediaLoader, samples: Sequence[Sample],
    *, max_new_tokens: int, batch: int = 16, stop: StopSignal | None = None,
) -> list[dict]:
    """Predictions from one greedy completion a sample, in the order given, on every rank. All ranks call it together.

    A quarantined sample stays in the denominator: it counts as wrong and carries its reason in `error`. Raises
    GenerationStopped on all ranks when any of them was told to `stop`.
    """
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    mine = list(samples[backend.dp_rank :: backend.dp])
    predictions: list[dict] = []
    for start in range(0, -(-len(samples) // backend.dp), batch):  # as often on every rank
        part = mine[start : start + batch]
        prompts = load_prompts(loader, backend, [(s, "plain") for s in part])
        loader.prefetch([(s, "plain") for s in mine[start + batch : start + 2 * batch]])
        alive = [p for p in prompts if p is not None]
        media = policy.embed_media(alive) if alive else []

        def answer(alive: list = alive, media: list = media) -> list:
            return generate(policy, alive, 1, sampling, ["greedy"] * len(alive), media=media, stop=stop, greedy=True)

        rows = iter(stop.guard(answer, backend) if stop is not None else answer())
        for sample, prompt in zip(part, prompts, strict=True):
            text = builder.decode(next(rows)[0].token_ids) if prompt is not None else ""
            predictions.append({
                "id": sample.id, "family": sample.family, "stage": sample.stage, "gold": sample.answer,
                "problem_type": sample.problem_type, "choices": list(sample.choices), **grade(sample, text),
                "error": None if prompt is not None else loader.quarantined.get(sample.id, "not decoded"),
            })
    gathered = backend.all_gather_object_dp(predictions)
    by_id = {p["id"]: p for rank in gathered for p in rank}
    return [by_id[s.id] for s in samples]
