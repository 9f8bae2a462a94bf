"""A stage's samples, those held out, and the tokens that they are expected to take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.config.schema import Config, StageConfig
from megatron_avatar.records import Prompt, Sample
from megatron_avatar.training.sft import sft_groups
from megatron_avatar.training.stage_data import held_out_samples, measure_lengths, stage_samples


def sample(name: str, split: str = "train", stage: str = "v", **more) -> Sample:
    return Sample(name, stage, split, "f", "?", "1", "numerical", **more)


def by_id(*samples: Sample) -> dict[str, Sample]:
    return {s.id: s for s in samples}


def test_a_stage_draws_from_its_own_split_and_data():
    samples = by_id(sample("a"), sample("b", stage="w"), sample("c", "eval"), sample("d", "sft"),
                    sample("e", stage="x"))  # fmt: skip
    assert list(stage_samples(samples, StageConfig(data=["v", "w"]))) == ["a", "b"]
    assert list(stage_samples(samples, StageConfig(kind="sft", data=["v"]))) == ["d"]
    assert [s.id for s in held_out_samples(samples, StageConfig(data=["v"]), 9)] == ["c"]


@given(st.integers(1, 60), st.integers(1, 40))
def test_held_out_samples_are_spread_over_the_manifest(there, limit):
    samples = by_id(*(sample(f"{k:02}", "eval") for k in range(there)), sample("train"))
    places = [int(s.id) for s in held_out_samples(samples, StageConfig(data=["v"]), limit)]
    assert len(places) == min(there, limit) and places[0] == 0
    gaps = np.diff([*places, there])  # to the end too: the last family has its turn
    assert gaps.min() >= 1 and np.ptp(gaps) <= 1


class Builder:
    """Ten tokens a prompt and five more for its hint; a token a letter."""

    def length(self, sample: Sample, variant: str) -> int:
        return 10 + 5 * (variant == "hinted")

    def completion_ids(self, text: str) -> np.ndarray:
        return np.arange(len(text))


def test_lengths_are_those_of_prompt_hint_and_completion():
    config = Config(stages={"cold": StageConfig(kind="sft", data=["v"]), "rl": StageConfig(data=["v"])})
    config.model.context, config.rl.n_on, config.rl.sampling.max_new_tokens = 40, 4, 20
    samples = by_id(sample("a"), sample("b", hint="look"), sample("c", "sft", trace="x" * 30))
    lengths, expected = measure_lengths(config, samples, Builder())
    assert lengths == {"a": 10, "b": 15, "c": 10}
    assert expected == {"cold": {"c": 40}, "rl": {"a": 50, "b": 55}}, "n completions of half their limit"
    config.model.context = 39
    with pytest.raises(ValueError, match="sample c has a prompt of 10 tokens and needs 30 for its trace, but .*=39"):
        measure_lengths(config, samples, Builder())
    del config.stages["cold"]
    config.model.context = 34
    with pytest.raises(ValueError, match="sample b has a prompt of 15 tokens and needs 20 for its completion"):
        measure_lengths(config, samples, Builder())


def test_a_trace_is_a_group_of_one():
    prompts = [Prompt(name, "plain", np.arange(3), np.zeros((3, 3))) for name in ("b", "a")]
    samples = by_id(sample("a", "sft", trace="yes"), sample("b", "sft", trace="no way"))
    groups = sft_groups(prompts, samples, Builder())
    assert [g.prompt.sample_id for g in groups] == ["b", "a"]
    assert [[t.completion.token_ids.tolist() for t in g.trajectories] for g in groups] == [[[*range(6)]], [[0, 1, 2]]]
    assert all(g.trajectories[0].completion.finished and g.weight == 1 for g in groups)
    with pytest.raises(AssertionError, match="check_traces comes first"):
        sft_groups(prompts, by_id(sample("a", "sft", trace=""), samples["b"]), Builder())
