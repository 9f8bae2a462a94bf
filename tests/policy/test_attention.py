"""Packing, micro-batch planning, group attention and the key-value cache, against dense row-by-row attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_avatar.policy.attention import GroupCoreAttention, pack_groups, plan_micro_batches
from megatron_avatar.policy.cache import FIRST_STEPS, KeyValueCache
from megatron_avatar.records import Prompt

HEADS, KV_HEADS, SIZE = 6, 2, 8
PLACEHOLDER = 7

groups_of_lengths = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=3
)


def make_prompt(length: int, rng: np.random.Generator) -> Prompt:
    ids = rng.integers(PLACEHOLDER, 50, length)
    ids[-1] = 9
    return Prompt("sample", "plain", ids, np.sort(rng.integers(0, 2 * length, (3, length))))


def make_groups(shape, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [make_prompt(length, rng) for length, _ in shape]
    return prompts, [[rng.integers(10, 50, length) for length in lengths] for _, lengths in shape]


def make_attention() -> GroupCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return GroupCoreAttention(config, 1, AttnMaskType.causal, "self")


def random_qkv(length: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 1, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def dense_causal(query, key, value):
    """Textbook attention of one row, [L, heads, d] each; the oracle."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)


def rows_of(batch, shape):
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
    rows = list(rows_of(batch, shape))
    flat = [(g, c) for g, outputs in enumerate(completions) for c in range(len(outputs))]
    places = batch.target_index.split(batch.lengths)
    for row, ids, index, (group, number) in zip(rows, owned, places, flat, strict=True):
        prompt, output = prompts[group], completions[group][number]
        # as one row: the inputs are prompt and completion without its last token, labels shifted by one
        assert batch.token_ids[0, row].tolist() == [*prompt.token_ids, *output[:-1]]
        assert ids.tolist() == output.tolist() and index.tolist() == row[-len(output) :].tolist()
        steps = np.broadcast_to(prompt.next_position + np.arange(len(output) - 1), (3, len(output) - 1))
        assert np.array_equal(batch.positions[:, 0, row], np.concatenate([prompt.positions, steps], axis=1))
    assert list(zip(batch.target_group.tolist(), batch.target_completion.tolist(), strict=True)) == [
        owner for owner, length in zip(flat, batch.lengths, strict=True) for _ in range(length)
    ]
    media = [prompt.token_ids[:-1] == PLACEHOLDER for prompt in prompts]
    assert len(batch.media_index([PLACEHOLDER, 1])) == sum(mask.sum() for mask in media)


@given(groups_of_lengths, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_attention_and_gradients_equal_dense_rows(shape, multiple):
    prompts, completions = make_groups(shape)
    batch = pack_groups(prompts, completions)
    length = len(batch)
    batch = batch.pad_to(multiple)
    packed, dense = random_qkv(len(batch)), random_qkv(len(batch))
    for tensor in (*packed, *dense):
        tensor.requires_grad_()
    output = make_attention()(*packed, batch.segments)
    assert output.shape == (len(batch), 1, HEADS * SIZE) and output.isfinite().all()
    probe = torch.randn(len(batch), HEADS * SIZE, generator=torch.Generator().manual_seed(1))
    wanted, loss = torch.zeros(length, HEADS * SIZE), 0.0
    seen = torch.zeros(length)
    for row in rows_of(batch, shape):
        result = dense_causal(*(x[row, 0] for x in dense))
        fresh = seen[row] == 0  # the prefix belongs to several rows and counts once
        loss = loss + (result * probe[row])[fresh].sum()
        wanted[row] = result.detach()
        seen[row] = 1
    torch.testing.assert_close(output[:length, 0], wanted, atol=1e-5, rtol=0)
    (output[:length, 0] * probe[:length]).sum().backward()
    loss.backward()
    for got, expected in zip(packed, dense, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=0)


def test_wrong_prefix_is_seen():
    """Negative control: a segment table off by one place misses by far more than the tolerance."""
    batch = pack_groups(*make_groups([(6, [4, 3])]))
    qkv = random_qkv(len(batch))
    shifted = batch.segments.clone()
    shifted[1:, 3] -= 1
    attention = make_attention()
    assert (attention(*qkv, batch.segments) - attention(*qkv, shifted)).abs().max() > 1e-2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 2), st.booleans())
@settings(max_examples=25, deadline=None)
def test_cache_equals_dense_rows(prompt_lengths, rows, padding, drop):
    """Prefill, then decode past one doubling of the cache; half way a prompt may leave the batch."""
    steps = FIRST_STEPS + 3
    attention = make_attention()
    batch = pack_groups(*make_groups([(length, [1]) for length in prompt_lengths]))
    prompt_qkv = random_qkv(len(batch))
    attention.cache = cache = KeyValueCache(prompt_lengths, rows)
    attention(*prompt_qkv, batch.segments)
    cache.start()
    alive = list(range(len(prompt_lengths)))
    histories = {(p, r): [x[:, 0].split(prompt_lengths)[p] for x in prompt_qkv] for p in alive for r in range(rows)}
    for step in range(steps):
        if drop and step == steps // 2 and len(alive) > 1:
            cache.keep(list(range(1, len(alive))))
            alive = alive[1:]
        new = random_qkv(len(alive) * rows + padding, seed=step + 1)
        output = attention(*new, None)
        assert output.shape == (len(alive) * rows + padding, 1, HEADS * SIZE)
        for i, owner in enumerate((p, r) for p in alive for r in range(rows)):
            histories[owner] = [torch.cat([old, x[i]]) for old, x in zip(histories[owner], new, strict=True)]
            if step in (0, FIRST_STEPS, steps - 1):
                torch.testing.assert_close(output[i, 0], dense_causal(*histories[owner])[-1], atol=1e-5, rtol=0)
        cache.advance()


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
