"""Keys and values of prompts and of their completions during generation, stored rotated.

Layout per layer: [B prompts, kv heads, slots, d]. Slots 0 .. P-1 hold the prompts (padded to the longest, P);
slot P + t * n + r holds token t of row r, for n rows a prompt. So the prompt exists once for its n rows, a decode
step appends one block of n slots, and attention is one call per layer: the rows of a prompt are queries over
the same slots, and a mask that all layers share shows every row the prompt and its own tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_STEPS = 32  # decode steps room is made for at first; the room doubles when it is used up


class KeyValueCache:
    """Cache of one generation: B prompts, n rows each. Usage: attach to the core attentions, run the packed prompts
    through the model, call `start`, then for each token run the rows and call `advance`."""

    def __init__(self, prompt_lengths: list[int], rows_per_prompt: int) -> None:
        self.prompt_lengths = prompt_lengths
        self.rows = rows_per_prompt
        self.ready = False  # False while prompts are read, True while rows are decoded
        self.steps = 0  # tokens that every row has stored
        self._room = 0  # tokens that every row can store
        self._longest = max(prompt_lengths)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._mask: Tensor | None = None  # additive [B, 1, n, slots]; a query head group repeats it

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take the prompts' rotated keys and values [S, kv heads, d]; prompts lie one after the other from 0."""
        total = sum(self.prompt_lengths)
        for store, packed in ((self._keys, key), (self._values, value)):
            parts = packed[:total].split(self.prompt_lengths)
            store[layer] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)

    def start(self) -> None:
        """End of the prompts: make room for decoded tokens."""
        self.ready = True
        self._grow()

    def advance(self) -> None:
        """End of a decode step: all layers have stored one token a row."""
        self.steps += 1
        if self.steps == self._room:
            self._grow()

    def keep(self, prompts: list[int]) -> None:
        """Drop all prompts but these (indices into the present batch)."""
        self.prompt_lengths = [self.prompt_lengths[i] for i in prompts]
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor[prompts]
        self._mask = self._mask[prompts]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store the rows' new token and attend to the prompt and the rows' own tokens, in one softmax.

        query [R, 1, heads, d], key and value [R, 1, kv heads, d] with R >= B * n rows, prompt by prompt; rows beyond
        B * n are padding and give zeros. Returns [R, 1, heads * d].
        """
        batch, rows = len(self.prompt_lengths), self.rows
        heads, groups, size = query.shape[2], key.shape[2], query.shape[3]
        padding = query.shape[0] - batch * rows
        if padding:
            query, key, value = (x[: batch * rows] for x in (query, key, value))
        begin = self._longest + self.steps * rows
        end = begin + rows
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, begin:end] = key.view(batch, rows, groups, size).transpose(1, 2)
        values[:, :, begin:end] = value.view(batch, rows, groups, size).transpose(1, 2)
        share = heads // groups
        # The heads that share a key-value head become further queries: [B, kv heads, share * n, d].
        query = query.view(batch, rows, groups, share, size).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
        mask = self._mask[..., :end].repeat(1, 1, share, 1)
        output = F.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end], mask, scale=scale)
        output = output.view(batch, groups, share, rows, size).permute(0, 3, 1, 2, 4).reshape(batch * rows, 1, -1)
        return F.pad(output, (0, 0, 0, 0, 0, padding)) if padding else output

    def _grow(self) -> None:
        """Double the room for decoded tokens, and rebuild the mask."""
        self._room = 2 * self._room or FIRST_STEPS
        slots = self._longest + self._room * self.rows
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = F.pad(tensor, (0, 0, 0, slots - tensor.shape[2]))
        sample = next(iter(self._keys.values()))
        slot = torch.arange(slots, device=sample.device)
        lengths = torch.tensor(self.prompt_lengths, device=sample.device)[:, None, None, None]
        row = torch.arange(self.rows, device=sample.device)[:, None]
        own = (slot >= self._longest) & ((slot - self._longest) % self.rows == row)
        self._mask = torch.zeros(len(lengths), 1, self.rows, slots, dtype=sample.dtype, device=sample.device)
        self._mask.masked_fill_(~((slot < lengths) | own), float("-inf"))
