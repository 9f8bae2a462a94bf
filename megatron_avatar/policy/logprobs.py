"""Log-probabilities of sampled tokens under the full softmax, over a vocabulary shared out among ranks.

Logits of V entries a token are the largest tensor of a training step: they are made in chunks of tokens and made
again in the backward pass, so that the peak is one chunk. The whole vocabulary of all N tokens never exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 26  # logits of one chunk on one rank: 256 MiB in float32


def completion_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    target_ids: Tensor,
    temperature: float,
    vocab_size: int,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, under softmax(head(hidden) / temperature).

    hidden [N, H], alike on all ranks of the tensor-parallel `group` (default: the group this process is in);
    head: [n, H] to this rank's share of the logits [n, V / tp], of which those from `vocab_size` on are padding and
    take no part; target_ids [N] int64. Returns logprobs [N] and entropy [N], float32; entropy carries no gradient.
    """
    group = parallel_state.get_tensor_model_parallel_group(check_initialized=False) if group is None else group
    ranks = group.size() if group is not None else 1
    rows = max(1, chunk_logits * ranks // vocab_size)
    score = functools.partial(
        _chunk_logprobs, head=head, temperature=temperature, vocab_size=vocab_size, group=group if ranks > 1 else None
    )
    if len(hidden) <= rows:
        return score(hidden, target_ids)
    pairs = [
        checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(rows), target_ids.split(rows), strict=True)
    ]
    logprobs, entropy = zip(*pairs, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _chunk_logprobs(
    hidden: Tensor,
    target_ids: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    width = logits.shape[-1]
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
