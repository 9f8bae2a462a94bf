"""Sharing out by tokens: nothing lost, nobody far above the mean, the same on every rank."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig, RLConfig
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.micro_batches import plan_micro_batches
from megatron_avatar.records import Completion, Group, Prompt, Trajectory
from megatron_avatar.rl.step import Visit
from megatron_avatar.training.balance import deal, even_out, imbalance, loads_of, packed_tokens
from megatron_avatar.training.learner import Learner, filler_group
from megatron_avatar.training.optim import build_optimizer
from megatron_avatar.training.rollout import share_visits
from tests.policy.tiny import KINDS, tiny_config, tiny_prompts, tiny_thinker
from tests.ranks import launch
from tests.training import layouts_world
from tests.training.layouts_world import run_leg

costs = st.lists(st.integers(0, 5000), max_size=40)
loads = st.lists(st.integers(0, 9000), min_size=1, max_size=8)


@given(costs, loads)
def test_dealt_evenly_and_always_alike(costs, loads):
    owners = deal(costs, loads)
    assert owners == deal(tuple(costs), tuple(loads)) and len(owners) == len(costs)
    assert set(owners) <= set(range(len(loads)))
    ends = [load + more for load, more in zip(loads, loads_of(costs, owners, len(loads)), strict=True)]
    mean, ranks = sum(ends) / len(loads), len(loads)
    assert sum(ends) == sum(costs) + sum(loads)
    assert max(ends) <= max(max(loads), mean + (1 - 1 / ranks) * max(costs, default=0)) + 1e-6
    assert 1 <= imbalance(ends) <= ranks + 1e-9


def test_fewer_tokens_are_waited_for_than_with_dealing_in_turn():
    """A step of long and short prompts, as a curriculum mixes them."""
    costs = [4500, 300, 4500, 300, 4500, 300, 4500, 300]
    in_turn = [k % 2 for k in range(8)]
    assert imbalance(loads_of(costs, in_turn, 2)) > 1.8 and imbalance(loads_of(costs, deal(costs, [0, 0]), 2)) == 1


@given(st.lists(st.integers(100, 5000), min_size=4, max_size=16), st.integers(0, 4), st.integers(1, 4))
def test_what_was_decoded_ahead_is_used_whatever_is_revisited(tokens, revisits, ranks):
    """Fresh prompts keep the ranks that they had before the revisits of the step were known."""
    names = [f"p{k}" for k in range(len(tokens))]
    known = deal(tokens, [0] * ranks)
    revisits = min(revisits, len(tokens))
    fresh = names[: len(tokens) - revisits]
    visits = [Visit(i, "plain", i, False) for i in fresh] + [Visit(i, "plain", i, True) for i in names[:revisits]]
    owners = share_visits(visits, known, dict(zip(names, tokens, strict=True)), ranks)
    assert owners[: len(fresh)] == known[: len(fresh)] and len(owners) == len(visits)


groups = st.lists(
    st.tuples(st.integers(1, 400), st.lists(st.integers(1, 200), min_size=1, max_size=6)), min_size=1, max_size=12
)


@given(groups, st.integers(1, 1500), st.integers(0, 5))
def test_equal_micro_batches_hold_the_same_parts_within_the_budget(groups, budget, more):
    plan = plan_micro_batches([p for p, _ in groups], [lengths for _, lengths in groups], budget)

    def tokens(part):
        return packed_tokens(groups[part[0]][0], [groups[part[0]][1][k] for k in part[1]])

    sizes = [[tokens(part) for part in batch] for batch in plan]
    evened = even_out(plan, sizes, len(plan) + more, budget)
    assert len(evened) <= len(plan) + more and all(evened)
    assert Counter(str(part) for batch in evened for part in batch) == Counter(str(p) for b in plan for p in b)
    largest = max(max(batch) for batch in sizes)
    assert max(sum(map(tokens, batch)) for batch in evened) <= max(budget, largest)


def test_a_pipeline_gets_equal_micro_batches():
    plan = [[(0, [0]), (1, [0])], [(2, [0])]]
    assert even_out(plan, [[60, 40], [30]], 2, 100) == [[(0, [0])], [(1, [0]), (2, [0])]]


def test_packed_tokens_are_those_of_the_packed_row():
    prompt = Prompt("a", "plain", np.arange(7), np.zeros((3, 7), np.int64))
    assert len(pack_groups([prompt], [[np.arange(3), np.arange(5)]])) == packed_tokens(7, [3, 5])


@pytest.mark.slow
@pytest.mark.core
def test_whoever_has_the_media_the_step_is_the_same(tmp_path: Path):
    """Two ranks, encoders in training: text on one and media on the other, everything on one, and a pipeline."""
    assert KINDS == ("audio_in_video", "video", "audio", "text")
    shares = {"in turn": None, "media | text": [0, 0, 0, 1], "text | media": [1, 1, 1, 0], "all | nothing": [0] * 4}
    plain = {"steps": 2, "model": "hf", "train_towers": True, "dtype": "float32", "parallel": {}}
    cases = {name: [{**plain, "owners": owners}] for name, owners in shares.items()}
    cases["pipeline"] = [{**plain, "parallel": {"pp": 2}}]
    tiny_thinker(tiny_config(layers=2)).save_pretrained(tmp_path / "hf")
    alone = run_leg(tmp_path, plain, "alone", 0, True)
    launch(layouts_world.main, 2, tmp_path, cases, timeout=250)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert alone[0][0] != alone[1][0] and curves.keys() == cases.keys()
    for curve in curves.values():  # the second step's loss knows of the first one's gradient
        np.testing.assert_allclose(curve, alone, rtol=2e-4)


def test_a_rank_with_less_work_begins_as_many_micro_batches(backend, tmp_path, monkeypatch):
    """Another replica has three: schedules and reductions of both have to meet, and fillers weigh nothing."""
    config = tiny_config(layers=2)
    tiny_thinker(config).save_pretrained(tmp_path)
    policy = build_policy(tmp_path, backend, ModelConfig(path=str(tmp_path)), ParallelConfig())
    optimization = build_optimizer(policy, OptimConfig(), lr=1e-3, total_steps=2)
    learner = Learner(policy, optimization, backend, RLConfig(tokens_per_micro_batch=4096))
    said = Completion(np.arange(3), np.zeros(3, np.float32), True)
    rows = [Trajectory("a", "plain", said, 0.5, {}, 0.0, "", "", 0, 0)]
    group = Group(tiny_prompts(config)["text"], rows, np.ones(1, np.float32), np.ones(1, bool))
    monkeypatch.setattr(type(backend), "all_gather_object_dp", lambda self, mine: [mine, 3])
    found = learner.micro_batches([group], [None])
    assert [micro.members for micro in found] == [[(0, [0])], [(-1, [0])], [(-1, [0])]]
    assert filler_group().weight == 0
