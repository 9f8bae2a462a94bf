"""The tiny Qwen3-Omni: the Thinker's own classes with about 3 M parameters, of which a token meets 2 M."""

from __future__ import annotations

from transformers import Qwen3OmniMoeThinkerConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from data_tools.tokenizer import special_tokens
from megatron_avatar.config.families import OMNI3


def tiny_omni3_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3OmniMoeThinkerConfig:
    """Two of eight experts a token, features for the first two layers; every dimension divides for TP 2."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special_tokens(OMNI3)}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5]},
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 128,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.05,
    }
    audio = {
        "encoder_layers": 2,
        "d_model": 128,
        "encoder_ffn_dim": 256,
        "encoder_attention_heads": 4,
        "downsample_hidden_size": 16,
        "output_dim": 128,
        "initializer_range": 0.05,
    }
    return Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        position_id_per_seconds=OMNI3.audio_rate,
        audio_token_id=ids[OMNI3.audio],
        image_token_id=ids[OMNI3.image],
        video_token_id=ids[OMNI3.video],
        vision_start_token_id=ids[OMNI3.vision_start],
        vision_end_token_id=ids[OMNI3.vision_end],
        audio_start_token_id=ids[OMNI3.audio_start],
        audio_end_token_id=ids[OMNI3.audio_end],
        user_token_id=tokenizer.convert_tokens_to_ids("Ġuser"),
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=end,
    )
