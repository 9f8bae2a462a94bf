"""Tiny Qwen2.5-Omni Thinkers of random weights, and prompts for them: the same classes as the 7B, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

VOCABULARY = 203  # divisible by nothing, so that tensor parallelism has to pad it
AUDIO, IMAGE, VIDEO = 190, 191, 192  # placeholders
VISION_START, VISION_END, AUDIO_START, AUDIO_END = 193, 194, 195, 196


def tiny_config(*, layers: int = 4, qwen_proportions: bool = False, tied: bool = False) -> Qwen2_5OmniThinkerConfig:
    """4 layers of 4 heads (2 key-value heads) of 16; or Qwen's head size 128, sections and 7 queries a key."""
    if qwen_proportions:
        heads = dict(hidden_size=14 * 128, num_attention_heads=14, num_key_value_heads=2, intermediate_size=256)
        section = [16, 24, 24]
    else:
        heads = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
        section = [2, 3, 3]
    text = dict(
        vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=4096, tie_word_embeddings=tied, **heads,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0, mrope_section=section),
    )
    vision = dict(
        depth=2, hidden_size=32, num_heads=2, intermediate_size=64, window_size=112, fullatt_block_indexes=[1],
        out_hidden_size=heads["hidden_size"],
    )
    audio = dict(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, n_window=100,
        output_dim=heads["hidden_size"],
    )
    config = Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, tie_word_embeddings=tied,
        audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO,
        audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )
    return config
