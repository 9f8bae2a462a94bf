"""Norm, rope and SwiGLU: Triton's kernels against torch's formulas, and these against autograd."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.kernels import norm, rope, swiglu
from tests.policy.kernels.where import DEVICE, interpreted

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3}
dtypes = st.sampled_from(list(TOLERANCE))
few = settings(deadline=None, max_examples=8)


def close(ours, theirs, dtype):
    ours, theirs = ([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype] * max(1.0, float(b.abs().max())), rtol=0)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@few
@given(rows=st.integers(1, 70), width=st.sampled_from([1, 24, 64, 80, 129]), dtype=dtypes, wide=st.booleans())
def test_norms_equal_torch(rows, width, dtype, wide):
    stream = torch.float32 if wide else dtype
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=stream, seed=1)
    weight = random(width, dtype=dtype)
    close(norm.triton_add_norm(x, residual, weight, 1e-6), norm.torch_add_norm(x, residual, weight, 1e-6), dtype)
    close(norm.triton_add_norm(residual, None, weight, 1e-6)[1], norm.torch_norm(residual, weight, 1e-6), dtype)
    grad, past = random(rows, width, dtype=dtype, seed=2), random(rows, width, dtype=stream, seed=3)
    ours = norm.triton_norm_backward(grad, past, residual, weight, 1e-6)
    theirs = norm.torch_norm_backward(grad, residual, weight, 1e-6)
    close(ours, (theirs[0] + past, theirs[1]), dtype)
    close(norm.triton_norm_backward(grad, None, residual, weight, 1e-6)[0], theirs[0], dtype)


@few
@given(rows=st.integers(1, 9), width=st.sampled_from([1, 24, 1025]), dtype=dtypes)
def test_swiglu_equals_torch(rows, width, dtype):
    x, grad = random(rows, 1, 2 * width, dtype=dtype), random(rows, 1, width, dtype=dtype, seed=1)
    close(swiglu.triton_swiglu(x), swiglu.torch_swiglu(x), dtype)
    close(swiglu.triton_swiglu_backward(grad, x), swiglu.torch_swiglu_backward(grad, x), dtype)


def head_norms(size, dtype, wanted):
    return rope.HeadNorms(*(1 + random(size, seed=k).to(dtype) for k in (8, 9)), 1e-6) if wanted else None


heads = {"groups": st.sampled_from([1, 2, 4, 8]), "share": st.integers(1, 8), "size": st.sampled_from([8, 64, 80, 128])}


@few
@given(tokens=st.integers(1, 5), dtype=dtypes, normed=st.booleans(), **heads)
def test_split_rope_equals_torch_and_turns_back(tokens, dtype, normed, groups, share, size):
    mixed, turn = random(tokens, groups, share + 2, size, dtype=dtype), random(tokens, size, seed=1)
    angles = torch.stack([turn.cos(), turn.sin()])
    norms = head_norms(size, dtype, normed)
    ours = rope.triton_split_rope(mixed, angles, norms)
    close(ours, rope.torch_split_rope(mixed, angles, norms), dtype)
    grads = [random(*x.shape, dtype=dtype, seed=k) for k, x in enumerate(ours)]
    if norms is not None:
        with mock.patch.object(rope, "TOKENS_A_PROGRAM", 2):
            ours = rope.triton_split_norm_rope_backward(*grads, angles, mixed, norms)
        close(ours, rope.torch_split_norm_rope_backward(*grads, angles, mixed, norms), dtype)
        return
    close(rope.triton_split_rope_backward(*grads, angles), rope.torch_split_rope_backward(*grads, angles), dtype)


@few
@given(rows=st.integers(1, 5), spare=st.integers(0, 2), dtype=dtypes, normed=st.booleans(), **heads)
def test_a_decode_steps_rope_writes_the_cache(rows, spare, dtype, normed, groups, share, size):
    mixed, turn = random(rows, groups, share + 2, size, dtype=dtype), random(rows, size, seed=1)
    angles = torch.stack([turn.cos(), turn.sin()])
    lengths = torch.arange(rows, device=DEVICE) * 3 % 7
    stores = [[random(rows + spare, groups, 7, size, dtype=dtype, seed=k) for k in (3, 4)] for _ in "to"]
    norms = head_norms(size, dtype, normed)
    close(rope.triton_decode_rope(mixed, angles, *stores[0], lengths, norms),
          rope.torch_decode_rope(mixed, angles, *stores[1], lengths, norms), dtype)  # fmt: skip
    close(stores[0], stores[1], dtype)


@interpreted
@pytest.mark.parametrize("function", ["norm", "add_norm", "swiglu", "split_rope", "split_norm_rope"])
def test_gradients_are_autograds(function):
    """In float64, through the operations that everyone calls, by torch's formulas."""
    x = random(5, 2, 6, 8).double().requires_grad_()
    turn = random(5, 4).double().repeat(1, 2)  # the halves turn alike
    angles = torch.stack([turn.cos(), turn.sin()])
    weight, residual = random(8).double().requires_grad_(), random(5, 2, 6, 8, seed=5).double().requires_grad_()
    run = {
        "norm": lambda: torch.autograd.gradcheck(lambda a, w: norm.norm(a, w, 1e-6), (x, weight)),
        "add_norm": lambda: torch.autograd.gradcheck(
            lambda a, r, w: norm.add_norm(a, r, w, 1e-6), (x, residual, weight)),
        "swiglu": lambda: torch.autograd.gradcheck(swiglu.swiglu, (x,)),
        "split_rope": lambda: torch.autograd.gradcheck(lambda a: rope.split_rope(a, angles), (x,)),
        "split_norm_rope": lambda: torch.autograd.gradcheck(
            lambda a, q, k: rope.split_rope(a, angles, rope.HeadNorms(q, k, 1e-6)),
            (x, weight, weight.detach().flip(0).requires_grad_())),
    }
    assert run[function]()


def test_rotation_is_megatrons():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    x, turn = random(7, 1, 3, 16), random(7, 1, 1, 16, seed=1)
    turn[..., 8:] = turn[..., :8]
    angles = torch.stack([turn.cos(), turn.sin()])[:, :, 0, 0]
    assert torch.equal(rope.rotate(x, angles), _apply_rotary_pos_emb_bshd(x, turn))
