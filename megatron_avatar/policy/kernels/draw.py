"""One token a row by inverse CDF over the allowed vocabulary, in two passes over the logits.

The first pass leaves, for each block of the vocabulary, its largest logit, the sum of exponentials relative to that,
the allowed part of the sum, and the most likely allowed token. The second finds the block in which the row's uniform
number falls, and the token inside of it. Sums are float64, in the vocabulary's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_avatar.policy.kernels.device import next_power, operation, runs_triton, tl, triton

BLOCK = 2048


def draw_tokens(logits: Tensor, uniforms: Tensor | None, temperature: float, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 and their log-probabilities [R] float32 under the full softmax at the temperature.

    logits [R, V] float32; uniforms [R] float64 in [0, 1), None takes the most likely token; banned [V] bool, never
    drawn. For logits that are not finite some token, and NaN.
    """
    greedy = uniforms is None
    uniforms = logits.new_zeros(len(logits), dtype=torch.float64) if greedy else uniforms
    return _draw(logits, uniforms, temperature, banned, greedy)


def torch_draw(
    logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """The formula."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    allowed = logprobs.masked_fill(banned, float("-inf"))
    if greedy:
        ids = allowed.argmax(dim=-1, keepdim=True)
    else:
        mass = allowed.double().exp()
        ids = find(mass, mass.cumsum(dim=-1), uniforms[:, None])
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


def find(mass: Tensor, cdf: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [R, 1] at the shares uniforms [R, 1] of the running sums cdf [R, V] of mass [R, V]; each has mass."""
    total = cdf[:, -1:]
    point = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))  # below it even after rounding
    ids = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[-1] - 1)  # V, where logits are not a number
    # Sums made in parallel may fall in places, and lead to a token without mass: never to a banned one.
    return ids.where(mass.gather(-1, ids) > 0, mass.argmax(dim=-1, keepdim=True))


# ----------------------------------------------------------------------------------------------------------------
# Triton


@triton.jit
def _scores(logits, banned, row, block, width, temperature, BLOCK: tl.constexpr):
    """A block's tokens, its logits over the temperature, and which of them may be drawn."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < width
    scores = tl.load(logits + row * width + tokens, inside, float("-inf")) / temperature
    allowed = inside & (tl.load(banned + tokens, inside, 1) == 0)
    return tokens, scores, allowed


@triton.jit
def _stats_kernel(
    logits, banned, highest, total, mass, likely, width, temperature, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, scores, allowed = _scores(logits, banned, row, block, width, temperature, BLOCK)
    top = tl.max(scores, 0)
    parts = tl.exp((scores - top).to(tl.float64))
    place = row * blocks + block
    tl.store(highest + place, top)
    tl.store(total + place, tl.sum(parts, 0))
    tl.store(mass + place, tl.sum(tl.where(allowed, parts, 0.0), 0))
    tl.store(likely + place, block * BLOCK + tl.argmax(tl.where(allowed, scores, float("-inf")), 0))


@triton.jit
def _find_kernel(
    logits, banned, uniforms, highest, total, mass, likely, ids, logprobs, width, temperature, blocks,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCKS)
    there = numbers < blocks
    tops = tl.load(highest + row * blocks + numbers, there, float("-inf"))
    top = tl.max(tops, 0)
    scale = tl.exp((tops - top).to(tl.float64))
    everything = tl.sum(tl.where(there, tl.load(total + row * blocks + numbers, there, 0.0) * scale, 0.0), 0)
    best = tl.load(likely + row * blocks + numbers, there, 0)
    best_scores = tl.load(logits + row * width + best, there, float("-inf")) / temperature
    best_banned = tl.load(banned + best, there, 1) != 0
    best_scores = tl.where(best_banned, float("-inf"), best_scores)
    first = tl.argmax(best_scores, 0)
    token = tl.sum(tl.where(numbers == first, best, 0), 0)
    if not GREEDY:
        own = tl.where(there, tl.load(mass + row * blocks + numbers, there, 0.0) * scale, 0.0)
        running = tl.cumsum(own, 0)
        whole = tl.sum(own, 0)
        point = tl.minimum(tl.load(uniforms + row), 1.0 - 1.1102230246251565e-16) * whole
        block = tl.minimum(tl.sum((there & (running <= point)).to(tl.int32), 0), blocks - 1)
        before = tl.sum(tl.where(numbers < block, own, 0.0), 0)
        tokens, scores, allowed = _scores(logits, banned, row, block, width, temperature, BLOCK)
        masses = tl.where(allowed, tl.exp((scores - top).to(tl.float64)), 0.0)
        place = tl.sum((before + tl.cumsum(masses, 0) <= point).to(tl.int32), 0)
        place = tl.minimum(place, BLOCK - 1)
        found = tl.sum(tl.where(tl.arange(0, BLOCK) == place, masses, 0.0), 0)
        token = tl.where(found > 0, block * BLOCK + place, token)  # rounding may lead to a token without mass
    token = tl.minimum(token, width - 1)
    score = tl.load(logits + row * width + token) / temperature
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprobs + row, ((score - top).to(tl.float64) - tl.log(everything)).to(tl.float32))


def triton_draw(
    logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """By the kernels: the same draw, but for uniform numbers that lie on a token's border to about 1e-7."""
    logits, (rows, width) = logits.contiguous(), logits.shape
    blocks = triton.cdiv(width, BLOCK)
    highest = logits.new_empty(rows, blocks)
    total, mass = (logits.new_empty(rows, blocks, dtype=torch.float64) for _ in "ab")
    likely = logits.new_empty(rows, blocks, dtype=torch.int32)
    _stats_kernel[(rows, blocks)](
        logits, banned, highest, total, mass, likely, width, temperature, blocks, BLOCK=BLOCK
    )
    ids, logprobs = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
    _find_kernel[(rows,)](
        logits, banned, uniforms, highest, total, mass, likely, ids, logprobs, width, temperature, blocks,
        GREEDY=greedy, BLOCK=BLOCK, BLOCKS=next_power(blocks),
    )  # fmt: skip
    return ids, logprobs


@operation("draw")
def _draw(logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    return (triton_draw if runs_triton(logits) else torch_draw)(logits, uniforms, temperature, banned, greedy)


@_draw.register_fake
def _(logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
