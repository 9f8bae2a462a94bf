"""A mixture's routes through a step: kept in generation, compared in the update, taken there where asked for."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_avatar.config.schema import (
    GuardConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RLConfig,
    SamplingConfig,
)
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Group
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from megatron_avatar.training.rollout import make_groups
from tests.policy.tiny import tiny_omni3, tiny_omni3_config, tiny_omni3_prompts

SAMPLING = SamplingConfig(max_new_tokens=9)
OFF = GuardConfig(exact=0, warn=0, mask=0, stop=0)


@pytest.fixture(scope="module")
def world(backend, tmp_path_factory):
    """(policy, media, groups, routes): two fresh groups, and one as if it came from the replay buffer."""
    folder = tmp_path_factory.mktemp("omni3")
    tiny_omni3(tiny_omni3_config(layers=4)).save_pretrained(folder)
    policy = build_policy(folder, backend, ModelConfig(path=str(folder)), ParallelConfig())
    load_hf(policy, folder)
    prompts = list(tiny_omni3_prompts(policy.hf_config).values())[:3]
    media, routes = policy.embed_media(prompts), list[list[np.ndarray]]()
    rows = generate(policy, prompts, 3, SAMPLING, ["a", "b", "c"], media=media, routes=routes)
    groups = make_groups(prompts, rows, str, stage="visual", step=1, version=1, ref_id="visual")
    for group in groups:
        group.advantages = np.array([1, -1, 0.5], np.float32)
    groups[2].on_policy[:] = False
    return policy, media, groups, routes[:2]


def update(world, groups: list[Group], routes, **settings) -> dict:
    policy, media, *_ = world
    optimization = build_optimizer(policy, OptimConfig(), lr=0.0, total_steps=9)
    rl = RLConfig(sampling=SAMPLING, guard=OFF, tokens_per_micro_batch=160, **settings)
    learner = Learner(policy, optimization, policy.backend, rl)
    learner.snapshot_reference()
    reference = learner.reference_logprobs(groups, media)
    first = learner.update(groups, media, reference, n_on=6, n_off=3, routes=routes)
    again = learner.update(groups, media, reference, n_on=6, n_off=3, routes=routes, check_logprobs=False)
    assert again["routing_flips"] == first["routing_flips"], "a later update tells the first one's"
    return first


def test_one_engine_chooses_alike_in_float32(world):
    _, _, groups, routes = world
    for replay in (False, True):
        stats = update(world, groups, routes, routing_replay=replay)
        assert stats["routing_flips"] == 0 and abs(stats["logprob_error"] - 1) < 1e-5
    assert update(world, groups, [])["routing_flips"] is None, "nothing was written down"


def test_flips_are_counted_and_replay_takes_what_was_written_down(world):
    """Experts of one layer that generation didn't choose, for one group: of the fresh tokens' layers that is a share.
    Taken again, they change what the layers behind choose, too."""
    _, _, groups, routes = world
    other = [[row.copy() for row in rows] for rows in routes]
    for row in other[0]:
        row[:, 1] = 7 - row[:, 1]  # sets that are their own mirror image stay
    moved = sum(set(a) != set(b) for old, new in zip(routes[0], other[0], strict=True)
                for a, b in zip(old[:, 1], new[:, 1], strict=True))  # fmt: skip
    tokens = sum(len(row) for rows in routes for row in rows)
    assert moved
    for replay in (False, True):
        stats = update(world, groups, other, routing_replay=replay)
        wanted = pytest.approx(moved / (4 * tokens))
        assert stats["routing_flips"] > wanted.expected if replay else stats["routing_flips"] == wanted
        assert (abs(stats["logprob_error"] - 1) > 1e-3) == replay
