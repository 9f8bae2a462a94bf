"""A decode step's attention: pages of prompts to the queries of all rows that read them, rows to their own tokens.

Split over keys: each page, and each stretch of a row's own tokens, is one program a key-value head, whose result and
log-sum-exp a second kernel merges. Shapes: R rows, U pages, d head size; query [R, groups, share, d], pages
[pages, groups, page, d], own tokens [rows, groups, room, d].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_avatar.policy.kernels.device import fits_head, next_power, operation, runs_triton, tl, triton

STRETCH = 512  # of a row's own tokens, one program
KEYS = 64  # worked on at a time; of four bytes a number half as many
MOST_QUERIES = 64  # of a program; likewise
LEAST = 16  # of both, for tl.dot
MERGE_WARPS = 1
FEW_QUERIES = 8  # below, FlashAttention for CPUs is slower than plain matrix products


class Tables(NamedTuple):
    """Who reads what in a decode step, on the device.

    readers [U, n]: rows that read a page, the first `read` [U] of them count; tokens [U]: of a page; ordinal [U]: the
    page's number in its prompt; pages [R]: of a row's prompt. For torch's operations: parts [R, p], where a row finds
    its parts among U * n results; absent [R, p] bool, which of them it lacks; empty [U, 1, 1, page], -inf where a page
    holds no token (None: nothing is absent, or empty).
    """

    readers: Tensor
    read: Tensor
    tokens: Tensor
    ordinal: Tensor
    pages: Tensor
    parts: Tensor
    absent: Tensor | None
    empty: Tensor | None


def attend(
    query: Tensor, page_keys: Tensor, page_values: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    later: Tensor | None, tables: Tables, own: int, scale: float,
) -> Tensor:  # fmt: skip
    """Softmax over a row's prompt and its own tokens [R, groups * share * d], in the query's dtype.

    lengths [R]: own tokens before the new one, which is stored already. `own` tokens of a row are looked at; `later`
    [R, 1, 1, own] is -inf beyond a row's own, None where all rows have `own` (torch's operations alone ask).
    """
    return _attend(query, page_keys, page_values, keys, values, lengths, later, list(tables), own, scale)


def by_kernels(tensor: Tensor) -> bool:
    """Whether Triton's kernels take this query or store, whose last axis is a head's."""
    return runs_triton(tensor) and fits_head(tensor.shape[-1])


# ----------------------------------------------------------------------------------------------------------------
# torch


def torch_attend(
    query: Tensor, page_keys: Tensor, page_values: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    later: Tensor | None, tables: Tables, own: int, scale: float,
) -> Tensor:  # fmt: skip
    """The formula: two attentions, merged by their log-sum-exp."""
    rows = len(query)
    seen = slice(rows), slice(None), slice(own)
    output, lse = attend_part(query, keys[seen], values[seen], later, scale)
    if tables.readers.numel():
        count = len(tables.readers)
        # [U, n, groups, share, d]: a page's queries are those of all its rows and of the heads that share a key
        queries = query[tables.readers].transpose(1, 2)
        page_output, page_lse = attend_part(
            queries.flatten(2, 3), page_keys[:count], page_values[:count], tables.empty, scale
        )
        page_output = page_output.view(queries.shape).transpose(1, 2).flatten(0, 1)[tables.parts]  # [R, p, ...]
        page_lse = page_lse.view(queries.shape[:-1]).transpose(1, 2).flatten(0, 1)[tables.parts]
        if tables.absent is not None:
            page_lse = page_lse.masked_fill(tables.absent[:, :, None, None], float("-inf"))
        shares = torch.cat([lse[:, None], page_lse], dim=1).softmax(dim=1)[..., None]
        output = shares[:, 0] * output + (shares[:, 1:] * page_output).sum(dim=1)
    return output.to(query.dtype).reshape(rows, -1)


def attend_part(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of query [B, heads, Q, d] to key and value [B, heads, K, d] under an additive mask [B, 1, 1, K].

    Returns the output [B, heads, Q, d] and the log-sum-exp [B, heads, Q] of the scores.
    """
    if query.device.type != "cpu":
        if mask is not None:
            mask = mask.expand(*query.shape[:3], -1)
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, False, scale=scale
        )
        return output, lse[..., : query.shape[2]]  # the kernel pads the queries
    if query.shape[2] >= FEW_QUERIES:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    scores = (query.float() * scale) @ key.float().mT
    scores = scores if mask is None else scores + mask
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights @ value.float()) / total, (largest + total.log())[..., 0]


# ----------------------------------------------------------------------------------------------------------------
# Triton


@triton.jit
def _parts_kernel(
    query, page_keys, page_values, keys, values, lengths, readers, read, tokens, ordinal, out, lse,
    page_programs, most_readers, groups, share, size, page, room, slots, own_slots, scale,
    STRETCH: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, QUERY_BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A page with QUERIES of its readers' queries, or a stretch of a row's own tokens with the row's."""
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.arange(0, QUERIES)
    stretch = tl.maximum(program - page_programs, 0) % own_slots
    if program < page_programs:
        unit = (program // QUERY_BLOCKS).to(tl.int64)
        number += (program % QUERY_BLOCKS) * QUERIES
        count = (tl.load(read + unit) * share).to(tl.int32)
        rows = tl.load(readers + unit * most_readers + number // share, number < count, 0)
        last = tl.load(tokens + unit).to(tl.int32)
        store = (unit * groups + group) * page * size
        key_rows, value_rows = page_keys + store, page_values + store
        slot = tl.load(ordinal + unit).to(tl.int32)
        start = stretch
    else:
        unit = ((program - page_programs) // own_slots).to(tl.int64)
        count = stretch * 0 + share
        rows = number * 0 + unit
        start = stretch * STRETCH
        last = tl.minimum(tl.load(lengths + unit).to(tl.int32) + 1, start + STRETCH)
        store = (unit * groups + group) * room * size
        key_rows, value_rows = keys + store, values + store
        slot = slots - own_slots + stretch
    asks = number < count
    if (last > start) & (tl.min(number, 0) < count):
        head = (rows.to(tl.int64) * groups + group) * share + number % share
        columns = tl.arange(0, SIZE)
        inside = columns < size
        q = tl.load(query + head[:, None] * size + columns[None], asks[:, None] & inside[None], 0.0)
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, SIZE], tl.float32)
        for first in range(start, last, KEYS):
            places = first + tl.arange(0, KEYS)
            there = (places < last)[:, None] & inside[None]
            offsets = places.to(tl.int64)[:, None] * size + columns[None]
            k = tl.load(key_rows + offsets, there, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
            scores = tl.where((places < last)[None], scores, float("-inf"))
            now = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - now[:, None])
            shrink = tl.exp(highest - now)
            v = tl.load(value_rows + offsets, there, 0.0)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee").to(tl.float32)
            highest = now
        # [R, groups * share, slots]: a row's parts lie side by side
        target = head * slots + slot
        tl.store(lse + target, highest + tl.log(total), asks)
        tl.store(out + target[:, None] * size + columns[None], mixed / total[:, None], asks[:, None] & inside[None])


@triton.jit
def _merge_kernel(
    parts, lse, lengths, pages, out, heads, size, slots, own_slots, STRETCH: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """One head of one row: its pages' and its stretches' results by their log-sum-exp."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, SIZE)
    inside = columns < size
    own, count = tl.cdiv(tl.load(lengths + row) + 1, STRETCH), tl.load(pages + row)
    base = (row * heads + head) * slots
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([SIZE], tl.float32)
    for part in range(count + own):
        slot = tl.where(part < count, part, slots - own_slots + part - count)
        weight = tl.load(lse + base + slot)
        now = tl.maximum(highest, weight)
        shrink, share = tl.exp(highest - now), tl.exp(weight - now)
        mixed = mixed * shrink + share * tl.load(parts + (base + slot) * size + columns, inside, 0.0)
        total = total * shrink + share
        highest = now
    result = mixed / total
    tl.store(out + (row * heads + head) * size + columns, result.to(out.dtype.element_ty), inside)


def blocks(itemsize: int, asked: int) -> tuple[int, int]:
    """Queries and keys that a program works on at a time, where `asked` queries read a page: float32 takes half as many
    of both, as 180 KB of shared memory are more than an A100 (163) and an L40 (99) have."""
    half = itemsize > 2
    most, keys = (max(LEAST, number >> half) for number in (MOST_QUERIES, KEYS))
    return max(LEAST, min(most, next_power(asked))), keys


def triton_attend(
    query: Tensor, page_keys: Tensor, page_values: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    later: Tensor | None, tables: Tables, own: int, scale: float,
) -> Tensor:  # fmt: skip
    """By the kernels."""
    query = query.contiguous()
    rows, groups, share, size = query.shape
    units, most = tables.readers.shape
    own_slots = triton.cdiv(own, STRETCH)
    slots = tables.parts.shape[1] + own_slots
    asked = max(most, 1) * share
    queries, at_once = blocks(query.itemsize, asked)
    turns = triton.cdiv(asked, queries)
    heads = groups * share
    parts = query.new_empty(rows, heads, slots, size, dtype=torch.float32)
    lse = query.new_empty(rows, heads, slots, dtype=torch.float32)
    wide = max(16, next_power(size))
    _parts_kernel[(units * turns + rows * own_slots, groups)](
        query, page_keys, page_values, keys, values, lengths, tables.readers, tables.read, tables.tokens,
        tables.ordinal, parts, lse, units * turns, most, groups, share, size, page_keys.shape[2], keys.shape[2],
        slots, own_slots, scale, STRETCH=STRETCH, KEYS=at_once, QUERIES=queries, QUERY_BLOCKS=turns, SIZE=wide,
    )  # fmt: skip
    out = query.new_empty(rows, heads * size)
    _merge_kernel[(rows, heads)](
        parts, lse, lengths, tables.pages, out, heads, size, slots, own_slots, STRETCH=STRETCH, SIZE=wide,
        num_warps=MERGE_WARPS,
    )  # fmt: skip
    return out


@operation("attend")
def _attend(
    query: Tensor, page_keys: Tensor, page_values: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    later: Tensor | None, tables: list[Tensor | None], own: int, scale: float,
) -> Tensor:  # fmt: skip
    run = triton_attend if by_kernels(query) else torch_attend
    return run(query, page_keys, page_values, keys, values, lengths, later, Tables._make(tables), own, scale)


@_attend.register_fake
def _(
    query: Tensor, page_keys: Tensor, page_values: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    later: Tensor | None, tables: list[Tensor | None], own: int, scale: float,
) -> Tensor:  # fmt: skip
    return query.new_empty(len(query), query[0].numel())
