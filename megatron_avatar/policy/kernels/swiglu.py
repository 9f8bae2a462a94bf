"""SwiGLU: silu(gate) · up of rows [..., 2F], gate in the first half; backward needs the rows alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.policy.kernels.device import operation, runs_triton, tl, triton

BLOCK = 1024


def swiglu(rows: Tensor) -> Tensor:
    """silu(gate) · up [..., F] of gate and up side by side [..., 2F], computed in float32. Differentiable."""
    return _SwiGLU.apply(rows)


def torch_swiglu(rows: Tensor) -> Tensor:
    """The formula."""
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_swiglu_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """The rows' gradient [..., 2F]."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    gate, up = rows.to(precise).chunk(2, dim=-1)
    grad, share = grad.to(precise), torch.sigmoid(gate)
    return torch.cat([grad * up * share * (1 + gate * (1 - share)), grad * gate * share], dim=-1).to(rows.dtype)


@triton.jit
def _forward_kernel(rows, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(rows + row * 2 * width + columns, inside, 0.0).to(tl.float32)
    up = tl.load(rows + row * 2 * width + width + columns, inside, 0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(grad, rows, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(grad + row * width + columns, inside, 0.0).to(tl.float32)
    gate = tl.load(rows + row * 2 * width + columns, inside, 0.0).to(tl.float32)
    up = tl.load(rows + row * 2 * width + width + columns, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    first, second = g * up * share * (1 + gate * (1 - share)), g * gate * share
    tl.store(out + row * 2 * width + columns, first.to(out.dtype.element_ty), inside)
    tl.store(out + row * 2 * width + width + columns, second.to(out.dtype.element_ty), inside)


def triton_swiglu(rows: Tensor) -> Tensor:
    """By the kernel."""
    rows, width = rows.contiguous(), rows.shape[-1] // 2
    out = rows.new_empty(*rows.shape[:-1], width)
    _forward_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](rows, out, width, BLOCK=BLOCK)
    return out


def triton_swiglu_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """By the kernel."""
    grad, rows, width = grad.contiguous(), rows.contiguous(), rows.shape[-1] // 2
    out = torch.empty_like(rows)
    _backward_kernel[(rows.numel() // (2 * width), triton.cdiv(width, BLOCK))](grad, rows, out, width, BLOCK=BLOCK)
    return out


@operation("swiglu")
def _swiglu(rows: Tensor) -> Tensor:
    return triton_swiglu(rows) if runs_triton(rows) else torch_swiglu(rows)


@_swiglu.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], rows.shape[-1] // 2)


@operation("swiglu_backward")
def _swiglu_backward(grad: Tensor, rows: Tensor) -> Tensor:
    return triton_swiglu_backward(grad, rows) if runs_triton(rows) else torch_swiglu_backward(grad, rows)


@_swiglu_backward.register_fake
def _(grad: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _swiglu(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _swiglu_backward(grad, *ctx.saved_tensors)
