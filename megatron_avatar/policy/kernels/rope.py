"""Rotary positions on queries and keys as the fused projection leaves them, and a decode step's new keys and values.

The projection's rows [S, groups, share + 2, d] hold, for each key-value head, the `share` query heads that read it,
its key and its value. `angles` [2, S, d] are cosines and sines in float32, made once a step for all layers. Rotation
is by halves: (a, b) -> (a cos - b sin, b cos + a sin). Families with head norms take the RMSNorm of every query and key
before, in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_avatar.policy.kernels.device import next_power, operation, runs_triton, tl, triton
from megatron_avatar.policy.kernels.norm import torch_norm, torch_norm_backward

WARPS = 1
TOKENS_A_PROGRAM = 16  # of the norms' backward pass, whose sums over tokens for the weights are written once a program


class HeadNorms(NamedTuple):
    """RMSNorm of every query and every key: weights [d] and what is added to the mean square."""

    query: Tensor
    key: Tensor
    eps: float


def split_rope(mixed: Tensor, angles: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [S, groups * share, d], rotated keys and values [S, groups, d] of [S, groups, share + 2, d], each
    in one piece. Differentiable in `mixed` and the norms' weights."""
    if norms is None:
        return _SplitRope.apply(mixed, angles)
    return _SplitNormRope.apply(mixed, angles, *norms)


def decode_rope(
    mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, norms: HeadNorms | None = None
) -> Tensor:
    """Rotated queries [R, groups, share, d] of a decode step; row r's rotated key and its value are stored in
    keys[r, :, lengths[r]] and values[r, :, lengths[r]] (both [rows, groups, room, d], R <= rows)."""
    return _decode_rope(mixed, angles, keys, values, lengths, *(norms or NO_NORMS))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [S, ..., d] rotated, in its dtype; float32 inside."""
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
    cos, sin = angles[0].view(shape), angles[1].view(shape)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


NO_NORMS = (None, None, 0.0)

# ----------------------------------------------------------------------------------------------------------------
# torch


def _normed(mixed: Tensor, norms: HeadNorms | None) -> tuple[Tensor, Tensor]:
    """Queries [S, groups, share, d] and keys [S, groups, d], normed where there are norms."""
    query, key = mixed[:, :, :-2], mixed[:, :, -2]
    if norms is None:
        return query, key
    return torch_norm(query, norms.query, norms.eps), torch_norm(key, norms.key, norms.eps)


def torch_split_rope(mixed: Tensor, angles: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The formula."""
    query, key = _normed(mixed, norms)
    value = mixed[:, :, -1].clone(memory_format=torch.contiguous_format)
    return rotate(query, angles).flatten(1, 2), rotate(key, angles), value


def torch_split_norm_rope_backward(
    query: Tensor, key: Tensor, value: Tensor, angles: Tensor, mixed: Tensor, norms: HeadNorms
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `mixed` and of the norms' weights (float32) from those of queries, keys and values."""
    grad = torch_split_rope_backward(query, key, value, angles)
    queries, query_weight = torch_norm_backward(grad[:, :, :-2], mixed[:, :, :-2], norms.query, norms.eps)
    keys, key_weight = torch_norm_backward(grad[:, :, -2], mixed[:, :, -2], norms.key, norms.eps)
    return torch.cat([queries, keys[:, :, None], grad[:, :, -1:]], dim=2), query_weight, key_weight


def torch_split_rope_backward(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    """The gradient of `mixed`, without norms, from those of queries, keys and values: rotated back."""
    back = torch.stack([angles[0], -angles[1]])
    query = query.unflatten(1, (key.shape[1], -1))
    return torch.cat([rotate(query, back), rotate(key, back)[:, :, None], value[:, :, None]], dim=2)


def torch_decode_rope(
    mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, norms: HeadNorms | None = None
) -> Tensor:
    """The formula."""
    query, key = _normed(mixed, norms)
    rows = torch.arange(len(mixed), device=mixed.device)
    keys[rows, :, lengths] = rotate(key, angles)
    values[rows, :, lengths] = mixed[:, :, -1]
    return rotate(query, angles)


# ----------------------------------------------------------------------------------------------------------------
# Triton


@triton.jit
def _halves(source, half, inside, columns):
    """Both halves of a head at `source`, in float32."""
    first = tl.load(source + columns, inside, 0.0).to(tl.float32)
    return first, tl.load(source + half + columns, inside, 0.0).to(tl.float32)


@triton.jit
def _turn(first, second, cos, sin, half, inside, columns, sign):
    """Both halves of a head rotated by +-angle."""
    low_cos, low_sin = tl.load(cos + columns, inside, 0.0), tl.load(sin + columns, inside, 0.0)
    high_cos, high_sin = tl.load(cos + half + columns, inside, 0.0), tl.load(sin + half + columns, inside, 0.0)
    return first * low_cos - sign * second * low_sin, second * high_cos + sign * first * high_sin


@triton.jit
def _norm(first, second, weight, half, inside, columns, eps, dtype: tl.constexpr):
    """The RMSNorm of a head, rounded as it would be stored."""
    scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * half) + eps)
    low, high = _halves(weight, half, inside, columns)
    return (first * scale * low).to(dtype).to(tl.float32), (second * scale * high).to(dtype).to(tl.float32)


@triton.jit
def _split_kernel(
    mixed, angles, query, key, value, query_weight, key_weight, eps, tokens, groups, share, half,
    BACK: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one token: from `mixed` to query, key or value; BACK: the other way, rotated back, without NORMS."""
    token, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, place = slot // (share + 2), slot % (share + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    size = 2 * half
    here = mixed + (token * groups * (share + 2) + slot) * size
    if place < share:
        there = query + ((token * groups + group) * share + place) * size
        weight = query_weight
    elif place == share:
        there = key + (token * groups + group) * size
        weight = key_weight
    else:
        there = value + (token * groups + group) * size
        weight = key_weight
    source, target = here, there
    sign = 1.0
    if BACK:
        source, target = there, here
        sign = -1.0
    first, second = _halves(source, half, inside, columns)
    if place <= share:
        if NORMS:
            first, second = _norm(first, second, weight, half, inside, columns, eps, mixed.dtype.element_ty)
        cos, sin = angles + token * size, angles + (tokens + token) * size
        first, second = _turn(first, second, cos, sin, half, inside, columns, sign)
    tl.store(target + columns, first.to(target.dtype.element_ty), inside)
    tl.store(target + half + columns, second.to(target.dtype.element_ty), inside)


@triton.jit
def _split_back_kernel(
    mixed, angles, query, key, value, query_weight, key_weight, grad, sums, eps, tokens, groups, share, half,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of TOKENS tokens: gradients of query, key or value rotated back and led through the norm into `grad`,
    this program's part of the weight's gradient into sums[program, slot]."""
    program, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, place = slot // (share + 2), slot % (share + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    size, slots = 2 * half, groups * (share + 2)
    low_sum, high_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if place < share:
        base, step, weight = query + (group * share + place) * size, groups * share * size, query_weight
    elif place == share:
        base, step, weight = key + group * size, groups * size, key_weight
    else:
        base, step, weight = value + group * size, groups * size, key_weight
    low, high = _halves(weight, half, inside, columns)
    for turn in range(TOKENS):
        token = program * TOKENS + turn
        there = inside & (token < tokens)
        first, second = _halves(base + token * step, half, there, columns)
        here = (token * slots + slot) * size
        if place <= share:
            cos, sin = angles + token * size, angles + (tokens + token) * size
            first, second = _turn(first, second, cos, sin, half, there, columns, -1.0)
            low_x, high_x = _halves(mixed + here, half, there, columns)
            scale = tl.rsqrt((tl.sum(low_x * low_x, 0) + tl.sum(high_x * high_x, 0)) / size + eps)
            low_x, high_x = low_x * scale, high_x * scale
            low_sum += first * low_x
            high_sum += second * high_x
            first, second = first * low, second * high
            mean = (tl.sum(first * low_x, 0) + tl.sum(second * high_x, 0)) / size
            first, second = (first - low_x * mean) * scale, (second - high_x * mean) * scale
        tl.store(grad + here + columns, first.to(grad.dtype.element_ty), there)
        tl.store(grad + here + half + columns, second.to(grad.dtype.element_ty), there)
    tl.store(sums + (program * slots + slot) * size + columns, low_sum, inside)
    tl.store(sums + (program * slots + slot) * size + half + columns, high_sum, inside)


@triton.jit
def _decode_kernel(
    mixed, angles, query, keys, values, lengths, query_weight, key_weight, eps, rows, groups, share, half, room,
    NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row: the query rotated, key and value into the cache at the row's length."""
    row, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, place = slot // (share + 2), slot % (share + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    size = 2 * half
    source = mixed + (row * groups * (share + 2) + slot) * size
    cell = ((row * groups + group) * room + tl.load(lengths + row)) * size
    if place < share:
        target = query + ((row * groups + group) * share + place) * size
        weight = query_weight
    elif place == share:
        target = keys + cell
        weight = key_weight
    else:
        target = values + cell
        weight = key_weight
    first, second = _halves(source, half, inside, columns)
    if place <= share:
        if NORMS:
            first, second = _norm(first, second, weight, half, inside, columns, eps, mixed.dtype.element_ty)
        cos, sin = angles + row * size, angles + (rows + row) * size
        first, second = _turn(first, second, cos, sin, half, inside, columns, 1.0)
    tl.store(target + columns, first.to(target.dtype.element_ty), inside)
    tl.store(target + half + columns, second.to(target.dtype.element_ty), inside)


def _weights(mixed: Tensor, norms: HeadNorms | None) -> tuple[Tensor, Tensor, float]:
    """The kernels' arguments; without norms tensors that nothing reads."""
    return norms or HeadNorms(mixed, mixed, 0.0)


def triton_split_rope(mixed: Tensor, angles: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel."""
    mixed = mixed.contiguous()
    tokens, groups, slots, size = mixed.shape
    query, key, value = (mixed.new_empty(tokens, heads, size) for heads in (groups * (slots - 2), groups, groups))
    _split_kernel[(tokens, groups * slots)](
        mixed, angles, query, key, value, *_weights(mixed, norms), tokens, groups, slots - 2, size // 2, BACK=False,
        NORMS=norms is not None, BLOCK=next_power(size // 2), num_warps=WARPS,
    )  # fmt: skip
    return query, key, value


def triton_split_rope_backward(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    """By the kernel."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    tokens, groups, size = key.shape
    share = query.shape[1] // groups
    mixed = query.new_empty(tokens, groups, share + 2, size)
    _split_kernel[(tokens, groups * (share + 2))](
        mixed, angles, query, key, value, *_weights(mixed, None), tokens, groups, share, size // 2, BACK=True,
        NORMS=False, BLOCK=next_power(size // 2), num_warps=WARPS,
    )  # fmt: skip
    return mixed


def triton_split_norm_rope_backward(
    query: Tensor, key: Tensor, value: Tensor, angles: Tensor, mixed: Tensor, norms: HeadNorms
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel."""
    query, key, value, mixed = query.contiguous(), key.contiguous(), value.contiguous(), mixed.contiguous()
    tokens, groups, slots, size = mixed.shape
    programs = triton.cdiv(tokens, TOKENS_A_PROGRAM)
    grad = torch.empty_like(mixed)
    sums = torch.empty(programs, groups, slots, size, dtype=torch.float32, device=mixed.device)
    _split_back_kernel[(programs, groups * slots)](
        mixed, angles, query, key, value, norms.query, norms.key, grad, sums, norms.eps, tokens, groups, slots - 2,
        size // 2, TOKENS=TOKENS_A_PROGRAM, BLOCK=next_power(size // 2), num_warps=WARPS,
    )  # fmt: skip
    sums = sums.sum((0, 1))
    return grad, sums[:-2].sum(0), sums[-2]


def triton_decode_rope(
    mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, norms: HeadNorms | None = None
) -> Tensor:
    """By the kernel."""
    mixed = mixed.contiguous()
    rows, groups, slots, size = mixed.shape
    query = mixed.new_empty(rows, groups, slots - 2, size)
    _decode_kernel[(rows, groups * slots)](
        mixed, angles, query, keys, values, lengths, *_weights(mixed, norms), rows, groups, slots - 2, size // 2,
        keys.shape[2], NORMS=norms is not None, BLOCK=next_power(size // 2), num_warps=WARPS,
    )  # fmt: skip
    return query


# ----------------------------------------------------------------------------------------------------------------
# One operation each


def _norms(query: Tensor | None, key: Tensor | None, eps: float) -> HeadNorms | None:
    return None if query is None or key is None else HeadNorms(query, key, eps)


@operation("split_rope")
def _split_rope(
    mixed: Tensor, angles: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = triton_split_rope if runs_triton(mixed) else torch_split_rope
    return run(mixed, angles, _norms(query_weight, key_weight, eps))


@_split_rope.register_fake
def _(
    mixed: Tensor, angles: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, slots, size = mixed.shape
    key = mixed.new_empty(tokens, groups, size)
    return mixed.new_empty(tokens, groups * (slots - 2), size), key, torch.empty_like(key)


@operation("split_rope_backward")
def _split_rope_backward(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    run = triton_split_rope_backward if runs_triton(query) else torch_split_rope_backward
    return run(query, key, value, angles)


@_split_rope_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    tokens, groups, size = key.shape
    return query.new_empty(tokens, groups, query.shape[1] // groups + 2, size)


@operation("split_norm_rope_backward")
def _split_norm_rope_backward(
    query: Tensor, key: Tensor, value: Tensor, angles: Tensor, mixed: Tensor, query_weight: Tensor, key_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = triton_split_norm_rope_backward if runs_triton(query) else torch_split_norm_rope_backward
    return run(query, key, value, angles, mixed, HeadNorms(query_weight, key_weight, eps))


@_split_norm_rope_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, angles: Tensor, mixed: Tensor, query_weight: Tensor, key_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    precise = torch.promote_types(mixed.dtype, torch.float32)
    weight = torch.empty(query_weight.shape, dtype=precise, device=mixed.device)
    return torch.empty_like(mixed, memory_format=torch.contiguous_format), weight, torch.empty_like(weight)


@operation("decode_rope", mutates=("keys", "values"))
def _decode_rope(
    mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, query_weight: Tensor | None,
    key_weight: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    run = triton_decode_rope if runs_triton(mixed) else torch_decode_rope
    return run(mixed, angles, keys, values, lengths, _norms(query_weight, key_weight, eps))


@_decode_rope.register_fake
def _(
    mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, query_weight: Tensor | None,
    key_weight: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    rows, groups, slots, size = mixed.shape
    return mixed.new_empty(rows, groups, slots - 2, size)


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(angles)
        return _split_rope(mixed, angles, *NO_NORMS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        return _split_rope_backward(query, key, value, *ctx.saved_tensors), None


class _SplitNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, angles: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(angles, mixed, query_weight, key_weight)
        ctx.eps = eps
        return _split_rope(mixed, angles, query_weight, key_weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        angles, mixed, query_weight, key_weight = ctx.saved_tensors
        mixed, first, second = _split_norm_rope_backward(
            query, key, value, angles, mixed, query_weight, key_weight, ctx.eps
        )
        return mixed, None, first.to(query_weight.dtype), second.to(key_weight.dtype), None
