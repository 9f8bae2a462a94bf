"""What a Hugging Face folder's config.json says, and the Megatron-Core configuration that follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig

from megatron_avatar.config.schema import ModelConfig, ParallelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_model_type(hf_folder: str | Path) -> str:
    """The folder's class: "qwen2_5_omni" (all of it) or "qwen2_5_omni_thinker"; ValueError for everything else."""
    path = Path(hf_folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist: model.path has to name a Hugging Face folder of Qwen2.5-Omni")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type not in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        raise ValueError(
            f"{path}: model_type is {model_type!r}, but the policy is built for 'qwen2_5_omni' and "
            "'qwen2_5_omni_thinker': point model.path to a Qwen2.5-Omni folder"
        )
    return model_type


def read_thinker_config(hf_folder: str | Path) -> Qwen2_5OmniThinkerConfig:
    """The Thinker's configuration in a folder of the full Omni class or of the Thinker alone."""
    if read_model_type(hf_folder) == "qwen2_5_omni":
        config = Qwen2_5OmniConfig.from_pretrained(hf_folder).thinker_config
    else:
        config = Qwen2_5OmniThinkerConfig.from_pretrained(hf_folder)
    rope = config.text_config.rope_parameters
    if config.text_config.use_sliding_window or rope["rope_type"] != "default" or "mrope_section" not in rope:
        raise ValueError(
            f"{hf_folder}/config.json: sliding windows and scaled or one-dimensional rotary positions are not "
            "supported; expected use_sliding_window false and rope_parameters of rope_type 'default' with mrope_section"
        )
    return config


def transformer_config(
    hf_config: Qwen2_5OmniThinkerConfig, model: ModelConfig, parallel: ParallelConfig, *, on_cpu: bool
) -> TransformerConfig:
    """Megatron-Core's configuration of the language model, for a rank of a tp x pp layout.

    Raises ValueError where the model doesn't split into parallel.tp and parallel.pp.
    """
    text = hf_config.text_config
    heads, groups, tp, pp = text.num_attention_heads, text.num_key_value_heads, parallel.tp, parallel.pp
    if heads % tp or text.intermediate_size % tp or (groups % tp and tp % groups):
        raise ValueError(
            f"parallel.tp={tp} doesn't divide the {heads} attention heads, {groups} key-value heads and "
            f"{text.intermediate_size} feed-forward units of the model: choose a tp that does"
        )
    if text.num_hidden_layers % pp:
        raise ValueError(
            f"parallel.pp={pp} doesn't divide the {text.num_hidden_layers} layers of the model: choose a pp that does"
        )
    if model.dtype not in DTYPES:
        raise ValueError(f"model.dtype={model.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    dtype = DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=text.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, even in a dense model
        # Fused kernels need Apex or Transformer Engine.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **(dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
           if parallel.recompute == "full" else {}),
    )  # fmt: skip
