"""The policy objective: clipped surrogate on fresh and replayed tokens, KL on fresh ones (paper, objective J).

    J = J_on + alpha * J_off - beta * KL,    loss = -J

Each part is averaged over a completion's tokens, then over the completions of that part in the whole
step. `token_weights` puts those averages into one weight a token, made from global counts, so that
`policy_loss` only ever sums: over tokens, micro-batches and ranks. N is the number of completion
tokens of a micro-batch, C the number of its completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def token_weights(
    lengths: Sequence[int], on_policy: Sequence[bool], n_on_total: int, n_off_total: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """Weights of every token in the step's objective.

    `lengths` [C] and `on_policy` [C] describe some completions; the totals count the completions of each
    part over all micro-batches and ranks, fillers excluded. Returns surrogate and KL weights, both
    [sum of lengths] float32: 1 / (L_i * total), times alpha off-policy; the KL weight is zero
    off-policy, where k3 under another policy's samples is biased.
    """
    repeats = torch.as_tensor(lengths, dtype=torch.int64)
    on = torch.as_tensor(on_policy, dtype=torch.float64)
    assert bool((repeats > 0).all()), "a completion holds its end token at least"
    # Only a filler can meet a part that has no completions; its group's weight is zero.
    kl = on / (max(n_on_total, 1) * repeats)
    surrogate = kl + alpha * (1 - on) / (max(n_off_total, 1) * repeats)
    return surrogate.float().repeat_interleave(repeats), kl.float().repeat_interleave(repeats)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, in the shape of the inputs, never negative."""
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    surrogate_weights: Tensor,
    kl_weights: Tensor,
    completion_index: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the step's loss, and its statistics.

    All tensors are [N]. `old_logprobs` are those stored at generation, for replayed tokens too;
    `advantages` are per token, temporal shaping applied; the weights come from `token_weights`, zeroed
    for fillers; `completion_index` int64 names each token's completion, one behind the other. At `ratio_level`
    "sequence" the ratio is the geometric mean over the completion. `dual_clip` c > 1 keeps the surrogate of a
    negative advantage above c * A. No shape depends on values, so nothing waits for the device.

    Statistics are float64 scalars, to be added over micro-batches and ranks except those named *_max (maximum);
    fillers count nowhere. `kl_sum` runs over on-policy tokens, all `off_` ones over replayed ones: `off_weight_sum`
    and `off_weight_sq_sum` over their ratios (effective sample size: sum^2 / sum of squares), `off_bounded_tokens`
    counts those that the dual clip bounds. One entry is no sum: `per_token_surrogate` [N], unweighted, of which
    Figure 1 of the supplement plots |.|.
    """
    log_ratio = logprobs - old_logprobs
    if ratio_level == "sequence":
        log_ratio = _completion_mean(log_ratio, completion_index)
    elif ratio_level != "token":
        raise ValueError(f"rl.ratio_level is {ratio_level!r}: choose 'token' or 'sequence'")
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    kl = kl_k3(logprobs, ref_logprobs)
    loss = beta * (kl_weights * kl).sum() - (surrogate_weights * surrogate).sum()

    with torch.no_grad():
        clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        bounded = torch.zeros_like(clipped)
        if dual_clip is not None:
            bounded = (ratio > dual_clip) & (advantages < 0)
            clipped |= bounded
        on = kl_weights > 0
        off = (surrogate_weights > 0) & ~on
        live = on | off
        live_ratio, off_ratio = (ratio.double().where(kept, 0) for kept in (live, off))
        stats = {
            "tokens": live.sum().double(),
            "ratio_sum": live_ratio.sum(),
            "ratio_max": _largest(live_ratio),
            "clipped_tokens": (clipped & live).sum().double(),
            "kl_sum": kl.double().where(on, 0).sum(),
            "off_ratio_max": _largest(off_ratio),
            "off_tokens": off.sum().double(),
            "off_bounded_tokens": (bounded & off).sum().double(),
            "off_weight_sum": off_ratio.sum(),
            "off_weight_sq_sum": off_ratio.square().sum(),
            "per_token_surrogate": surrogate.detach(),
        }
    return loss, stats


def completion_slots(index: Tensor) -> Tensor:
    """0, 1, 2, … for the completions that `index` [N] names one behind the other, as int64 [N]: each is below N."""
    return F.pad((index[1:] != index[:-1]).long(), (min(1, len(index)), 0)).cumsum(0)


def completion_means(values: Tensor, slots: Tensor) -> Tensor:
    """Means of `values` [N] over completions, [N]: that of completion k at place k, 0 behind the last."""
    sums, counts = (values.new_zeros(len(values)).index_add(0, slots, x) for x in (values, torch.ones_like(values)))
    return sums / counts.clamp(min=1)


def _largest(values: Tensor) -> Tensor:
    """The largest of `values` [N], none of them negative; 0 where there is none."""
    return values.amax() if len(values) else values.sum()


def _completion_mean(values: Tensor, completion_index: Tensor) -> Tensor:
    """Mean of `values` [N] over each completion, given back to each of its tokens [N]."""
    slots = completion_slots(completion_index)
    return completion_means(values, slots)[slots]
