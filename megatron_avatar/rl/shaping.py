"""Temporal Advantage Shaping (paper, TAS): token advantage A_{i,t} = w_t * A_i.

With t' = t / (L - 1) the parabola 1 + lam * (2t' - 1)^2 lifts the completion's opening, where the
answer is planned, and its end, where it is drawn together. TAS scales the surrogate, not the KL term.

On the whole completion, as in the paper, the parabola's peaks are `<think>` and `</answer>`, which a policy that
knows the format is certain of. Between the tags t' runs over the reasoning and the answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_avatar.rl.rewards.format import content_spans

_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "parabolic": lambda t: (2 * t - 1) ** 2,
    "uniform": torch.zeros_like,
    "linear_decay": lambda t: 1 - t,
    "linear_incline": lambda t: t,
    "inverse_parabolic": lambda t: 1 - (2 * t - 1) ** 2,
    # The parabola's mean: a control for its scale. In closed form (L + 1) / (3 (L - 1)), and 1 for L = 1.
    "uniform_matched": lambda t: ((2 * t - 1) ** 2).mean().expand_as(t),
}


def temporal_weights(length: int, shape: str, lam: float, inside: Tensor | None = None) -> Tensor:
    """Weights w_t [L] float32 of a completion of `length` tokens, padding excluded, end token included.

    A completion of one token has t' = 0. `inside` [L] bool restricts the weighting to some tokens, as
    `between_tags` gives them: t' runs over these, and the others' weight is 1. Raises ValueError for an unknown shape.
    """
    if shape not in _SHAPES:
        raise ValueError(f"rl.shaping.shape is {shape!r}: choose one of {', '.join(_SHAPES)}")
    places = token_places(length, inside)
    weights = torch.ones(length, dtype=torch.float64)
    shaped = ~places.isnan()
    weights[shaped] += lam * _SHAPES[shape](places[shaped])
    return weights.float()


def token_places(length: int, inside: Tensor | None = None) -> Tensor:
    """t' of every token [L] float64 in [0, 1], over those `inside` [L] bool (all by default); NaN for the others."""
    assert length >= 1, "a completion holds its end token at least"
    inside = torch.ones(length, dtype=torch.bool) if inside is None else inside
    places = torch.full((length,), torch.nan, dtype=torch.float64)
    count = int(inside.sum())
    places[inside] = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    return places


def between_tags(pieces: Sequence[str]) -> Tensor:
    """Which tokens [L] bool lie in the reasoning or the answer and touch no tag; `pieces` are the tokens' texts.

    All of them where the completion is not in the format: nothing else is known of its parts.
    """
    spans = content_spans("".join(pieces))
    inside, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        inside.append(any(low <= start and end <= high and start < end for low, high in spans))
        start = end
    mask = torch.tensor(inside, dtype=torch.bool)
    return mask if bool(mask.any()) else torch.ones(len(pieces), dtype=torch.bool)
