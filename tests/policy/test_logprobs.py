"""Vocabulary-parallel log-probabilities against torch.log_softmax; two ranks are in test_generate.py's launch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.logprobs import completion_logprobs


def reference(hidden, weight, ids, temperature, vocab_size):
    scores = torch.log_softmax(hidden @ weight[:vocab_size].T / temperature, dim=-1)
    return scores.gather(1, ids[:, None])[:, 0], -(scores.exp() * scores).sum(-1)


@given(
    tokens=st.integers(1, 40),
    vocab_size=st.integers(2, 60),
    padding=st.integers(0, 9),
    temperature=st.floats(0.3, 3.0),
    chunk_logits=st.integers(1, 4000),
    scale=st.sampled_from([1.0, 30.0]),
)
@settings(max_examples=50, deadline=None)
def test_value_and_gradient_equal_log_softmax(tokens, vocab_size, padding, temperature, chunk_logits, scale):
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (tokens, vocab_size + padding)]
    inputs[0] *= scale
    ids = torch.randint(vocab_size, (tokens,), generator=generator)
    probe = torch.randn(tokens, generator=generator)
    ours = [x.float().requires_grad_() for x in inputs]
    theirs = [x.float().double().requires_grad_() for x in inputs]
    logprobs, entropy = completion_logprobs(
        *ours, ids, temperature=temperature, vocab_size=vocab_size, chunk_logits=chunk_logits
    )
    expected, expected_entropy = reference(*theirs, ids, temperature, vocab_size)
    assert logprobs.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    close = dict(atol=1e-5 * scale, rtol=1e-5)
    torch.testing.assert_close(logprobs.double(), expected, **close)
    torch.testing.assert_close(entropy.double(), expected_entropy, **close)
    (logprobs * probe).sum().backward()
    (expected * probe).sum().backward()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=3e-5 * scale, rtol=1e-4)


def test_padding_takes_no_part():
    """Negative control: counting the padded columns would change the result."""
    hidden, weight, ids = torch.ones(3, 4), torch.ones(10, 4), torch.zeros(3, dtype=torch.int64)
    exact, _ = completion_logprobs(hidden, weight, ids, temperature=1.0, vocab_size=5)
    torch.testing.assert_close(exact, torch.full((3,), 1 / 5).log())


def peak_bytes(work) -> int:
    """Most memory that torch held at once while `work` ran, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_two_chunks_whatever_the_number_of_tokens(dtype, frozen):
    """At Qwen's vocabulary, forward and backward; the naive form takes hundreds of chunks."""
    vocabulary, width, chunk = 152_064, 64, 1 << 19
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=not frozen)
    extra = {}
    for tokens in (64, 256):
        hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
        ids = torch.randint(vocabulary, (tokens,))

        def step(hidden=hidden, ids=ids):
            scores, _ = completion_logprobs(
                hidden, weight, ids, temperature=0.9, vocab_size=151_936, chunk_logits=chunk
            )
            torch.autograd.grad(scores.sum(), [x for x in (hidden, weight) if x.requires_grad])

        # Gradients, and one matrix product.
        results = 4 * tokens * width * 3 + (0 if frozen else weight.numel() * weight.itemsize)
        extra[tokens] = peak_bytes(step) - results
        # A half for what products of bfloat16 lay out anew, on processors that have them.
        assert extra[tokens] < 2.7 * 4 * chunk, f"{extra[tokens] / (4 * chunk):.2f} chunks"
    assert extra[256] < 1.2 * extra[64]


def test_half_precision_inputs_give_float32():
    """The scores of bfloat16 weights are those of the same numbers in float32, but for one rounding of the logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16().requires_grad_() for n in (50, 301))
    ids = torch.randint(300, (50,), generator=generator)
    logprobs, entropy = completion_logprobs(hidden, weight, ids, temperature=1.0, vocab_size=300, chunk_logits=2000)
    assert logprobs.dtype == entropy.dtype == torch.float32
    theirs = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected, _ = reference(*theirs, ids, 1.0, 300)
    torch.testing.assert_close(logprobs, expected, atol=0.1, rtol=0.01)
    logprobs.sum().backward()
    expected.sum().backward()
    for ours, full in zip((hidden, weight), theirs, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert float((ours.grad - full.grad).norm() / full.grad.norm()) < 0.01


def test_a_frozen_head_gets_no_gradient_and_entropy_gives_none():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    logprobs, entropy = completion_logprobs(hidden, weight, torch.arange(5), temperature=1.0, vocab_size=11)
    logprobs.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad is None and not entropy.requires_grad
