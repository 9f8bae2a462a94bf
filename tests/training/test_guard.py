"""What the error between generation and training does to a step: warns, masks, isn't applied, ends the run."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.config.schema import GuardConfig
from megatron_avatar.training.guard import ENTROPY_EDGES, Guard, LogprobMismatch, StepError, error_stats, step_error

BINS = len(ENTROPY_EDGES) + 1


def found(mean: float, kept: float | None = None, *, masked: int = 0, sums=None, tokens=None) -> StepError:
    counts = np.full(BINS, 100.0) if tokens is None else np.array(tokens, float)
    sums = mean * counts if sums is None else np.array(sums, float)
    return StepError(mean, mean if kept is None else kept, mean, masked, 8, sums, counts)


def applied(guard: Guard, *errors: StepError) -> list[bool]:
    return [guard.judge(error, speaks=True) for error in errors]


def test_a_run_ends_only_where_the_error_stays(caplog):
    guard = Guard(GuardConfig(), exact=False)
    high, low = found(1.31), found(1.04)
    assert applied(guard, high, high, low, high, high) == [False, False, True, False, False]
    continued = Guard(GuardConfig(), exact=False)
    continued.load_state_dict(guard.state_dict())  # as a checkpoint has it
    for judge in (guard, continued):
        with pytest.raises(LogprobMismatch, match=r"1\.310, above rl\.guard\.stop=1\.3 in 3 steps in a row"):
            applied(judge, high)
    assert applied(Guard(GuardConfig(), exact=False), *[found(1.29)] * 9) == [True] * 9  # warned about, no more
    assert applied(Guard(GuardConfig(stop=0), exact=False), *[found(9.0)] * 9) == [True] * 9
    assert applied(Guard(GuardConfig(in_a_row=5), exact=False), *[high] * 4) == [False] * 4


def test_in_float32_a_fault_ends_the_run_at_once():
    with pytest.raises(LogprobMismatch, match=r"1\.051, above rl\.guard\.exact=1\.05.* No update was applied"):
        applied(Guard(GuardConfig(), exact=True), found(1.051))
    assert applied(Guard(GuardConfig(exact=0), exact=True), found(1.051)) == [True]
    assert applied(Guard(GuardConfig(), exact=False), found(1.051)) == [True]


def test_a_step_is_applied_where_what_is_left_agrees():
    """One token that is off makes any mean; the others' completions still teach. Numbers that aren't finite are not
    judged here: the update is skipped for them."""
    guard = Guard(GuardConfig(), exact=False)
    assert applied(guard, found(40.0, 1.01, masked=1)) == [True] and guard.in_a_row == 1
    assert applied(guard, found(40.0, math.nan, masked=8)) == [False] and guard.in_a_row == 2  # nothing is left
    assert applied(guard, found(math.inf), found(math.nan)) == [True, True] and guard.in_a_row == 2
    nothing = dataclasses.replace(found(0.0), completions=0)
    assert applied(guard, nothing) == [True] and guard.in_a_row == 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (found(1.2), "Tokens that the model is sure of disagree too (1.200 below 0.5 nats)"),
        (found(9.0, 1.01, masked=1, sums=[100] * 5 + [4300]), "1 of 8 completions make it, and are masked; without"),
        (found(1.06, sums=[100, 100, 100, 100, 110, 126]), "sure of agree (1.000), unsure ones don't: rounding"),
        (found(1.06, tokens=[0, 3, 0, 0, 9, 400]), "Nearly no token is one that the model is sure of"),
    ],
)
def test_a_warning_says_the_likely_cause_and_where_it_lies(caplog, error, words):
    guard = Guard(GuardConfig(stop=0), exact=False)
    assert applied(guard, *[error] * 51) == [True] * 51
    first, again = caplog.messages  # the first, and the fiftieth after it
    assert words in first and "above rl.guard.warn=1.05" in first and "step number 51" in again
    assert first.count("tokens)") == sum(count > 0 for count in error.tokens)
    caplog.clear()
    assert applied(Guard(GuardConfig(warn=0, stop=0), exact=False), error) == [True] and not caplog.messages
    assert not guard.judge(found(1.2), speaks=False) or not caplog.messages  # one rank speaks


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_statistics_are_numpy_s(count, seed):
    """Means of completions and bins against numpy's, with masked, replayed and fresh tokens in any mixture."""
    rng = np.random.default_rng(seed)
    index, error = np.sort(rng.integers(0, 5, count)), np.exp(rng.exponential(0.7, count))
    entropy, on = rng.exponential(1.5, count), rng.random(5) < 0.7
    guard = Guard(GuardConfig(), exact=False)
    fresh = torch.from_numpy(on[index])
    masked, means, which = guard.to_mask(torch.from_numpy(error), fresh, torch.from_numpy(index))
    own = {c: error[index == c].mean() for c in np.unique(index) if on[c]}
    np.testing.assert_allclose(means[which].numpy(), list(own.values()))
    over = np.array([on[c] and own[c] > 2 for c in index], bool)
    assert masked.tolist() == over.tolist()
    stats = error_stats(torch.from_numpy(error), torch.from_numpy(entropy), fresh, masked, means, which)
    step = step_error({name: value.numpy() for name, value in stats.items()} | {"masked": 0})
    wanted = error[on[index]]
    assert step.mean == pytest.approx(wanted.mean() if len(wanted) else 0.0)
    assert step.largest == pytest.approx(max(own.values(), default=0.0)) and step.completions == len(own)
    kept = error[on[index] & ~over]
    assert step.kept_mean == pytest.approx(kept.mean()) if len(kept) else math.isnan(step.kept_mean)
    edges = [-1, *ENTROPY_EDGES, np.inf]
    np.testing.assert_allclose(step.tokens, np.histogram(entropy[on[index]], edges)[0])
    np.testing.assert_allclose(step.sums, np.histogram(entropy[on[index]], edges, weights=wanted)[0])
    off = Guard(GuardConfig(mask=0), exact=False)
    assert not off.to_mask(torch.from_numpy(error), fresh, torch.from_numpy(index))[0].any()
