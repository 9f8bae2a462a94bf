"""A tiny Qwen2.5-Omni of the full class: Thinker, talker and vocoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from tests.policy.tiny import tiny_config, tiny_thinker


def tiny_omni(folder: Path, *, layers: int = 2, **save) -> Qwen2_5OmniForConditionalGeneration:
    """The model, saved to `folder` with its speakers."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    talker = dict(
        vocab_size=64, embedding_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope, tts_codec_start_token_id=60,
        tts_codec_end_token_id=61, tts_codec_pad_token_id=62, tts_codec_mask_token_id=63,
    )  # fmt: skip
    dit = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, emb_dim=16, num_embeds=65, enc_dim=16,
        enc_emb_dim=16, enc_channels=[16] * 4 + [48], enc_attention_channels=8, enc_res2net_scale=2, enc_se_channels=8,
        look_ahead_layers=[0], look_backward_layers=[0],
    )  # fmt: skip
    vocoder = dict(
        upsample_initial_channel=64, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]],
    )  # fmt: skip
    config = Qwen2_5OmniConfig(
        thinker_config=tiny_config(layers=layers).to_dict(),
        talker_config=talker,
        token2wav_config=dict(dit_config=dit, bigvgan_config=vocoder),
    )
    model = Qwen2_5OmniForConditionalGeneration(config).eval()
    model.thinker = tiny_thinker(model.config.thinker_config)
    model.save_pretrained(folder, **save)
    torch.save({}, folder / "spk_dict.pt")
    return model
