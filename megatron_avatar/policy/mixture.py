"""A mixture of experts in the place of a layer's feed-forward, inside of one model replica.

Each tensor-parallel rank has E / tp whole experts and sees all tokens, as a dense layer's ranks do: the tokens come
together where a dense layer gathers them, and the parts of the result are summed where it sums them. So replicas never
wait for each other, and experts are sharded, saved and optimised like any layer's rows. Nothing waits for the device:
rows are sorted by expert, and products are made up to places that stay there.

Shapes: T tokens, k experts a token, E experts of F inner units, n = E / tp of them on this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_avatar.policy.kernels.swiglu import swiglu
from megatron_avatar.policy.routes import Recorder, Routes


class Mixture(MegatronModule):
    """The experts of a layer, and the router that shares tokens out.

    router [E, H] is on every rank; gate_up [n 2F, H] and down [n H, F] hold this rank's experts one below the other.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.rank = parallel_state.get_tensor_model_parallel_rank()
        self.experts, self.top = config.experts, config.experts_per_token
        self.own = self.experts // config.tensor_model_parallel_size
        self.first = self.rank * self.own
        hidden, inner = config.hidden_size, config.expert_inner
        like: dict[str, Any] = dict(dtype=config.params_dtype, device=torch.cuda.current_device())
        self.router = nn.Parameter(torch.empty(self.experts, hidden, **like))
        self.gate_up = nn.Parameter(torch.empty(self.own * 2 * inner, hidden, **like))
        self.down = nn.Parameter(torch.empty(self.own * hidden, inner, **like))
        for experts in (self.gate_up, self.down):
            tensor_parallel.set_tensor_model_parallel_attributes(experts, True, 0, 1)
        self.register_buffer("borders", torch.arange(1, self.own + 1, device=self.router.device), persistent=False)
        # Under sequence parallelism each rank routes its own tokens: Megatron-Core then sums this gradient over them.
        setattr(self.router, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (Megatron-Core's mark)

    def set_layer_number(self, number: int) -> None:
        """Megatron-Core's, of the layer that this is a part of."""
        self.layer_number = number

    def forward(self, normed: Tensor, routes: Recorder | Routes | None = None) -> Tensor:
        """What the experts make of the normed stream [S, 1, H], or of this rank's part of it; shaped alike."""
        tokens = normed[:, 0]
        if self.config.sequence_parallel:
            enter, leave = GATHER, tensor_parallel.reduce_scatter_to_sequence_parallel_region
        else:
            enter = tensor_parallel.copy_to_tensor_model_parallel_region
            leave = tensor_parallel.reduce_from_tensor_model_parallel_region
        shares, chosen = self._route(tokens, routes)
        order = sort_rows(chosen, self.first, self.borders, self.experts)
        return leave(_Experts.apply(enter(tokens), enter(shares), self.gate_up, self.down, order)[:, None])

    def _route(self, tokens: Tensor, routes: Recorder | Routes | None) -> tuple[Tensor, Tensor]:
        """How much each expert counts for this rank's tokens [t, H], and the experts of all tokens: [t, k] and [T, k].
        """
        logits = F.linear(tokens, self.router)
        top, own = logits.topk(self.top, dim=-1)
        chosen = found = GATHER(own) if self.config.sequence_parallel else own
        if routes is not None:
            chosen = routes.take(self.layer_number, found)
        if chosen is not found:
            start = self.rank * len(own) if len(own) < len(chosen) else 0
            top = logits.gather(-1, chosen[start : start + len(own)])
        if self.config.normed_shares:  # of all experts' shares, which add up to 1 then
            shares = top.softmax(dim=-1, dtype=torch.float32)
        else:
            shares = (top.float() - logits.float().logsumexp(dim=-1, keepdim=True)).exp()
        return shares.to(logits.dtype), chosen

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"gate_up": 0, "down": 0}, sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(), dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip


GATHER = tensor_parallel.gather_from_sequence_parallel_region


def through_experts(
    tokens: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, first: int, experts: int
) -> Tensor:
    """This rank's part of what the experts `chosen` [T, k] make of tokens [T, H], by shares [T, k]; it has those from
    number `first` on, of so many in all. For tests: a layer keeps its borders."""
    borders = torch.arange(1, len(down) // tokens.shape[1] + 1, device=tokens.device)
    return _Experts.apply(tokens, shares, gate_up, down, sort_rows(chosen, first, borders, experts))


class Order(NamedTuple):
    """Rows, one a token and expert of its, in the order of this rank's experts, and others' behind them.

    token [T k]: of each row; row [T k]: of each token's experts, token by token; ends [n]: where an expert's rows end;
    others [T, k, 1]: which of a token's experts other ranks have, None where there are none.
    """

    token: Tensor
    row: Tensor
    ends: Tensor
    others: Tensor | None


def sort_rows(chosen: Tensor, first: int, borders: Tensor, experts: int) -> Order:
    """The order for the experts [T, k] that were chosen, of which a rank has n from number `first` on; borders are 1 to
    n."""
    own = len(borders)
    # Counted from the rank's first expert on, its own come before all others.
    numbers = chosen if own == experts else (chosen - first) % experts
    ranked, order = numbers.flatten().sort(stable=True)
    ends = torch.searchsorted(ranked, borders, out_int32=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=chosen.device))
    return Order(order // chosen.shape[1], row, ends, None if own == experts else (numbers >= own)[..., None])


class _Experts(torch.autograd.Function):
    """The sum over a token's experts of share · down(silu(gate) · up), this rank's part of it. The shares come before
    the last product, where rows are narrow. Behind the own experts' rows there is whatever memory held: nothing may
    read it."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
        first, second = _stacked(gate_up, down, order)
        inside = grouped(tokens[order.token], first.mT, order.ends)
        ctx.save_for_backward(tokens, shares, inside, gate_up, down)
        ctx.order = order
        return _collect(grouped(swiglu(inside) * _by_row(shares, order), second.mT, order.ends), order, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, shares, inside, gate_up, down = ctx.saved_tensors
        order, needed = ctx.order, ctx.needs_input_grad
        first, second = _stacked(gate_up, down, order)
        found: list[Tensor | None] = [None] * 4
        share, active, grad = _by_row(shares, order), swiglu(inside), grad[order.token]
        inner = grouped(grad, second, order.ends)
        if needed[3]:
            found[3] = _of_weights(grad, active * share, order.ends)
        if needed[1]:
            found[1] = _collect((inner * active).sum(dim=-1, keepdim=True), order, shares, summed=False)
        inside = torch.ops.avatar.swiglu_backward(inner * share, inside)
        if needed[2]:
            found[2] = _of_weights(inside, tokens[order.token], order.ends)
        if needed[0]:
            found[0] = _collect(grouped(inside, first, order.ends), order, shares)
        return *found, None


def _stacked(gate_up: Tensor, down: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """The experts' weights [n, 2F, H] and [n, H, F]."""
    own = len(order.ends)
    return gate_up.unflatten(0, (own, -1)), down.unflatten(0, (own, -1))


def _of_weights(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The gradient [n K, N] of experts' weights from grad [R, K] and rows [R, N], zero of an expert without a row."""
    found = grouped(grad.mT, rows, ends)
    if leaves_out_empty(found.device):
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        found.masked_fill_(empty[:, None, None], 0)
    return found.flatten(0, 1)


def _by_row(shares: Tensor, order: Order) -> Tensor:
    """Shares [T, k] of the rows [T k, 1]: of a row that is the j-th of its token's."""
    by_row = torch.empty_like(shares).view(-1)
    return by_row.scatter_(0, order.row, shares.flatten())[:, None]


def _collect(rows: Tensor, order: Order, shares: Tensor, *, summed: bool = True) -> Tensor:
    """Rows [T k, W] token by token: their sums [T, W], or their only column [T, k]."""
    found = rows[order.row].view(*shares.shape, -1)
    if order.others is not None:
        found.masked_fill_(order.others, 0)
    return found.sum(dim=1) if summed else found[..., 0]


@torch.library.custom_op("avatar::grouped", mutates_args=())
def grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Products of groups of rows that end at `ends` [n]: a [R, K] with b [n, K, N] gives [R, N], of which rows behind
    the last end are undefined; a [K, R] with b [R, N] gives [n, K, N]."""
    return F.grouped_mm(a, b, offs=ends)


@grouped.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(len(a), b.shape[2]) if b.dim() == 3 else a.new_empty(len(ends), len(a), b.shape[1])


def leaves_out_empty(device: torch.device) -> bool:
    """Whether `grouped` writes nothing for a group without a row of [K, R] by [R, N], in whose place memory keeps what
    it held: on Blackwell (pytorch issue 172439). Elsewhere it writes zeros, and all gradients needn't be passed over
    once more; selftest.py's `experts` looks."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def stays_on_device(dtype: torch.dtype) -> bool:
    """Whether `grouped` runs on this GPU without asking it for numbers: bfloat16 on Hopper and Blackwell. Elsewhere
    torch goes through the experts on the host, which no CUDA graph can hold."""
    return dtype is torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)
