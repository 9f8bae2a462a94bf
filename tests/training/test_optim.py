"""Optimization against torch's own AdamW, clipping and schedules."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_avatar.config.schema import OptimConfig, ParallelConfig
from megatron_avatar.policy import fusions
from megatron_avatar.training import optim as optim_module
from megatron_avatar.training.optim import build_optimizer
from tests.resilience.test_checkpoint import Trainer
from tests.training.gpt import batch, build_gpt, train_step

PLAIN, SHARED = ParallelConfig(), ParallelConfig(distributed_optimizer=True)


def optimize(policy, backend, optim=None, *, lr=1e-2, total_steps=5, parallel=PLAIN):
    optim = optim or OptimConfig()
    return build_optimizer(policy, optim, lr=lr, total_steps=total_steps, parallel=parallel)


def main_weights(optimization) -> dict[str, torch.Tensor]:
    return {name: main.clone() for name, main in optimization.main_weights().items()}


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


@pytest.fixture(params=[PLAIN, SHARED], ids=["plain", "distributed"])
def parallel(request) -> ParallelConfig:
    return request.param


def test_five_steps_equal_torch_adamw(backend, parallel):
    optim = OptimConfig(weight_decay=0.1, clip_grad=1.0, warmup_fraction=0.4, schedule="cosine", min_lr=1e-3)
    ours, plain = build_gpt(backend), build_gpt(backend)
    optimization = optimize(ours, backend, optim, parallel=parallel)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_skips_the_update(backend, bad, dtype, parallel):
    policy = build_gpt(backend, dtype=dtype)
    optimization = optimize(policy, backend, OptimConfig(warmup_fraction=0.0), parallel=parallel)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stage_renews_moments_and_schedule_and_keeps_main_weights(backend, parallel, dtype):
    """Bit for bit; what follows is what a fresh optimizer would do from these main weights."""
    policy, twin = build_gpt(backend, dtype=dtype), build_gpt(backend, dtype=dtype)
    optimization = optimize(policy, backend, parallel=parallel)
    for step in range(4):
        train_step(optimization, step)
    before = main_weights(optimization)
    assert before.keys() == dict(policy.named_parameters()).keys()
    assert (dtype is torch.float32) == all(
        torch.equal(main.flatten(), policy.get_parameter(name).float().flatten()) for name, main in before.items()
    )
    optim = OptimConfig(weight_decay=0.1, schedule="constant", warmup_fraction=0.5)
    optimization.renew(optim, lr=3e-3, total_steps=4)
    assert all(torch.equal(main, before[name]) for name, main in main_weights(optimization).items())

    fresh = optimize(twin, backend, optim, lr=3e-3, total_steps=4, parallel=parallel)
    with torch.no_grad():
        for name, main in fresh.main_weights().items():
            main.copy_(before[name])
        for name, parameter in twin.named_parameters():
            parameter.copy_(policy.get_parameter(name))
    for step in range(4, 7):
        assert train_step(optimization, step) == train_step(fresh, step)
        assert optimization.lr == fresh.lr == (1.5e-3 if step == 4 else 3e-3)
    ours, theirs = main_weights(optimization), main_weights(fresh)
    assert all(torch.equal(main, theirs[name]) for name, main in ours.items())
    with pytest.raises(ValueError, match="steps=0"):
        optimization.renew(optim, lr=3e-3, total_steps=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_stage_freezes_rests_and_goes_on_later(backend, parallel, dtype):
    """Weight decay doesn't move it either; trained again, its main weight goes on from its last bit."""
    policy, name = build_gpt(backend, dtype=dtype), "decoder.layers.0.mlp.linear_fc1.weight"
    frozen, optim = policy.get_parameter(name), OptimConfig(weight_decay=0.1)
    optimization = optimize(policy, backend, optim, parallel=parallel)
    train_step(optimization, 0)
    before = main_weights(optimization)
    optimization.renew(optim, lr=1e-2, total_steps=5)
    frozen.requires_grad_(False)
    for step in range(1, 3):
        train_step(optimization, step)
    after = main_weights(optimization)
    assert {key for key, main in after.items() if torch.equal(main, before[key])} == {name}
    state = optimization._optimizer.optimizer.state.values()
    assert {float(entry["step"]) for entry in state} == {2.0}, "checkpoints keep one count for all"
    optimization.renew(optim, lr=1e-2, total_steps=5)
    frozen.requires_grad_(True)
    assert torch.equal(main_weights(optimization)[name], before[name])
    train_step(optimization, 3)
    assert not torch.equal(main_weights(optimization)[name], before[name])


def test_bfloat16_keeps_float32_weights_and_gradients(backend, parallel):
    """Updates smaller than bfloat16 can hold add up in the main weights, gradients in float32."""
    policy = build_gpt(backend, dtype=torch.bfloat16)
    weight = policy.decoder.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        weight.fill_(1.0)
    optim = OptimConfig(warmup_fraction=0.0, schedule="constant")
    optimization = optimize(policy, backend, optim, lr=1e-3, parallel=parallel)
    assert weight.main_grad.dtype == weight.main_param.dtype == torch.float32
    for seen in (1.0, 0.99609375, 0.99609375):  # bfloat16's next number below 1; three steps of 0.001 reach 0.997
        optimization.zero_grad()
        (weight.float().sum()).backward()  # through the wrapper's hook
        ((2**-12 * weight.float()).sum()).backward()
        assert float(weight.main_grad[0, 0]) == 1 + 2**-12
        optimization.step()
        assert float(weight.detach().max()) == seen
    assert float(weight.main_param.max()) == pytest.approx(0.997, abs=1e-6)


def overflow(optimization, policy) -> tuple[float, bool]:
    """A step whose gradient is beyond float16."""
    optimization.zero_grad()
    next(policy.parameters()).main_grad.view(-1)[3] = float("inf")
    return optimization.step()


def test_in_float16_the_loss_scale_falls_with_overflows_and_rises_without(backend, parallel, monkeypatch):
    monkeypatch.setattr(optim_module, "RISES_AFTER", 2)
    monkeypatch.setattr(optim_module, "FIRST_SCALE", 2.0**6)
    policy = build_gpt(backend, dtype=torch.float16)
    optimization = optimize(policy, backend, parallel=parallel)
    scales = [optimization.loss_scale]
    for step in range(3):
        train_step(optimization, step)
        scales.append(optimization.loss_scale)
    assert scales == [64, 64, 128, 128]
    for overflows in range(1, 8):
        assert overflow(optimization, policy)[1] and optimization.loss_scale == 2.0 ** (7 - overflows)
        assert (optimization.overflows, optimization.skipped, optimization.skipped_in_row) == (overflows, overflows, 0)
    overflow(optimization, policy)  # no smaller scale answers this one
    assert (optimization.loss_scale, optimization.overflows, optimization.skipped_in_row) == (1, 7, 1)
    assert not train_step(optimization, 3)[1] and optimization.skipped_in_row == 0 and optimization.skipped == 8
    before = main_weights(optimization)
    optimization.zero_grad()
    assert optimization.step(usable=False)[1] and optimization.overflows == 7 and optimization.skipped_in_row == 1
    assert all(torch.equal(main, before[name]) for name, main in main_weights(optimization).items())
    optimization.renew(OptimConfig(), lr=1e-2, total_steps=5)
    assert optimization.loss_scale >= 1 and optimization.overflows == optimization.skipped == 0


def test_in_float16_a_norm_that_no_scale_answers_counts_as_in_a_row(backend, parallel):
    policy = build_gpt(backend, dtype=torch.float16)
    optimization = optimize(policy, backend, parallel=parallel)
    for row in (1, 2):
        optimization.zero_grad()
        next(policy.parameters()).main_grad.fill_(1e30)  # each finite, their squares are not
        norm, skipped = optimization.step()
        assert skipped and not math.isfinite(norm)
        assert (optimization.skipped_in_row, optimization.overflows) == (row, 0)
    assert optimization.loss_scale == optim_module.FIRST_SCALE


def test_a_float16_step_is_that_of_float32_within_its_rounding(backend, parallel):
    """A large eps keeps AdamW from making whole steps of gradients that are rounding alone."""
    half, whole = (build_gpt(backend, dtype=dtype) for dtype in (torch.float16, torch.float32))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(half.get_parameter(name))
    optim = OptimConfig(eps=1e-2)
    ours, theirs = (optimize(policy, backend, optim, lr=1e-3, parallel=parallel) for policy in (half, whole))
    for step in range(4):
        norm, skipped = train_step(ours, step)
        assert not skipped and norm == pytest.approx(train_step(theirs, step)[0], rel=2e-3)
    for name, main in main_weights(ours).items():
        assert (main.flatten() - whole.get_parameter(name).flatten()).abs().max() < 2e-5, name


@pytest.mark.parametrize("distributed", [False, True])
def test_a_float16_checkpoint_continues_with_its_scale_bit_for_bit(backend, tmp_path, distributed, monkeypatch):
    monkeypatch.setattr(optim_module, "RISES_AFTER", 3)
    parallel = ParallelConfig(distributed_optimizer=distributed)
    one, two = (Trainer(backend, seed=seed, parallel=parallel, dtype=torch.float16) for seed in range(2))
    overflow(one.optimization, one.policy)
    two.load(one.save(tmp_path, 0))
    for ours in (one.optimization, two.optimization):
        assert (ours.overflows_in_row, ours.overflows) == (1, 1)
    overflow(two.optimization, two.policy)
    assert two.optimization.overflows_in_row == 2, "one on each side of the checkpoint"
    one.train(0, 4)  # the scale doubles after three, and one counts towards the next
    path = one.save(tmp_path, 4)
    scale = one.optimization.loss_scale
    norms = one.train(4, 9)
    two.train(7, 8)
    two.load(path)
    assert two.optimization.loss_scale == scale == optim_module.FIRST_SCALE
    assert (two.optimization.overflows, two.optimization.skipped, two.optimization.overflows_in_row) == (1, 1, 0)
    assert two.train(4, 9) == norms and two.optimization.loss_scale == one.optimization.loss_scale > scale
    ours, theirs = main_weights(one.optimization), main_weights(two.optimization)
    assert all(torch.equal(main, theirs[name]) for name, main in ours.items())


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's and Apex's interface: moments made by Megatron-Core, one count of steps a group."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            (beta1, beta2), rate = group["betas"], group["lr"]
            for parameter in group["params"]:
                state = self.state[parameter]
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(parameter.grad, 1 - beta1)
                square.lerp_(parameter.grad**2, 1 - beta2)
                parameter.mul_(1 - rate * group["weight_decay"])
                scale = (square / (1 - beta2**step)).sqrt() + group["eps"]
                parameter.sub_(rate * mean / (1 - beta1**step) / scale)


@pytest.fixture
def fused(monkeypatch):
    """Megatron-Core as it would be where Apex is installed, on a GPU."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    for module in (optimizer, distrib_optimizer):
        monkeypatch.setattr(module, "Adam", FusedAdam)
    names = ("USING_PYTORCH_OPTIMIZER", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    apex = dict(zip(names, (False, True, False, True), strict=True))
    flags = [(module, name, apex[name], of_torch) for module, name, _, of_torch in fusions.FLAGS["adam"]]
    monkeypatch.setitem(fusions.FLAGS, "adam", flags)
    for module, name, found, _ in flags:
        monkeypatch.setattr(module, name, found)
    chosen = {"auto": fusions.Fusions(adam="apex"), "torch": fusions.Fusions()}
    monkeypatch.setattr(optim_module, "choose_fusions", lambda kernels, **_: chosen[kernels])


@pytest.mark.parametrize("distributed", [False, True])
def test_a_fused_adam_gives_the_same_updates_and_its_checkpoints_fit(backend, tmp_path, fused, distributed):
    one, two, three = (
        Trainer(backend, seed=seed, parallel=ParallelConfig(kernels=kernels, distributed_optimizer=distributed))
        for seed, kernels in enumerate(("auto", "torch", "auto"))
    )
    assert isinstance(one.optimization._optimizer.optimizer, FusedAdam)
    assert type(two.optimization._optimizer.optimizer) is torch.optim.AdamW
    fusions.pin(fusions.Fusions(adam="apex"))
    one.train(0, 3)
    path = one.save(tmp_path, 3)
    norms = one.train(3, 6)
    three.train(7, 8)
    three.load(path)
    assert three.train(3, 6) == norms
    fusions.pin(fusions.Fusions())
    two.train(7, 8)
    two.load(path)
    assert two.train(3, 6) == pytest.approx(norms, rel=1e-4)


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
