"""Groups as packed sequences, and micro-batches of them.

A group is one prompt and its completions. Packed, it costs P - 1 + sum(L) tokens:

    prompt without its last token | last, o_1 .. o_{L-1} | last, o_1 .. o_{L-1} | ...
    prefix, computed once           completion 1            completion 2

A completion's segment opens with the prompt's last token, so its L outputs predict o_1 .. o_L: labels are
natural, and logits of the prompt never exist. Every segment sees the prefix and itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.records import Prompt


@dataclass(frozen=True)
class GroupBatch:
    """Groups packed into one row of S tokens with N completion tokens, C completions.

    token_ids [1, S] int64; positions [3, 1, S] float32;
    prompt_ids [S] int64 on the host: token ids of the prompts, -1 where a completion or padding is;
    segments [n, 4] int32 on the host: start, length, prefix_start, prefix_length (0: sees only itself);
    target_index [N]: places in S whose outputs predict target_ids [N];
    lengths [C]: tokens of each completion, in packed order, so that `x.split(lengths)` cuts any [N] tensor.
    """

    token_ids: Tensor
    positions: Tensor
    prompt_ids: Tensor
    segments: Tensor
    target_index: Tensor
    target_ids: Tensor
    lengths: list[int]

    def __len__(self) -> int:
        return self.token_ids.shape[1]

    def to(self, device: torch.device | str) -> GroupBatch:
        """Copy to `device`; segments and prompt_ids stay on the host."""
        names = ("token_ids", "positions", "target_index", "target_ids")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

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
            prompt_ids=F.pad(self.prompt_ids, (0, padding), value=-1),
            segments=torch.cat([self.segments, row]),
        )

    def media_index(self, placeholder_ids: Collection[int]) -> Tensor:
        """Places in S [M] where media embeddings go, rising: the prompts' placeholders. On the host, where they are
        found: a device would have to be waited for."""
        return torch.isin(self.prompt_ids, torch.tensor(sorted(placeholder_ids))).nonzero()[:, 0]


def pack_groups(prompts: Sequence[Prompt], completions: Sequence[Sequence[np.ndarray]]) -> GroupBatch:
    """Pack groups, each a prompt and the token ids [L] of its completions, into one row.

    A group of one completion is a plain causal sequence and gets a single segment.
    """
    assert prompts and len(prompts) == len(completions), "one list of completions a prompt"
    tokens, positions, prompt_ids, segments, lengths = [], [], [], [], []
    index, targets = [], []
    start = 0
    for prompt, outputs in zip(prompts, completions, strict=True):
        assert outputs and all(len(output) for output in outputs), "a group needs completions, and those need tokens"
        prefix_start, prefix_length = start, len(prompt) - 1
        tokens.append(prompt.token_ids[:-1])
        positions.append(prompt.positions[:, :-1])
        start += prefix_length
        if len(outputs) == 1:
            segments.append((prefix_start, prefix_length + len(outputs[0]), 0, 0))
        elif prefix_length:
            segments.append((prefix_start, prefix_length, 0, 0))
        prompt_ids.append(prompt.token_ids[:-1])
        for output in outputs:
            length = len(output)
            tokens += [prompt.token_ids[-1:], output[:-1]]
            new = prompt.next_position + np.arange(length - 1)  # float64: rounded once, as in decoding
            positions += [prompt.positions[:, -1:], np.broadcast_to(new, (3, length - 1))]
            prompt_ids += [prompt.token_ids[-1:], np.full(length - 1, -1)]
            if len(outputs) > 1:
                segments.append((start, length, prefix_start, prefix_length))
            lengths.append(length)
            index.append(np.arange(start, start + length))
            targets.append(output)
            start += length

    def tensor(parts: list[np.ndarray], dtype: type[np.generic] = np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate(parts, axis=-1).astype(dtype))

    return GroupBatch(
        token_ids=tensor(tokens)[None],
        positions=tensor(positions, np.float32)[:, None],
        prompt_ids=tensor(prompt_ids),
        segments=torch.tensor(segments, dtype=torch.int32),
        target_index=tensor(index),
        target_ids=tensor(targets),
        lengths=lengths,
    )
