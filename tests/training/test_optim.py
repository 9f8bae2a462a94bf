"""Optimization against torch's own AdamW, clipping and schedules."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_avatar.config.schema import OptimConfig
from megatron_avatar.training.optim import build_optimizer
from tests.training.gpt import batch, build_gpt, train_step


def optimize(policy, backend, optim=None, *, lr=1e-2, total_steps=5):
    optim = optim or OptimConfig()
    return build_optimizer(policy, optim, lr=lr, total_steps=total_steps)


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def test_five_steps_equal_torch_adamw(backend):
    optim = OptimConfig(weight_decay=0.1, clip_grad=1.0, warmup_fraction=0.4, schedule="cosine", min_lr=1e-3)
    ours, plain = build_gpt(backend), build_gpt(backend)
    optimization = optimize(ours, backend, optim)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    vectors = [p for p in plain.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    rates = [5e-3, 1e-2] + [1e-3 + 9e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)]
    norms = []
    for step, rate in enumerate(rates):
        tokens, targets, positions, mask = batch(step)
        adamw.zero_grad()
        plain(tokens, positions, mask, labels=targets).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        norm, skipped = train_step(optimization, step)
        assert norm == pytest.approx(norms[-1], rel=1e-5) and not skipped
        assert optimization.lr == pytest.approx(rate)
    assert min(norms) > 1.0  # clipping was at work
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6, name


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_warms_up_and_never_wastes_an_update(backend, schedule):
    optimization = optimize(build_gpt(backend), backend, OptimConfig(schedule=schedule, warmup_fraction=0.2),
                            lr=1.0, total_steps=10)
    rates = []
    for step in range(10):
        train_step(optimization, step)
        rates.append(optimization.lr)
    assert rates[:2] == [0.5, 1.0]
    rest = {
        "constant": [1.0] * 8,
        "linear": [1 - k / 9 for k in range(1, 9)],
        "cosine": [(1 + math.cos(math.pi * k / 9)) / 2 for k in range(1, 9)],
    }[schedule]
    assert rates[2:] == pytest.approx(rest)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_skips_the_update(backend, bad):
    policy = build_gpt(backend)
    optimization = optimize(policy, OptimConfig(warmup_fraction=0.0))
    train_step(optimization, 0)
    before = weights(policy)
    optimization.zero_grad()
    next(policy.parameters()).main_grad.view(-1)[3] = bad
    norm, skipped = optimization.step()
    assert skipped and not math.isfinite(norm) and optimization.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(policy).items())
    first = optimization.lr
    norm, skipped = train_step(optimization, 1)
    assert not skipped and math.isfinite(norm) and optimization.skipped == 1
    assert optimization.lr < first  # the schedule went on
    assert not torch.equal(next(policy.parameters()), before["embedding.word_embeddings.weight"])


def test_frozen_parameters_stay_and_a_new_stage_starts_afresh(backend):
    policy, twin = build_gpt(backend), build_gpt(backend)
    frozen = policy.decoder.layers[0].mlp.linear_fc1.weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimization = optimize(policy, backend)
    for step in range(2):
        train_step(optimization, step)
    assert torch.equal(frozen, before) and not hasattr(frozen, "main_grad")
    optimization.close()
    frozen.requires_grad_(True)
    assert not any(hasattr(p, "main_grad") for p in policy.parameters())
    twin.load_state_dict(policy.state_dict())
    second, fresh = optimize(policy, backend), optimize(twin, backend)
    for step in range(2, 4):
        assert train_step(second, step) == train_step(fresh, step)
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(policy).items())
    assert not torch.equal(frozen, before)


@pytest.mark.parametrize(
    ("optim", "arguments", "named"),
    [
        (OptimConfig(schedule="step"), {}, "optim.schedule"),
        (OptimConfig(warmup_fraction=1.5), {}, "optim.warmup_fraction"),
        (OptimConfig(min_lr=1e-3), {"lr": 1e-4}, "optim.min_lr"),
        (OptimConfig(), {"total_steps": 0}, "steps=0"),
    ],
)
def test_settings_out_of_range_are_named(backend, optim, arguments, named):
    with pytest.raises(ValueError, match=named):
        optimize(torch.nn.Linear(2, 2), backend, optim, **arguments)
