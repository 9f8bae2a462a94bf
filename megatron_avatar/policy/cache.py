"""Keys and values of prompts and of the rows that continue them, stored rotated, in rooms of bounded size.

A prompt of P tokens is kept once for all of its rows, without its last token: that one opens each row, as it opens
each completion in training, so a row can begin at any time. Per layer there are two stores:

    pages  [pages, kv heads, page, d]   the prompts, cut into pages; pages 0 .. U-1 are in use
    own    [rows, kv heads, room, d]    what the rows have read themselves; rows 0 .. R-1 are in use

A decode step attends in two parts: every page to the queries of all rows of its prompt at once, every row to its own
tokens. The parts are merged by the log-sum-exp of their scores: no key is copied or read twice, and a long prompt is
worked on in as many parts as it has pages. When rows or prompts leave, the last ones move into their places, so what
is in use stays in front, and nothing else costs work. A store is one tensor [layers, 2, ...], so that a move is one
operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_avatar.policy.flash import to_device
from megatron_avatar.policy.kernels.attend import Tables, attend, by_kernels
from megatron_avatar.policy.kernels.rope import HeadNorms, decode_rope

PAGE = 512  # tokens of a prompt that are worked on together
FIRST_ROOM = 64  # own tokens there is room for at first; doubled when used up
FEWEST_ROWS = 8  # of a static step: reading the weights takes the time, fewer rows would save none
ALIGNED = 16  # masks of the attention kernels on GPUs have a length of this multiple


@dataclass(frozen=True)
class Room:
    """Most of everything that a cache ever holds: `pages` pages of `page` tokens, `rows` rows of `steps` tokens, of
    them `rows_per_prompt` of one prompt, `pages_per_prompt` of one prompt."""

    pages: int
    page: int
    rows: int
    steps: int
    rows_per_prompt: int
    pages_per_prompt: int


class Shape(NamedTuple):
    """What decides the shapes of a decode step: R rows, U pages, of which n rows read one and p belong to a prompt,
    and the own tokens that are looked at."""

    rows: int
    pages: int
    readers: int
    parts: int
    own: int


class KeyValueCache:
    """A room for prompts and rows. Usage: attach it to the core attentions; for prompts call `admit` and `read`, and
    run them packed; for rows call `add_rows`, then for each token `prepare`, and run the rows after `begin`.

    layers: numbers of this stage's layers. With `static`, shapes are rounded up, so that few are met, and a shape's
    tables stay at one address: what CUDA graphs need.
    """

    def __init__(
        self, room: Room, layers: Sequence[int], kv_heads: int, head_size: int, dtype: torch.dtype,
        device: torch.device, *, static: bool = False,
    ) -> None:  # fmt: skip
        self.room, self.device, self.dtype, self.static = room, device, dtype, static
        self._most_own = -(-room.steps // ALIGNED) * ALIGNED
        self.prompts: list[int] = []  # prompt of each row
        self._pages_of: dict[int, list[int]] = {}  # of each prompt
        self._length_of: dict[int, int] = {}
        self._owners: list[int] = []  # prompt of each page in use
        self._own_room = 0

        def store(count: int, tokens: int) -> Tensor:
            return torch.zeros(len(layers), 2, count, kv_heads, tokens, head_size, dtype=dtype, device=device)

        self._all_pages, self._all_own = store(room.pages, room.page), store(room.rows, self._most_own * static)
        self._layers = list(layers)
        self._pages, self._own = self._by_layer(self._all_pages), self._by_layer(self._all_own)
        self._tables: dict[tuple[int, ...], Tables] = {}  # by rows, pages, readers, parts
        self._layout: tuple[int, ...] | None = None  # whose tables are up to date
        self._kernels = static and by_kernels(self._all_own)

    # ------------------------------------------------------------------------------------------------------------
    # Prompts and rows come and go: host only, but for the moves

    def clear(self) -> None:
        """Empty it for other prompts; tables and stores stay at their addresses."""
        self.prompts, self._owners, self._own_room, self._layout = [], [], 0, None
        self._pages_of, self._length_of = {}, {}

    @property
    def bytes(self) -> int:
        """Of all keys and values that there is room for."""
        return self._all_pages.nbytes + self._all_own.nbytes

    def _by_layer(self, store: Tensor) -> dict[int, tuple[Tensor, ...]]:
        """Keys and values of each layer, where they lie in the store."""
        return {layer: part.unbind() for layer, part in zip(self._layers, store.unbind(), strict=True)}

    def fits(self, length: int) -> bool:
        """Whether a prompt of which `length` tokens are kept can be admitted now."""
        return len(self._owners) + -(-length // self.room.page) <= self.room.pages

    def admit(self, prompt: int, length: int) -> None:
        """Give a prompt the pages for the `length` tokens of it that are kept."""
        assert self.fits(length) and prompt not in self._pages_of
        pages = range(len(self._owners), len(self._owners) + -(-length // self.room.page))
        self._pages_of[prompt], self._length_of[prompt] = list(pages), length
        self._owners += [prompt] * len(pages)
        self._layout = None

    def read(self, prompts: Sequence[int], starts: Sequence[int]) -> None:
        """The run that follows holds these prompts' tokens, packed, at `starts`."""
        places = []
        for prompt, start in zip(prompts, starts, strict=True):
            token = np.arange(self._length_of[prompt])
            pages = np.array(self._pages_of[prompt], np.int64)[token // self.room.page]
            places.append(np.stack([start + token, pages, token % self.room.page]))
        self._places = to_device(torch.from_numpy(np.concatenate(places, axis=1)), self.device)

    def drop(self, prompt: int) -> None:
        """Free the pages of a prompt without rows; the last pages move there."""
        free = self._pages_of.pop(prompt)
        del self._length_of[prompt]
        left = len(self._owners) - len(free)
        sources = [page for page in range(left, len(self._owners)) if page not in free]
        targets = [page for page in free if page < left]
        for source, target in zip(sources, targets, strict=True):
            owner = self._owners[target] = self._owners[source]
            pages = self._pages_of[owner]
            pages[pages.index(source)] = target
        del self._owners[left:]
        self._move(self._all_pages, sources, targets)

    def add_rows(self, prompts: Sequence[int]) -> None:
        """Rows that continue these prompts, behind the others."""
        self.prompts += prompts
        assert len(self.prompts) <= self.room.rows
        self._layout = None

    def keep_rows(self, kept: np.ndarray) -> np.ndarray:
        """Drop the rows for which `kept` [R] is False; the last rows move there. Returns the old places of those
        that stay, in their new order."""
        order = np.arange(kept.sum())
        targets = (~kept[: len(order)]).nonzero()[0]
        order[targets] = kept[len(order) :].nonzero()[0] + len(order)
        self.prompts = [self.prompts[row] for row in order]
        self._move(self._all_own, order[targets].tolist(), targets.tolist())
        return order

    def _move(self, store: Tensor, sources: list[int], targets: list[int]) -> None:
        """One by one: nothing is copied in between, however much moves."""
        self._layout = None
        for source, target in zip(sources, targets, strict=True):
            store[:, :, target] = store[:, :, source]

    # ------------------------------------------------------------------------------------------------------------
    # Prompts

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take the rotated keys and values [S, kv heads, d] of the prompts being read."""
        source, page, place = self._places
        for store, packed in zip(self._pages[layer], (key, value), strict=True):
            store[page, :, place] = packed[source]

    # ------------------------------------------------------------------------------------------------------------
    # A decode step

    def prepare(self, lengths: np.ndarray) -> Shape:
        """Make ready for a step of all rows, which have stored `lengths` [R] own tokens; shape.rows >= R rows run."""
        longest = int(lengths.max()) + 1
        if longest > self._own_room:
            self._own_room = min(self._most_own, max(FIRST_ROOM, 2 * self._own_room))
            if self._kernels:  # they look at what there is, whatever the shape says
                self._own_room = self._most_own
            if not self.static:
                self._all_own = F.pad(self._all_own, (0, 0, 0, self._own_room - self._all_own.shape[4]))
                self._own = self._by_layer(self._all_own)
        if self._layout is None:
            self._layout = self._fill()
        self._even = not self.static and longest == lengths.min() + 1
        return Shape._make((*self._layout, self._own_room if self.static else longest))

    def _fill(self) -> tuple[int, ...]:
        """Write the tables of a step: rows that read a page, [U, n]; where a row finds its parts among U * n results,
        [R, p], and which of the p it lacks; which places of a page hold no token, [U, 1, 1, page], -inf there."""
        room, rows, pages = self.room, len(self.prompts), len(self._owners)
        if self.static:
            rows, pages = max(FEWEST_ROWS, _round_up(rows, 1)), _round_up(pages, 2)
            rows, pages = min(rows, room.rows), min(pages, room.pages)
            layout = rows, pages, room.rows_per_prompt, room.pages_per_prompt
        else:
            layout = rows, pages, max(Counter(self.prompts).values()), max(map(len, self._pages_of.values()))
        rows, pages, most_readers, most_parts = layout
        readers, empty = np.zeros((pages, most_readers), np.int64), np.zeros((pages, room.page), bool)
        parts, absent = np.zeros((rows, most_parts), np.int64), np.ones((rows, most_parts), bool)
        read, tokens, ordinal = np.zeros((3, pages), np.int64)
        own_pages = np.zeros(rows, np.int64)
        seen: Counter[int] = Counter()
        for row, prompt in enumerate(self.prompts):
            own = self._pages_of[prompt]
            readers[own, seen[prompt]] = row
            parts[row, : len(own)] = np.array(own, np.int64) * most_readers + seen[prompt]
            absent[row, : len(own)] = False
            own_pages[row] = len(own)
            seen[prompt] += 1
        for prompt, own in self._pages_of.items():
            read[own], tokens[own], ordinal[own] = seen[prompt], room.page, np.arange(len(own))
            if own:
                tokens[own[-1]] = self._length_of[prompt] - (len(own) - 1) * room.page
                empty[own[-1], tokens[own[-1]] :] = True
        mask = torch.zeros(empty.shape, dtype=self.dtype).masked_fill_(torch.from_numpy(empty), float("-inf"))
        arrays = (readers, read, tokens, ordinal, own_pages, parts, absent)
        tables = Tables._make((*map(torch.from_numpy, arrays), mask[:, None, None]))
        if self.static and layout in self._tables:
            for old, new in zip(self._tables[layout], tables, strict=True):
                assert old is not None and new is not None, "static tables are whole"
                old.copy_(to_device(new, self.device))  # without waiting for the step that runs
            return layout
        if not self.static:  # what hides nothing need not be looked at
            self._tables.clear()
            tables = tables._replace(absent=tables.absent if absent.any() else None,
                                     empty=tables.empty if empty.any() else None)  # fmt: skip
        self._tables[layout] = Tables._make(None if table is None else table.to(self.device) for table in tables)
        return layout

    def begin(self, shape: Shape, lengths: Tensor) -> None:
        """Start a step on the device: own tokens [shape.rows] that the rows have stored."""
        self._step, self._lengths, self._own_tokens, self._later = self._tables[shape[:4]], lengths, shape.own, None
        if not self._even and not self._kernels:
            later = torch.arange(shape.own, device=self.device) > lengths[:, None]
            self._later = torch.zeros(later.shape, dtype=self.dtype, device=self.device)
            self._later = self._later.masked_fill_(later, float("-inf"))[:, None, None]

    def attend(
        self, layer: int, mixed: Tensor, angles: Tensor, scale: float, norms: HeadNorms | None = None
    ) -> Tensor:
        """Norm (where there are norms) and rotate the rows' new queries and keys, store keys and values, and attend to
        prompts and own tokens, in one softmax: mixed [R, groups, share + 2, d] as the projection leaves it, angles
        [2, R, d] -> [R, heads * d]."""
        keys, values = self._own[layer]
        query = decode_rope(mixed, angles, keys, values, self._lengths, norms)
        page_keys, page_values = self._pages[layer]
        return attend(query, page_keys, page_values, keys, values, self._lengths, self._later, self._step,
                      self._own_tokens, scale)  # fmt: skip


def _round_up(count: int, steps: int) -> int:
    """The next of `steps` evenly spaced sizes in each doubling."""
    step = max(1, (1 << max(0, count - 1).bit_length()) // (2 * steps))
    return max(1, -(-count // step) * step)
