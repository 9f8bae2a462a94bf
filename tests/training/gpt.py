"""A tiny GPTModel and one training step on it, through Megatron's own schedule."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_avatar.policy.backend import Backend
from megatron_avatar.training.optim import Optimization

VOCABULARY, LENGTH = 64, 16


def build_gpt(
    backend: Backend, *, hidden: int = 32, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> GPTModel:
    """The same architecture as the policy's language model: RMSNorm, SwiGLU, grouped-query attention, biased QKV."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=2 * hidden,
        tensor_model_parallel_size=backend.tp, pipeline_model_parallel_size=backend.pp, pipeline_dtype=dtype,
        params_dtype=dtype, bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16,
        use_cpu_initialization=True, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        normalization="RMSNorm", add_bias_linear=False, add_qkv_bias=True, attention_dropout=0.0, hidden_dropout=0.0,
        persist_layer_norm=False, bias_activation_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), VOCABULARY, 64, position_embedding_type="rope",
        pre_process=backend.is_first_stage, post_process=backend.is_last_stage, parallel_output=True,
        share_embeddings_and_output_weights=True,
    )
    return model.to(dtype)


def batch(step: int) -> tuple[torch.Tensor, ...]:
    """Random tokens keyed by `step`: tokens, targets and positions [2, LENGTH], mask (True: not to be seen)."""
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH).expand(2, LENGTH), mask


def train_step(optimization: Optimization, step: int) -> tuple[float, bool]:
    """One update on the batch of `step`: (gradient norm, skipped)."""

    def forward(_, model):
        tokens, targets, positions, mask = batch(step)
        return model(tokens, positions, mask, labels=targets), lambda losses: (losses.mean(), {})

    optimization.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter(()), model=[optimization.model], num_microbatches=1,
        seq_length=LENGTH, micro_batch_size=2, forward_only=False,
    )
    return optimization.step()
