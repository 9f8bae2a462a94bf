"""Packing of groups and planning of micro-batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.micro_batches import plan_micro_batches
from megatron_avatar.records import Prompt

PLACEHOLDER = 7

groups_of_lengths = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=3
)


def make_prompt(length: int, rng: np.random.Generator) -> Prompt:
    ids = rng.integers(PLACEHOLDER, 50, length)
    ids[-1] = 9
    positions = np.sort(rng.integers(0, 6 * length, (3, length))) / np.float32(3)  # fractions, as Qwen3-Omni's times
    return Prompt("sample", "plain", ids, positions.astype(np.float32))


def make_groups(shape, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [make_prompt(length, rng) for length, _ in shape]
    return prompts, [[rng.integers(PLACEHOLDER, 50, length) for length in lengths] for _, lengths in shape]


def rows_of(shape):
    """Places in S of each completion's whole row, prefix first."""
    start = 0
    for prompt_length, lengths in shape:
        prefix = list(range(start, start + prompt_length - 1))
        start += prompt_length - 1
        for length in lengths:
            yield torch.tensor(prefix + list(range(start, start + length)))
            start += length


@given(groups_of_lengths)
@settings(max_examples=40, deadline=None)
def test_packing_keeps_every_row(shape):
    prompts, completions = make_groups(shape)
    batch = pack_groups(prompts, completions)
    assert len(batch) == sum(p - 1 + sum(lengths) for p, lengths in shape)
    owned = batch.target_ids.split(batch.lengths)
    rows = list(rows_of(shape))
    flat = [(g, c) for g, outputs in enumerate(completions) for c in range(len(outputs))]
    places = batch.target_index.split(batch.lengths)
    for row, ids, index, (group, number) in zip(rows, owned, places, flat, strict=True):
        prompt, output = prompts[group], completions[group][number]
        # as one row: the inputs are prompt and completion without its last token, labels shifted by one
        assert batch.token_ids[0, row].tolist() == [*prompt.token_ids, *output[:-1]]
        assert ids.tolist() == output.tolist() and index.tolist() == row[-len(output) :].tolist()
        steps = np.broadcast_to(prompt.next_position + np.arange(len(output) - 1), (3, len(output) - 1))
        expected = np.concatenate([prompt.positions, steps], axis=1).astype(np.float32)
        assert np.array_equal(batch.positions[:, 0, row], expected)
    # Placeholders count in prompts alone: PLACEHOLDER in the completions is a token like others.
    places = batch.pad_to(8).media_index([PLACEHOLDER, 0, 1])
    assert (batch.token_ids[0, places] == PLACEHOLDER).all()
    assert len(places) == sum((prompt.token_ids[:-1] == PLACEHOLDER).sum() for prompt in prompts)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=6)), max_size=8),
    st.integers(1, 120),
)
def test_plan_covers_everything_once_within_budget(groups, budget):
    prompt_lengths = [p for p, _ in groups]
    completion_lengths = [lengths for _, lengths in groups]
    plan = plan_micro_batches(prompt_lengths, completion_lengths, budget)
    placed = [(group, number) for batch in plan for group, numbers in batch for number in numbers]
    assert sorted(placed) == [(g, c) for g, lengths in enumerate(completion_lengths) for c in range(len(lengths))]
    for batch in plan:
        tokens = sum(prompt_lengths[g] - 1 + sum(completion_lengths[g][c] for c in numbers) for g, numbers in batch)
        assert tokens <= budget or (len(batch) == 1 and len(batch[0][1]) == 1)
    assert plan == plan_micro_batches(prompt_lengths, completion_lengths, budget)


def test_plan_splits_a_large_group_and_fills_up():
    assert plan_micro_batches([11, 6], [[10, 10, 10], [5]], 30) == [[(0, [0, 1])], [(0, [2]), (1, [0])]]


def test_empty_completion_is_refused():
    prompts, _ = make_groups([(3, [1])])
    with pytest.raises(AssertionError, match="need tokens"):
        pack_groups(prompts, [[np.zeros(0, np.int64)]])
