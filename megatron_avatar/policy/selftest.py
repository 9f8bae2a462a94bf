"""Kernels of other packages against torch, once a process, in the model's dtype: what differs, or fails, is not taken.

`kernels=auto` finds Transformer Engine, Apex and FlashAttention-3 in many containers, built for other GPUs or versions
than those at hand. Each test returns what differs, in words; nothing where they agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.policy import flash

ROWS, COLUMNS, TOKENS = 96, 64, 32
# Of the largest number: products in a dtype (float32's by TensorFloat-32); a wrong layout differs by all of it.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}
ADAM_TOLERANCE = 1e-3  # Apex's formula rounds to 2.4e-5 in float32; one without the decay differs by 0.3
NORM_TOLERANCE = 1e-3  # one rounding to float16
STEPS = 3
# Head sizes of the language models and the encoders, and sequences of an attention: queries, and keys they all see.
HEAD_SIZES, QUERIES, KEYS = (64, 80, 128), (70, 5, 33), (129, 1, 64)


def differs(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest number of `theirs`; infinite where one isn't finite."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    theirs = theirs.double()
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def linear(make: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> str:
    """A column-parallel layer with a bias and a row-parallel one without, as the decoder's: outputs and gradients;
    `make` as transformer_engine.pytorch.Linear."""
    found = ""
    for mode, bias in (("column", True), ("row", False)):
        layer = make(COLUMNS, ROWS, bias=bias, parallel_mode=mode, params_dtype=dtype, device=device)
        ours, theirs = (_passed(layer, forward, device, dtype)
                        for forward in (layer, functools.partial(_plain, layer, bias)))  # fmt: skip
        names = ("output", "input's gradient", "weight's gradient", *["bias's gradient"] * bias)
        found = found or _said(names, ours, theirs, TOLERANCE[dtype])
    return found


def accumulating_linear(make: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> str:
    """The same layers' gradients of the weights, which they add to a float32 buffer by themselves."""
    found = ""
    for mode, bias in (("column", True), ("row", False)):
        layer = make(COLUMNS, ROWS, bias=bias, parallel_mode=mode, params_dtype=dtype, device=device,
                     fuse_wgrad_accumulation=True)  # fmt: skip
        layer.weight.main_grad = torch.ones(ROWS, COLUMNS, device=device)
        layer.weight.grad_added_to_main_grad = False
        x, g = _random(device, dtype)
        _passed(layer, layer, device, dtype)
        expected = 1 + g.float().t() @ x.float()
        found = found or _said(("gradient buffer",), (layer.weight.main_grad,), (expected,), TOLERANCE[dtype])
        if not layer.weight.grad_added_to_main_grad:
            found = found or "it doesn't say that it added the gradient to the buffer"
    return found


def accumulate(add: Callable[[Tensor, Tensor, Tensor], Any], device: torch.device, dtype: torch.dtype) -> str:
    """A weight's gradient added to a float32 buffer; `add` as fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32."""
    x, g = _random(device, dtype)
    buffer = torch.ones(ROWS, COLUMNS, device=device)
    expected = buffer + g.float().t() @ x.float()
    add(x, g, buffer)
    return _said(("gradient buffer",), (buffer,), (expected,), TOLERANCE[dtype])


def adam(make: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> str:
    """Some steps of AdamW, in float32 as main weights are in every `dtype`; `make` as FusedAdam of Transformer Engine
    and Apex."""
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


def norms(kernels: tuple[Callable, Callable, Callable], device: torch.device, dtype: torch.dtype) -> str:
    """The norm of gradients, also of those that aren't finite, which alone keeps a broken update from being applied;
    their scaling, and the copy of main weights into float16 ones; `kernels` as Megatron-Core finds them:
    multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale."""
    apply, l2_norm, scale = kernels
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator).to(device) for n in (ROWS * COLUMNS, 7, 70_001)]
    flag = torch.zeros(1, dtype=torch.int, device=device)
    norm = torch.cat(gradients).norm()
    scaled = [x.clone() for x in gradients]
    copy = torch.float16 if dtype is torch.float16 else torch.float32  # bfloat16 is copied without these kernels
    copied = [torch.zeros_like(x, dtype=copy) for x in gradients]
    found, _ = apply(l2_norm, flag, [gradients], False)
    apply(scale, flag, [scaled, scaled], 0.25)
    apply(scale, flag, [gradients, copied], 1.0)
    ours = (found.reshape(()), torch.cat(scaled), torch.cat(copied))
    theirs = (norm, 0.25 * torch.cat(gradients), torch.cat(gradients))
    said = _said(("norm", "scaling", "copy"), ours, theirs, NORM_TOLERANCE)
    for bad in (float("inf"), float("nan")):
        gradients[1][3] = bad
        found, _ = apply(l2_norm, torch.zeros_like(flag), [gradients], False)
        if bool(found.isfinite().all()):
            said = said or f"its norm differs from torch's by hiding {bad}"
    return said


def attention(kernel: flash.Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Segments that see themselves, and queries that see keys of other lengths: outputs, log-sum-exps and gradients,
    with two and with seven heads a key."""
    found = ""
    for size in HEAD_SIZES:
        for share in (2, 7):
            for lengths, causal in ((QUERIES, True), (KEYS, False)):
                generator = torch.Generator().manual_seed(size)
                shapes = [(sum(QUERIES), 2 * share), (sum(lengths), 2), (sum(lengths), 2), (sum(QUERIES), 2 * share)]
                tensors = [torch.randn(*shape, size, generator=generator).to(device, dtype) for shape in shapes]
                ours, theirs = (_attended(way, tensors, lengths, causal) for way in (kernel, flash.IN_CHUNKS))
                names = ("output", "log-sum-exp", "queries' gradient", "keys' gradient", "values' gradient")
                found = found or _said(names, ours, theirs, TOLERANCE[dtype])
    return found


class Sizes(NamedTuple):
    """Of a mixture: tokens, experts a token, all experts and the first and number of a rank's, hidden and inner."""

    tokens: int = 24
    top: int = 2
    experts: int = 6
    first: int = 1
    own: int = 4
    hidden: int = COLUMNS
    inner: int = 48


def experts(
    run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, sizes: Sizes = Sizes()  # noqa: B008
) -> str:
    """A rank's experts in products of all of them, against a loop in float32: outputs and gradients. One has no token,
    and some tokens' are another rank's; memory that products get has held what is no number. `run` as
    policy/mixture.py's `through_experts`."""
    generator = torch.Generator().manual_seed(0)
    tokens, top, _, first, own, hidden, inner = sizes
    chosen = torch.rand(tokens, sizes.experts, generator=generator)
    chosen[:, first + own // 2] = -1  # the one that nobody chooses
    chosen = chosen.topk(top, dim=1).indices.to(device)
    shapes = (tokens, hidden), (tokens, top), (own * 2 * inner, hidden), (own * hidden, inner), (tokens, hidden)
    scales = (1, 0.5, hidden**-0.5, inner**-0.5, 1)
    *inputs, grad = (torch.randn(*shape, generator=generator).mul(scale).to(device, dtype)
                     for shape, scale in zip(shapes, scales, strict=True))  # fmt: skip

    def passed(way: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        rows = (tokens * top, 2 * inner), (tokens * top, hidden), (own, 2 * inner, hidden), (own, hidden, inner)
        dirty = [torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in rows for _ in range(4)]
        del dirty  # what is allocated now finds it
        out = way(*leaves, chosen, first, sizes.experts)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

    names = ("output", "tokens' gradient", "shares' gradient", "first weights' gradient", "second weights' gradient")
    return _said(names, passed(run, dtype), passed(_one_by_one, torch.float32), TOLERANCE[dtype])


def _one_by_one(
    x: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, first: int, experts: int
) -> Tensor:
    own, out = len(down) // x.shape[1], torch.zeros_like(x)
    for k, (up, back) in enumerate(zip(gate_up.chunk(own), down.chunk(own), strict=True)):
        gate, inside = F.linear(x, up).chunk(2, dim=1)
        share = (shares * (chosen == first + k)).sum(dim=1, keepdim=True)
        out = out + share * F.linear(F.silu(gate) * inside, back)
    return out


def _attended(
    kernel: flash.Kernel, tensors: list[Tensor], lengths: flash.Lengths, causal: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    query, key, value, grad = tensors
    more = (QUERIES, lengths, causal, query.shape[-1] ** -0.5)
    output, lse = kernel.forward(query, key, value, *more)
    return output, lse, *kernel.backward(grad, query, key, value, output, lse, *more)


def _random(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's input [TOKENS, COLUMNS] and its output's gradient [TOKENS, ROWS]."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(TOKENS, n, generator=generator).to(device, dtype) for n in (COLUMNS, ROWS))
    return x, g


def _plain(layer: Any, bias: bool, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias if bias else None)


def _passed(layer: Any, forward: Callable, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output, the input's gradient, and the gradients that the layer's parameters have then."""
    layer.zero_grad(set_to_none=True)
    x, g = _random(device, dtype)
    x.requires_grad_()
    out = forward(x)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(g)
    assert x.grad is not None
    return out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None and p.numel())


def _said(names: tuple[str, ...], ours: tuple, theirs: tuple, tolerance: float) -> str:
    for name, one, other in zip(names, ours, theirs, strict=True):
        if not (error := differs(one, other)) <= tolerance:
            return f"its {name} differs from torch's by {error:.1e}"
    return ""


def verdict(test: Callable[..., str], make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> str:
    """Why a package's kernel isn't taken; empty where it agrees with torch. `make` finds it."""
    try:
        with torch.enable_grad():
            return test(make(), device, dtype)
    except Exception as error:  # a package built for something else may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
