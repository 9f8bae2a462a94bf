"""Two parts of an attention merged: Triton's kernel against torch's formula."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.kernels.merge import torch_merge_parts, triton_merge_parts
from tests.policy.kernels.where import DEVICE

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@settings(deadline=None, max_examples=10)
@given(rows=st.integers(1, 6), spare=st.integers(0, 3), heads=st.integers(1, 8), size=st.sampled_from([64, 80, 128]),
       dtype=st.sampled_from(list(TOLERANCE)), listed=st.booleans(), spread=st.sampled_from([1.0, 60.0]))  # fmt: skip
def test_merged_parts_are_torchs(rows, spare, heads, size, dtype, listed, spread):
    """Rows that lie together or anywhere, log-sum-exps as FlashAttention leaves them (heads first) and far apart."""
    generator = torch.Generator().manual_seed(rows * size + heads)
    output = torch.randn(rows + spare, heads, size, generator=generator).to(DEVICE, dtype)
    part = torch.randn(rows, heads, size, generator=generator).to(DEVICE, dtype)
    lse, part_lse = (spread * torch.randn(heads, n, generator=generator).to(DEVICE).t() for n in (rows + spare, rows))
    places = torch.randperm(rows + spare, generator=generator)[:rows].to(DEVICE)
    start, queries = (0, places) if listed else (spare, slice(spare, spare + rows))
    ours, theirs = (output.clone(), lse.clone()), (output.clone(), lse.clone())
    ours[1][queries] = triton_merge_parts(ours[0], ours[1], part, part_lse, places if listed else None, start)
    torch_merge_parts(*theirs, part, part_lse, queries)
    torch.testing.assert_close(ours[0], theirs[0], atol=TOLERANCE[dtype] * 4, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-6)
