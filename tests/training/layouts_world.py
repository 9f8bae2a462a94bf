"""Runs on four ranks: the same steps on the same groups in many layouts. main(FOLDER, CASES):

FOLDER holds the models, CASES: name -> a list of legs. A leg trains `steps` in a layout from the checkpoint
that the leg before it left. Writes FOLDER/curves.json: name -> [[loss, gradient norm], …].
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig, RLConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Completion, Group, Trajectory
from megatron_avatar.resilience import checkpoint
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import TEXT, family_of_config

STEPS, PLANNED = 14, 20  # that a case runs, of those that the learning rate is planned for
LENGTHS = {"audio_in_video": (3, 7, 5), "text": (6, 2), "video": (4, 4), "audio": (8, 1, 2), "image": (3, 7, 5),
           "image_and_video": (8, 1, 2)}  # fmt: skip


def groups_of(policy) -> list[Group]:
    """A group of each kind of prompt, fresh and replayed completions mixed; the same on every rank."""
    rng = np.random.default_rng(0)
    groups = []
    for kind, prompt in family_of_config(policy.hf_config).prompts(policy.hf_config).items():
        completions = [Completion(rng.integers(0, TEXT, n), np.zeros(n, np.float32), True) for n in LENGTHS[kind]]
        rows = [Trajectory(kind, "plain", c, 0.5, {}, 0.0, "", "", 0, 0) for c in completions]
        advantages = rng.standard_normal(len(rows)).astype(np.float32)
        groups.append(Group(prompt, rows, advantages, rng.random(len(rows)) < 0.6))
    return groups


def run_leg(folder: Path, leg: dict, case: str, start: int, last: bool) -> list[list[float]]:
    """Loss and gradient norm of the steps from `start` on; in float16 the loss scale after each too. At step
    leg["overflow"] a gradient of the second replica alone is beyond any number: no rank has a norm (None)."""
    parallel = ParallelConfig(**leg["parallel"])
    model = ModelConfig(dtype=leg["dtype"])
    source, towers = folder / leg["model"], leg["train_towers"]
    backend = backends.start(parallel)
    policy = build_policy(source, backend, model, parallel)
    load_hf(policy, source)
    policy.set_train_towers(towers)
    optim = OptimConfig(schedule="cosine", warmup_fraction=0.2, weight_decay=0.1)
    optimization = build_optimizer(policy, optim, lr=2e-3, total_steps=PLANNED, parallel=parallel)
    learner = Learner(policy, optimization, backend, RLConfig(tokens_per_micro_batch=160), train_towers=towers)
    learner.snapshot_reference()

    everything = groups_of(policy)
    owners = leg.get("owners") or [k % backend.dp for k in range(len(everything))]
    mine = [group for group, owner in zip(everything, owners, strict=True) if owner == backend.dp_rank]
    media = policy.embed_media([g.prompt for g in mine])
    # What was sampled: the policy as it began, off by a fixed noise for replayed completions.
    began = learner.reference_logprobs(mine, media)
    for group, scores in zip(mine, began, strict=True):
        noise = np.random.default_rng(len(group.prompt))
        for trajectory, on, row in zip(group.trajectories, group.on_policy, scores, strict=True):
            trajectory.completion.logprobs[:] = row + (0 if on else 0.3 * noise.standard_normal(len(row)))
    if start:
        checkpoint.load(
            folder / case / "checkpoints" / f"step_{start:08d}", policy=policy, optimization=optimization,
            reference=learner.reference, backend=backend,
        )
    n_on = sum(int(g.on_policy.sum()) for g in everything)
    n_off = sum(len(g.trajectories) for g in everything) - n_on
    curve = []
    weight = policy.language_model.decoder.layers[0].self_attention.linear_qkv.weight
    for step in range(start, start + leg["steps"]):
        beyond = step == leg.get("overflow")
        hook = weight.register_hook(lambda grad: grad * math.inf) if beyond and backend.dp_rank == 1 else None
        stats = learner.update(mine, media, began, n_on=n_on, n_off=n_off, check_logprobs=False)
        if hook is not None:
            hook.remove()
        seen = {(stats["skipped"], stats.get("loss_scale"), stats.get("overflows")) for stats in
                backend.all_gather_object({name: stats.get(name) for name in ("skipped", "loss_scale", "overflows")})}
        assert len(seen) == 1 and stats["skipped"] == beyond, seen
        scale = [stats["loss_scale"]] if "loss_scale" in stats else []
        curve.append([float(stats["loss"]), None if beyond else stats["grad_norm"], *scale])
    if not last:
        checkpoint.save(
            folder / case, start + leg["steps"], policy=policy, optimization=optimization, reference=learner.reference,
            state={}, backend=backend, keep=1,
        )
    backends.stop()
    return curve


def main(folder: Path, cases: dict[str, list[dict]]) -> None:
    torch.manual_seed(0)
    curves = {}
    for case, legs in cases.items():
        curves[case] = []
        for leg in legs:
            curves[case] += run_leg(folder, leg, case, len(curves[case]), leg is legs[-1])
        if os.environ["RANK"] == "0":
            (folder / "curves.json").write_text(json.dumps(curves))

