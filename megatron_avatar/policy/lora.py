"""LoRA: trainable low-rank adapters beside the frozen linear layers of the language model.

A Hugging Face layer y = W x gets y + alpha / r · B (A x), exactly as PEFT would add it. Megatron-Core fuses q, k, v
and gate, up into one layer each; the adapters of a fused layer's parts share one A (stacked) and one B (in the rows of
the fused layer), so that a fused layer costs two small products whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_avatar.config.schema import LoraConfig
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.slots import Slot, linear_slots


class LoraAdapter(MegatronModule):
    """The adapters of one fused linear layer's n targeted Hugging Face layers.

    a [n r, inputs] stacks their A; b [outputs, r] holds their B row by row, in the order of the fused layer's rows;
    rows of an untargeted part stay zero. Sharded like the fused layer: where that splits its outputs, b is split and a
    is on every tensor-parallel rank; where it splits its inputs, the other way round.
    """

    def __init__(self, policy: OmniPolicy, slot: Slot, lora: LoraConfig, seed: int) -> None:
        super().__init__(config=policy.config)
        backend, weight = policy.backend, slot.parameter
        self.slot, self.rank, self.splits_outputs = slot, lora.rank, slot.dim == 0
        self.gated = len(slot.shapes) == 2
        targeted = [name for name in slot.shapes if leaf(name) in lora.targets]
        outputs, inputs = weight.shape
        like: dict[str, Any] = dict(dtype=weight.dtype, device=weight.device)
        self.a = nn.Parameter(torch.empty(len(targeted) * lora.rank, inputs, **like))
        self.b = nn.Parameter(torch.zeros(outputs, lora.rank, **like))
        sharded, replicated, axis = (self.b, self.a, 0) if self.splits_outputs else (self.a, self.b, 1)
        tensor_parallel.set_tensor_model_parallel_attributes(sharded, True, axis, 1)
        # Under sequence parallelism each rank sees its own tokens: Megatron-Core then sums this gradient over them.
        setattr(replicated, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010  (Megatron-Core's mark)

        columns = next(iter(slot.shapes.values()))[1]
        self.a_slot = Slot(
            self.a,
            {adapter_name(name, "A"): (lora.rank, columns) for name in targeted},
            dim=None if self.splits_outputs else 1,
        )
        self.b_slot = Slot(
            self.b,
            {adapter_name(name, "B"): (rows, lora.rank) for name, (rows, _) in slot.shapes.items()},
            dim=0 if self.splits_outputs else None,
            blocks=slot.blocks,
        )
        # Which A each row of b belongs to, times the adapters' weight: [outputs, n].
        marks = [
            torch.tensor([[name == other for other in targeted]], device="cpu").expand(rows, -1).float()
            for name, (rows, _) in slot.shapes.items()
        ]
        owners = self.b_slot.take(marks, backend.tp, backend.tp_rank) * (lora.alpha / lora.rank)
        self.register_buffer("owners", owners.to(weight.device), persistent=False)
        self.kept_up: Tensor | None = None  # see keep_up
        self._room: Tensor | None = None  # its place, the same each time: graphs of decode steps read it

        # Like PEFT: A uniform, B zero. Keyed by name, so that every layout starts from the same values.
        bound = columns**-0.5
        draws = [keyed_rng(seed, "lora", name).uniform(-bound, bound, (lora.rank, columns)) for name in targeted]
        with torch.no_grad():
            full = [torch.from_numpy(draw.astype(np.float32)) for draw in draws]
            self.a.copy_(self.a_slot.take(full, backend.tp, backend.tp_rank))

    def _up(self) -> Tensor:
        """b as the product with the stacked A needs it: float32 [outputs, n r], weighted, zero off a row's own A."""
        return (self.b.float()[:, None] * self.owners[:, :, None]).flatten(1)

    def keep(self) -> None:
        """Make `_up` for all calls until `kept_up` is None again."""
        up = self._up().to(self.b.dtype)
        self._room = up.clone() if self._room is None else self._room.copy_(up)
        self.kept_up = self._room

    def forward(self, inputs: Tensor, sequence_parallel: bool) -> Tensor:
        """What is added to the fused layer's output for its `inputs` [s, 1, inputs]."""
        low = F.linear(inputs, self.a)
        if self.splits_outputs:
            if sequence_parallel:
                low = tensor_parallel.gather_from_sequence_parallel_region(low)
            else:
                low = tensor_parallel.copy_to_tensor_model_parallel_region(low)
        elif sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        return F.linear(low, self._up().to(low.dtype) if self.kept_up is None else self.kept_up)

    def add_to(self, linear: nn.Module, args: tuple[Tensor], output: tuple[Tensor, Tensor | None]) -> tuple:
        """The forward hook of the fused layer."""
        out, bias = output
        return out + self(args[0], linear.sequence_parallel), bias

    def merged(self) -> Tensor:
        """This rank's part of the fused weight with the adapters in it, in float32."""
        return self.slot.parameter.float() + self._up() @ self.a.float()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"b": 0} if self.splits_outputs else {"a": 1},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:  # gate and up rows, as the fused layer's own
            single = metadata.get("singleton_local_shards", False)
            state[f"{prefix}b"] = apply_swiglu_sharded_factory(state[f"{prefix}b"], sharded_offsets, single)
        return state


def add_lora(policy: OmniPolicy, lora: LoraConfig, seed: int = 0) -> None:
    """Freeze the language model and put an adapter beside every layer that `lora.targets` names.

    The values it starts from depend on `seed` and the layers' names alone. Raises ValueError for a target that
    matches no layer.
    """
    policy.language_model.requires_grad_(False)
    found = set()
    for layer in policy.language_model.decoder.layers:
        for fused, slot in linear_slots(policy, layer).items():
            names = {leaf(name) for name in slot.shapes}
            found |= names
            if names.isdisjoint(lora.targets):
                continue
            room = layer.self_attention if hasattr(layer.self_attention, fused) else layer.mlp
            adapter = LoraAdapter(policy, slot, lora, seed)
            room.add_module(fused.replace("linear", "lora"), adapter)
            getattr(room, fused).register_forward_hook(adapter.add_to)
    if unmatched := set(lora.targets) - found:
        experts = " (experts take no adapters)" if policy.config.experts else ""
        raise ValueError(
            f"model.lora.targets: {', '.join(sorted(unmatched))} matches no linear layer of the language model{experts}"
            f": choose from {', '.join(sorted(found))}"
        )


def lora_adapters(policy: OmniPolicy) -> Iterator[LoraAdapter]:
    """This rank's adapters, layer by layer."""
    return (module for module in policy.modules() if isinstance(module, LoraAdapter))


@contextmanager
def keep_up(policy: OmniPolicy) -> Iterator[None]:
    """Make every adapter's `_up` once, for as long as no adapter changes: while tokens are generated."""
    adapters = list(lora_adapters(policy))
    try:
        for adapter in adapters:
            adapter.keep()
        yield
    finally:
        for adapter in adapters:
            adapter.kept_up = None


def leaf(name: str) -> str:
    """The layer's own name: q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2]


def adapter_name(name: str, part: str) -> str:
    """PEFT's name of the A or B beside a weight."""
    return f"{name.removesuffix('weight')}lora_{part}.weight"
