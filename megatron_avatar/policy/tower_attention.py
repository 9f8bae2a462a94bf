"""Attention inside the encoders: within windows (or slices of a video, or chunks of sound) that don't see each other.

transformers' own path calls a kernel for every window of every layer, dozens to thousands of small ones. Registered
under a name with "flash" in it, ours gets all windows at once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from megatron_avatar.policy import flash

NAME = "flash_windows"


def window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_,
) -> tuple[Tensor, None]:
    """Output [1, S, heads, D] of query, key and value [1, heads, S, D]; window i: cu_seq_lens_q[i] to [i + 1], int32.

    The signature is that of transformers' attention functions.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None, "the encoder did not say where its windows end"
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [S, heads, D]
    if flash.kernel_for(query.device, query.dtype, query.shape[-1]) is flash.FLASH_VARLEN:
        bounds, longest = cu_seq_lens_q, max(2, max_length_q)  # length 1 would take a path made for decoding
        output: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling)  # one tensor
        return output[None], None
    return _by_length(query, key, value, cu_seq_lens_q.tolist(), scaling)[None], None


def _by_length(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float) -> Tensor:
    """[S, heads, D], one kernel call for all windows of a length: a picture's have four lengths at most."""
    starts = defaultdict(list)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        starts[stop - start].append(start)
    if len(starts) == 1:
        return _batched(query, key, value, bounds[1], scaling)
    rows = torch.cat(
        [(torch.tensor(first)[:, None] + torch.arange(length)).flatten() for length, first in starts.items()]
    ).to(query.device)
    sizes = [length * len(first) for length, first in starts.items()]
    parts = zip(*(tensor[rows].split(sizes) for tensor in (query, key, value)), starts, strict=True)
    return torch.cat([_batched(q, k, v, length, scaling) for (q, k, v, length) in parts])[rows.argsort()]


def _batched(query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float) -> Tensor:
    """[S, heads, D] of windows that are all `length` long."""
    query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(NAME, window_attention)
