"""A rank's flat share of a tensor, as boxes of that tensor: what the distributed optimizer holds, written and read by
each rank for itself. No rank gathers another's share, and any layout reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...], int]  # offsets and sizes in the array, and its first element's number


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The boxes that elements start … end - 1 of an array make up, row-major: at most two a dimension, less one."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,), start
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner  # whole rows
    if first > last:  # a part of one row
        yield from _row(shape, last, start, end)
        return
    yield from _row(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), first * inner
    yield from _row(shape, last, last * inner, end)


def _row(shape: tuple[int, ...], row: int, start: int, end: int) -> Iterator[Box]:
    """The boxes of elements start … end - 1, which lie in one row."""
    before = row * math.prod(shape[1:])
    for offsets, sizes, number in boxes(shape[1:], start - before, end - before):
        yield (row, *offsets), (1, *sizes), before + number


def share(weight: ShardedTensor | ShardedTensorFactory, key: str, flat: Tensor, start: int) -> list[ShardedTensor]:
    """Elements start … start + n - 1 of a weight's shard, whose values `flat` [n] holds, as boxes of the tensor `key`.

    `weight` describes the shard, its data being the weight itself; a factory cuts it into parts of several places
    (gate and up). The boxes are views of `flat`: what is loaded into them is there.
    """
    whole, found = weight.data, []
    for part in weight.build() if isinstance(weight, ShardedTensorFactory) else [weight]:
        assert part.data.is_contiguous(), "a part is a run of the shard's elements"
        before = part.data.storage_offset() - whole.storage_offset()  # elements of the shard ahead of this part
        low, high = (min(max(x - before, 0), part.data.numel()) for x in (start, start + flat.numel()))
        layer = part.prepend_axis_num  # axes that only the whole tensor has: layers, stacked
        for offsets, sizes, number in boxes(tuple(part.local_shape), low, high):
            at, sizes = before + number - start, (*[1] * layer, *sizes)
            offsets = (*[0] * layer, *offsets)
            found.append(replace(
                part, key=key, data=flat[at : at + math.prod(sizes)].view(sizes), dtype=flat.dtype, local_shape=sizes,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, offsets, strict=True)),
                axis_fragmentations=None, prepend_axis_num=0,  # no regular grid
                replica_id=(*part.replica_id[:-1], 0),  # every data-parallel rank has another share
            ))  # fmt: skip
    return found
