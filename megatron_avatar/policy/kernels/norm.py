"""RMSNorm, and the addition to the residual stream before it, in one pass over the row.

Shapes: x [..., H] what a branch adds, in the model's dtype; residual [..., H] the stream, in the model's dtype or in
float32; weight [H]. What comes back in the stream's dtype is the stream, what comes back in x's dtype is normed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.policy.kernels.device import next_power, operation, runs_triton, tl, triton

WARPS = 8
ROWS_A_PROGRAM = 64  # of the backward pass, whose sums over rows for the weight are written once a program


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, its RMSNorm times the weight in x's dtype); without a residual, x itself is the stream.

    The norm is computed in float32 from the stream as it is stored. Differentiable in all tensors.
    """
    if residual is None:
        return x, _Norm.apply(x, weight, eps)
    return _AddNorm.apply(x, residual, weight, eps)


def norm(stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm [..., H] of the stream in the weight's dtype."""
    return _Norm.apply(stream, weight, eps)


# ----------------------------------------------------------------------------------------------------------------
# torch


def torch_norm(stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula: stream / sqrt(mean(stream²) + eps) · weight, in the weight's dtype."""
    if stream.dtype == weight.dtype:
        return F.rms_norm(stream, weight.shape, weight, eps)
    return F.rms_norm(stream, weight.shape, weight.to(stream.dtype), eps).to(weight.dtype)


def torch_add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(stream, normed); see `add_norm`."""
    stream = x if residual is None else residual + x
    return stream, torch_norm(stream, weight, eps)


def torch_norm_backward(grad: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the stream (in its dtype) and of the weight (in float32) for the normed output's."""
    precise = torch.promote_types(stream.dtype, torch.float32)
    x, g, w = stream.to(precise), grad.to(precise), weight.to(precise)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, own = x * scale, g * w
    grad_stream = (own - normed * (own * normed).mean(-1, keepdim=True)) * scale
    return grad_stream.to(stream.dtype), (g * normed).flatten(0, -2).sum(0)


# ----------------------------------------------------------------------------------------------------------------
# Triton


@triton.jit
def _forward_kernel(
    x, residual, weight, stream, normed, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row: stream = residual + x where ADDS, normed = RMSNorm(stream)."""
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row + columns, inside, 0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row + columns, inside, 0.0).to(tl.float32)
        rounded = values.to(stream.dtype.element_ty)
        tl.store(stream + row + columns, rounded, inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    values = values * scale * tl.load(weight + columns, inside, 0.0).to(tl.float32)
    tl.store(normed + row + columns, values.to(normed.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    grad, extra, stream, weight, grad_stream, grad_weight, rows, width, eps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the stream's gradient, `extra` (what flows past the norm) added where ADDS, and this program's part
    of the weight's."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own_weight = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for place in range(ROWS):
        row = program * ROWS + place
        there = inside & (row < rows)
        x = tl.load(stream + row * width + columns, there, 0.0).to(tl.float32)
        g = tl.load(grad + row * width + columns, there, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        own, normed = g * own_weight, x * scale
        result = (own - normed * (tl.sum(own * normed, 0) / width)) * scale
        if ADDS:
            result += tl.load(extra + row * width + columns, there, 0.0).to(tl.float32)
        tl.store(grad_stream + row * width + columns, result.to(grad_stream.dtype.element_ty), there)
        sums += g * normed
    tl.store(grad_weight + program * width + columns, sums, inside)


def triton_add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(stream, normed) by the kernel; see `add_norm`."""
    width = weight.shape[0]
    x = x.contiguous()
    stream = x if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    normed = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    residual = x if residual is None else residual.contiguous()
    _forward_kernel[(x.numel() // width,)](
        x, residual, weight, stream, normed, width, eps, ADDS=stream is not x, BLOCK=next_power(width), num_warps=WARPS
    )
    return stream, normed


def triton_norm_backward(
    grad: Tensor, extra: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the stream, `extra` added, and of the weight, by the kernel."""
    width, rows = weight.shape[0], stream.numel() // weight.shape[0]
    programs = -(-rows // ROWS_A_PROGRAM)
    grad, stream = grad.contiguous(), stream.contiguous()
    grad_stream = torch.empty_like(stream)
    grad_weight = torch.empty(programs, width, dtype=torch.float32, device=stream.device)
    _backward_kernel[(programs,)](
        grad, grad if extra is None else extra.contiguous(), stream, weight, grad_stream, grad_weight, rows, width, eps,
        ADDS=extra is not None, ROWS=ROWS_A_PROGRAM, BLOCK=next_power(width), num_warps=WARPS,
    )  # fmt: skip
    return grad_stream, grad_weight.sum(0)


# ----------------------------------------------------------------------------------------------------------------
# One operation each


@operation("norm")
def _norm(stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    return triton_add_norm(stream, None, weight, eps)[1] if runs_triton(stream) else torch_norm(stream, weight, eps)


@_norm.register_fake
def _(stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(stream.shape, dtype=weight.dtype, device=stream.device)


@operation("add_norm")
def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (triton_add_norm if runs_triton(x) else torch_add_norm)(x, residual, weight, eps)


@_add_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty(x.shape, dtype=weight.dtype, device=x.device)


@operation("norm_backward")
def _norm_backward(
    grad: Tensor, extra: Tensor | None, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if runs_triton(stream):
        return triton_norm_backward(grad, extra, stream, weight, eps)
    grad_stream, grad_weight = torch_norm_backward(grad, stream, weight, eps)
    return grad_stream if extra is None else grad_stream + extra, grad_weight


@_norm_backward.register_fake
def _(grad: Tensor, extra: Tensor | None, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(stream.dtype, torch.float32)
    return torch.empty_like(stream), torch.empty(weight.shape, dtype=precise, device=weight.device)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(stream, weight)
        ctx.eps = eps
        return _norm(stream, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, weight = ctx.saved_tensors
        grad_stream, grad_weight = _norm_backward(grad, None, stream, weight, ctx.eps)
        return grad_stream, grad_weight.to(weight.dtype), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        stream, normed = _add_norm(x, residual, weight, eps)
        ctx.save_for_backward(stream, weight)
        ctx.eps, ctx.dtype = eps, x.dtype
        return stream, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_past: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, weight = ctx.saved_tensors
        grad_stream, grad_weight = _norm_backward(grad, grad_past, stream, weight, ctx.eps)
        return grad_stream.to(ctx.dtype), grad_stream, grad_weight.to(weight.dtype), None
