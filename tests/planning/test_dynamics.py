"""What a stage is expected to do, against probabilities in closed form, and what it is warned about."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_avatar.config import Config, StageConfig, load_config
from megatron_avatar.config.schema import HintConfig, ReplayConfig, RLConfig
from megatron_avatar.data.manifest import write_manifest
from megatron_avatar.planning.dynamics import FORMAT, HINT_LIFT, SUCCESS, FixedPolicy, outlook
from megatron_avatar.planning.prospects import Pool, never, pools, prospects
from megatron_avatar.records import Sample
from megatron_avatar.rl.step import Visit


def stage(steps: int, batch: int, **rl) -> Config:
    rewards = {"format": 0.5, "accuracy": 0.5}
    return Config(rl=RLConfig(**rl), stages={"s": StageConfig(steps=steps, prompts_per_step=batch, rewards=rewards)})


GRPO = {"n_off": 0, "revisit_share": 0.0, "hints": HintConfig(enabled=False)}


@pytest.mark.parametrize("n_on", [4, 8])
def test_vanished_groups_are_as_many_as_their_probability_says(n_on):
    """A completion earns 0, 0.5 or 1; a group vanishes where all of it earns the same."""
    p = np.linspace(0.0005, 0.9995, 4000)
    weight = stats.beta(*SUCCESS).pdf(p)
    alike = (1 - FORMAT) ** n_on + (FORMAT * p) ** n_on + (FORMAT * (1 - p)) ** n_on
    expected = float((alike * weight).sum() / weight.sum())
    found = outlook(stage(100, 16, n_on=n_on, **GRPO), "s")
    assert found.visits == 1600 and found.visits_per_prompt == 1 and found.hinted == 0 and found.dead is None
    assert abs(found.vanished - expected) < 4 * math.sqrt(expected * (1 - expected) / 1600) + 0.01


def test_a_hint_lifts_what_would_fail():
    policy = FixedPolicy([f"p{k}" for k in range(2000)], seed=0)
    right = {}
    for variant in ("plain", "hinted"):
        rows = [policy.complete(Visit(f"p{k}", variant, f"{variant}/{k}", False), 1, 0)[0][0] for k in range(2000)]
        right[variant] = np.mean([row.parts["correct"] for row in rows])
    mean = SUCCESS[0] / sum(SUCCESS)
    assert right["plain"] == pytest.approx(FORMAT * mean, abs=0.05)
    assert right["hinted"] == pytest.approx(FORMAT * (mean + HINT_LIFT * (1 - mean)), abs=0.05)


def test_an_expectation_is_repeatable_and_follows_its_settings():
    config = stage(60, 4, replay=ReplayConfig(max_age=20))
    found = outlook(config, "s", pool=40)
    assert found == outlook(config, "s", pool=40) and found.visits == 240 and found.visits_per_prompt == 6
    assert found.dead == 0 and found.hinted > 0 and found.replayed > 0.9
    paper = replace(config.rl, replay=ReplayConfig(live=False, order="uniform"))
    dead = outlook(replace(config, rl=paper), "s", pool=40)
    assert dead.dead > 0.1, "the paper's draw takes what has no advantage"
    assert outlook(config, "s", pool=40, hintable=0).hinted == 0
    patient = replace(config, rl=replace(config.rl, hints=HintConfig(patience=5)))
    assert outlook(patient, "s", pool=40).hinted < found.hinted


@pytest.mark.parametrize("recipe", ["avatar_7b", "vl_7b", "avatar_7b_cluster", "tiny_avatar"])
def test_a_recipe_hints_a_tenth_to_three_tenths_of_its_visits(recipe):
    config = load_config([f"recipe={recipe}", "dry_run=true"])
    found = outlook(config, next(iter(config.stages)))
    assert 0.1 <= found.hinted <= 0.3 and found.dead == 0 and found.replayed > 0.9 and found.vanished < 0.65


# ---- what can never be -------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 8), st.integers(1, 3), st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 5),
    st.integers(0, 20), st.integers(0, 3), st.booleans(),
)
def test_what_is_said_to_be_impossible_never_happens(steps, batch, pool, share, patience, fill, max_age, has_hints):
    config = stage(steps, batch, revisit_share=share, hints=HintConfig(patience=patience),
                   replay=ReplayConfig(min_fill=fill, max_age=max_age, live=False))  # fmt: skip
    said = " ".join(never(config, {"s": Pool(pool, pool if has_hints else 0)}))
    found = outlook(config, "s", pool, float(has_hints))
    assert found.hinted == 0 or not ("can ever be hinted" in said or "none of its" in said)
    assert not found.replayed or "can ever be replayed" not in said
    assert has_hints or "none of its" in said


def test_what_a_short_stage_can_not_do_is_named_with_remedies():
    (hints, replay) = never(stage(2, 1), {"s": Pool(9, 9)})
    assert "stages.s: no prompt can ever be hinted" in hints and "rl.hints.enabled=false" in hints
    assert "1 earlier steps make 4 completions, fewer than rl.replay.min_fill=10" in replay
    assert never(stage(2, 1, **GRPO), {"s": Pool(9, 0)}) == []
    (absent,) = never(stage(50, 4), {"s": Pool(9, 0)})
    assert "none of its 9 samples has one" in absent and "data_tools.hints" in absent
    assert never(stage(50, 4), {"s": Pool(9, 1)}) == []


def test_next_to_nothing_is_warned_about():
    _, warnings = prospects(stage(100, 1, revisit_share=0.05))
    assert len(warnings) == 1 and "hints are next to nothing" in warnings[0]
    _, warnings = prospects(stage(60, 4, revisit_share=0.0, hints=HintConfig(enabled=False),
                                  replay=ReplayConfig(live=False, order="uniform")))  # fmt: skip
    assert len(warnings) == 1 and "have no advantage: write rl.replay.live=true" in warnings[0]


def test_pools_are_those_of_the_manifest(tmp_path):
    samples = [
        Sample(f"{split}{k}", where, split, "f", "?", "1", "numerical", hint="Count." if k % 2 else None)
        for split, where, count in (("train", "s", 8), ("train", "other", 3), ("eval", "s", 5))
        for k in range(count)
        for where in [where]
    ]
    samples = [replace(sample, id=f"{sample.id}/{sample.stage}") for sample in samples]
    write_manifest(tmp_path / "m.jsonl", samples)
    config = stage(40, 2, revisit_share=0.5)
    config.stages["s"].data, config.data.manifest = ["s"], str(tmp_path / "m.jsonl")
    assert pools(config) == {"s": Pool(8, 4)}
    table, rests_on = prospects(config)[0].renderables
    assert "of the manifest" in rests_on
    assert list(table.columns[1].cells)[0] == "8, 4" and table.columns[1].header == "s"
    config.data.manifest = ""
    assert pools(config) == {} and "comes up twice" in prospects(config)[0].renderables[1]
