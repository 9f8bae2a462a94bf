"""Which Hugging Face tensors each parameter of the policy is made of, under any tp and pp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.policy.mixture import Mixture
from megatron_avatar.policy.model import OmniPolicy

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """A parameter of this rank and the Hugging Face tensors that it is made of.

    The tensors are cut into `blocks` along dimension 0 and stacked block by block: per query group for q, k, v, per
    rank for gate and up. The result is split over the ranks along `dim`; None: every rank has all of it. Where `whole`,
    the ranks share the tensors out uncut: experts.
    """

    parameter: Tensor
    shapes: dict[str, Shape]
    dim: int | None = None
    blocks: int = 1
    duplicate: bool = False  # another stage exports it
    whole: bool = False

    def needed(self, tp: int, tp_rank: int) -> list[str]:
        """The tensors that this rank's part is made of."""
        names, share = list(self.shapes), len(self.shapes) // tp
        return names[tp_rank * share : (tp_rank + 1) * share] if self.whole else names

    def take(self, tensors: list[Tensor], tp: int, tp_rank: int) -> Tensor:
        """This rank's part of the full Hugging Face tensors that it needs; a view of them where it can be."""
        if self.whole:
            return torch.cat(tensors)
        blocks = self.blocks
        whole_blocks = self.dim == 0 and blocks % tp == 0
        if whole_blocks:  # cut first, so that only this rank's rows are read
            tensors, blocks = [tensor.chunk(tp)[tp_rank] for tensor in tensors], blocks // tp
        full = tensors[0]
        if len(tensors) > 1:
            full = torch.cat([tensor.unflatten(0, (blocks, -1)) for tensor in tensors], dim=1).flatten(0, 1)
        if self.dim is None or whole_blocks:
            return full
        size = self.parameter.shape[self.dim]
        if self.dim == 1:
            return full[:, tp_rank * size : (tp_rank + 1) * size]
        part = full[tp_rank * size : (tp_rank + 1) * size]
        if len(part) < size:  # only the vocabulary is padded
            part = F.pad(part, (0, 0) * (part.dim() - 1) + (0, size - len(part)))
        return part

    def join(self, full: Tensor) -> Iterator[Tensor]:
        """The Hugging Face tensors of the whole parameter, the parts of all tensor-parallel ranks put together."""
        rows = [shape[0] for shape in self.shapes.values()]
        parts = full[: sum(rows)].unflatten(0, (self.blocks, -1)).split([n // self.blocks for n in rows], dim=1)
        return (part.flatten(0, 1).contiguous() for part in parts)


def linear_slots(policy: OmniPolicy, layer: Any) -> dict[str, Slot]:
    """The weights of a decoder layer's fused linear layers, by those layers' names: all that may have adapters."""
    text, attention, mlp = policy.hf_config.text_config, layer.self_attention, layer.mlp
    hidden, size, prefix = text.hidden_size, policy.config.kv_channels, f"model.layers.{layer.layer_number - 1}."
    queries, keys = text.num_attention_heads * size, text.num_key_value_heads * size

    def slot(parameter: Tensor, room: str, rows: dict[str, int], columns: int, **kwargs) -> Slot:
        return Slot(parameter, {f"{prefix}{room}.{name}.weight": (n, columns) for name, n in rows.items()}, **kwargs)

    qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    found = {
        "linear_qkv": slot(
            attention.linear_qkv.weight, "self_attn", qkv, hidden, dim=0, blocks=text.num_key_value_heads
        ),
        "linear_proj": slot(attention.linear_proj.weight, "self_attn", {"o_proj": hidden}, queries, dim=1),
    }
    if isinstance(mlp, Mixture):
        return found
    inner = text.intermediate_size
    return found | {
        "linear_fc1": slot(
            mlp.linear_fc1.weight, "mlp", dict(gate_proj=inner, up_proj=inner), hidden, dim=0, blocks=policy.backend.tp
        ),
        "linear_fc2": slot(mlp.linear_fc2.weight, "mlp", {"down_proj": hidden}, inner, dim=1),
    }


def _mixture_slots(mixture: Mixture, text: Any, prefix: str) -> list[Slot]:
    """Router and experts, of which each has its own names."""
    hidden, inner = text.hidden_size, text.moe_intermediate_size
    experts = [f"{prefix}experts.{number}." for number in range(text.num_experts)]
    up: Shape = (inner, hidden)
    down: Shape = (hidden, inner)
    return [
        Slot(mixture.router, {f"{prefix}gate.weight": (text.num_experts, hidden)}),
        Slot(mixture.gate_up, {f"{expert}{name}_proj.weight": up for expert in experts for name in ("gate", "up")},
             dim=0, whole=True),
        Slot(mixture.down, {f"{expert}down_proj.weight": down for expert in experts}, dim=0, whole=True),
    ]


def _attention_slots(attention: Any, weights: Slot, prefix: str) -> list[Slot]:
    """What a family has beside the projections: their biases, or norms of queries and keys."""
    slots = []
    if attention.linear_qkv.bias is not None:
        biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in weights.shapes.items()}
        slots.append(Slot(attention.linear_qkv.bias, biases, dim=0, blocks=weights.blocks))
    if attention.config.qk_layernorm:
        for name, norm in (("q_norm", attention.q_layernorm), ("k_norm", attention.k_layernorm)):
            slots.append(Slot(norm.weight, {f"{prefix}{name}.weight": tuple(norm.weight.shape)}))
    return slots


def policy_slots(policy: OmniPolicy) -> list[Slot]:
    """All parameters of this rank but LoRA's adapters, with Hugging Face names as a Thinker's folder has them."""
    text, gpt = policy.hf_config.text_config, policy.language_model
    hidden, vocabulary = text.hidden_size, (policy.vocab_size, text.hidden_size)
    slots = []
    if policy.pre_process:
        for name, parameter in policy.towers.named_parameters():
            slots.append(Slot(parameter, {name: tuple(parameter.shape)}))
        slots.append(Slot(gpt.embedding.word_embeddings.weight, {"model.embed_tokens.weight": vocabulary}, dim=0))
    for layer in gpt.decoder.layers:
        prefix, linear = f"model.layers.{layer.layer_number - 1}.", linear_slots(policy, layer)
        slots += [
            Slot(layer.input_layernorm.weight, {f"{prefix}input_layernorm.weight": (hidden,)}),
            *linear.values(),
            *_attention_slots(layer.self_attention, linear["linear_qkv"], f"{prefix}self_attn."),
            Slot(layer.pre_mlp_layernorm.weight, {f"{prefix}post_attention_layernorm.weight": (hidden,)}),
        ]
        if isinstance(layer.mlp, Mixture):
            slots += _mixture_slots(layer.mlp, text, f"{prefix}mlp.")
    if policy.post_process:
        slots.append(Slot(gpt.decoder.final_layernorm.weight, {"model.norm.weight": (hidden,)}))
        if not policy.share_embeddings_and_output_weights:
            slots.append(Slot(gpt.output_layer.weight, {"lm_head.weight": vocabulary}, dim=0))
        elif not policy.pre_process:  # tied over pipeline stages: the last one holds a copy
            slots.append(Slot(gpt.output_layer.weight, {"model.embed_tokens.weight": vocabulary}, 0, duplicate=True))
    return slots
