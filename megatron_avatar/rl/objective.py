"""The policy objective: clipped surrogate on fresh and replayed tokens, KL on fresh ones (paper eq. J).

    J = J_on + alpha * J_off - beta * KL,    loss = -J

Each part is averaged over a completion's tokens, then over the completions of that part in the whole
step. `token_weights` puts those averages into one weight a token, made from global counts, so that
`policy_loss` only ever sums: over tokens, micro-batches and ranks. N is the number of completion
tokens of a micro-batch, C the number of its completions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """`loss` scalar; `stats` float64 scalars for `merge_stats`; `per_token_surrogate` [N] detached,
    unweighted, as Figure 1 of the supplement plots it (mean of its absolute value)."""

    loss: Tensor
    stats: dict[str, Tensor]
    per_token_surrogate: Tensor


def token_weights(
    lengths: Tensor, on_policy: Tensor, n_on_total: int, n_off_total: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """Weights of every token in the step's objective.

    `lengths` [C] int64 and `on_policy` [C] bool describe a micro-batch's completions; the totals count
    the completions of each part over all micro-batches and ranks, fillers excluded. Returns surrogate
    and KL weights, both [sum of lengths] float32: 1 / (L_i * total), times alpha off-policy; the KL
    weight is zero off-policy, where k3 under foreign samples is biased.
    """
    assert bool((lengths > 0).all()), "a completion holds its end token at least"
    # Only a filler can meet a part without completions; it is weighted zero by its group.
    on = on_policy / max(n_on_total, 1)
    off = ~on_policy * (alpha / max(n_off_total, 1))
    surrogate = ((on + off) / lengths).float()
    kl = (on / lengths).float()
    return surrogate.repeat_interleave(lengths), kl.repeat_interleave(lengths)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, shape of the inputs, never negative."""
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - log_ratio - 1


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
) -> PolicyLoss:
    """A micro-batch's share of the step's loss.

    All tensors are [N]. `old_logprobs` are those stored at generation, for replayed tokens too;
    `advantages` are per token, temporal shaping applied; the weights come from `token_weights` (zero for
    fillers); `completion_index` int64 names each token's completion, read at `ratio_level` "sequence",
    where the ratio is the geometric mean over the completion. `dual_clip` c > 1 bounds the surrogate
    of a negative advantage from below by c * A.
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
    surrogate_sum = (surrogate_weights * surrogate).sum()
    kl_sum = (kl_weights * kl).sum()

    with torch.no_grad():
        clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        if dual_clip is not None:
            clipped |= (ratio > dual_clip) & (advantages < 0)
        on = kl_weights > 0
        off = (surrogate_weights > 0) & ~on
        stats = _ratio_stats(ratio.detach(), on | off, off)
        stats["clipped_tokens"] = (clipped & (on | off)).sum().double()
        stats["surrogate_sum"] = surrogate_sum.double()
        stats["kl_sum"] = kl_sum.double()
    return PolicyLoss(beta * kl_sum - surrogate_sum, stats, surrogate.detach())


def merge_stats(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stats of several micro-batches or ranks as one: keys ending in `_max` by maximum, the rest by sum."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for key, value in part.items():
            if key not in merged:
                merged[key] = value
            elif key.endswith("_max"):
                merged[key] = torch.maximum(merged[key], value)
            else:
                merged[key] = merged[key] + value
    return merged


def summarize_stats(stats: dict[str, Tensor]) -> dict[str, float]:
    """What a step logs, from its merged stats. `off_policy_ess` is the effective sample size of the
    replayed tokens, (sum r)^2 / sum r^2, as a share of them (NaN without replay)."""
    total = {key: float(value) for key, value in stats.items()}
    tokens = max(total["tokens"], 1.0)
    off = total["off_tokens"]
    return {
        "ratio_mean": total["ratio_sum"] / tokens,
        "ratio_max": total["ratio_max"],
        "clip_fraction": total["clipped_tokens"] / tokens,
        "kl": total["kl_sum"],
        "surrogate": total["surrogate_sum"],
        "off_policy_ess": total["off_ratio_sum"] ** 2 / (total["off_ratio_square_sum"] * off) if off else float("nan"),
    }


def _completion_mean(values: Tensor, completion_index: Tensor) -> Tensor:
    """Mean of `values` [N] over each completion, given back to each of its tokens [N]."""
    _, slot, counts = torch.unique(completion_index, return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts)).index_add(0, slot, values)
    return (sums / counts)[slot]


def _ratio_stats(ratio: Tensor, live: Tensor, off: Tensor) -> dict[str, Tensor]:
    """Sums over live tokens (fillers excluded) and over the replayed ones among them."""
    live_ratio, off_ratio = ratio[live].double(), ratio[off].double()
    return {
        "tokens": live.sum().double(),
        "ratio_sum": live_ratio.sum(),
        "ratio_max": live_ratio.amax() if len(live_ratio) else live_ratio.sum(),
        "off_tokens": off.sum().double(),
        "off_ratio_sum": off_ratio.sum(),
        "off_ratio_square_sum": off_ratio.square().sum(),
    }
