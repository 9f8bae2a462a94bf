"""The error between generation and training, watched: it warns, masks a completion, and ends a run only where it stays.

Both score the same tokens with the same weights, so exp|difference of log-probabilities| is 1 but for rounding. In
float32 that is 1e-6, and whatever else differs is a fault. In half precision it grows with the entropy of what is
sampled: 1.001 to 1.04 is reported for trained models, random weights give 1.06, and single completions more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_avatar.config.schema import GuardConfig
from megatron_avatar.policy.flash import to_device
from megatron_avatar.rl.objective import completion_means, completion_slots

ENTROPY_EDGES = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats; the bins that a step's error is told by
SURE = 2  # bins of tokens that the model is sure of, below 0.5 nats
ENOUGH = 20  # tokens, before a bin's mean says something
WARN_EVERY = 50  # steps above the limit
log = logging.getLogger(__name__)


class LogprobMismatch(RuntimeError):
    """Generation and training disagree on the log-probabilities of the same tokens."""


@dataclass(frozen=True)
class StepError:
    """What a step's fresh tokens say: mean exp|difference|, of all and of those that aren't masked (NaN without any);
    the largest of a completion; masked and all completions; by bin of entropy sums [B] and tokens [B]."""

    mean: float
    kept_mean: float
    largest: float
    masked: int
    completions: int
    sums: np.ndarray
    tokens: np.ndarray

    @property
    def by_entropy(self) -> list[float | None]:
        """The mean of each bin; None where it has no token."""
        return [float(s / n) if n else None for s, n in zip(self.sums, self.tokens, strict=True)]

    def record(self) -> dict[str, Any]:
        """What a step logs of it."""
        return {
            "logprob_error": self.mean, "logprob_error/max": self.largest, "logprob_error/masked": self.masked,
            "logprob_error/entropy": {"edges": list(ENTROPY_EDGES), "mean": self.by_entropy,
                                      "tokens": [int(n) for n in self.tokens]},
        }  # fmt: skip


class Guard:
    """Judges each step's error by `rl.guard`; lives for the whole run. `exact`: the policy computes in float32."""

    def __init__(self, limits: GuardConfig, *, exact: bool) -> None:
        self.limits, self.exact = limits, exact
        self.above = self.in_a_row = 0  # steps above `warn` so far, and above `stop` up to now

    def state_dict(self) -> dict[str, int]:
        return {"above": self.above, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.above, self.in_a_row = state["above"], state["in_a_row"]

    def to_mask(self, error: Tensor, on: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens [N] belong to a fresh completion whose mean `error` [N] passes rl.guard.mask; the completions'
        means [N], one behind the other; and which of these are of fresh completions [N]. `on` [N]: fresh tokens;
        `index` [N] names completions. One that isn't finite is not masked: it makes the whole update unusable."""
        slots = completion_slots(index)
        means = completion_means(error, slots)
        fresh = torch.zeros_like(on).scatter(0, slots, on)
        over = fresh & (means > (self.limits.mask or math.inf)) & means.isfinite()
        return over[slots], means, fresh

    def judge(self, error: StepError, *, speaks: bool) -> bool:
        """Whether the step may be applied. Warns where one rank `speaks`; raises LogprobMismatch on all of them."""
        limits = self.limits
        if not error.completions or not math.isfinite(error.mean):
            return True
        if self.exact and limits.exact and error.mean > limits.exact:
            raise LogprobMismatch(
                f"{self._measured(error)}, above rl.guard.exact={limits.exact:g}: in float32 only a fault does that. "
                f"{likely_cause(error, limits.exact)}. No update was applied; the last checkpoint is good."
            )
        if limits.warn and error.mean > limits.warn:
            self.above += 1
            if speaks and self.above % WARN_EVERY == 1:
                log.warning("%s, above rl.guard.warn=%g (step number %d so far). %s. By entropy: %s",
                            self._measured(error), limits.warn, self.above, likely_cause(error, limits.warn),
                            told_by_entropy(error))  # fmt: skip
        self.in_a_row = self.in_a_row + 1 if limits.stop and error.mean > limits.stop else 0
        if self.in_a_row and self.in_a_row >= limits.in_a_row:
            raise LogprobMismatch(
                f"{self._measured(error)}, above rl.guard.stop={limits.stop:g} in {self.in_a_row} steps in a row. "
                f"{likely_cause(error, limits.stop)}. By entropy: {told_by_entropy(error)}. No update was applied in "
                "this step; the same command tries it again, from the last checkpoint"
            )
        return not limits.stop or error.kept_mean <= limits.stop

    def _measured(self, error: StepError) -> str:
        return f"mean exp|log-probability difference| between generation and training is {error.mean:.3f}"


def step_error(stats: dict[str, Any]) -> StepError:
    """From a step's summed statistics (`error_stats`)."""
    kept = float(stats["on_tokens"])
    return StepError(
        mean=float(stats["error_sum"] / max(float(stats["error_tokens"]), 1.0)),
        kept_mean=float(stats["error_kept_sum"]) / kept if kept else math.nan,
        largest=float(stats["error_max"]), masked=int(stats["masked"]), completions=int(stats["fresh"]),
        sums=np.asarray(stats["error_bins"]), tokens=np.asarray(stats["error_bin_tokens"]),
    )  # fmt: skip


def error_stats(
    error: Tensor, entropy: Tensor, on: Tensor, masked: Tensor, means: Tensor, fresh: Tensor
) -> dict[str, Tensor]:
    """A micro-batch's share of what `step_error` reads: float64, sums except *_max. `error`, `entropy` [N] float64;
    `on` [N]: fresh tokens, `masked` [N] those of masked completions; `means` and `fresh` [N] as `Guard.to_mask` gives
    them."""
    edges = to_device(torch.tensor(ENTROPY_EDGES, dtype=entropy.dtype), entropy.device)
    bins, none = torch.bucketize(entropy, edges), error.new_zeros(len(ENTROPY_EDGES) + 1)
    kept, own = on & ~masked, error.where(on, 0)
    return {
        "error_sum": own.sum(), "error_tokens": on.sum().double(), "fresh": fresh.sum().double(),
        "error_kept_sum": error.where(kept, 0).sum(), "on_tokens": kept.sum().double(),
        "error_max": means.where(fresh, 0).amax(),
        "error_bins": none.index_add(0, bins, own), "error_bin_tokens": none.index_add(0, bins, on.double()),
    }  # fmt: skip


def likely_cause(error: StepError, limit: float) -> str:
    """In words, from where the error lies: with tokens that the model is sure of, with few completions, or with the
    unsure tokens, as rounding does."""
    sure = float(error.tokens[:SURE].sum())
    sure_mean = float(error.sums[:SURE].sum()) / sure if sure else math.nan
    if sure >= ENOUGH and sure_mean > limit:
        return (f"Tokens that the model is sure of disagree too ({sure_mean:.3f} below {ENTROPY_EDGES[SURE - 1]:g} "
                "nats), which rounding doesn't do: positions, weights or kernels of the two forwards differ (try "
                "parallel.kernels=torch, or another layout)")  # fmt: skip
    if error.masked and error.kept_mean <= limit:
        return (f"{error.masked} of {error.completions} completions make it, and are masked; without them it is "
                f"{error.kept_mean:.3f}")  # fmt: skip
    if sure < ENOUGH:
        return ("Nearly no token is one that the model is sure of: rounding in half precision, which grows with the "
                "entropy, or a fault; a few steps with model.dtype=float32 in another output_dir tell them apart")
    return (f"Tokens that the model is sure of agree ({sure_mean:.3f}), unsure ones don't: rounding in half precision, "
            "which grows with the entropy; a lower rl.sampling.temperature lessens it, and rl.guard.warn is its limit")


def told_by_entropy(error: StepError) -> str:
    """The bins in words: `below 0.1 nats 1.002 (120 tokens), …`."""
    names = [f"below {edge:g} nats" for edge in ENTROPY_EDGES] + ["above"]
    rows: Sequence[tuple[str, float | None, float]] = list(zip(names, error.by_entropy, error.tokens, strict=True))
    return ", ".join(f"{name} {mean:.3f} ({int(n)} tokens)" for name, mean, n in rows if mean is not None)
