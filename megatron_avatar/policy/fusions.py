"""Which layers and which Adam run: Transformer Engine's and Apex's where they are installed, else torch's own.

What is installed is Megatron-Core's finding, made when it is imported; it is taken where a self-test at the start
agrees with torch (selftest.py). A GPU is needed for either; on a CPU, and with parallel.kernels=torch, everything is
torch's. Transformer Engine's linear layers stay apart from its norms, to keep the parameters' names, and with them
weights and checkpoints, the same in all cases; by construction: it has not been run with Transformer Engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_avatar.policy import selftest
from megatron_avatar.policy.attention import GroupCoreAttention
from megatron_avatar.policy.kernels.norm import norm
from megatron_avatar.policy.layer import OmniLayer

PARTS = {"linear": "linear layers", "adam": "AdamW", "accumulate": "gradient accumulation"}
TITLES = {"transformer_engine": "Transformer Engine", "apex": "Apex", "torch": "torch"}
# Megatron-Core's record of where its Adam comes from: module, name, found here, value for torch's.
ADAM_FLAGS = [
    (module, name, getattr(module, name), of_torch)
    for module, name, of_torch in (
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
        (distrib_optimizer, "USING_TE_OPTIMIZER", False),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", False),
    )
]


class RMSNorm(torch.nn.RMSNorm):
    """A norm whose input may be a float32 stream and whose output has the weight's dtype, with the mark that makes
    Megatron-Core sum its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (Megatron-Core's mark)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        return norm(stream, self.weight, self.eps)


@dataclass(frozen=True)
class Fusions:
    """The choice: where layers and Adam come from, and what is fused. `missing` is what this machine lacks,
    `refused` what is installed and doesn't do as torch does."""

    layers: str = "torch"  # transformer_engine | torch
    adam: str = "torch"  # transformer_engine | apex | torch
    weight_gradients: bool = False  # a layer's backward adds to the float32 buffer by itself (Apex's kernel)
    missing: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """TransformerConfig's fields that follow."""
        return dict(
            transformer_impl="transformer_engine" if self.layers == "transformer_engine" else "local",
            gradient_accumulation_fusion=self.weight_gradients,
            bias_activation_fusion=False,  # the layer's own kernels
            # Dropout is off, softmax is the core attention's, and torch's norm has no persistent kernel.
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
        )

    def __str__(self) -> str:
        """One line for the log."""
        names = {package: f"{title} {_version(package)}".strip() for package, title in TITLES.items()}
        parts = [f"layers of {names[self.layers]}", f"AdamW of {names[self.adam]}"]
        parts += ["fused gradient accumulation"] * self.weight_gradients
        line = ", ".join(parts) + (f"; not installed: {', '.join(self.missing)}" if self.missing else "")
        return line + "".join(f"; left aside: {reason}" for reason in self.refused)


def choose_fusions(kernels: str, *, on_cpu: bool) -> Fusions:
    """What to run for parallel.kernels: `auto` takes what Megatron-Core found and agrees with torch, `torch` nothing of
    it. The first call on GPUs is made by all ranks together: one that refuses speaks for all."""
    if on_cpu or kernels == "torch":
        return Fusions()
    adam_of_torch = ADAM_FLAGS[0][2]
    has_engine = transformer_engine.HAVE_TE
    can_accumulate = megatron_layers._grad_accum_fusion_available
    adam = "torch" if adam_of_torch else megatron_optimizer.Adam.__module__.split(".")[0]
    found = {"linear": "transformer_engine" * has_engine, "adam": adam * (adam != "torch"),
             "accumulate": "apex" * can_accumulate}  # fmt: skip
    refused = refusals(tuple(found.items()), dist.get_world_size() if dist.is_initialized() else 1)
    missing = ["Transformer Engine"] * (not has_engine) + ["Apex with --cuda_ext"] * (not can_accumulate)
    return Fusions(
        layers="transformer_engine" if has_engine and "linear" not in refused else "torch",
        adam="torch" if "adam" in refused else adam,
        weight_gradients=can_accumulate and "accumulate" not in refused,
        missing=tuple(missing),
        refused=tuple(f"{TITLES[found[part]]}'s {PARTS[part]} ({reason})" for part, reason in refused.items()),
    )


@functools.cache
def refusals(found: tuple[tuple[str, str], ...], ranks: int) -> dict[str, str]:
    """Why no rank takes a part: some rank's test, or what it has. Replicas of different kernels drift apart."""
    mine = {part: (package, tested(part) if package else "") for part, package in found}
    everyone: list[Any] = [mine]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, mine)
    reasons: dict[str, str] = {}
    for part, package in found:
        for rank, (theirs, reason) in enumerate(verdicts[part] for verdicts in everyone):
            if package and (theirs != package or reason):
                said = reason if theirs == package else f"it has {TITLES.get(theirs, 'none')}"
                reasons.setdefault(part, f"rank {rank}: {said}" if ranks > 1 else said)
    return reasons


def tested(part: str) -> str:
    """Why a package's part isn't taken, from a test on this rank's GPU; empty where it agrees with torch."""
    tests: dict[str, tuple[Callable[..., str], Callable[[], Any]]] = {
        "linear": (selftest.linear, lambda: import_module("transformer_engine.pytorch").Linear),
        "adam": (selftest.adam, lambda: megatron_optimizer.Adam),
        "accumulate": (selftest.accumulate,
                       lambda: import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32),
    }  # fmt: skip
    return selftest.verdict(*tests[part], torch.device("cuda", torch.cuda.current_device()))


def pin_adam(fusions: Fusions) -> None:
    """Make the next optimizer take the chosen Adam: Megatron-Core alone would take whichever it found."""
    for module, name, found, of_torch in ADAM_FLAGS:
        setattr(module, name, of_torch if fusions.adam == "torch" else found)


def layer_spec(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """A decoder layer around our core attention, and the class of its norms, for config.transformer_impl."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    layer.module = OmniLayer
    attention.core_attention = GroupCoreAttention
    if config.transformer_impl == "transformer_engine":
        attention.linear_qkv = mlp.linear_fc1 = transformer_engine.TEColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = transformer_engine.TERowParallelLinear
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # built from source
        return ""
