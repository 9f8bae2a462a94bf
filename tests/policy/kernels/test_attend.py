"""Split attention over pages and own tokens: Triton's kernels against textbook attention."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.cache import KeyValueCache, Room
from megatron_avatar.policy.kernels import attend
from tests.policy.kernels.where import DEVICE

PAGE, STEPS, LAYER = 16, 24, 1
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}


def textbook(query, key, value):
    """Softmax of one query [groups, share, d] over keys [T, groups, d], in float64."""
    scores = torch.einsum("gsd,tgd->gst", query.double(), key.double()) * query.shape[-1] ** -0.5
    return torch.einsum("gst,tgd->gsd", scores.softmax(-1), value.double()).flatten()


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 2 * PAGE + 3), st.integers(1, 3)), min_size=1, max_size=3),
    data=st.data(), groups=st.integers(2, 8), share=st.integers(1, 7), size=st.sampled_from([64, 80, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
)  # fmt: skip
@example(prompts=[(0, 1)], data=None, groups=2, share=7, size=128, dtype=torch.float16)
@example(prompts=[(PAGE, 1)], data=None, groups=8, share=1, size=80, dtype=torch.float32)
def test_rows_see_their_prompt_and_themselves(prompts, data, groups, share, size, dtype):
    """Prompts of no, some and whole pages (length, rows), rows of one and of many tokens, one row alone; the rooms
    behind what is in use hold no numbers."""
    owners = [number for number, (_, rows) in enumerate(prompts) for _ in range(rows)]
    pages = [-(-length // PAGE) for length, _ in prompts]
    room = Room(pages=sum(pages) + 1, page=PAGE, rows=len(owners) + 1, steps=STEPS, rows_per_prompt=3,
                pages_per_prompt=max(1, *pages))  # fmt: skip
    cache = KeyValueCache(room, [LAYER], groups, size, dtype, DEVICE, static=True)
    for number, (length, rows) in enumerate(prompts):
        cache.admit(number, length)
        cache.add_rows([number] * rows)
    lengths = np.array([0 if data is None else data.draw(st.integers(0, STEPS - 1)) for _ in owners])
    with mock.patch.object(cache, "_kernels", True):
        shape = cache.prepare(lengths)
    generator = torch.Generator().manual_seed(int(lengths.sum()) + size)
    stores = [*cache._pages[LAYER], *cache._own[LAYER]]
    for store in stores:
        store.copy_(torch.randn(store.shape, generator=generator))
    query = torch.randn(shape.rows, groups, share, size, generator=generator).to(DEVICE, dtype)
    whole = torch.zeros(shape.rows, dtype=torch.int64, device=DEVICE)
    whole[: len(owners)] = torch.from_numpy(lengths).to(DEVICE)

    def seen(row: int, which: int) -> torch.Tensor:
        """Keys (0) or values (1) that a row attends to, [T, groups, d]."""
        prompt, own = owners[row], stores[2 + which][row, :, : lengths[row] + 1].transpose(0, 1)
        parts = [stores[which][page].transpose(0, 1) for page in cache._pages_of[prompt]]
        return torch.cat([*parts, own[:0]])[: prompts[prompt][0]], own

    expected = [textbook(query[row], *(torch.cat(seen(row, which)) for which in (0, 1))) for row in range(len(owners))]
    first = sum(pages)  # pages and tokens from here on are nobody's
    for store in stores[:2]:
        store[first:] = float("nan")
    for store in stores[2:]:
        for row, length in enumerate(lengths):
            store[row, :, length + 1 :] = float("nan")
    with mock.patch.multiple(attend, STRETCH=8, KEYS=16, MOST_QUERIES=16):
        ours = attend.triton_attend(query, *stores, whole, None, cache._tables[shape[:4]], shape.own, size**-0.5)
    assert ours.dtype == dtype and ours.shape == (shape.rows, groups * share * size)
    for row, theirs in enumerate(expected):
        torch.testing.assert_close(ours[row].double(), theirs, atol=TOLERANCE[dtype] * 4, rtol=0)
