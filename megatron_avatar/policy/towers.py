"""The encoders in front of the language model: transformers' own, on the first pipeline stage.

Shapes: H hidden size, M media placeholders of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder, Qwen2_5OmniVisionEncoder
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_avatar.policy.architecture import PolicyConfig, hears, placeholder_ids
from megatron_avatar.records import Prompt


class Towers(nn.Module):
    """The vision and the audio encoder, which turn prompts' media into embeddings of the language model.

    `visual` and `audio_tower` bear their Hugging Face names; `audio_tower` is None for a model that doesn't hear.
    """

    def __init__(self, hf_config: PolicyConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.hf_config = hf_config
        self.dtype = dtype
        self.placeholder_ids = placeholder_ids(hf_config)
        encoder = Qwen2_5OmniVisionEncoder if hears(hf_config) else Qwen2_5_VisionTransformerPretrainedModel
        with no_init_weights():
            self.visual = encoder._from_config(hf_config.vision_config, dtype=dtype)
            self.audio_tower = None
            if hears(hf_config):
                self.audio_tower = Qwen2_5OmniAudioEncoder._from_config(hf_config.audio_config, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_train(self, train: bool) -> None:
        """Freeze or train the encoders. Call it before the model is wrapped for data parallelism."""
        self.requires_grad_(train)
        if self.audio_tower is not None:
            # The Thinker embeds these two tokens as text: their parameter never gets a gradient.
            self.audio_tower.audio_bos_eos_token.requires_grad_(False)

    def forward(self, prompts: Sequence[Prompt], grad: bool = False) -> list[Tensor | None]:
        """Embeddings [M, H] of each prompt's media, in the order of its placeholders; None without media.

        Each encoder runs once over all prompts. With `grad` (training towers) it runs even without media, on a
        dummy that gets a gradient of zero, so that all data-parallel ranks reduce the same parameters.
        Raises ValueError where placeholders and features differ in number.
        """
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            visual, visual_counts = self._embed_pixels(prompts, grad)
            audio, audio_counts = self._embed_sound(prompts, grad)
            media = [
                self._interleave(*parts)
                for parts in zip(prompts, visual.split(visual_counts), audio.split(audio_counts), strict=True)
            ]
            if grad and media:  # an empty slice ties the dummy to the loss
                media[0] = torch.cat([visual[:0], audio[:0], visual[:0] if media[0] is None else media[0]])
        return media

    def _embed_pixels(self, prompts: Sequence[Prompt], always: bool) -> tuple[Tensor, list[int]]:
        """Embeddings of all pictures [sum, H], and how many of them each prompt has."""
        vision = self.hf_config.vision_config
        merged = vision.spatial_merge_size**2
        shown = [prompt for prompt in prompts if prompt.pixels is not None]
        counts = [0 if prompt.pixels is None else len(prompt.pixels) // merged for prompt in prompts]
        if not shown and not always:
            return self._no_media(), counts
        if shown:
            pixels, grid = (torch.cat([getattr(p, name) for p in shown]) for name in ("pixels", "grid_thw"))
        else:
            side = vision.spatial_merge_size
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixels, grid = torch.zeros(merged, width), torch.tensor([[1, side, side]])
        device = self.device
        features = self.visual(pixels.to(device, self.dtype), grid.to(device)).pooler_output
        return features[: sum(counts)], counts

    def _embed_sound(self, prompts: Sequence[Prompt], always: bool) -> tuple[Tensor, list[int]]:
        """Embeddings of all sounds [sum, H], and how many of them each prompt has."""
        heard = [prompt for prompt in prompts if prompt.mel is not None]
        counts = [0 if p.mel is None else sum(_audio_tokens(n) for n in p.mel_lengths.tolist()) for p in prompts]
        if self.audio_tower is None or (not heard and not always):
            return self._no_media(), counts
        if heard:
            mel, lengths = torch.cat([p.mel for p in heard], dim=1), torch.cat([p.mel_lengths for p in heard])
        else:
            mel, lengths = torch.zeros(self.hf_config.audio_config.num_mel_bins, 4), torch.tensor([4])
        device = self.device
        features = self.audio_tower(mel.to(device, self.dtype), lengths.to(device)).last_hidden_state
        return features[: sum(counts)], counts

    def _no_media(self) -> Tensor:
        return torch.empty(0, self.hf_config.text_config.hidden_size, dtype=self.dtype, device=self.device)

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


def _audio_tokens(mel_frames: int) -> int:
    """Audio embeddings that the encoder makes of a clip: two convolutions, then pooling by two (25 a second)."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1
