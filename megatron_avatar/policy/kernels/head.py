"""A chunk of logits in one pass each way: the running softmax forward, the gradient of the scores backward.

Logits l are [N, W] float32, products of hidden states with W rows of the output layer, the first of which is token
`start`; they are divided by the temperature here. The running state [4, N] float32 holds, over the chunks so far, the
largest l, sum exp(l - largest), sum exp(l - largest) * (l - largest), and the target's l.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_avatar.policy.kernels.device import operation, runs_triton, tl, triton

BLOCK = 4096


def new_state(tokens: int, device: torch.device) -> Tensor:
    """Of no chunk: [4, N]."""
    state = torch.zeros(4, tokens, dtype=torch.float32, device=device)
    state[0] = torch.finfo(torch.float32).min
    return state


def add_chunk(state: Tensor, logits: Tensor, target_ids: Tensor, start: int, temperature: float) -> None:
    """Take a chunk into the running state, in place; `logits` are used up."""
    if runs_triton(logits):
        _add_chunk(state, logits, target_ids, start, temperature)
    else:
        torch_add_chunk(state, logits, target_ids, start, temperature)


def scores_gradient(
    logits: Tensor, target_ids: Tensor, normaliser: Tensor, grad: Tensor, start: int, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What flows back to a chunk's products [N, W] in `dtype`, from `grad` [N] over the temperature at the
    log-probabilities; normaliser [N] is log sum exp(l). `logits` are used up."""
    arguments = logits, target_ids, normaliser, grad, start, temperature, dtype
    return _scores_gradient(*arguments) if runs_triton(logits) else torch_scores_gradient(*arguments)


def rescale(total: Tensor, weighted: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums relative to another maximum, `new` >= `old`: (total, weighted, new)."""
    shift = old - new
    scale = shift.exp()
    return total * scale, (weighted + total * shift) * scale, new


# ----------------------------------------------------------------------------------------------------------------
# torch


def torch_add_chunk(state: Tensor, logits: Tensor, target_ids: Tensor, start: int, temperature: float) -> None:
    """The formula."""
    highest, total, weighted, target = state.unbind()
    logits = logits if temperature == 1 else logits.div_(temperature)
    owned = (target_ids >= start) & (target_ids < start + logits.shape[1])
    own = logits.gather(1, (target_ids - start).where(owned, 0)[:, None])[:, 0]
    target.copy_(own.where(owned, target))
    new_total, new_weighted, new_highest = rescale(total, weighted, highest, highest.maximum(logits.amax(dim=1)))
    shifted = logits.sub_(new_highest[:, None])
    exp = shifted.exp()
    total.copy_(new_total + exp.sum(dim=1))
    weighted.copy_(new_weighted + exp.mul_(shifted).sum(dim=1))
    highest.copy_(new_highest)


def torch_scores_gradient(
    logits: Tensor, target_ids: Tensor, normaliser: Tensor, grad: Tensor, start: int, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The formula."""
    logits = logits if temperature == 1 else logits.div_(temperature)
    scores = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None])
    owned = ((target_ids >= start) & (target_ids < start + logits.shape[1])).float()
    place = (target_ids - start).clamp(0, logits.shape[1] - 1)
    scores.scatter_add_(1, place[:, None], (owned * grad)[:, None])
    return scores.to(dtype)


# ----------------------------------------------------------------------------------------------------------------
# Triton: a row a program forward, a block of a row backward


@triton.jit
def _add_kernel(state, logits, targets, tokens, width, start, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest, total = tl.load(state + row), tl.load(state + tokens + row)
    weighted, target = tl.load(state + 2 * tokens + row), tl.load(state + 3 * tokens + row)
    wanted = tl.load(targets + row) - start
    for first in range(0, width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < width
        scores = tl.load(logits + row * width + places, inside, float("-inf")) / temperature
        new = tl.maximum(highest, tl.max(scores, 0))
        shift = highest - new
        weighted = (weighted + total * shift) * tl.exp(shift)
        total = total * tl.exp(shift)
        shifted = tl.where(inside, scores - new, 0.0)
        exp = tl.where(inside, tl.exp(shifted), 0.0)
        total += tl.sum(exp, 0)
        weighted += tl.sum(exp * shifted, 0)
        target += tl.sum(tl.where(inside & (places == wanted), scores, 0.0), 0)
        highest = new
    tl.store(state + row, highest)
    tl.store(state + tokens + row, total)
    tl.store(state + 2 * tokens + row, weighted)
    tl.store(state + 3 * tokens + row, target)


@triton.jit
def _gradient_kernel(
    logits, targets, normaliser, grad, out, width, start, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < width
    scores = tl.load(logits + row * width + places, inside, 0.0) / temperature
    weight = tl.load(grad + row)
    own = tl.where(places == tl.load(targets + row) - start, weight, 0.0)
    scores = own - tl.exp(scores - tl.load(normaliser + row)) * weight
    tl.store(out + row * width + places, scores.to(out.dtype.element_ty), inside)


def triton_add_chunk(state: Tensor, logits: Tensor, target_ids: Tensor, start: int, temperature: float) -> None:
    """By the kernel: no pass but one reading of the logits. A target of another chunk adds nothing."""
    tokens, width = logits.shape
    if tokens:
        _add_kernel[(tokens,)](state, logits, target_ids, tokens, width, start, temperature, BLOCK=BLOCK)


def triton_scores_gradient(
    logits: Tensor, target_ids: Tensor, normaliser: Tensor, grad: Tensor, start: int, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """By the kernel: the logits are read once, and the gradient is written once, in `dtype`."""
    (tokens, width), out = logits.shape, torch.empty_like(logits, dtype=dtype)
    if tokens:
        _gradient_kernel[(tokens, triton.cdiv(width, BLOCK))](
            logits, target_ids, normaliser, grad, out, width, start, temperature, BLOCK=BLOCK
        )
    return out


@operation("add_chunk", mutates=("state",))
def _add_chunk(state: Tensor, logits: Tensor, target_ids: Tensor, start: int, temperature: float) -> None:
    triton_add_chunk(state, logits, target_ids, start, temperature)


@_add_chunk.register_fake
def _(state: Tensor, logits: Tensor, target_ids: Tensor, start: int, temperature: float) -> None:
    return None


@operation("scores_gradient")
def _scores_gradient(
    logits: Tensor, target_ids: Tensor, normaliser: Tensor, grad: Tensor, start: int, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return triton_scores_gradient(logits, target_ids, normaliser, grad, start, temperature, dtype)


@_scores_gradient.register_fake
def _(
    logits: Tensor, target_ids: Tensor, normaliser: Tensor, grad: Tensor, start: int, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits, dtype=dtype)
