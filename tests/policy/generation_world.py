"""Runs on four ranks: generation and vocabulary-parallel log-probabilities in every layout.

main(FOLDER) reads the models there, FOLDER/FAMILY; rank 0 writes FOLDER/results.json: family and layout -> completions
as [token ids, log-probabilities, finished].
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy import generate as generation
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import Generation, GenerationStopped, generate
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.logprobs import completion_logprobs
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.routes import Routes
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Prompt
from tests.policy import tiny

# (family, tp, pp, sequence parallel)
LAYOUTS = [("omni", 2, 1, False), ("omni", 1, 2, False), ("omni", 2, 2, True), ("vl3", 2, 2, True),
           ("omni3", 2, 1, True), ("omni3", 2, 2, True)]  # fmt: skip
LAYERS = {"omni": 4, "vl3": 6, "omni3": 6}  # deepstack wants three on the first of two stages
STOP_IDS = list(range(1, 10))  # many, so that completions of a random model end at different times
SAMPLING = SamplingConfig(temperature=0.8, max_new_tokens=40)
KEYS = [f"seed/stage/step/{kind}/0" for kind in tiny.KINDS]
traces: list[list[int | None]] = []  # of every generation on this rank
ROWS = 3  # odd, so that sequence parallelism has to pad a decode step


def make_folder(folder: Path, name: str) -> Path:
    """FOLDER/NAME, the family's tiny model with these stop tokens."""
    family = tiny.FAMILIES[name]
    config = family.config(layers=LAYERS[name])
    for owner in (config, config.text_config):
        owner.eos_token_id = STOP_IDS
    family.model(config).save_pretrained(folder / name)
    return folder / name


def open_policy(folder: Path, parallel: ParallelConfig) -> OmniPolicy:
    policy = build_policy(folder, backends.start(parallel), ModelConfig(path=str(folder)), parallel)
    load_hf(policy, folder)
    return policy


class TracedGeneration(Generation):
    """Writes down the lane that this stage works on in every tick, None if it has nothing to do."""

    def run(self) -> None:
        self.trace, self.lane = [], None
        traces.append(self.trace)
        super().run()

    def _forward(self, lane: int, *args: Any) -> torch.Tensor | None:
        self.lane = lane
        return super()._forward(lane, *args)

    def _exchange(self, *args: Any) -> torch.Tensor | None:
        self.trace.append(self.lane)
        self.lane = None
        return super()._exchange(*args)


def check_layout(folder: Path, family: str, parallel: ParallelConfig) -> list:
    policy = open_policy(folder / family, parallel)
    backend = policy.backend
    prompts = list(tiny.FAMILIES[family].prompts(policy.hf_config).values())[:3]
    routes: list = []
    groups = generate(policy, prompts, ROWS, SAMPLING, KEYS[:3], routes=routes)
    check_routes(policy, prompts, groups, routes)
    # One prompt is enough to keep all stages at work: its rows are shared out to the lanes.
    generate(policy, prompts[:1], 2, dataclasses.replace(SAMPLING, max_new_tokens=3), KEYS[:1])
    long, short = traces[-2:]
    filling = [None] * backend.pp_rank
    assert long[:20] == [*filling, *[tick % backend.pp for tick in range(20 - len(filling))]], long
    assert short[: 4 * backend.pp] == [*filling, *list(range(backend.pp)) * 4][: 4 * backend.pp], short
    rows = [[row.token_ids.tolist(), row.logprobs.tolist(), row.finished] for group in groups for row in group]
    assert all(other == rows for other in backend.all_gather_object(rows)), "ranks hold different completions"

    # Replicas have different work, and never wait for each other.
    mine = 1 + backend.dp_rank
    generate(policy, prompts[:mine], mine, dataclasses.replace(SAMPLING, max_new_tokens=3 * mine), KEYS[:mine])
    # Only the sampling rank's signal counts, and stops all ranks of its replica at the same token.
    sampling_rank = backend.is_last_stage and backend.tp_rank == 0
    polls = 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return polls == 3 if sampling_rank else polls == 1

    try:
        generate(policy, prompts, 1, dataclasses.replace(SAMPLING, max_new_tokens=5), KEYS[:3], stop=stop)
    except GenerationStopped:
        polls = -polls
    assert backend.all_gather_object(polls) == [-3] * backend.world
    backends.stop()
    return rows


def check_routes(policy: OmniPolicy, prompts: list[Prompt], groups: list, routes: list) -> None:
    """In float32 a mixture chooses in the training forward what it has chosen in generation, on every stage."""
    assert bool(routes) == bool(policy.config.experts)
    if not routes:
        return
    batch = pack_groups(prompts, [[row.token_ids for row in rows] for rows in groups])
    recorded = torch.from_numpy(np.concatenate([row for rows in routes for row in rows]))
    layers = policy.language_model.decoder.layers
    media, hidden = policy.embed_media(prompts), []
    for replay in (False, True):  # taken again, they change nothing
        kept = Routes(recorded, batch.target_index, layers[0].layer_number, replay=replay)
        hidden.append(policy.run_pipeline(*policy._inputs(batch, media, kept)))
        assert kept.counts.tolist() == [0, len(batch.target_ids) * len(layers)], kept.counts
    if policy.post_process:
        torch.testing.assert_close(hidden[1], hidden[0], atol=1e-5, rtol=0)


def check_logprobs() -> None:
    """Value and gradients of vocabulary-parallel log-probabilities, on vocabularies that leave a rank padding only."""
    backend = backends.start(ParallelConfig(tp=2))
    for vocab_size, width in ((11, 7), (5, 6), (12, 6)):  # width: padded vocabulary entries a rank
        generator = torch.Generator().manual_seed(vocab_size)
        hidden = torch.randn(9, 4, generator=generator).requires_grad_()
        weight = torch.randn(2 * width, 4, generator=generator).requires_grad_()
        ids = torch.randint(vocab_size, (9,), generator=generator)
        shard = slice(width * backend.tp_rank, width * (backend.tp_rank + 1))
        ours = [hidden.detach().clone().requires_grad_(), weight.detach()[shard].clone().requires_grad_()]
        logprobs, entropy = completion_logprobs(
            *ours, ids, temperature=0.7, vocab_size=vocab_size, chunk_logits=4 * width,
            group=parallel_state.get_tensor_model_parallel_group(),
        )  # fmt: skip
        full = torch.log_softmax(hidden @ weight[:vocab_size].T / 0.7, -1)
        expected = full[range(9), ids]
        probe = torch.linspace(-1, 1, 9)
        (logprobs * probe).sum().backward()
        (expected * probe).sum().backward()
        for got, want in (
            (logprobs, expected),
            (entropy, -(full.exp() * full).sum(-1)),
            (ours[0].grad, hidden.grad),
            (ours[1].grad, weight.grad[shard]),
        ):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    backends.stop()


def main(folder: Path) -> None:
    check_logprobs()
    generation.Generation = TracedGeneration
    results = {}
    for family, tp, pp, sequence_parallel in LAYOUTS:
        parallel = ParallelConfig(tp=tp, pp=pp, sequence_parallel=sequence_parallel)
        results[f"{family}-{tp}-{pp}-{sequence_parallel}"] = check_layout(folder, family, parallel)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))

