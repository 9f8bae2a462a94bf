"""Groups as packed sequences, and the attention that understands them.

A group is one prompt and its completions. Packed, it costs P - 1 + sum(L) tokens:

    prompt without its last token | last, o_1 .. o_{L-1} | last, o_1 .. o_{L-1} | ...
    prefix, computed once           completion 1            completion 2

A completion's segment opens with the prompt's last token, so its L outputs predict o_1 .. o_L: labels are
natural, and logits of the prompt never exist. Every segment sees the prefix and itself.

The segment table takes the place of Megatron-Core's `attention_mask`. It travels through the layers as an
argument, so recomputation and pipelining need no global state, and it stays on the host, so reading it
never waits for the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.records import Prompt


@dataclass(frozen=True)
class GroupBatch:
    """Groups packed into one row of S tokens with N completion tokens, C completions, B groups.

    token_ids [1, S] int64; positions [3, 1, S] int64; is_prompt [S] bool;
    segments [n, 4] int32 on the host: start, length, prefix_start, prefix_length (0: sees only itself);
    target_index [N]: places in S whose outputs predict target_ids [N];
    target_group [N]: index of the group; target_completion [N]: index of the completion within its group;
    lengths [C]: tokens of each completion, in packed order, so that `x.split(lengths)` cuts any [N] tensor;
    weights [B] float32: 0 marks a filler group.
    """

    token_ids: Tensor
    positions: Tensor
    is_prompt: Tensor
    segments: Tensor
    target_index: Tensor
    target_ids: Tensor
    target_group: Tensor
    target_completion: Tensor
    lengths: list[int]
    weights: Tensor

    def __len__(self) -> int:
        return self.token_ids.shape[1]

    def to(self, device: torch.device | str) -> GroupBatch:
        """Copy to `device`; the segment table stays on the host."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if name != "segments"}
        return replace(self, **moved)

    def pad_to(self, multiple: int) -> GroupBatch:
        """Extend S to a multiple (sequence parallelism needs one). The padding is a segment of its own."""
        length, padding = len(self), -len(self) % multiple
        if not padding:
            return self
        row = torch.tensor([[length, padding, 0, 0]], dtype=torch.int32)
        return replace(
            self,
            token_ids=F.pad(self.token_ids, (0, padding)),
            positions=F.pad(self.positions, (0, padding)),
            is_prompt=F.pad(self.is_prompt, (0, padding)),
            segments=torch.cat([self.segments, row]),
        )

    def media_index(self, placeholder_ids: Collection[int]) -> Tensor:
        """Places in S [M] where media embeddings go: the prompts' placeholders, prompt by prompt, in order."""
        wanted = torch.tensor(sorted(placeholder_ids), device=self.token_ids.device)
        return (self.is_prompt & torch.isin(self.token_ids[0], wanted)).nonzero()[:, 0]


def pack_groups(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[np.ndarray]], weights: Sequence[float] | None = None
) -> GroupBatch:
    """Pack groups, each a prompt and the token ids [L] of its completions, into one row.

    A group of one completion is a plain causal sequence and gets a single segment.
    """
    assert prompts and len(prompts) == len(completions), "one list of completions a prompt"
    tokens, positions, is_prompt, segments, lengths = [], [], [], [], []
    index, targets, group_of, completion_of = [], [], [], []
    start = 0
    for group, (prompt, outputs) in enumerate(zip(prompts, completions, strict=True)):
        assert outputs and all(len(output) for output in outputs), "a group needs completions, and those need tokens"
        prefix_start, prefix_length = start, len(prompt) - 1
        tokens.append(prompt.token_ids[:-1])
        positions.append(prompt.positions[:, :-1])
        start += prefix_length
        if len(outputs) == 1:
            segments.append((prefix_start, prefix_length + len(outputs[0]), 0, 0))
        elif prefix_length:
            segments.append((prefix_start, prefix_length, 0, 0))
        is_prompt.append(np.ones(prefix_length, bool))
        for number, output in enumerate(outputs):
            length = len(output)
            tokens += [prompt.token_ids[-1:], output[:-1]]
            new = np.arange(prompt.next_position, prompt.next_position + length - 1)
            positions += [prompt.positions[:, -1:], np.broadcast_to(new, (3, length - 1))]
            is_prompt += [np.ones(1, bool), np.zeros(length - 1, bool)]
            if len(outputs) > 1:
                segments.append((start, length, prefix_start, prefix_length))
            lengths.append(length)
            index.append(np.arange(start, start + length))
            targets.append(output)
            group_of.append(np.full(length, group))
            completion_of.append(np.full(length, number))
            start += length

    def tensor(parts: list[np.ndarray], dtype: type = np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate(parts, axis=-1).astype(dtype))

    return GroupBatch(
        token_ids=tensor(tokens)[None],
        positions=tensor(positions)[:, None],
        is_prompt=tensor(is_prompt, bool),
        segments=torch.tensor(segments, dtype=torch.int32),
        target_index=tensor(index),
        target_ids=tensor(targets),
        target_group=tensor(group_of),
        target_completion=tensor(completion_of),
        lengths=lengths,
        weights=torch.ones(len(prompts)) if weights is None else torch.tensor(weights, dtype=torch.float32),
    )


def plan_micro_batches(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], budget: int
) -> list[list[tuple[int, list[int]]]]:
    """Share groups out over micro-batches of at most `budget` packed tokens.

    A group larger than the budget is split by completions, each part repeating the prompt; a single completion
    that is too large with its prompt gets a micro-batch of its own. Parts are placed first-fit, largest first.
    Returns micro-batches as lists of (group, completion indices); the same input gives the same plan.
    """
    parts: list[tuple[int, int, list[int]]] = []  # tokens, group, completions
    for group, (prompt_length, lengths) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        prefix = prompt_length - 1
        bins: list[tuple[int, list[int]]] = []
        for number, length in enumerate(lengths):
            if not bins or bins[-1][0] + length > budget:
                bins.append((prefix, []))
            bins[-1] = (bins[-1][0] + length, [*bins[-1][1], number])
        parts += [(tokens, group, numbers) for tokens, numbers in bins]

    loads: list[int] = []
    plan: list[list[tuple[int, list[int]]]] = []
    for tokens, group, numbers in sorted(parts, key=lambda part: (-part[0], part[1], part[2])):
        fitting = (i for i, load in enumerate(loads) if load + tokens <= budget)
        place = next(fitting, len(plan))
        if place == len(plan):
            loads.append(0)
            plan.append([])
        loads[place] += tokens
        plan[place].append((group, numbers))
    return [sorted(batch) for batch in plan]


class GroupCoreAttention(MegatronModule):
    """Core attention over packed groups, in place of DotProductAttention in a layer spec.

    `forward` takes query [S, 1, heads, d], key and value [S, 1, kv heads, d] (heads of this tensor-parallel rank)
    and the segment table as `attention_mask`; it returns [S, 1, heads * d]. No mask of S x S ever exists.
    While `cache` is set, prompts leave their keys and values there and decode steps read them (see cache.py).
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
        """Attention of every segment to its prefix and itself; of decode rows to the cache when that is ready."""
        assert attention_bias is None and packed_seq_params is None
        if self.cache is not None and self.cache.ready:
            return self.cache.attend(self.layer_number, query, key, value, self.softmax_scale)
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.cache is not None:
            self.cache.store_prompts(self.layer_number, key, value)
        outputs = []
        # Rows that share a prefix lie side by side; rows without one stand alone.
        rows = enumerate(attention_mask.tolist())
        for _, run in itertools.groupby(rows, key=lambda item: tuple(item[1][2:]) if item[1][3] else item[0]):
            segments = [row for _, row in run]
            start, _, prefix_start, prefix_length = segments[0]
            lengths = [row[1] for row in segments]
            own = slice(start, start + sum(lengths))
            prefix = slice(prefix_start, prefix_start + prefix_length)
            outputs.append(
                _attend(query[own], key[own], value[own], key[prefix], value[prefix], lengths, self.softmax_scale)
            )
        return torch.cat(outputs).flatten(1)[:, None]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    lengths: list[int],
    scale: float,
) -> Tensor:
    """Causal attention of segments of `lengths` to a prefix [P, kv heads, d] and to themselves: [sum L, heads, d]."""
    count, longest = len(lengths), max(lengths)
    ragged = count * longest > len(query)
    if ragged:
        place, real = _padding(tuple(lengths), query.device)
        query, key, value = query[place], key[place], value[place]
    query, key, value = (x.unflatten(0, (count, longest)) for x in (query, key, value))
    if len(prefix_key):
        key = torch.cat([prefix_key.expand(count, -1, -1, -1), key], dim=1)
        value = torch.cat([prefix_value.expand(count, -1, -1, -1), value], dim=1)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=causal_lower_right(longest, key.shape[1]),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    output = output.transpose(1, 2).flatten(0, 1)
    return output[real] if ragged else output


@functools.lru_cache(maxsize=256)  # every layer and pass of a batch asks again
def _padding(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Segments filled up to the longest: sources of all tokens [c * Lmax], and places of the real ones [sum L].

    A short segment is filled up with its first token: later than its own tokens, so never seen by them.
    """
    starts, steps = np.cumsum([0, *lengths[:-1]])[:, None], np.arange(max(lengths))
    real = steps < np.array(lengths)[:, None]
    place = np.where(real, starts + steps, starts)
    return torch.from_numpy(place.ravel()).to(device), torch.from_numpy(real.ravel().nonzero()[0]).to(device)
