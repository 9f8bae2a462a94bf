"""Passes over a chunk of logits: Triton's kernels against torch's formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy import logprobs
from megatron_avatar.policy.kernels import head
from megatron_avatar.policy.kernels.head import BLOCK
from tests.policy.kernels.where import DEVICE


@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(1, 5), widths=st.lists(st.sampled_from([1, 70, BLOCK, BLOCK + 9]), min_size=1, max_size=3),
       temperature=st.sampled_from([0.7, 1.0]), spread=st.sampled_from([0.1, 30.0]))  # fmt: skip
def test_running_softmax_and_gradient_are_torchs(tokens, widths, temperature, spread):
    generator = torch.Generator().manual_seed(tokens * sum(widths))
    chunks = [spread * torch.randn(tokens, width, generator=generator).to(DEVICE) for width in widths]
    targets = torch.randint(sum(widths), (tokens,), generator=generator).to(DEVICE)
    states, start = [head.new_state(tokens, DEVICE) for _ in "ab"], 0
    for chunk in chunks:
        head.torch_add_chunk(states[0], chunk.clone(), targets, start, temperature)
        head.triton_add_chunk(states[1], chunk, targets, start, temperature)
        torch.testing.assert_close(states[1], states[0], rtol=2e-6, atol=2e-5)
        start += chunk.shape[1]
    normaliser, grad, start = states[0][0] + states[0][1].log(), torch.randn(tokens, generator=generator).to(DEVICE), 0
    for chunk in chunks:
        for dtype, close in ((torch.float32, 3e-6), (torch.float16, 2e-3)):
            arguments = targets, normaliser, grad, start, temperature, dtype
            theirs = head.torch_scores_gradient(chunk.clone(), *arguments)
            ours = head.triton_scores_gradient(chunk, *arguments)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=close, atol=close * spread)
        start += chunk.shape[1]


@pytest.mark.parametrize("chunk_logits", [40, 1000])
def test_the_head_by_the_kernels_is_the_head_by_torch(monkeypatch, chunk_logits):
    """Log-probabilities, entropy and gradients over all chunks, padding left out."""
    generator, found = torch.Generator().manual_seed(0), []
    inputs = [torch.randn(n, 8, generator=generator).to(DEVICE) for n in (6, 53)]
    ids = torch.randint(50, (6,), generator=generator).to(DEVICE)
    for kernels in (False, True):
        monkeypatch.setattr(logprobs, "add_chunk", head.triton_add_chunk if kernels else head.torch_add_chunk)
        monkeypatch.setattr(logprobs, "scores_gradient",
                            head.triton_scores_gradient if kernels else head.torch_scores_gradient)  # fmt: skip
        own = [x.clone().requires_grad_() for x in inputs]
        scores, entropy = logprobs.completion_logprobs(
            *own, ids, temperature=0.8, vocab_size=50, chunk_logits=chunk_logits
        )
        scores.sum().backward()
        found.append([scores, entropy, *(x.grad for x in own)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
