"""Attention that understands packed groups: the prompt's keys and values once for all of its completions.

What a completion sees splits in two: (a) its own tokens, causally, and (b) its prefix, all of it. The parts are
computed apart, by FlashAttention's kernels, and merged by their log-sum-exp:

    (a) all segments, prompts too:  causal, each to itself
    (b) all completions of a group: one block of queries to the group's prefix, not causal

So a prefix is neither copied nor read again for each completion, and no mask exists. Backward is the same kernels
again: given output and log-sum-exp of the merged softmax, each part's gradient is exact, and gradients add.

The segment table (see groups.py) takes the place of Megatron-Core's `attention_mask`. It travels through the layers
as an argument, so recomputation and pipelining need no global state, and it stays on the host, so reading it
never waits for the device.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.flash import Kernel, Lengths, kernel_for, to_device
from megatron_avatar.policy.kernels.merge import merge_parts


class Layout(NamedTuple):
    """Who sees what in a row of packed groups.

    segments: lengths of all segments, which tile the row. For groups with a prefix, in order: `queries`, the places of
    their completions' tokens, `query_lengths` a group; `keys`, the places of their prefixes, `key_lengths` a group.
    """

    segments: Lengths
    queries: slice | Tensor
    query_lengths: Lengths
    keys: slice | Tensor
    key_lengths: Lengths


def read_layout(segments: Tensor, device: torch.device) -> Layout:
    """The layout that a segment table int32 [n, 4] describes; places are on `device`."""
    return _layout(tuple(map(tuple, segments.tolist())), device)


@functools.lru_cache(maxsize=64)  # every layer and pass of a micro-batch asks again
def _layout(rows: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Layout:
    lengths = tuple(length for _, length, _, _ in rows)
    assert [row[0] for row in rows] == [0, *itertools.accumulate(lengths)][:-1], "segments tile the row"
    queries, keys = [], []
    for prefix, run in itertools.groupby(rows, key=lambda row: row[2:]):
        if prefix[1]:
            members = list(run)
            queries.append((members[0][0], sum(length for _, length, _, _ in members)))
            keys.append(prefix)
    assert len(set(keys)) == len(keys), "completions of a group lie side by side"
    return Layout(
        lengths,
        _places(queries, device), tuple(length for _, length in queries),
        _places(keys, device), tuple(length for _, length in keys),
    )  # fmt: skip


def _places(spans: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """All places of spans (start, length): a slice, which copies nothing, where they are one piece."""
    if len(spans) <= 1:
        return slice(spans[0][0], sum(spans[0])) if spans else slice(0, 0)
    places = np.concatenate([np.arange(start, start + length) for start, length in spans])
    return to_device(torch.from_numpy(places), device)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, kernel: Kernel, scale: float
    ) -> Tensor:
        value = value.contiguous()  # it comes as a view, which would keep the whole projection alive until backward
        output, lse = kernel.forward(query, key, value, layout.segments, layout.segments, True, scale)
        if layout.key_lengths:
            queries, keys = layout.queries, layout.keys
            part, part_lse = kernel.forward(
                query[queries], key[keys], value[keys], layout.query_lengths, layout.key_lengths, False, scale
            )
            merge_parts(output, lse, part, part_lse, queries)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.arguments = layout, kernel, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        layout, kernel, scale = ctx.arguments
        dq, dk, dv = kernel.backward(
            grad, query, key, value, output, lse, layout.segments, layout.segments, True, scale
        )
        if layout.key_lengths:
            queries, keys = layout.queries, layout.keys
            prefix_dq, prefix_dk, prefix_dv = kernel.backward(
                grad[queries], query[queries], key[keys], value[keys], output[queries], lse[queries],
                layout.query_lengths, layout.key_lengths, False, scale,
            )  # fmt: skip
            for whole, rows, part in ((dq, queries, prefix_dq), (dk, keys, prefix_dk), (dv, keys, prefix_dv)):
                if isinstance(rows, slice):
                    whole[rows].add_(part)
                else:
                    whole.index_add_(0, rows, part)
        return dq, dk, dv, None, None, None


def group_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, kernel: Kernel | None = None
) -> Tensor:
    """Attention of every segment to its prefix and, causally, itself.

    query [S, heads, d], key and value [S, kv heads, d], segments as in GroupBatch; returns [S, heads, d]. The same
    input gives the same bits on a CPU. `kernel` is chosen by device, type and head size where it isn't given.
    """
    kernel = kernel or kernel_for(query.device, query.dtype, query.shape[2])
    return _GroupAttention.apply(query, key, value, read_layout(segments, query.device), kernel, scale)


class GroupCoreAttention(MegatronModule):
    """Core attention over packed groups, in place of DotProductAttention in a layer spec.

    `forward` takes query [S, 1, heads, d], key and value [S, 1, kv heads, d] (heads of this tensor-parallel rank)
    and the segment table as `attention_mask`; it returns [S, 1, heads * d].
    While `cache` is set, the prompts that are read leave their keys and values there (see cache.py).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self" and config.context_parallel_size == 1
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0, "generation and training must compute the same function"
        self.layer_number = layer_number
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.cache: KeyValueCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Attention of every segment to its prefix and itself."""
        assert attention_bias is None and packed_seq_params is None
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if self.cache is not None:
            self.cache.store_prompts(self.layer_number, key, value)
        return group_attention(query, key, value, attention_mask, self.softmax_scale).flatten(1)[:, None]
