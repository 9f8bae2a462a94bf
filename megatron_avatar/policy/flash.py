"""Attention of packed sequences, forward and backward, by the kernels that torch brings along.

All of them compute the same. Sequence i has `lengths_q[i]` rows of query [Tq, heads, d] and attends to `lengths_k[i]`
rows of key and value [Tk, kv heads, d]; the sequences lie one after the other, and none is empty. `causal` needs equal
lengths. Forward returns the output [Tq, heads, d] and the log-sum-exp [Tq, heads] of the scaled scores (float32, or
float64 for float64). Backward takes output and log-sum-exp of the softmax over *all* keys that a query sees, of which
the keys given may be a part: gradients of parts then simply add. Memory is linear in the number of tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Lengths = tuple[int, ...]
CHUNK_SCORES = 1 << 24  # scores that `in_chunks` holds at a time: 64 MiB in float32


class Kernel(NamedTuple):
    """forward(query, key, value, lengths_q, lengths_k, causal, scale) -> output, log-sum-exp;
    backward(grad, query, key, value, output, log-sum-exp, lengths_q, lengths_k, causal, scale) -> their gradients."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel_for(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """The fastest kernel for heads of this size there. What FlashAttention refuses on a GPU is computed in chunks."""
    if device.type == "cpu":
        return FLASH_CPU
    if device.type == "meta":  # a plan counts what a GPU would hold
        return FLASH_VARLEN
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and head_size % 8 == 0 and head_size <= 256 and _has_flash(device):
        return FLASH_VARLEN
    return IN_CHUNKS


@functools.cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


# ----------------------------------------------------------------------------------------------------------------
# GPU: one call over all sequences, whatever their lengths. Backward adds in no fixed order, unless
# torch.use_deterministic_algorithms is on.


@functools.lru_cache(maxsize=64)  # every layer and pass of a micro-batch asks again
def _boundaries(lengths: Lengths, device: torch.device) -> Tensor:
    """Starts of the sequences and the end of the last, int32 on the device, without waiting for it."""
    return to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _varlen_arguments(query: Tensor, lengths_q: Lengths, lengths_k: Lengths) -> tuple[Tensor, Tensor, int, int]:
    # Queries of length 1 throughout would take a path made for decoding.
    longest_q, longest_k = max(2, *lengths_q), max(lengths_k)
    return _boundaries(lengths_q, query.device), _boundaries(lengths_k, query.device), longest_q, longest_k


def _varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_varlen_arguments(query, lengths_q, lengths_k), 0.0, causal, False, scale=scale
    )
    return output, lse.t()


def _varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = _varlen_arguments(query, lengths_q, lengths_k)
    # Two states of random numbers, which nothing reads without dropout.
    states = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, output, lse.t().contiguous(), *arguments, 0.0, causal, *states, scale=scale
    )


# ----------------------------------------------------------------------------------------------------------------
# CPU: one call for each run of sequences of equal lengths


def _runs(lengths_q: Lengths, lengths_k: Lengths) -> Iterator[tuple[int, slice, slice]]:
    """Neighbours of equal lengths: how many, and their rows of query and of key."""
    start_q = start_k = 0
    for (length_q, length_k), run in itertools.groupby(zip(lengths_q, lengths_k, strict=True)):
        count = len(list(run))
        stop_q, stop_k = start_q + count * length_q, start_k + count * length_k
        yield count, slice(start_q, stop_q), slice(start_k, stop_k)
        start_q, start_k = stop_q, stop_k


def _batched(rows: Tensor, count: int) -> Tensor:
    """[count * L, heads, ...] as [count, heads, L, ...]."""
    return rows.unflatten(0, (count, -1)).transpose(1, 2)


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """The opposite, for all runs: a copy only where there are several."""
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    pairs = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_batched(rows, count) for rows in (query[own], key[seen], value[seen])), 0.0, causal, scale=scale
        )
        for count, own, seen in _runs(lengths_q, lengths_k)
    ]
    outputs, lses = zip(*pairs, strict=True)
    return _packed(outputs), _packed(lses)


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    triples = []
    for count, own, seen in _runs(lengths_q, lengths_k):
        rows = (grad[own], query[own], key[seen], value[seen], output[own], lse[own])
        triples.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_batched(x, count) for x in rows), 0.0, causal, scale=scale
            )
        )
    dq, dk, dv = zip(*triples, strict=True)
    return _packed(dq), _packed(dk), _packed(dv)


# ----------------------------------------------------------------------------------------------------------------
# Anywhere: the formulas, for as many queries at a time as CHUNK_SCORES allows


def _chunks(
    query: Tensor, key: Tensor, lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of query and of key, and their scaled scores [kv heads, heads per kv head, rows, keys]."""
    precise = torch.promote_types(query.dtype, torch.float32)
    heads, kv_heads = query.shape[1], key.shape[1]
    start_q = start_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        rows = max(1, CHUNK_SCORES // (heads * length_k))
        for first in range(0, length_q, rows):
            last = min(first + rows, length_q)
            own, seen = slice(start_q + first, start_q + last), slice(start_k, start_k + (last if causal else length_k))
            grouped = query[own].to(precise).unflatten(1, (kv_heads, -1))
            scores = torch.einsum("qgrd,kgd->grqk", grouped, key[seen].to(precise)) * scale
            if causal:
                later = torch.ones(last - first, last, dtype=torch.bool, device=query.device).triu(first + 1)
                scores = scores.masked_fill(later, float("-inf"))
            yield own, seen, scores
        start_q, start_k = start_q + length_q, start_k + length_k


def _chunked_forward(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    for own, seen, scores in _chunks(query, key, lengths_q, lengths_k, causal, scale):
        total = scores.logsumexp(-1, keepdim=True)
        mixed = torch.einsum("grqk,kgd->qgrd", (scores - total).exp(), value[seen].to(lse.dtype))
        output[own] = mixed.flatten(1, 2).to(output.dtype)
        lse[own] = total[..., 0].flatten(0, 1).t()
    return output, lse


def _chunked_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    lengths_q: Lengths, lengths_k: Lengths, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    precise, kv_heads = lse.dtype, key.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=precise, device=x.device) for x in (query, key, value))
    inner = (grad.to(precise) * output.to(precise)).sum(-1)
    for own, seen, scores in _chunks(query, key, lengths_q, lengths_k, causal, scale):
        total, dot = (x[own].t().unflatten(0, (kv_heads, -1))[..., None] for x in (lse, inner))
        probabilities = (scores - total).exp()
        wanted, asked = (x[own].to(precise).unflatten(1, (kv_heads, -1)) for x in (grad, query))
        dv[seen] += torch.einsum("grqk,qgrd->kgd", probabilities, wanted)
        dscores = probabilities * (torch.einsum("qgrd,kgd->grqk", wanted, value[seen].to(precise)) - dot) * scale
        dq[own] = torch.einsum("grqk,kgd->qgrd", dscores, key[seen].to(precise)).flatten(1, 2)
        dk[seen] += torch.einsum("grqk,qgrd->kgd", dscores, asked)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


FLASH_VARLEN = Kernel("flash_varlen", _varlen_forward, _varlen_backward)
FLASH_CPU = Kernel("flash_cpu", _cpu_forward, _cpu_backward)
IN_CHUNKS = Kernel("in_chunks", _chunked_forward, _chunked_backward)
