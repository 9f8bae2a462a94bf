"""A step's prompts and groups: shared out among ranks, decoded, filled with what was generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from megatron_avatar.config.schema import Config
from megatron_avatar.data.loader import MediaLoader
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.records import Completion, Group, Prompt, Sample, Trajectory, Variant
from megatron_avatar.rl.step import Visit
from megatron_avatar.training.balance import deal, loads_of


def share_visits(visits: Sequence[Visit], fresh_owners: Sequence[int], tokens: Mapping[str, int], dp: int) -> list[int]:
    """Data-parallel rank of each visit: fresh prompts have theirs, revisits even out the tokens by sample id."""
    costs = [tokens[v.sample_id] for v in visits]
    owners = list(fresh_owners[: sum(not v.revisit for v in visits)])
    fresh, again = costs[: len(owners)], costs[len(owners) :]
    return owners + deal(again, loads_of(fresh, owners, dp))


def load_prompts(
    loader: MediaLoader, backend: Backend, requests: list[tuple[Sample, Variant]]
) -> list[Prompt | None]:
    """Decoded prompts in the order asked for; None for a quarantined sample, on all ranks of a model replica alike.

    Called by all ranks together: a deadline may have passed on one rank of a replica only.
    """
    prompts = loader.get(requests)
    if backend.tp * backend.pp == 1:
        return prompts
    for replica, gone in backend.all_gather_object((backend.dp_rank, [p is None for p in prompts])):
        if replica == backend.dp_rank:
            prompts = [None if lost else p for p, lost in zip(prompts, gone, strict=True)]
    return prompts


def keeps_embeddings(config: Config, backend: Backend) -> bool:
    """Whether what the encoders made of a prompt's media may take its media's place for the rest of the run.

    Where an encoder trains in any stage it would be out of date, a served judge looks at the pixels, tensor-parallel
    ranks have to encode the same prompts together, and on a GPU the encoders are a small part of a step.
    """
    trained = any(stage.train_towers for stage in config.stages.values())
    return backend.device.type == "cpu" and backend.tp == 1 and not config.judge.endpoint and not trained


def embed(policy: OmniPolicy, loader: MediaLoader, prompts: Sequence[Prompt], *, keep: bool) -> list[Tensor | None]:
    """Embeddings [M, W] of each prompt's media by frozen encoders (see Towers); `keep` them in the loader. What is kept
    is made one prompt at a time: it must not depend on when a run met it."""
    if not keep:
        return policy.embed_media(prompts)
    media = [policy.embed_media([prompt])[0] for prompt in prompts]
    loader.keep(prompts, media)
    return media


def make_groups(
    prompts: list[Prompt], completions: list[list[Completion]], decode: Callable[[np.ndarray], str],
    *, stage: str, step: int, version: int, ref_id: str,
) -> list[Group]:
    """The step's fresh groups, not scored yet: `Scoring` fills in reward and parts, `metrics.set_kl` kl_ref."""
    groups = []
    for prompt, rows in zip(prompts, completions, strict=True):
        trajectories = [
            Trajectory(
                sample_id=prompt.sample_id, variant=prompt.variant, completion=row, reward=math.nan, parts={},
                kl_ref=0.0, ref_id=ref_id, stage=stage, step=step, policy_version=version, text=decode(row.token_ids),
            )
            for row in rows
        ]
        groups.append(Group(prompt, trajectories, on_policy=np.ones(len(rows), bool)))
    return groups
