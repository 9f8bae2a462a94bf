"""Log-probabilities of sampled tokens under the full softmax, over a vocabulary shared out among ranks.

Logits of V entries a token are the largest tensor of a training step. They are made for a chunk of the vocabulary at
a time and made again in the backward pass, so that the peak is two chunks, whatever N and V. Every chunk updates a
running softmax; its rows of the weight's gradient are complete when it is done, and are written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_avatar.policy.kernels.head import add_chunk, new_state, rescale, scores_gradient

# Logits of one chunk on one rank, in float32: 8 MiB stay in a CPU's cache, 256 MiB fill a GPU.
CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26, "meta": 1 << 26}  # a plan counts what a GPU would hold


def completion_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(hidden @ weight.T / temperature).

    hidden [N, H], alike on all ranks of the tensor-parallel `group` (its gradient is too); weight [V / tp, H], this
    rank's rows of the output layer, of which those from `vocab_size` on are padding and take no part;
    target_ids [N] int64. Returns logprobs [N] and entropy [N], float32; entropy carries no gradient. Beyond results
    and gradients, the forward pass takes two chunks of `chunk_logits` float32 logits (of N, where that is more), the
    backward pass one, half of one more for half-precision inputs, and two of float32 [N, H].
    """
    group = group if group is not None and group.size() > 1 else None
    if group is not None:
        hidden = copy_to_tensor_model_parallel_region(hidden, group)
    chunk_logits = chunk_logits or CHUNK_LOGITS[hidden.device.type]
    return _CompletionLogprobs.apply(hidden, weight, target_ids, temperature, vocab_size, group, chunk_logits)


def linear_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, H] @ weight [V, H].T in float32; on a GPU sums of half-precision products are not rounded to it first.
    """
    return _matmul_float32(hidden, weight.t())


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    if (a.is_cuda or a.is_meta) and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


class _CompletionLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, vocab_size: int,
        group: dist.ProcessGroup | None, chunk_logits: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.settings = temperature, vocab_size, group, chunk_logits
        state = new_state(len(hidden), hidden.device)
        first = _first_row(weight, group)
        for chunk in _chunks(len(hidden), weight, vocab_size, group, chunk_logits):
            logits = linear_float32(hidden, weight[chunk])
            add_chunk(state, logits, target_ids, first + chunk.start, temperature)
            del logits  # before the next chunk is made
        highest, total, weighted, target = state.unbind()
        if group is not None:
            everywhere = highest.clone()
            dist.all_reduce(everywhere, dist.ReduceOp.MAX, group)
            total, weighted, highest = rescale(total, weighted, highest, everywhere)
            sums = torch.stack([total, weighted, target])
            dist.all_reduce(sums, group=group)
            total, weighted, target = sums.unbind()
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, target_ids, highest + log_total)
        ctx.mark_non_differentiable(entropy)
        return target - highest - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target_ids, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        temperature, vocab_size, group, chunk_logits = ctx.settings
        grad = grad / temperature
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None  # zeros stay for the padding
        first = _first_row(weight, group)
        for chunk in _chunks(len(hidden), weight, vocab_size, group, chunk_logits):
            logits = linear_float32(hidden, weight[chunk])
            scores = scores_gradient(
                logits, target_ids, normaliser, grad, first + chunk.start, temperature, weight.dtype
            )
            if grad_hidden is not None:
                grad_hidden += _matmul_float32(scores, weight[chunk])
            if grad_weight is not None:
                torch.mm(scores.t(), hidden, out=grad_weight[chunk])
            del logits, scores
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, *[None] * 5


def _chunks(
    tokens: int, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None, chunk_logits: int
) -> Iterator[slice]:
    """This rank's rows of the weight without padding, as many at a time as make `chunk_logits` logits of the tokens."""
    real = min(max(vocab_size - _first_row(weight, group), 0), len(weight))  # a rank may hold nothing but padding
    width = max(1, chunk_logits // max(1, tokens))
    return (slice(start, min(start + width, real)) for start in range(0, real, width))


def _first_row(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Token id of the weight's first row on this rank."""
    return 0 if group is None else len(weight) * group.rank()
