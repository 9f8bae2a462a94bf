"""Flat shares as boxes: they are the share, whatever the shape."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.resilience.shares import boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_hold_a_flat_range_in_order_and_nothing_else(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    array, seen = np.arange(size).reshape(shape), []
    found = list(boxes(tuple(shape), start, end))
    for offsets, sizes, number in found:
        box = array[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert box.shape == tuple(sizes) and box.flat[0] == number
        seen += box.flatten().tolist()
    assert seen == list(range(start, end)) and len(found) <= 2 * len(shape) - 1
