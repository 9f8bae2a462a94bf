"""A tiny Qwen3-Omni of the full class, with tensors of a talker and a vocoder as a published folder has them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from tests.policy.tiny import tiny_omni3, tiny_omni3_config


def tiny_whole_omni3(folder: Path, *, layers: int = 3) -> Qwen3OmniMoeForConditionalGeneration:
    """The model, saved to `folder`. Its talker is there as tensors alone: nothing here computes with it."""
    thinker = tiny_omni3_config(layers=layers)
    config = Qwen3OmniMoeConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    model = Qwen3OmniMoeForConditionalGeneration(config).eval()
    model.thinker = tiny_omni3(thinker)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["talker.model.layers.0.mlp.experts.0.gate_proj.weight"] = torch.randn(6, 4).bfloat16()
    tensors["code2wav.decoder.0.conv.weight"] = torch.randn(3, 2, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model
