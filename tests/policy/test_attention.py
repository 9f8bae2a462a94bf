"""Group attention by each of its kernels against textbook attention, row by row: values, gradients, memory."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from megatron_avatar.policy import flash
from megatron_avatar.policy.attention import GroupCoreAttention, group_attention
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.records import Prompt

HEADS, KV_HEADS, SIZE = 6, 2, 8
SCALE = SIZE**-0.5

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=3
)  # of groups: prompt length, completion lengths


def segments_of(shape, multiple=1):
    prompts = [Prompt("sample", "plain", np.zeros(n, np.int64), np.zeros((3, n), np.int64)) for n, _ in shape]
    batch = pack_groups(prompts, [[np.zeros(length, np.int64) for length in lengths] for _, lengths in shape])
    return batch.pad_to(multiple).segments


def random_qkv(segments, *, seed=0, dtype=torch.float64, device="cpu", size=SIZE):
    length = int(segments[:, 1].sum())
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, heads, size) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for x in shapes]


def precise(qkv):
    return [x.detach().double().requires_grad_() for x in qkv]


def textbook(query, key, value, segments):
    """Every segment as a row of its own, prefix first; of that row the segment's part. Plain autograd; the oracle."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    for start, length, prefix_start, prefix_length in segments.tolist():
        row = [*range(prefix_start, prefix_start + prefix_length), *range(start, start + length)]
        scores = torch.einsum("qhd,khd->hqk", query[row], key[row]) * query.shape[2] ** -0.5
        later = torch.ones(scores.shape[1:], device=query.device).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), value[row])
        outputs.append(mixed[prefix_length:])
    return torch.cat(outputs)


def value_and_gradients(attend, qkv):
    output = attend(*qkv)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, qkv, probe.to(output))]


@contextlib.contextmanager
def flash_kernels_of_a_gpu():
    """FlashAttention's operators as they are on a GPU: what they accept, and the layout of what they return."""

    def check(query, key, value, starts_q, starts_k, longest_q, longest_k, dropout):
        assert dropout == 0 and all(x.stride(-1) == 1 for x in (query, key, value))
        for rows, starts, longest in ((query, starts_q, longest_q), (key, starts_k, longest_k)):
            assert starts.dtype == torch.int32 and starts.is_contiguous() and starts[0] == 0 and starts[-1] == len(rows)
            assert 0 < starts.diff().min() and starts.diff().max() <= longest
        return tuple(starts_q.diff().tolist()), tuple(starts_k.diff().tolist())

    def forward(query, key, value, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        lengths = check(query, key, value, starts_q, starts_k, longest_q, longest_k, dropout)
        output, lse = flash.IN_CHUNKS.forward(query, key, value, *lengths, causal, scale)
        return output, lse.t().contiguous(), query.new_empty(2), query.new_empty(0), query.new_empty(0)

    def backward(
        grad, query, key, value, output, lse, starts_q, starts_k, longest_q, longest_k, dropout, causal,
        seed, unused, *, scale,
    ):  # fmt: skip
        lengths = check(query, key, value, starts_q, starts_k, longest_q, longest_k, dropout)
        assert lse.is_contiguous() and lse.shape == (query.shape[1], len(query)), "[heads, Tq]"
        return flash.IN_CHUNKS.backward(grad, query, key, value, output, lse.t(), *lengths, causal, scale)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield
    finally:
        library._destroy()


@pytest.fixture(params=[flash.FLASH_CPU, flash.IN_CHUNKS, flash.FLASH_VARLEN], ids=lambda kernel: kernel.name)
def kernel(request, monkeypatch):
    monkeypatch.setattr(flash, "CHUNK_SCORES", 4 * HEADS * 10)  # a few rows at a time
    with flash_kernels_of_a_gpu() if request.param is flash.FLASH_VARLEN else contextlib.nullcontext():
        yield request.param


@pytest.mark.filterwarnings("ignore::UserWarning")  # operators overridden on purpose
def test_values_and_gradients_equal_rows(kernel):
    @given(shapes, st.integers(1, 5))
    @settings(max_examples=40)
    def check(shape, multiple):
        segments = segments_of(shape, multiple)
        qkv = random_qkv(segments)
        ours = value_and_gradients(lambda *qkv: group_attention(*qkv, segments, SCALE, kernel), qkv)
        theirs = value_and_gradients(lambda *qkv: textbook(*qkv, segments), qkv)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)

    check()


def test_long_rows_in_single_precision():
    """Past all block sizes of the kernel, with scores large enough to upset a careless softmax."""
    segments = segments_of([(1100, [40, 40, 7, 600]), (1, [3, 900]), (530, [70] * 4)])
    qkv = random_qkv(segments, dtype=torch.float32)
    with torch.no_grad():
        qkv[0].mul_(20)
    ours = value_and_gradients(lambda *qkv: group_attention(*qkv, segments, SCALE), qkv)
    theirs = value_and_gradients(lambda *qkv: textbook(*qkv, segments), precise(qkv))
    for got, expected in zip(ours, theirs, strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_wrong_prefix_is_seen():
    """Negative control: a segment table off by one place misses by far more than the tolerance."""
    segments = segments_of([(6, [4, 3])])
    qkv = random_qkv(segments)
    shifted = segments.clone()
    shifted[1:, 3] -= 1
    assert (group_attention(*qkv, segments, SCALE) - group_attention(*qkv, shifted, SCALE)).abs().max() > 1e-2


def test_same_bits_each_time_with_and_without_recomputation():
    segments = segments_of([(300, [40, 17, 40]), (20, [5]), (70, [9, 200])])
    qkv = random_qkv(segments, dtype=torch.float32)

    def attend(*qkv):
        return group_attention(*qkv, segments, SCALE)

    first = value_and_gradients(attend, qkv)
    for again in (attend, lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(first, value_and_gradients(again, qkv), strict=True))
    with torch.no_grad():
        assert torch.equal(attend(*qkv), first[0])


def test_half_precision_stays_close():
    segments = segments_of([(200, [30, 12]), (40, [9])])
    qkv = random_qkv(segments, dtype=torch.bfloat16)
    ours = value_and_gradients(lambda *qkv: group_attention(*qkv, segments, SCALE), qkv)
    theirs = value_and_gradients(lambda *qkv: textbook(*qkv, segments), precise(qkv))
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() <= 0.01 * expected.norm()


def allocated(work):
    """Most bytes that `work` held at a time of what it allocated, the kernels' own scratch space included."""
    work()  # tables are kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    held = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("completions", [[64, 48, 64], [64]], ids=["group", "one row"])
def test_memory_grows_linearly_with_the_prompt(completions):
    peaks = []
    for length in (1024, 2048, 4096):
        segments = segments_of([(length, completions)])
        qkv = random_qkv(segments, dtype=torch.float32)
        peaks.append(allocated(lambda: torch.autograd.grad(group_attention(*qkv, segments, SCALE).sum(), qkv)))  # noqa: B023
    assert peaks[2] - peaks[1] <= 2.1 * (peaks[1] - peaks[0]), "a square would make it 4"
    assert peaks[2] - peaks[1] < 3 * 2048 * 4 * (2 * HEADS + 2 * KV_HEADS) * SIZE, "bytes of three copies of the tokens"


def test_backward_keeps_inputs_output_and_log_sum_exp_only():
    """Not the copies of a prefix, and not the projection that the value is a view of."""
    segments = segments_of([(300, [20, 30, 40])])
    length = int(segments[:, 1].sum())
    projection = torch.randn(length, KV_HEADS, 5 * SIZE, requires_grad=True)
    query, key, _ = random_qkv(segments, dtype=torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        group_attention(query, key, projection[..., :SIZE], segments, SCALE)
    assert sum(kept.values()) == 4 * length * (2 * HEADS * SIZE + 2 * KV_HEADS * SIZE + HEADS)


def test_choice_of_kernels(monkeypatch):
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    assert flash.kernel_for(torch.device("cpu"), half, 7) is flash.FLASH_CPU
    monkeypatch.setattr(flash, "_has_flash", lambda device: True)
    assert flash.kernel_for(gpu, half, 128) is flash.kernel_for(gpu, torch.float16, 8) is flash.FLASH_VARLEN
    for dtype, size in ((torch.float32, 128), (half, 20), (half, 264)):
        assert flash.kernel_for(gpu, dtype, size) is flash.IN_CHUNKS
    monkeypatch.setattr(flash, "_has_flash", lambda device: False)
    assert flash.kernel_for(gpu, half, 128) is flash.IN_CHUNKS


def test_core_attention_of_a_layer():
    """Megatron-Core's shapes; prompts leave keys and values in the cache, rows that continue them go there."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=KV_HEADS,
        attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    attention = GroupCoreAttention(config, 3, AttnMaskType.causal, "self")
    segments = segments_of([(6, [4, 3])])
    qkv = random_qkv(segments)
    packed = [x[:, None] for x in qkv]
    expected = textbook(*qkv, segments).flatten(1)[:, None]
    torch.testing.assert_close(attention(*packed, segments), expected, atol=1e-12, rtol=0)

    class Cache:
        def store_prompts(self, layer, key, value):
            self.stored = layer, key, value

    attention.cache = cache = Cache()
    torch.testing.assert_close(attention(*packed, segments), expected, atol=1e-12, rtol=0)
    assert cache.stored[0] == 3 and torch.equal(cache.stored[1], qkv[1]) and torch.equal(cache.stored[2], qkv[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, size, error", [(torch.bfloat16, 64, 0.01), (torch.float32, 64, 1e-5)])
def test_on_a_gpu(dtype, size, error):
    segments = segments_of([(300, [64, 1, 100]), (1, [3, 9]), (70, [30]), (129, [5] * 4)])
    qkv = random_qkv(segments, dtype=dtype, device="cuda", size=size)
    ours = value_and_gradients(lambda *qkv: group_attention(*qkv, segments, size**-0.5), qkv)
    theirs = value_and_gradients(lambda *qkv: textbook(*qkv, segments), precise(qkv))
    for got, expected in zip(ours, theirs, strict=True):
        assert (got - expected).norm() <= error * expected.norm()
