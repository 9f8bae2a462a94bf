"""Transformer Engine's and Apex's kernels against torch, once a process: what differs, or fails, is not taken.

`kernels=auto` finds these packages in many containers, built for other GPUs or versions than those at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS, TOKENS = 96, 64, 32
TOLERANCE = 2e-2  # of the largest number: bfloat16's products; a wrong layout differs by all of it
ADAM_TOLERANCE = 1e-3  # Apex's formula rounds to 2.4e-5 in float32; one without the decay differs by 0.3
STEPS = 3


def differs(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest number of `theirs`; infinite where one isn't finite."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    theirs = theirs.double()
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def linear(make: Callable[..., Any], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """A linear layer's output and gradients; `make` as transformer_engine.pytorch.Linear. Empty where they agree."""
    layer = make(COLUMNS, ROWS, bias=True, params_dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(TOKENS, n, generator=generator).to(device, dtype) for n in (COLUMNS, ROWS))
    found = []
    for forward in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        layer.zero_grad(set_to_none=True)
        x = x.detach().requires_grad_()
        out = forward(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(g)
        found.append((out.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    names = ("output", "input's gradient", "weight's gradient", "bias's gradient")
    return _said(names, found[0], found[1], TOLERANCE)


def adam(make: Callable[..., Any], device: torch.device) -> str:
    """Some steps of AdamW in float32; `make` as FusedAdam of Transformer Engine and Apex."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(ROWS, COLUMNS, generator=generator).to(device) for _ in range(STEPS + 1))
    settings: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    found = []
    for build in (functools.partial(make, adam_w_mode=True), torch.optim.AdamW):
        weight = start.clone().requires_grad_()
        optimizer = build([weight], **settings)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append((weight.detach() - start,))
    return _said(("update",), found[0], found[1], ADAM_TOLERANCE)


def accumulate(add: Callable[[Tensor, Tensor, Tensor], Any], device: torch.device) -> str:
    """A weight's gradient added to a float32 buffer; `add` as fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(TOKENS, n, generator=generator).to(device, torch.bfloat16) for n in (COLUMNS, ROWS))
    buffer = torch.ones(ROWS, COLUMNS, device=device)
    expected = buffer + g.float().t() @ x.float()
    add(x, g, buffer)
    return _said(("gradient buffer",), (buffer,), (expected,), TOLERANCE)


def _said(names: tuple[str, ...], ours: tuple, theirs: tuple, tolerance: float) -> str:
    for name, one, other in zip(names, ours, theirs, strict=True):
        if not (error := differs(one, other)) <= tolerance:
            return f"its {name} differs from torch's by {error:.1e}"
    return ""


def verdict(test: Callable[..., str], make: Callable[[], Callable[..., Any]], device: torch.device) -> str:
    """Why a package's kernel isn't taken; empty where it agrees with torch. `make` finds it."""
    try:
        with torch.enable_grad():
            return test(make(), device)
    except Exception as error:  # a package built for something else may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
