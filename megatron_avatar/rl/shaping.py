"""Temporal Advantage Shaping (paper, TAS): token advantage A_{i,t} = w_t * A_i.

With t' = t / (L - 1) the parabola 1 + lam * (2t' - 1)^2 lifts the completion's opening, where the
answer is planned, and its end, where it is drawn together. TAS scales the surrogate, not the KL term.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "parabolic": lambda t: (2 * t - 1) ** 2,
    "uniform": torch.zeros_like,
    "linear_decay": lambda t: 1 - t,
    "linear_incline": lambda t: t,
    "inverse_parabolic": lambda t: 1 - (2 * t - 1) ** 2,
    # The parabola's mean: a control for its scale. In closed form (L + 1) / (3 (L - 1)), and 1 for L = 1.
    "uniform_matched": lambda t: ((2 * t - 1) ** 2).mean().expand_as(t),
}


def temporal_weights(length: int, shape: str, lam: float) -> Tensor:
    """Weights w_t [L] float32 of a completion of `length` tokens, padding excluded, end token included.

    A completion of one token has t' = 0. Raises ValueError for an unknown shape.
    """
    if shape not in _SHAPES:
        raise ValueError(f"rl.shaping.shape is {shape!r}: choose one of {', '.join(_SHAPES)}")
    assert length >= 1, "a completion holds its end token at least"
    t = torch.arange(length, dtype=torch.float64) / max(length - 1, 1)
    return (1 + lam * _SHAPES[shape](t)).float()
