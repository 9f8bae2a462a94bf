"""Which experts the tokens of completions went to: written down in generation, compared in the update, and where
rl.routing_replay says so taken there again.

Where two experts are nearly equal for a token, generation and training, which sum in other orders, may choose another
one: a flip. Each stage keeps its own layers' routes, on the replica that generated. Prompts are routed anew, and so are
completions from the replay buffer.

Shapes: N completion tokens, R rows of a decode step, T tokens, k experts a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

UNKNOWN = 255  # in the place of an expert's number where nothing was written down


class Recorder:
    """Takes down what the layers of a stage choose in a pass."""

    def __init__(self) -> None:
        self._chosen: list[Tensor] = []  # layer by layer

    def take(self, layer: int, chosen: Tensor) -> Tensor:
        """The experts [R, k] that the next layer has chosen, as they are."""
        self._chosen.append(chosen)
        return chosen

    def stacked(self) -> Tensor:
        """Those of all layers, [R, layers, k]."""
        return torch.stack(self._chosen, dim=1)


class Routes:
    """A micro-batch's routes `recorded` [N, layers, k] uint8 of the tokens at `places` [N], of layers from number
    `first` on. `counts` [2] holds flips, and the tokens of all layers that could have been one; what recomputes
    a layer counts it again, in both."""

    def __init__(self, recorded: Tensor, places: Tensor, first: int, *, replay: bool) -> None:
        self.recorded, self.places, self.first, self.replay = recorded, places, first, replay
        self.counts = torch.zeros(2, dtype=torch.int64, device=recorded.device)

    def take(self, layer: int, chosen: Tensor) -> Tensor:
        """The experts [T, k] that a layer takes, of those that it has chosen and those that were written down."""
        recorded, own = self.recorded[:, layer - self.first].long(), chosen[self.places]
        known = recorded[:, :1] != UNKNOWN
        differs = (own[:, :, None] != recorded[:, None]).all(dim=2).any(dim=1, keepdim=True) & known
        self.counts += torch.stack([differs.sum(), known.sum()])
        return chosen.index_copy(0, self.places, recorded.where(known, own)) if self.replay else chosen


def assembled(steps: list[tuple[np.ndarray, np.ndarray, Tensor]], lengths: np.ndarray) -> list[np.ndarray]:
    """Routes [L, layers, k] of each completion, from steps (rows, number of each row's token, routes [R, layers, k]);
    `lengths` are the completions'. What a row drew beyond its end is left out."""
    rows, tokens = (np.concatenate([step[part] for step in steps]) for part in (0, 1))
    found = torch.cat([step[2] for step in steps]).cpu().numpy()
    order = np.lexsort((tokens, rows))
    order = order[tokens[order] < lengths[rows[order]]]
    assert len(order) == lengths.sum(), "a step for each token"
    return np.split(found[order], np.cumsum(lengths)[:-1])
