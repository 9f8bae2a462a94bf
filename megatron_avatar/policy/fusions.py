"""Which layers, Adam, gradient norms and attention run: Transformer Engine's, Apex's and FlashAttention-3's where they
are installed, else torch's own; and whether the package's own kernels do (kernels/), else torch's operations.

What is installed is Megatron-Core's finding, made when it is imported; it is taken where a self-test at the start
agrees with torch (selftest.py). A GPU is needed for each; on a CPU, and with parallel.kernels=torch, everything is
torch's. Norms, rotary positions and SwiGLU have kernels of our own, so none of theirs is taken. Transformer Engine's
linear layers stay apart from norms, to keep the parameters' names, and with them weights and checkpoints, the same in
all cases; by construction: it has not been run with Transformer Engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import attention as torch_attention

from megatron_avatar.policy import flash, selftest
from megatron_avatar.policy.attention import GroupCoreAttention
from megatron_avatar.policy.kernels import device, probe
from megatron_avatar.policy.kernels.norm import norm
from megatron_avatar.policy.layer import OmniLayer
from megatron_avatar.policy.mixture import Mixture, through_experts

# Parts, in the order in which they are tested; a layer's gradient accumulation is its own package's.
PARTS = {"linear": "linear layers", "engine_accumulate": "gradient accumulation", "adam": "AdamW",
         "accumulate": "gradient accumulation", "norms": "gradient norms", "attention": "attention",
         "kernels": "kernels of this package"}  # fmt: skip
TITLES = {"transformer_engine": "Transformer Engine", "apex": "Apex", "flash_attn_3": "FlashAttention-3",
          "triton": "Triton", "torch": "torch"}  # fmt: skip
APEX_ACCUMULATES = megatron_layers._grad_accum_fusion_available
FLASH_3 = "FA3"  # torch's name of it (torch.nn.attention.activate_flash_attention_impl)
HOPPER = (9, 0)  # the GPUs that it is made for


def apply_at_once(function: Callable, flag: torch.Tensor, lists: list[list[torch.Tensor]], *arguments: Any) -> Any:
    """torch's in place of Apex's multi_tensor_applier."""
    return function(lists, *arguments)


def l2_norm(lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
    """The norm [1] of all tensors together. Megatron-Core's own waits for the device once a tensor."""
    assert not per_tensor
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0])))[None], None


def scale_each(lists: list[list[torch.Tensor]], factor: float) -> None:
    """factor * source into each target, in the target's dtype."""
    for source, target in zip(*lists, strict=True):
        torch.mul(source, factor, out=target)


def _record(*rows: tuple[Any, str, Any]) -> list[tuple[Any, str, Any, Any]]:
    return [(module, name, getattr(module, name), of_torch) for module, name, of_torch in rows]


# Megatron-Core's record of where its kernels come from: module, name, found here, torch's.
FLAGS = {
    "adam": _record(
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
        (distrib_optimizer, "USING_TE_OPTIMIZER", False),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", False),
    ),
    "norms": _record(
        (clip_grads, "multi_tensor_applier", apply_at_once),
        (clip_grads, "l2_norm_impl", l2_norm),
        (clip_grads, "multi_tensor_scale_impl", scale_each),
        (mixed_precision, "multi_tensor_applier", apply_at_once),
        (mixed_precision, "multi_tensor_scale_impl", scale_each),
    ),
}


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
    """The choice: where layers, Adam, gradient norms and attention come from, whether the package's kernels run, and
    what is fused. `missing` is what this machine lacks, `refused` what is installed and doesn't do as torch does."""

    layers: str = "torch"  # transformer_engine | torch
    adam: str = "torch"  # transformer_engine | apex | torch
    norms: str = "torch"  # transformer_engine | apex | torch
    attention: str = "torch"  # flash_attn_3 | torch
    kernels: str = "torch"  # triton | torch
    weight_gradients: bool = False  # a layer's backward adds to the float32 buffer by itself
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
        parts += [f"gradient norms of {names[self.norms]}"] * (self.norms != "torch")
        parts += [names[self.attention]] * (self.attention != "torch")
        parts += [f"own kernels in {names[self.kernels]}"] * (self.kernels != "torch")
        parts += ["fused gradient accumulation"] * self.weight_gradients
        line = ", ".join(parts) + (f"; not installed: {', '.join(self.missing)}" if self.missing else "")
        return line + "".join(f"; left aside: {reason}" for reason in self.refused)


def choose_fusions(kernels: str, *, on_cpu: bool, dtype: torch.dtype) -> Fusions:
    """What to run for parallel.kernels and a model's dtype: `auto` takes what is found and agrees with torch, `torch`
    nothing of it. The first call on GPUs is made by all ranks together: one that refuses speaks for all."""
    if on_cpu or kernels == "torch":
        return Fusions()
    found = installed(dtype)
    refused = refusals(tuple(found.items()), dtype, dist.get_world_size() if dist.is_initialized() else 1)
    taken = {part: package if package and part not in refused else "torch" for part, package in found.items()}
    engine = taken["linear"] == "transformer_engine"
    accumulates = taken["engine_accumulate" if engine else "accumulate"] != "torch"
    missing = ["Transformer Engine"] * (not found["linear"])
    missing += ["Apex with --cuda_ext"] * (not found["accumulate"] and not engine)
    missing += ["FlashAttention-3"] * (not found["attention"] and fits_flash_3(dtype))
    return Fusions(
        layers=taken["linear"], adam=taken["adam"], norms=taken["norms"], attention=taken["attention"],
        kernels=taken["kernels"], weight_gradients=accumulates, missing=tuple(missing),
        refused=tuple(f"{TITLES[found[part]]}'s {PARTS[part]} ({reason})" for part, reason in refused.items()),
    )  # fmt: skip


def installed(dtype: torch.dtype) -> dict[str, str]:
    """The package that has each of PARTS here; empty where none does."""
    engine = "transformer_engine" * transformer_engine.HAVE_TE
    adam = "" if FLAGS["adam"][0][2] else package_of(megatron_optimizer.Adam)
    norms = package_of(FLAGS["norms"][0][2])
    flash_3 = fits_flash_3(dtype) and find_spec("flash_attn_interface") is not None
    triton = "triton" * (not device.obstacle(torch.cuda.current_device()))
    return {"linear": engine, "engine_accumulate": engine, "adam": adam, "accumulate": "apex" * APEX_ACCUMULATES,
            "norms": "" if norms == "megatron" else norms, "attention": "flash_attn_3" * flash_3,
            "kernels": triton}  # fmt: skip


def package_of(thing: Any) -> str:
    return thing.__module__.split(".")[0]


def fits_flash_3(dtype: torch.dtype) -> bool:
    """Whether FlashAttention-3 would run here: a GPU that it is made for, a dtype, and a torch that has a switch."""
    half = dtype in (torch.float16, torch.bfloat16)
    switch = FLASH_3 in getattr(torch_attention, "list_flash_attention_impls", list)()
    return half and switch and torch.cuda.get_device_capability() == HOPPER


@functools.cache
def refusals(found: tuple[tuple[str, str], ...], dtype: torch.dtype, ranks: int) -> dict[str, str]:
    """Why no rank takes a part: some rank's test, or what it has. Replicas of different kernels drift apart."""
    mine = {part: (package, tested(part, dtype) if package else "") for part, package in found}
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


def tested(part: str, dtype: torch.dtype) -> str:
    """Why a package's part isn't taken, from a test on this rank's GPU; empty where it agrees with torch. `experts`:
    what speaks against torch's own products of a mixture."""
    engine = functools.partial(_imported, "transformer_engine.pytorch", "Linear")
    apex = functools.partial(_imported, "fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32")
    tests: dict[str, tuple[Callable[..., str], Callable[[], Any]]] = {
        "linear": (selftest.linear, engine),
        "engine_accumulate": (selftest.accumulating_linear, engine),
        "adam": (selftest.adam, lambda: megatron_optimizer.Adam),
        "accumulate": (selftest.accumulate, apex),
        "norms": (selftest.norms, lambda: tuple(found for _, _, found, _ in FLAGS["norms"][:3])),
        "attention": (selftest.attention, flash_3),
        "kernels": (probe.own_kernels, lambda: probe.OURS),
        "experts": (selftest.experts, lambda: through_experts),
    }
    before = active_attention()
    try:
        return selftest.verdict(*tests[part], torch.device("cuda", torch.cuda.current_device()), dtype)
    finally:
        switch_attention(before)


def _imported(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def flash_3() -> flash.Kernel:
    """FlashAttention-3 by torch's switch, which puts it in the place of FlashAttention-2 in the whole process."""
    switch_attention("flash_attn_3")
    return flash.FLASH_VARLEN


def active_attention() -> str:
    """Whose torch's operations of FlashAttention are now: flash_attn_3, or torch (an older one has no switch)."""
    now = getattr(torch_attention, "current_flash_attention_impl", lambda: None)()
    return "flash_attn_3" if now == FLASH_3 else "torch"


def switch_attention(package: str) -> None:
    """Make torch's operations of FlashAttention those of `package`: flash_attn_3, or torch's own."""
    if package == active_attention():
        return
    if package == "flash_attn_3":
        torch_attention.activate_flash_attention_impl(FLASH_3)
    else:
        torch_attention.restore_flash_attention_impl()


def pin(fusions: Fusions) -> None:
    """Make the models and optimizers that are built from now on take what was chosen: Megatron-Core alone would take
    whichever it found."""
    for part, package in (("adam", fusions.adam), ("norms", fusions.norms)):
        for module, name, found, of_torch in FLAGS[part]:
            setattr(module, name, of_torch if package == "torch" else found)
    # Transformer Engine's layers need no Apex for it; Megatron-Core's output layer, whose product is ours, asks for it.
    megatron_layers._grad_accum_fusion_available = APEX_ACCUMULATES or fusions.weight_gradients
    switch_attention(fusions.attention)
    device.switch(fusions.kernels == "triton")


def layer_spec(config: Any) -> tuple[ModuleSpec, type]:
    """A decoder layer around our core attention, with a mixture where there are experts, and the class of its norms,
    for config.transformer_impl."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    layer.module = OmniLayer
    attention.core_attention = GroupCoreAttention
    if config.transformer_impl == "transformer_engine":
        attention.linear_qkv = mlp.linear_fc1 = transformer_engine.TEColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = transformer_engine.TERowParallelLinear
    if config.experts:
        layer.submodules.mlp = Mixture
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # built from source
        return ""
