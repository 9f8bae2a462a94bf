"""The cache against textbook attention, while prompts and rows come and go."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.ops import Counted
from megatron_avatar.policy import cache as caches
from megatron_avatar.policy.cache import KeyValueCache, Room
from megatron_avatar.policy.kernels import attend as kernels
from megatron_avatar.policy.kernels import rope
from megatron_avatar.policy.kernels.attend import FEW_QUERIES, attend_part
from tests.policy.kernels.where import interpreted

HEADS, KV_HEADS, SIZE, LAYERS = 6, 2, 8, (3, 4)
SCALE = SIZE**-0.5
PAGE, STEPS = 16, 70


def textbook(query, key, value):
    """Softmax of one query [heads, d] over keys [T, kv heads, d], in float64."""
    query, key, value = query.double(), *(x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    return torch.einsum("ht,thd->hd", (torch.einsum("hd,thd->ht", query, key) * SCALE).softmax(-1), value).flatten()


class World:
    """A cache, and what each row should have seen: all keys and values, as lists by layer."""

    def __init__(self, static, *, pages=7, rows=8, steps=STEPS):
        room = Room(pages=pages, page=PAGE, rows=rows, steps=steps, rows_per_prompt=3, pages_per_prompt=3)
        self.cache = KeyValueCache(room, LAYERS, KV_HEADS, SIZE, torch.float32, torch.device("cpu"), static=static)
        self.prompts, self.rows, self.owners = {}, [], []  # prompt -> keys, values; row -> its own; row -> prompt
        self.generator = torch.Generator().manual_seed(0)

    def random(self, count, heads):
        return torch.randn(count, heads, SIZE, generator=self.generator)

    def read(self, lengths):
        """Read prompts (number -> tokens), packed behind one another with a token between them that isn't kept."""
        starts = np.cumsum([0, *[length + 1 for length in lengths.values()]])
        for prompt, length in lengths.items():
            self.cache.admit(prompt, length)
            self.prompts[prompt] = {}
        self.cache.read(list(lengths), starts[:-1])
        for layer in LAYERS:
            key, value = (self.random(int(starts[-1]) + 2, KV_HEADS) for _ in "kv")
            self.cache.store_prompts(layer, key, value)
            for (prompt, length), start in zip(lengths.items(), starts[:-1], strict=True):
                self.prompts[prompt][layer] = key[start : start + length], value[start : start + length]

    def add_rows(self, prompts):
        self.cache.add_rows(prompts)
        self.owners += prompts
        empty = torch.zeros(0, KV_HEADS, SIZE)
        self.rows += [{layer: (empty, empty) for layer in LAYERS} for _ in prompts]

    def leave(self, gone):
        kept = np.array([row not in gone for row in range(len(self.rows))])
        order = self.cache.keep_rows(kept)
        assert sorted(order) == kept.nonzero()[0].tolist()
        self.rows, self.owners = [self.rows[i] for i in order], [self.owners[i] for i in order]
        for prompt in set(self.prompts) - set(self.owners):
            self.cache.drop(prompt)
            del self.prompts[prompt]

    def step(self):
        shape = self.cache.prepare(np.array([len(row[LAYERS[0]][0]) for row in self.rows]))
        assert shape.rows >= len(self.rows)
        lengths = torch.zeros(shape.rows, dtype=torch.int64)
        lengths[: len(self.rows)] = torch.tensor([len(row[LAYERS[0]][0]) for row in self.rows])
        self.cache.begin(shape, lengths)
        for layer in LAYERS:
            query, key, value = (self.random(shape.rows, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
            mixed = torch.cat([query.unflatten(1, (KV_HEADS, -1)), key[:, :, None], value[:, :, None]], dim=2)
            angles = torch.tensor([1.0, 0.0])[:, None, None].expand(2, shape.rows, SIZE)  # none: positions are rope's
            output = self.cache.attend(layer, mixed, angles.contiguous(), SCALE)
            assert output.shape == (shape.rows, HEADS * SIZE) and output.isfinite().all()
            for i, (row, prompt) in enumerate(zip(self.rows, self.owners, strict=True)):
                row[layer] = tuple(torch.cat([row[layer][j], new[i : i + 1]]) for j, new in enumerate((key, value)))
                seen = [torch.cat(parts) for parts in zip(self.prompts[prompt][layer], row[layer], strict=True)]
                torch.testing.assert_close(output[i].double(), textbook(query[i], *seen), atol=2e-6, rtol=0)


@pytest.mark.parametrize("static", [False, True])
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3 * PAGE), min_size=1, max_size=6),
    data=st.data(),
)
def test_every_row_sees_its_prompt_and_itself(static, lengths, data):
    """Prompts of any length, one of no kept token too, come when there is room; rows leave whenever they like."""
    world, waiting = World(static), dict(enumerate(lengths))
    for _ in range(12):
        while waiting and len(world.rows) < 7:
            prompt, length = next(iter(waiting.items()))
            if not world.cache.fits(length):
                break
            world.read({prompt: waiting.pop(prompt)})
            world.add_rows([prompt] * data.draw(st.integers(1, min(3, 8 - len(world.rows)))))
        if not world.rows:
            break
        world.step()
        gone = data.draw(st.sets(st.integers(0, len(world.rows) - 1), max_size=3))
        if gone:
            world.leave(gone)
    assert not waiting or world.rows, "a prompt that waits has rows in its way"


@pytest.mark.parametrize("static", [False, True])
def test_own_tokens_outgrow_their_first_room(static):
    world = World(static)
    world.read({0: 20, 1: 0, 2: 5})
    world.add_rows([0, 2, 1, 0])
    for step in range(STEPS):
        world.step()
        if step == 3:
            world.leave({0})
            world.add_rows([2])
    assert STEPS > caches.FIRST_ROOM


@interpreted
@pytest.mark.parametrize("size", [8, 24])
def test_the_kernels_see_the_same(monkeypatch, size):
    """Triton's kernels in the interpreter: pages that are full, half full and absent, rows of one token and of many,
    more queries of a page than one program takes, stretches of own tokens."""
    monkeypatch.setattr(kernels, "MOST_QUERIES", 16)
    monkeypatch.setattr(kernels, "STRETCH", 4)
    monkeypatch.setattr(kernels, "KEYS", 16)
    monkeypatch.setitem(globals(), "SIZE", size)
    for module in (kernels, rope):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    monkeypatch.setitem(globals(), "LAYERS", (3,))
    world = World(True, pages=6, rows=6, steps=6)
    world.read({0: 3 * PAGE, 1: 0, 2: PAGE + 5})
    world.add_rows([0, 0, 0, 1, 2])
    for step in range(6):
        world.step()
        if step == 2:
            world.leave({1, 3})
            world.add_rows([2])
    assert max(len(row[LAYERS[0]][0]) for row in world.rows) > 4


def test_room_is_bounded():
    world = World(False, pages=3)
    world.read({0: 2 * PAGE})
    assert world.cache.fits(PAGE) and not world.cache.fits(PAGE + 1)
    world.add_rows([0] * 8)
    with pytest.raises(AssertionError):
        world.cache.add_rows([0])
    world.leave(set(range(8)))
    assert world.cache.fits(3 * PAGE)


def test_prompts_and_moves_copy_without_waiting(monkeypatch):
    copied = []
    monkeypatch.setattr(caches, "to_device", lambda tensor, device: copied.append(tensor.shape) or tensor.to(device))
    world = World(False)
    world.read({0: 20, 1: 30})
    world.add_rows([0, 1])
    world.leave({0})
    assert copied == [(3, 50)]  # what is read; moves need nothing of the host


@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_leaves_is_one_operation_for_all_layers(static):
    """And so is each page of a prompt without rows."""
    world = World(static)
    world.read({0: 20, 1: 30})
    world.add_rows([0, 1, 1])
    world.step()
    with Counted() as counted:
        world.cache.keep_rows(np.array([False, True, True]))
        assert counted.names == {"aten::copy_": 1}
        world.cache.drop(0)
    assert counted.names == {"aten::copy_": 3}


def test_a_step_of_the_same_layout_keeps_its_tables_in_place():
    """CUDA graphs read what lies at the addresses that they were captured with."""
    world = World(True)
    world.read({0: 20, 1: 30})
    world.add_rows([0, 0, 1])
    first = world.cache.prepare(np.zeros(3, np.int64))
    tables = [table.data_ptr() for table in world.cache._tables[first[:4]]]
    world.leave({0})
    world.add_rows([1])
    assert world.cache.prepare(np.zeros(3, np.int64)) == first
    assert [table.data_ptr() for table in world.cache._tables[first[:4]]] == tables
    world.step()


@pytest.mark.parametrize("queries", [1, FEW_QUERIES])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_an_attention(queries, masked, dtype):
    """On a CPU both ways of computing a part; on a GPU the shapes that its kernel promises."""
    query, key, value = (torch.randn(3, KV_HEADS, n, SIZE).to(dtype) for n in (queries, 32, 32))
    mask = torch.zeros(3, 1, 1, 32, dtype=dtype)
    mask[1, ..., 7:] = float("-inf")
    output, lse = attend_part(query, key, value, mask if masked else None, SCALE)
    scores = query.double() @ key.double().mT * SCALE + (mask.double() if masked else 0)
    tolerance = dict(atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=0)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value.double(), **tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), **tolerance)
    meta = [x.to("meta") for x in (query, key, value, mask)]
    if not masked:
        meta[-1] = None
    on_gpu = attend_part(*meta, SCALE)
    assert on_gpu[0].shape == output.shape and on_gpu[1].shape == lse.shape


@pytest.mark.parametrize("steps", [1, 4])
def test_rounding_meets_few_sizes(steps):
    sizes = [caches._round_up(count, steps) for count in range(1, 1025)]
    assert all(count <= size <= max(1, count * (1 + 1 / steps)) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 10 * steps + 1 and sizes == sorted(sizes)
