"""Rotary positions on queries and keys as the fused projection leaves them, and a decode step's new keys and values.

The projection's rows [S, groups, share + 2, d] hold, for each key-value head, the `share` query heads that read it,
its key and its value. `angles` [2, S, d] are cosines and sines in float32, made once a step for all layers. Rotation
is by halves: (a, b) -> (a cos - b sin, b cos + a sin).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_avatar.policy.kernels.device import next_power, runs_triton, tl, triton


def split_rope(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [S, groups * share, d], rotated keys and values [S, groups, d] of [S, groups, share + 2, d], each
    in one piece. Differentiable in `mixed`."""
    return _SplitRope.apply(mixed, angles)


def decode_rope(mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Rotated queries [R, groups, share, d] of a decode step; row r's rotated key and its value are stored in
    keys[r, :, lengths[r]] and values[r, :, lengths[r]] (both [rows, groups, room, d], R <= rows)."""
    return _decode_rope(mixed, angles, keys, values, lengths)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [S, ..., d] rotated, in its dtype; float32 inside."""
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
    cos, sin = angles[0].view(shape), angles[1].view(shape)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------
# torch


def torch_split_rope(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula."""
    query = rotate(mixed[:, :, :-2], angles).flatten(1, 2)
    return query, rotate(mixed[:, :, -2], angles), mixed[:, :, -1].clone(memory_format=torch.contiguous_format)


def torch_split_rope_backward(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    """The gradient of `mixed` from those of queries, keys and values: rotated back."""
    back = torch.stack([angles[0], -angles[1]])
    query = query.unflatten(1, (key.shape[1], -1))
    return torch.cat([rotate(query, back), rotate(key, back)[:, :, None], value[:, :, None]], dim=2)


def torch_decode_rope(mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The formula."""
    rows = torch.arange(len(mixed), device=mixed.device)
    keys[rows, :, lengths] = rotate(mixed[:, :, -2], angles)
    values[rows, :, lengths] = mixed[:, :, -1]
    return rotate(mixed[:, :, :-2], angles)


# ----------------------------------------------------------------------------------------------------------------
# Triton


@triton.jit
def _turn(source, cos, sin, half, inside, columns, sign):
    """Both halves of a head at `source`, rotated by +-angle."""
    first = tl.load(source + columns, inside, 0.0).to(tl.float32)
    second = tl.load(source + half + columns, inside, 0.0).to(tl.float32)
    low_cos, low_sin = tl.load(cos + columns, inside, 0.0), tl.load(sin + columns, inside, 0.0)
    high_cos, high_sin = tl.load(cos + half + columns, inside, 0.0), tl.load(sin + half + columns, inside, 0.0)
    return first * low_cos - sign * second * low_sin, second * high_cos + sign * first * high_sin


@triton.jit
def _split_kernel(
    mixed, angles, query, key, value, tokens, groups, share, half, BACK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One head of one token: from `mixed` to query, key or value; BACK: the other way, rotated back."""
    token, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, place = slot // (share + 2), slot % (share + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    size = 2 * half
    here = mixed + (token * groups * (share + 2) + slot) * size
    if place < share:
        there = query + ((token * groups + group) * share + place) * size
    elif place == share:
        there = key + (token * groups + group) * size
    else:
        there = value + (token * groups + group) * size
    source, target = here, there
    sign = 1.0
    if BACK:
        source, target = there, here
        sign = -1.0
    if place <= share:
        cos, sin = angles + token * size, angles + (tokens + token) * size
        first, second = _turn(source, cos, sin, half, inside, columns, sign)
    else:
        first = tl.load(source + columns, inside, 0.0).to(tl.float32)
        second = tl.load(source + half + columns, inside, 0.0).to(tl.float32)
    tl.store(target + columns, first.to(target.dtype.element_ty), inside)
    tl.store(target + half + columns, second.to(target.dtype.element_ty), inside)


@triton.jit
def _decode_kernel(
    mixed, angles, query, keys, values, lengths, rows, groups, share, half, room, BLOCK: tl.constexpr
):  # fmt: skip
    """One head of one row: the query rotated, key and value into the cache at the row's length."""
    row, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, place = slot // (share + 2), slot % (share + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    size = 2 * half
    source = mixed + (row * groups * (share + 2) + slot) * size
    cell = ((row * groups + group) * room + tl.load(lengths + row)) * size
    if place <= share:
        first, second = _turn(source, angles + row * size, angles + (rows + row) * size, half, inside, columns, 1.0)
    else:
        first = tl.load(source + columns, inside, 0.0).to(tl.float32)
        second = tl.load(source + half + columns, inside, 0.0).to(tl.float32)
    if place < share:
        target = query + ((row * groups + group) * share + place) * size
    elif place == share:
        target = keys + cell
    else:
        target = values + cell
    tl.store(target + columns, first.to(target.dtype.element_ty), inside)
    tl.store(target + half + columns, second.to(target.dtype.element_ty), inside)


def triton_split_rope(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel."""
    mixed = mixed.contiguous()
    tokens, groups, slots, size = mixed.shape
    query, key, value = (mixed.new_empty(tokens, heads, size) for heads in (groups * (slots - 2), groups, groups))
    _split_kernel[(tokens, groups * slots)](
        mixed, angles, query, key, value, tokens, groups, slots - 2, size // 2, BACK=False,
        BLOCK=next_power(size // 2), num_warps=1,
    )  # fmt: skip
    return query, key, value


def triton_split_rope_backward(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    """By the kernel."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    tokens, groups, size = key.shape
    share = query.shape[1] // groups
    mixed = query.new_empty(tokens, groups, share + 2, size)
    _split_kernel[(tokens, groups * (share + 2))](
        mixed, angles, query, key, value, tokens, groups, share, size // 2, BACK=True, BLOCK=next_power(size // 2),
        num_warps=1,
    )  # fmt: skip
    return mixed


def triton_decode_rope(mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """By the kernel."""
    mixed = mixed.contiguous()
    rows, groups, slots, size = mixed.shape
    query = mixed.new_empty(rows, groups, slots - 2, size)
    _decode_kernel[(rows, groups * slots)](
        mixed, angles, query, keys, values, lengths, rows, groups, slots - 2, size // 2, keys.shape[2],
        BLOCK=next_power(size // 2), num_warps=1,
    )  # fmt: skip
    return query


# ----------------------------------------------------------------------------------------------------------------
# One operation each


@torch.library.custom_op("avatar::split_rope", mutates_args=())
def _split_rope(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return triton_split_rope(mixed, angles) if runs_triton(mixed) else torch_split_rope(mixed, angles)


@_split_rope.register_fake
def _(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, slots, size = mixed.shape
    key = mixed.new_empty(tokens, groups, size)
    return mixed.new_empty(tokens, groups * (slots - 2), size), key, torch.empty_like(key)


@torch.library.custom_op("avatar::split_rope_backward", mutates_args=())
def _split_rope_backward(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    run = triton_split_rope_backward if runs_triton(query) else torch_split_rope_backward
    return run(query, key, value, angles)


@_split_rope_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    tokens, groups, size = key.shape
    return query.new_empty(tokens, groups, query.shape[1] // groups + 2, size)


@torch.library.custom_op("avatar::decode_rope", mutates_args=("keys", "values"))
def _decode_rope(mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    run = triton_decode_rope if runs_triton(mixed) else torch_decode_rope
    return run(mixed, angles, keys, values, lengths)


@_decode_rope.register_fake
def _(mixed: Tensor, angles: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    rows, groups, slots, size = mixed.shape
    return mixed.new_empty(rows, groups, slots - 2, size)


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(angles)
        return _split_rope(mixed, angles)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        return _split_rope_backward(query, key, value, *ctx.saved_tensors), None
