"""Two ranks, each with a GPU of its own where there are two: main(FOLDER, DTYPE) writes FOLDER/found.json.

In each layout: generation without graphs and by graphs, what training says of its tokens, an update, generation by the
graphs from before it and what training says of that, a checkpoint, the update after it; and that one again from the
other layout's checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig, RLConfig, SamplingConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.decode import Decoder
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Completion, Group, Trajectory
from megatron_avatar.resilience import checkpoint
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import KINDS, tiny_prompts

LAYOUTS = {"tp2": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}}
ROWS, TOKENS = 4, 24


def make_learner(folder: Path, dtype: str, backend, parallel: ParallelConfig) -> Learner:
    policy = build_policy(folder / "hf", backend, ModelConfig(dtype=dtype), parallel)
    load_hf(policy, folder / "hf")
    optimization = build_optimizer(policy, OptimConfig(schedule="constant"), lr=2e-5, total_steps=20, parallel=parallel)
    learner = Learner(policy, optimization, backend, RLConfig(tokens_per_micro_batch=300))
    learner.snapshot_reference()
    return learner


def run(folder: Path, name: str, dtype: str) -> dict:
    """What a layout found; the first groups that were sampled serve all updates, so that layouts compare."""
    parallel = ParallelConfig(recompute="selective", **LAYOUTS[name])
    backend = backends.start(parallel)
    learner = make_learner(folder, dtype, backend, parallel)
    prompts = list(tiny_prompts(learner.policy.hf_config).values())
    media = learner.policy.embed_media(prompts)
    sampling = SamplingConfig(max_new_tokens=TOKENS)

    def sample() -> list[list[Completion]]:
        return generate(learner.policy, prompts, ROWS, sampling, list(KINDS), media=media)

    with mock.patch.object(Decoder, "_replay", Decoder.step):  # without graphs
        plain = sample()
    learner.policy.kept_generation = None
    sample()  # captures
    rows = sample()
    same = all(np.array_equal(a.token_ids, b.token_ids)
               for x, y in zip(rows, plain, strict=True) for a, b in zip(x, y, strict=True))  # fmt: skip

    def grouped(rows: list[list[Completion]]) -> list[Group]:
        return backend.broadcast_object([
            Group(prompt, [Trajectory(prompt.sample_id, "plain", c, 0.5, {}, 0.0, "", "", 0, 0) for c in part],
                  np.array([1, -1, 0, 0.5], np.float32), np.ones(ROWS, bool))
            for prompt, part in zip(prompts, rows, strict=True)
        ])  # fmt: skip

    def error(groups: list[Group]) -> tuple[list, float]:
        """Scores under the reference, and mean exp|difference| to what generation recorded."""
        scores = learner.reference_logprobs(groups, media)
        recorded = np.concatenate([t.completion.logprobs for g in groups for t in g.trajectories])
        seen = np.concatenate([row for group in scores for row in group])
        return scores, float(np.exp(np.abs(seen - recorded)).mean())

    groups = grouped(rows)
    scores, before = error(groups)
    kept = folder / "groups.pt"
    if not kept.exists():
        backend.barrier()
        if backend.rank == 0:
            torch.save((groups, scores), kept)
        backend.barrier()
    groups, scores = torch.load(kept, weights_only=False)  # written by this test, just now

    def update(learner: Learner) -> list[float]:
        stats = learner.update(groups, media, scores, n_on=len(prompts) * ROWS, n_off=0, check_logprobs=False)
        assert not stats["skipped"]
        return [float(stats["loss"]), stats["grad_norm"]]

    first = update(learner)
    fresh = grouped(sample())  # by graphs that were captured before the update
    reference = learner.reference
    learner.snapshot_reference()  # the weights of now
    after = error(fresh)[1]
    learner.reference = reference
    path = checkpoint.save(
        folder / name, 1, policy=learner.policy, optimization=learner.optimization, reference=learner.reference,
        state={}, backend=backend, keep=1,
    )  # fmt: skip
    second, resumed = update(learner), {}
    for other in LAYOUTS:
        source = folder / other / "checkpoints" / path.name
        if source.exists():
            checkpoint.load(source, policy=learner.policy, optimization=learner.optimization,
                            reference=learner.reference, backend=backend)  # fmt: skip
            resumed[other] = update(learner)
    backends.stop()
    return {"same": same, "error": max(before, after), "first": first, "second": second, "resumed": resumed,
            "device": backend.device.type}  # fmt: skip


def main(folder: Path, dtype: str) -> None:
    found = {name: run(folder, name, dtype) for name in LAYOUTS}
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))
