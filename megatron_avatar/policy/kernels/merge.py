"""Two attentions of the same queries to different keys become one, by their log-sum-exps: the update's completions see
themselves and their prefix.

output [S, heads, d] and lse [S, heads] hold all rows' first parts; part [Q, heads, d] and part_lse [Q, heads] the
second parts of the rows at `queries`, a slice of S or places [Q].
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_avatar.policy.kernels.device import next_power, operation, runs_triton, tl, triton

WARPS = 8


def merge_parts(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, queries: slice | Tensor) -> None:
    """Merge the second parts into `output` and `lse`, in place: o = o₁ + σ(l₂ - l₁)(o₂ - o₁), l = log(e^l₁ + e^l₂)."""
    if not runs_triton(output):
        return torch_merge_parts(output, lse, part, part_lse, queries)
    start, places = (queries.start, None) if isinstance(queries, slice) else (0, queries)
    lse[queries] = _merge_parts(output, lse, part, part_lse, places, start)


def torch_merge_parts(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, queries: slice | Tensor) -> None:
    """The formula."""
    own, own_lse = output[queries].to(lse.dtype), lse[queries]
    share = torch.sigmoid(part_lse - own_lse)[..., None]
    output[queries] = torch.lerp(own, part.to(lse.dtype), share).to(output.dtype)
    lse[queries] = torch.logaddexp(own_lse, part_lse)


@triton.jit
def _merge_kernel(
    output, lse, part, part_lse, merged, places, start, width, size, lse_row, lse_head, part_row, part_head,
    LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: all its heads. The new log-sum-exps go to `merged` [Q, heads], as others still read the old ones."""
    row = tl.program_id(0).to(tl.int64)
    place = start + row
    if LISTED:
        place = tl.load(places + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    head = columns // size
    own = tl.load(lse + place * lse_row + head * lse_head, inside, 0.0)
    other = tl.load(part_lse + row * part_row + head * part_head, inside, 0.0)
    first = tl.load(output + place * width + columns, inside, 0.0).to(tl.float32)
    second = tl.load(part + row * width + columns, inside, 0.0).to(tl.float32)
    highest = tl.maximum(own, other)
    total = tl.exp(own - highest) + tl.exp(other - highest)
    share = tl.exp(other - highest) / total
    result = first + share * (second - first)
    tl.store(output + place * width + columns, result.to(output.dtype.element_ty), inside)
    leads = inside & (columns % size == 0)
    tl.store(merged + row * (width // size) + head, highest + tl.log(total), leads)


def triton_merge_parts(
    output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, places: Tensor | None, start: int
) -> Tensor:  # fmt: skip
    """By the kernel: `output` in place, and the log-sum-exps [Q, heads] of the rows from `start` on, or at `places`."""
    assert output.is_contiguous() and part.is_contiguous()
    rows, heads, size = part.shape
    merged = torch.empty(rows, heads, dtype=lse.dtype, device=lse.device)
    if rows:
        _merge_kernel[(rows,)](
            output, lse, part, part_lse, merged, merged if places is None else places, start, heads * size, size,
            lse.stride(0), lse.stride(1), part_lse.stride(0), part_lse.stride(1),
            LISTED=places is not None, BLOCK=next_power(heads * size), num_warps=WARPS,
        )  # fmt: skip
    return merged


@operation("merge_parts", mutates=("output",))
def _merge_parts(
    output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, places: Tensor | None, start: int
) -> Tensor:  # fmt: skip
    return triton_merge_parts(output, lse, part, part_lse, places, start)


@_merge_parts.register_fake
def _(
    output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, places: Tensor | None, start: int
) -> Tensor:  # fmt: skip
    return torch.empty(part_lse.shape, dtype=lse.dtype, device=lse.device)
