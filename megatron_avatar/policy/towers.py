"""The encoders in front of the language model: transformers' own, on the first pipeline stage.

A picture's or a video's slices (one pair of frames each) and a sound's windows (2 s, of Qwen3-Omni 8 s) are encoded
without seeing each other. So the tensor-parallel ranks share them out, and a rank encodes its share in bounded pieces.

Shapes: N rows (patches or log-mel frames), M media placeholders of a prompt, W columns of an embedding: the language
model's hidden size, and as many more for each layer that deepstack feeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from megatron_avatar.config.families import family_of
from megatron_avatar.policy import tower_attention
from megatron_avatar.policy.architecture import PolicyConfig, classes_of, placeholder_ids
from megatron_avatar.policy.shape import deepstack_layers
from megatron_avatar.records import Prompt

# Rows of one encoder call without gradient. At the 7B's width a patch takes 65 KiB of activations in bfloat16 (a frame
# of sound less): 2 GiB a call, whatever is evaluated. A video of 16 frames at 224 x 224 pixels has 2,048 patches.
ROWS_PER_CALL = 32_768


@dataclass(frozen=True)
class Units:
    """The input of one encoder: rows [N, features] in parts, cut into units that don't see each other.

    shapes: of each unit, (height, width) in patches or (log-mel frames, those of its sound's longest chunk). sizes: its
    rows. tokens: embeddings that it gives.
    """

    rows: list[Tensor]
    shapes: list[tuple[int, int]]
    sizes: list[int]
    tokens: list[int]


class Towers(nn.Module):
    """The vision and the audio encoder, which turn prompts' media into embeddings of the language model.

    `visual` and `audio_tower` bear their Hugging Face names; `audio_tower` is None for a model that doesn't hear.
    """

    def __init__(self, hf_config: PolicyConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.hf_config = hf_config
        self.dtype = dtype
        self.family = family_of(hf_config.model_type)
        self.placeholder_ids = placeholder_ids(hf_config)
        self.width = (1 + deepstack_layers(hf_config)) * hf_config.text_config.hidden_size
        classes = classes_of(hf_config)
        with no_init_weights():
            self.visual = classes.vision._from_config(deepcopy(hf_config.vision_config), dtype=dtype)
            self.audio_tower: Any = None
            if classes.audio is not None:
                self.audio_tower = classes.audio._from_config(deepcopy(hf_config.audio_config), dtype=dtype)
        for tower in self.children():  # their configurations are copies: hf_config stays what the folder says
            config: Any = tower.config
            config._attn_implementation = tower_attention.NAME

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_train(self, train: bool) -> None:
        """Freeze or train the encoders. Call it before the model is wrapped for data parallelism."""
        self.requires_grad_(train)
        if hasattr(self.audio_tower, "audio_bos_eos_token"):
            # Qwen2.5-Omni's Thinker embeds these two tokens as text: their parameter never gets a gradient.
            self.audio_tower.audio_bos_eos_token.requires_grad_(False)
        for parameter in self.parameters():  # each tensor-parallel rank's gradient is that of its share
            setattr(parameter, "average_gradients_across_tp_domain", True)  # noqa: B010  (Megatron-Core's mark)

    def forward(self, prompts: Sequence[Prompt], grad: bool = False) -> list[Tensor | None]:
        """Embeddings [M, W] of each prompt's media, in the order of its placeholders; None without media.

        All ranks of a tensor-parallel group call it alike. With `grad` (training towers), where torch records
        gradients, each encoder runs exactly once, without media on a dummy that gets a gradient of zero, so that all
        ranks reduce the same parameters.
        Raises ValueError where placeholders and features differ in number.
        """
        grad = grad and torch.is_grad_enabled()  # not where a reference is scored
        if known := {k: prompt.embedded for k, prompt in enumerate(prompts) if prompt.embedded is not None}:
            assert not grad, "what trained encoders give is never kept"
            fresh = iter(self([prompt for prompt in prompts if prompt.embedded is None]))
            return [known[k] if k in known else next(fresh) for k in range(len(prompts))]
        with torch.set_grad_enabled(grad):
            slices = [self._slices(prompt) for prompt in prompts]
            windows = [self._windows(prompt) for prompt in prompts]
            visual = self._encode(self._see, _join(slices), self._dummy_slice(), grad)
            audio = self._nothing()
            if self.audio_tower is not None:
                audio = self._encode(self._hear, _join(windows), self._dummy_window(), grad)
            visual_counts, audio_counts = ([sum(units.tokens) for units in parts] for parts in (slices, windows))
            media = [
                self._interleave(*parts)
                for parts in zip(prompts, visual.split(visual_counts), audio.split(audio_counts), strict=True)
            ]
            if grad and media:  # an empty slice ties the dummy to the loss
                media[0] = torch.cat([visual[:0], audio[:0], visual[:0] if media[0] is None else media[0]])
        return media

    # ------------------------------------------------------------------------------------------------------------
    # What the encoders take apart

    def _slices(self, prompt: Prompt) -> Units:
        """The pictures: attention, full or in windows, stays inside of a slice of time."""
        if prompt.pixels is None or prompt.grid_thw is None:
            return Units([], [], [], [])
        shapes = [(h, w) for t, h, w in prompt.grid_thw.tolist() for _ in range(t)]
        sizes, merged = [h * w for h, w in shapes], self.hf_config.vision_config.spatial_merge_size**2
        return Units([prompt.pixels], shapes, sizes, [size // merged for size in sizes])

    def _windows(self, prompt: Prompt) -> Units:
        """The sounds: convolutions, positions, attention and pooling stay inside of a window."""
        if prompt.mel is None or prompt.mel_lengths is None:
            return Units([], [], [], [])
        chunk, longest = 2 * self.hf_config.audio_config.n_window, audio_window(self.hf_config)
        assert self.family.audio_chunk in (0, chunk), "the family counts tokens of chunks of another length"
        assert longest % 4 == 0, "pooling by two after a convolution of stride two would cross the windows' borders"
        shapes = [(min(longest, n - start), min(chunk, n))
                  for n in prompt.mel_lengths.tolist() for start in range(0, n, longest)]  # fmt: skip
        sizes = [length for length, _ in shapes]
        return Units([prompt.mel.T], shapes, sizes, [self.family.audio_tokens(size) for size in sizes])

    def _dummy_slice(self) -> Units:
        vision = self.hf_config.vision_config
        side, channels = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size
        return Units([torch.zeros(side**2, channels * vision.patch_size**2)], [(side, side)], [side**2], [1])

    def _dummy_window(self) -> Units:
        return Units([torch.zeros(4, self.hf_config.audio_config.num_mel_bins)], [(4, 4)], [4], [1])

    # ------------------------------------------------------------------------------------------------------------
    # Encoding

    def _see(self, rows: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        # Slices of one size are one video to the encoder, which loops over videos in Python.
        grid = [(len(list(run)), *shape) for shape, run in itertools.groupby(shapes)]
        seen = self.visual(rows, torch.tensor(grid, device=rows.device))
        out = torch.cat([seen.pooler_output, *getattr(seen, "deepstack_features", ())], dim=1)
        assert out.shape[1] == self.width, f"the encoder gives {out.shape[1]} columns instead of {self.width}"
        return out

    def _hear(self, rows: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        assert self.audio_tower is not None
        lengths = [length for length, _ in shapes]
        if not self.family.audio_chunk:
            return self.audio_tower(rows.T, torch.tensor(lengths, device=rows.device)).last_hidden_state
        # The encoder fills a call's chunks up to its longest, which a short one's last token hears: a sound below a
        # chunk has a call of its own length.
        out, start = [], 0
        for longest, run in itertools.groupby(shapes, key=lambda shape: shape[1]):
            own = [length for length, _ in run]
            out.append(self._hear_chunks(rows[start : start + sum(own)], own, longest))
            start += sum(own)
        return F.pad(torch.cat(out), (0, self.width - out[0].shape[1]))  # deepstack's features, of which sound has none

    def _hear_chunks(self, rows: Tensor, lengths: list[int], longest: int) -> Tensor:
        """Qwen3-Omni's audio embeddings of windows of `lengths` frames, each chunk filled up to `longest` frames."""
        sizes = [min(longest, length - start) for length in lengths for start in range(0, length, longest)]
        chunks = nn.utils.rnn.pad_sequence(
            [*rows.split(sizes), rows.new_zeros(longest, rows.shape[1])], batch_first=True
        )[:-1]
        tokens = torch.tensor([self.family.audio_tokens(size) for size in sizes])
        room = self.family.audio_tokens(longest)
        kept = (torch.arange(room) < tokens[:, None]).flatten().nonzero()[:, 0]
        ends = np.cumsum([0, *(self.family.audio_tokens(length) for length in lengths)])
        assert self.audio_tower is not None
        return self.audio_tower(
            feature_lens=None,
            padded_feature=chunks.transpose(1, 2),
            chunk_lengths=torch.tensor(sizes),
            valid_indices=kept.to(rows.device),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=rows.device),
        ).last_hidden_state

    def _encode(
        self, encoder: Callable[[Tensor, Sequence[tuple[int, int]]], Tensor], units: Units, dummy: Units, grad: bool
    ) -> Tensor:
        """Embeddings of all units [sum of tokens, W], of which this tensor-parallel rank encodes its share."""
        group = parallel_state.get_tensor_model_parallel_group()
        sizes, borders = units.sizes, share_out(units.sizes, group.size())
        counts = [sum(units.tokens[start:stop]) for start, stop in itertools.pairwise(borders)]
        start, stop = borders[group.rank()], borders[group.rank() + 1]
        pieces = pack(sizes[start:stop], None if grad else ROWS_PER_CALL)
        first = np.cumsum([0, *sizes])  # row of each unit
        own = []
        for low, high in ((start + low, start + high) for low, high in pieces):
            rows = take(units.rows, first[low], first[high])
            own.append(encoder(self._moved(rows), units.shapes[low:high]))
        if grad and not own:
            own.append(encoder(self._moved(dummy.rows), dummy.shapes)[:0])
        share = torch.cat(own) if own else self._nothing()
        assert len(share) == counts[group.rank()]
        return share if group.size() == 1 or not sum(counts) else _GatherShares.apply(share, counts, group)

    def _moved(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows [N, features] on the encoders' device, in their dtype: cast there, not by the host before the copy."""
        moved = [rows.to(self.device).to(self.dtype) for rows in parts]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.width, dtype=self.dtype, device=self.device)

    def _interleave(self, prompt: Prompt, visual: Tensor, audio: Tensor) -> Tensor | None:
        """Put one prompt's visual and audio embeddings into the order of its placeholders."""
        ids = torch.from_numpy(prompt.token_ids)
        ids = ids[torch.isin(ids, torch.tensor(self.placeholder_ids))]
        is_audio = torch.isin(ids, torch.tensor(self.placeholder_ids[2:]))  # none where the model doesn't hear
        for name, features, wanted in (("visual", visual, ~is_audio), ("audio", audio, is_audio)):
            if len(features) != wanted.sum():
                raise ValueError(
                    f"prompt of sample {prompt.sample_id!r} has {wanted.sum()} {name} placeholders, but its media give "
                    f"{len(features)} {name} embeddings: its tokens and its media don't belong together"
                )
        if not len(is_audio):
            return None
        order = torch.where(is_audio, len(visual) + is_audio.cumsum(0) - 1, (~is_audio).cumsum(0) - 1)
        return torch.cat([visual, audio])[order.to(visual.device)]


class _GatherShares(torch.autograd.Function):
    """All ranks' embeddings [sum of counts, W] from each rank's own [counts[rank], W].

    Every rank has the whole gradient of the result and hands its own rows on. They are multiplied by the ranks'
    number, because Megatron-Core then averages the weights' gradients over the ranks, where we want their sum.
    """

    @staticmethod
    def forward(ctx, own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        longest = max(counts)
        padded = F.pad(own, (0, 0, 0, longest - len(own)))
        shares = padded.new_empty(len(counts) * longest, padded.shape[1])
        dist.all_gather_into_tensor(shares, padded, group=group)
        return torch.cat([share[:count] for share, count in zip(shares.split(longest), counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.split(ctx.counts)[ctx.group.rank()] * ctx.group.size(), None, None


def audio_window(hf_config: PolicyConfig) -> int:
    """Log-mel frames of a sound that see each other: a unit, which one rank encodes in one call."""
    audio = hf_config.audio_config
    chunk = 2 * audio.n_window
    return audio.n_window_infer // chunk * chunk if family_of(hf_config.model_type).audio_chunk else chunk


def share_out(sizes: Sequence[int], shares: int) -> list[int]:
    """Borders [shares + 1] of contiguous shares of nearly equal size: share k holds units borders[k] to borders[k + 1].

    Each border is the one nearest to its ideal place, so that no share exceeds the mean by more than one unit.
    """
    ends = np.cumsum([0, *sizes])
    middles = (ends[:-1] + ends[1:]) / 2
    return np.searchsorted(middles, ends[-1] * np.arange(shares + 1) / shares).tolist()


def pack(sizes: Sequence[int], budget: int | None) -> list[tuple[int, int]]:
    """Consecutive units in pieces (first, last + 1) of at most `budget` rows (None: all at once), or of one unit."""
    pieces, start, rows = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and budget is not None and rows + size > budget:
            pieces.append((start, index))
            start, rows = index, 0
        rows += size
    return [*pieces, (start, len(sizes))] if sizes else []


def take(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Views of the rows from `start` to `stop` of parts [N, features] that lie one behind the other."""
    found, first = [], 0
    for rows in parts:
        if max(start, first) < min(stop, first + len(rows)):
            found.append(rows[max(start - first, 0) : stop - first])
        first += len(rows)
    return found


def _join(parts: Iterable[Units]) -> Units:
    parts = [units for units in parts if units.shapes]
    chain = itertools.chain.from_iterable
    return Units(
        list(chain(units.rows for units in parts)),
        list(chain(units.shapes for units in parts)),
        list(chain(units.sizes for units in parts)),
        list(chain(units.tokens for units in parts)),
    )
