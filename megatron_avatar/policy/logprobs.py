"""Log-probabilities of sampled tokens under the full softmax, over a vocabulary shared out among ranks.

Logits of V entries a token are the largest tensor of a training step: they are made in chunks of tokens and made
again in the backward pass, so that the peak is one chunk. The whole vocabulary of all N tokens never exists.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 26  # logits of one chunk on one rank: 256 MiB in float32


def completion_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(hidden @ weight.T / temperature).

    hidden [N, H], alike on all ranks of the tensor-parallel `group` (its gradient is too); weight [V / tp, H], this
    rank's rows of the output layer, of which those from `vocab_size` on are padding and take no part;
    target_ids [N] int64. Returns logprobs [N] and entropy [N], float32; entropy carries no gradient.
    """
    group = group if group is not None and group.size() > 1 else None
    if group is not None:
        hidden = copy_to_tensor_model_parallel_region(hidden, group)
    rows = max(1, chunk_logits // len(weight))
    if len(hidden) <= rows:
        return _chunk_logprobs(hidden, weight, target_ids, temperature, vocab_size, group)
    pairs = [
        checkpoint(
            _chunk_logprobs, part, weight, ids, temperature, vocab_size, group,
            use_reentrant=False, preserve_rng_state=False,
        )
        for part, ids in zip(hidden.split(rows), target_ids.split(rows), strict=True)
    ]  # fmt: skip
    logprobs, entropy = zip(*pairs, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _chunk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float() / temperature
    width = len(weight)
    first = width * (group.rank() if group is not None else 0)
    real = min(max(vocab_size - first, 0), width)
    if real < width:  # finite, so that 0 * logit stays 0; a rank may hold nothing but padding
        logits = F.pad(logits[:, :real], (0, width - real), value=torch.finfo(torch.float32).min)
    with torch.no_grad():
        highest = logits.amax(dim=-1, keepdim=True)
        if group is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    logits = logits - highest
    local = target_ids - first
    owned = (local >= 0) & (local < real)
    target = logits.gather(1, local.where(owned, 0)[:, None])[:, 0].where(owned, 0.0)
    exp = logits.exp()
    sums = torch.stack([exp.sum(-1), target, (exp * logits).detach().sum(-1)])
    if group is not None:
        sums = reduce_from_tensor_model_parallel_region(sums, group)
    total, target, weighted = sums
    log_total = total.log()
    return target - log_total, (log_total - weighted / total).detach()
