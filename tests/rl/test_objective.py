"""The objective against TRL's own loss, and its sums over micro-batches."""

from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.rl.objective import kl_k3, policy_loss, token_weights

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
PLAIN = {**CLIP, "dual_clip": None, "ratio_level": "token", "beta": 0.1}


class Case(NamedTuple):
    """Completions as flat tensors [N], float64."""

    lengths: list[int]
    new: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor
    index: torch.Tensor

    def loss(self, weights: torch.Tensor, kl_weights: torch.Tensor, **options) -> tuple:
        """policy_loss of all tokens."""
        return self.part(slice(None), weights, kl_weights, **options)

    def part(self, kept, weights: torch.Tensor, kl_weights: torch.Tensor, **options) -> tuple:
        """policy_loss of the tokens `kept` (slice or mask), whose weights are given."""
        return policy_loss(self.new[kept], self.old[kept], self.ref[kept], self.advantages[kept], weights, kl_weights,
                           self.index[kept], **{**PLAIN, **options})


def make_case(seed: int, lengths: list[int], shaped: bool = False, noise: float = 0.4) -> Case:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    old = -normal(n).abs()
    new = old + noise * normal(n)
    advantages = normal(len(lengths)).repeat_interleave(torch.tensor(lengths))
    if shaped:
        advantages = advantages * (1 + 0.3 * normal(n).abs())
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Case(lengths, new.requires_grad_(), old, old + noise * normal(n), advantages, index)


def grpo_weights(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return token_weights(lengths, [True] * len(lengths), len(lengths), 0, alpha=1.0)


def trl_loss(case: Case, *, level: str, delta: float | None, beta: float) -> torch.Tensor:
    """The loss of TRL's GRPOTrainer on padded rows; only its model call is replaced."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values.split(case.lengths)), batch_first=True)

    mask = padded(torch.ones_like(case.old)).long()
    new = padded(case.new)
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.model = torch.nn.Identity()
    trainer.args = SimpleNamespace(delta=delta, use_bias_correction_kl=False)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = "grpo", level, beta
    trainer.epsilon_low, trainer.epsilon_high = CLIP["clip_low"], CLIP["clip_high"]
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.use_vllm = trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (new, torch.zeros_like(new), None)
    return trainer._compute_loss(trainer.model, {
        "prompt_ids": torch.zeros(len(mask), 1).long(), "prompt_mask": torch.ones(len(mask), 1).long(),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "advantages": padded(case.advantages),
        "old_per_token_logps": padded(case.old), "ref_per_token_logps": padded(case.ref),
    })


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("shaped", [False, True])
def test_equals_trl_in_value_and_gradient(level: str, dual_clip: float | None, shaped: bool) -> None:
    # Sequence ratios are means of many tokens: more noise makes them leave the clip range, too.
    case = make_case(0, [7, 1, 12, 5, 3, 9, 2, 4], shaped, noise=0.4 if level == "token" else 1.0)
    theirs = trl_loss(case, level=level, delta=dual_clip, beta=0.1)
    (their_gradient,) = torch.autograd.grad(theirs, case.new)
    ours, stats = case.loss(*grpo_weights(case.lengths), ratio_level=level, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(ours, case.new)

    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-6, rtol=0)
    # The comparison means something: both clip sides act, and every setting moves the result.
    log_ratio = (case.new - case.old).detach()
    if level == "sequence":
        log_ratio = torch.cat([r.mean().expand(len(r)) for r in log_ratio.split(case.lengths)])
    ratio = log_ratio.exp()
    assert ((ratio < 0.8) & (case.advantages < 0)).any() and ((ratio > 1.28) & (case.advantages > 0)).any()
    assert 0 < stats["clipped_tokens"] < stats["tokens"] == sum(case.lengths)
    for other in ({"beta": 0.0}, {"dual_clip": 1.2}, {"ratio_level": "token" if level == "sequence" else "sequence"},
                  {"clip_low": 0.1}, {"clip_high": 0.1}):
        changed, _ = case.loss(*grpo_weights(case.lengths), **{"ratio_level": level, "dual_clip": dual_clip, **other})
        assert abs(float((changed - ours).detach())) > 1e-4, other


def test_an_unclipped_first_step_is_the_policy_gradient() -> None:
    """At the behaviour policy the gradient is -A / (L * n), whatever the clip range."""
    case = make_case(1, [3, 5], noise=0.0)
    loss, stats = case.loss(*grpo_weights(case.lengths), beta=0.0)
    (gradient,) = torch.autograd.grad(loss, case.new)
    weights = torch.tensor([1 / 6] * 3 + [1 / 10] * 5)
    torch.testing.assert_close(gradient, -weights * case.advantages, atol=1e-7, rtol=0, check_dtype=False)
    assert stats["ratio_sum"] == 8 and stats["ratio_max"] == 1 and stats["clipped_tokens"] == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=9), st.integers(0, 99), st.data(),
    st.sampled_from(["token", "sequence"]),
)
def test_micro_batches_sum_to_the_whole_step(lengths: list[int], seed: int, data: st.DataObject, level: str) -> None:
    """However completions are spread, losses, gradients and statistics add up to the step's."""
    case = make_case(seed, lengths)
    on = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    totals = (sum(on), len(on) - sum(on))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    whole, stats = case.loss(*token_weights(lengths, on, *totals, alpha=0.7), ratio_level=level)
    parts = []
    for k in range(3):
        mine = [i for i in range(len(lengths)) if owner[i] == k]
        weights = token_weights([lengths[i] for i in mine], [on[i] for i in mine], *totals, alpha=0.7)
        kept = owner[case.index] == k
        parts.append(case.part(kept, *weights, ratio_level=level))
    total = sum(loss for loss, _ in parts)
    assert float(total.detach()) == pytest.approx(float(whole.detach()), abs=1e-9)
    for mine, expected in zip(torch.autograd.grad(total, case.new), torch.autograd.grad(whole, case.new), strict=True):
        torch.testing.assert_close(mine, expected)
    for key, value in stats.items():
        if key == "per_token_surrogate":
            continue
        combined = [part[key] for _, part in parts]
        merged = torch.stack(combined).max() if key.endswith("_max") else sum(combined)
        assert float(merged) == pytest.approx(float(value), abs=1e-9), key


def test_mean_of_micro_batch_means_is_another_objective() -> None:
    """Negative control: local counts instead of the step's weigh completions by where they lie."""
    case = make_case(3, [4, 6, 2, 8, 5])
    whole, _ = case.loss(*grpo_weights(case.lengths))
    halves = zip((slice(0, 10), slice(10, 25)), ([4, 6], [2, 8, 5]), strict=True)
    means = sum(case.part(kept, *grpo_weights(lengths))[0] for kept, lengths in halves) / 2
    assert abs(float((means - whole).detach())) > 1e-3


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12), st.just(0.0) | st.floats(1e-3, 3)
)
def test_token_weights_average_each_part(completions: list[tuple[int, bool]], alpha: float) -> None:
    lengths, on = [n for n, _ in completions], [o for _, o in completions]
    n_on, n_off = sum(on), len(on) - sum(on)
    surrogate, kl = token_weights(lengths, np.array(on), n_on, n_off, alpha)
    assert float(kl.sum()) == pytest.approx(float(n_on > 0), abs=1e-5)
    assert float(surrogate.sum()) == pytest.approx((n_on > 0) + alpha * (n_off > 0), rel=1e-5)
    for weights, is_on, length in zip(surrogate.split(lengths), on, lengths, strict=True):
        expected = 1 / (n_on * length) if is_on else alpha / (n_off * length)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert not kl[(~torch.tensor(on)).repeat_interleave(torch.tensor(lengths))].any()


def test_fillers_contribute_nothing() -> None:
    case = make_case(4, [3, 4])
    # What becomes filler has ratios that would be clipped, and the largest ones.
    case = case._replace(old=case.new.detach() - torch.tensor([0.0] * 3 + [3.0] * 4), advantages=torch.ones(7))
    assert case.loss(*grpo_weights([3, 4]))[1]["clipped_tokens"] == 4
    weights, kl_weights = grpo_weights([3, 4])
    weights[3:] = kl_weights[3:] = 0
    loss, stats = case.loss(weights, kl_weights)
    alone, alone_stats = case.part(slice(0, 3), weights[:3], kl_weights[:3])
    assert float(loss.detach()) == pytest.approx(float(alone.detach()), abs=1e-12)
    assert not torch.autograd.grad(loss, case.new)[0][3:].any()
    assert {k: float(v) for k, v in stats.items() if v.ndim == 0} == pytest.approx(
        {k: float(v) for k, v in alone_stats.items() if v.ndim == 0})


def test_replayed_tokens_have_no_kl_and_count_for_the_sample_size() -> None:
    case = make_case(5, [3, 4])
    weights = token_weights([3, 4], [True, False], 1, 1, alpha=1.0)
    loss, stats = case.loss(*weights)
    moved, _ = case._replace(ref=case.ref + torch.tensor([0.0] * 3 + [1.0] * 4)).loss(*weights)
    assert float(moved.detach()) == float(loss.detach())
    ratio = (case.new - case.old).detach().exp()
    assert float(stats["off_weight_sum"]) == pytest.approx(float(ratio[3:].sum()))
    assert float(stats["off_weight_sq_sum"]) == pytest.approx(float(ratio[3:].square().sum()))
    assert float(stats["kl_sum"]) == pytest.approx(float(kl_k3(case.new, case.ref)[:3].sum().detach()))


def test_extreme_log_ratios_stay_finite() -> None:
    new = torch.tensor([-900.0, -0.1, -500.0], requires_grad=True)
    old = torch.tensor([-0.1, -900.0, -0.1])
    weights = torch.full((3,), 1 / 3)
    loss, stats = policy_loss(new, old, old, torch.tensor([-1.0, -1.0, 1.0]), weights, weights, torch.zeros(3).long(),
                              **PLAIN)
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all() and stats["ratio_max"].log() == pytest.approx(20)


def test_dual_clip_bounds_the_surrogate_of_negative_advantages() -> None:
    new, old = torch.tensor([3.0, 3.0]), torch.zeros(2)
    ones = torch.ones(2)
    _, stats = policy_loss(new, old, old, torch.tensor([-2.0, 2.0]), ones, ones, torch.arange(2),
                           **{**PLAIN, "dual_clip": 3.0})
    assert stats["per_token_surrogate"].tolist() == pytest.approx([-6.0, 2.56])
    assert stats["clipped_tokens"] == 2


def test_an_empty_micro_batch_and_an_unknown_level() -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss, stats = policy_loss(*[empty] * 6, torch.zeros(0).long(), **PLAIN)
    assert float(loss.detach()) == 0 and stats["ratio_max"] == 0
    with pytest.raises(ValueError, match="rl.ratio_level"):
        policy_loss(*[empty] * 6, torch.zeros(0).long(), **{**PLAIN, "ratio_level": "word"})


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=20))
def test_k3_is_never_negative_and_zero_for_equal_policies(pairs: list[tuple[float, float]]) -> None:
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    assert (kl_k3(a, b) >= 0).all() and not kl_k3(a, a).any()
