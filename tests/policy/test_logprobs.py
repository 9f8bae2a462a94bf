"""Vocabulary-parallel log-probabilities against torch.log_softmax; two ranks are in test_generate.py's launch."""

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


def test_bounded_by_the_chunk():
    """What is kept for the backward pass does not grow with tokens x vocabulary."""
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    ids = torch.zeros(512, dtype=torch.int64)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs, _ = completion_logprobs(hidden, weight, ids, temperature=1.0, vocab_size=1000, chunk_logits=16 * 1000)
    assert sum(kept.values()) < 16 * 1000
    logprobs.sum().backward()
    assert hidden.grad.isfinite().all()


def test_half_precision_inputs_give_float32():
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    logprobs, entropy = completion_logprobs(hidden, weight, torch.arange(5), temperature=1.0, vocab_size=11)
    assert logprobs.dtype == entropy.dtype == torch.float32
