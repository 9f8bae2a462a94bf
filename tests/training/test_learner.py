"""The learner on the real policy: micro-batches leave the step alone, and what happens at its edges."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_avatar.config.schema import GuardConfig, ModelConfig, OptimConfig, ParallelConfig, RLConfig, ShapingConfig
from megatron_avatar.planning.seconds import forward_flops
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import GenerationStopped
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Completion, Group, Trajectory
from megatron_avatar.training import learner as learners
from megatron_avatar.training import metrics
from megatron_avatar.training.guard import LogprobMismatch
from megatron_avatar.training.learner import Learner, NonFiniteUpdates
from megatron_avatar.training.optim import FIRST_SCALE, build_optimizer
from tests.policy.tiny import tiny_config, tiny_prompts, tiny_thinker

TAGGED = ("<think>", "sounds", "</think><answer>", "two", "</answer>")
OFF = GuardConfig(exact=0, warn=0, mask=0, stop=0)
LENGTHS = {"audio_in_video": (3, 5, 4), "text": (2, 6)}


@pytest.fixture
def world(backend, tmp_path):
    """(policy, groups): two prompts, fresh and replayed completions with random log-probabilities at generation."""
    config = tiny_config(layers=2)
    tiny_thinker(config).save_pretrained(tmp_path)
    policy = build_policy(tmp_path, backend, ModelConfig(path=str(tmp_path)), ParallelConfig())
    load_hf(policy, tmp_path)
    rng = np.random.default_rng(0)
    groups = []
    for kind, lengths in LENGTHS.items():
        completions = [Completion(rng.integers(0, 180, n), -rng.random(n, np.float32), True) for n in lengths]
        rows = [Trajectory(kind, "plain", c, 0.5, {}, 0.0, "", "", 0, 0) for c in completions]
        advantages = rng.standard_normal(len(rows)).astype(np.float32)
        groups.append(Group(tiny_prompts(config)[kind], rows, advantages, np.full(len(rows), kind != "text")))
    return policy, groups


def learner(policy, backend, *, train_towers=False, pieces=None, **settings) -> Learner:
    policy.set_train_towers(train_towers)
    optimization = build_optimizer(policy, OptimConfig(), lr=1e-2, total_steps=9)
    return Learner(policy, optimization, backend, RLConfig(**settings), train_towers=train_towers, pieces=pieces)


def update(learner: Learner, groups: list[Group], **kwargs) -> dict:
    learner.snapshot_reference()
    media = learner.policy.embed_media([g.prompt for g in groups])
    on, off = (sum(int((g.on_policy == side).sum()) for g in groups) for side in (True, False))
    return learner.update(groups, media, learner.reference_logprobs(groups, media), n_on=on, n_off=off, **kwargs)


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.named_parameters()}


def counted(group: Group) -> tuple[int, int, float]:
    """Packed tokens, outputs and pairs of a group in one piece."""
    prefix, lengths = len(group.prompt) - 1, [len(t.completion) for t in group.trajectories]
    pairs = prefix * (prefix + 1) / 2 + sum(n * prefix + n * (n + 1) / 2 for n in lengths)
    return prefix + sum(lengths), sum(lengths), pairs


def test_micro_batches_change_neither_loss_nor_gradient(world, backend):
    policy, groups = world
    start, results = weights(policy), []
    for budget in (1, 150, 4096):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(start[name])
        results.append(update(learner(policy, backend, tokens_per_micro_batch=budget), groups, check_logprobs=False))
    flops = [result["flops/done"] for result in results]
    assert flops[0] >= flops[1] >= flops[2] and flops[0] > flops[2]  # a prompt that is split is computed again
    text = policy.hf_config.text_config  # at the largest budget: all once, and three passes, of the head four
    tokens, outputs, pairs = map(sum, zip(*(counted(group) for group in groups), strict=True))
    forward = forward_flops(policy.hf_config, tokens, pairs, outputs)
    assert results[2]["flops"] == pytest.approx(3 * (forward.layers + forward.head))
    assert flops[2] - results[2]["flops"] == pytest.approx(2 * outputs * text.hidden_size * text.vocab_size)
    for other in results[1:]:
        for name in ("loss", "grad_norm", "tokens", "kl_sum", "ratio_max", "entropy_sum"):
            assert float(other[name]) == pytest.approx(float(results[0][name]), rel=1e-4), name
        assert np.allclose(other["surrogate_bins"], results[0]["surrogate_bins"], rtol=1e-4)
    assert results[0]["tokens"] == results[0]["position_bins"].sum() == 20


def test_a_step_whose_prompts_are_all_set_aside_moves_nothing(world, backend):
    policy, groups = world
    ours = learner(policy, backend)
    update(ours, groups, check_logprobs=False)  # momentum from here on
    before = weights(policy)
    stats = update(ours, [])
    assert stats["skipped"] and stats["tokens"] == 0 and stats["position_bins"].sum() == 0
    supervised = ours.update_sft([], [])
    assert supervised["skipped"] and math.isnan(supervised["loss"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    record = metrics.rl_record(
        fresh=[], accuracy=None, drawn=[], stats=stats, on_advantages=[[]], off_advantages=[], clipped=0.0,
        vanished=0.0, step=1, tracker=metrics.RewardTracker(), buffer=None, visits=0, hinted=0, in_use=0, pool=["a"],
        completions_generated=0, lr=0.0, updates=1,
    )
    assert record["reward"] is None and record["replay/ess"] is None and record["tokens"] == 0
    assert record["replay/dead"] is None and record["replay/age_max"] is None and record["replay/ratio_max"] is None


def test_shaping_between_the_tags_bins_what_is_between_them(world, backend):
    """Of five tokens two: the reasoning stands at the beginning, the answer at the end. The other completions are in
    no format, and count as a whole."""
    policy, groups = world
    groups = groups[:1]
    tagged = groups[0].trajectories[1].completion.token_ids
    texts = dict.fromkeys(range(180), "x") | dict(zip(tagged.tolist(), TAGGED, strict=True))
    others = [t.completion.token_ids for t in groups[0].trajectories if t.completion.token_ids is not tagged]
    assert len({*tagged.tolist()}) == 5 and not {*tagged.tolist()} & {*np.concatenate(others).tolist()}
    counted = {}
    for span in ("completion", "between_tags"):
        shaping = ShapingConfig(shape="linear_incline", lam=1.0, span=span)
        ours = learner(policy, backend, pieces=lambda row: [texts[i] for i in row.tolist()], shaping=shaping)
        counted[span] = update(ours, groups, check_logprobs=False)["position_bins"]
    assert counted["completion"].sum() == 12 and counted["between_tags"].sum() == 3 + 2 + 4
    assert counted["between_tags"][0] == counted["between_tags"][-1] == 3
    assert [counted[span][10] for span in counted] == [2, 1], "the middle of three tokens, and once that of five"


def test_the_gate_stops_before_anything_is_applied(world, backend):
    policy, groups = world
    before = weights(policy)
    for trajectory in groups[0].trajectories:
        trajectory.completion.logprobs += np.float32(3.0)
    with pytest.raises(LogprobMismatch, match="No update was applied"):
        update(learner(policy, backend), groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())


def test_a_completion_on_which_both_disagree_is_masked_and_counted(world, backend):
    """The update is the one in which its advantage is zero, also a rollout's second, when the policy has moved; without
    the mask it isn't. KL off, as a mask takes that too."""
    policy, groups = world
    fresh = next(g for g in groups if g.on_policy.all())
    media = policy.embed_media([g.prompt for g in groups])
    at_first = learner(policy, backend)
    at_first.snapshot_reference()
    scores = at_first.reference_logprobs(groups, media)
    for trajectory, row in zip(fresh.trajectories, scores[groups.index(fresh)], strict=True):
        trajectory.completion.logprobs[:] = row  # what generation would have said
    fresh.trajectories[1].completion.logprobs[:] += np.float32(1.0)
    fresh.advantages[1] = 1.0  # which the clip leaves its gradient
    start, ended = weights(policy), {}
    for name, guard, advantage in (("masked", GuardConfig(exact=0), None), ("zero", OFF, 0.0), ("plain", OFF, None)):
        with torch.no_grad():
            for key, tensor in policy.named_parameters():
                tensor.copy_(start[key])
        ours, own = learner(policy, backend, beta=0.0, guard=guard), fresh.advantages.copy()
        if advantage is not None:
            fresh.advantages[1] = advantage
        for first in (True, False):
            stats = update(ours, groups, check_logprobs=first)
            assert stats["logprob_error/masked"] == (name == "masked") and not stats["skipped"]
        assert ours.masked == ([(groups.index(fresh), 1)] if name == "masked" else [])
        assert stats["logprob_error/max"] == pytest.approx(math.e, rel=1e-5)  # the first update's, not the last one's
        fresh.advantages[:], ended[name] = own, weights(policy)
        if name == "masked":
            counted = stats["tokens"]
    assert counted == stats["tokens"] - len(fresh.trajectories[1].completion)
    assert all(torch.allclose(ended["masked"][key], ended["zero"][key], atol=1e-7) for key in start)
    assert not all(torch.allclose(ended["masked"][key], ended["plain"][key], atol=1e-4) for key in start)


def test_a_step_that_the_guard_refuses_moves_nothing_in_any_update_and_is_not_replayed(world, backend):
    policy, groups = world
    fresh = [(i, k) for i, group in enumerate(groups) for k, on in enumerate(group.on_policy) if on]
    before, generated = weights(policy), [groups[i].trajectories[k].completion.logprobs.copy() for i, k in fresh]
    ours = learner(policy, backend, guard=GuardConfig(exact=0, mask=0, stop=1.1))
    for i, k in fresh:
        groups[i].trajectories[k].completion.logprobs[:] += np.float32(1.0)
    try:
        for first in (True, False):
            assert update(ours, groups, check_logprobs=first)["skipped"]
            assert ours.masked == fresh
    finally:
        for (i, k), row in zip(fresh, generated, strict=True):
            groups[i].trajectories[k].completion.logprobs[:] = row
    assert fresh and all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    ours.guard = learner(policy, backend, guard=OFF).guard
    assert not update(ours, groups)["skipped"] and not ours.masked, "the next step is its own"


def test_a_number_that_is_not_finite_skips_the_update_and_three_in_a_row_end_the_run(world, backend, monkeypatch):
    policy, groups = world
    ours = learner(policy, backend, guard=OFF)
    update(ours, groups)  # momentum from here on
    before = weights(policy)
    generated = groups[0].trajectories[0].completion.logprobs
    sound = generated.copy()
    generated[0] = math.nan
    assert update(ours, groups)["skipped"]
    generated[:] = sound
    reference = ours.reference_logprobs(groups, policy.embed_media([g.prompt for g in groups]))
    ours.reference_logprobs = lambda groups, media: reference
    hidden = policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda *args: hidden(*args) * math.nan)
    stats = update(ours, groups)
    assert stats["skipped"] and not math.isfinite(stats["logprob_error"]) and not math.isfinite(stats["grad_norm"])
    with pytest.raises(NonFiniteUpdates, match="latest one number 4 .*latest one's log-probabilities.*None was app"):
        update(ours, groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    monkeypatch.undo()
    assert not update(ours, groups)["skipped"] and ours.optimization.skipped_in_row == 0


@pytest.fixture
def half(world, backend, tmp_path):
    """(learner in float16, groups, factors): the gradient of the second layer's first product, times factors[0]."""
    _, groups = world
    policy = build_policy(tmp_path, backend, ModelConfig(path=str(tmp_path), dtype="float16"), ParallelConfig())
    load_hf(policy, tmp_path)
    factors = [1.0]
    disturb(policy.language_model.decoder.layers[1].mlp.linear_fc1, factors)
    return learner(policy, backend, guard=OFF), groups, factors


def disturb(module, factors: list[float]) -> None:
    """The gradient of the module's output, times factors[0]."""
    def hook(module, inputs, output) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda grad: grad * factors[0])

    module.register_forward_hook(hook)


BEYOND = 2.0**20  # by a scale of 8,192 beyond float16, by 1 it isn't


def test_a_bad_batch_after_overflows_is_skipped_as_in_bfloat16(half, caplog):
    """The search for a scale takes two updates; then one gradient has no finite scale, and the next one is good."""
    ours, groups, factors = half
    before = weights(ours.policy)
    for factors[0], overflows, in_row in ((BEYOND, 1, 0), (BEYOND, 2, 0), (math.nan, 2, 1)):
        stats = update(ours, groups)
        assert stats["skipped"] and stats["overflows"] == overflows
        assert ours.optimization.skipped_in_row == in_row
    assert caplog.text.count("is beyond float16") == 2, "the third wasn't"
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(ours.policy).items())
    factors[0] = 1.0
    assert not update(ours, groups)["skipped"]
    assert ours.optimization.skipped_in_row == ours.optimization.overflows_in_row == 0
    assert not all(torch.equal(tensor, before[name]) for name, tensor in weights(ours.policy).items())


def test_three_gradients_in_a_row_that_no_loss_scale_makes_finite_end_the_run(half):
    """Where, and in which update, is said; where a scale answers an overflow, nothing is lost but the updates."""
    ours, groups, factors = half
    before = weights(ours.policy)
    for factors[0] in (BEYOND, BEYOND, math.nan, BEYOND, math.nan):
        assert update(ours, groups)["skipped"]
    factors[0] = math.nan
    said = r"number 6 of the stage.*by a loss scale of 1 too, first in layer 2\)"
    with pytest.raises(NonFiniteUpdates, match=said) as end:
        update(ours, groups)
    assert "None was applied" in str(end.value) and "model.dtype=bfloat16" in str(end.value)
    assert ours.optimization.loss_scale == FIRST_SCALE / 64 and ours.optimization.overflows == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(ours.policy).items())


@pytest.mark.parametrize("place", ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1",
                                   "mlp.linear_fc2"])  # fmt: skip
def test_the_layer_is_named_whichever_of_its_products_breaks(world, backend, place):
    policy, groups = world
    disturb(policy.language_model.decoder.layers[0].get_submodule(place), [math.nan])
    ours = learner(policy, backend, guard=OFF)
    assert update(ours, groups)["skipped"]
    assert ours._first_not_finite() == "layer 1"


@pytest.mark.parametrize("turned", [False, True])
def test_the_layer_nearest_to_the_loss_is_named_over_ranks(world, backend, monkeypatch, turned):
    """By the parameters' own numbers: the rank that knows of one has the other's first place in its list."""
    policy, _ = world
    ours = learner(policy, backend)
    names = [name for name, _ in policy.named_parameters()]

    def numbered(*layers: int) -> list[tuple[int, str]]:
        return [(number, name) for number, name in enumerate(names)
                if any(f"decoder.layers.{layer}." in name for layer in layers)]

    lists, seen = [numbered(0), numbered(1)[-1:]], []
    assert len(lists[0]) > 1
    lists = lists[::-1] if turned else lists
    for found in lists:
        monkeypatch.setattr(ours.optimization, "not_finite", lambda found=found: found)
        ours.backend = SimpleNamespace(pp_rank=0, all_gather_object=lambda mine: seen.append(mine) or seen)
        named = ours._first_not_finite()
    assert len(seen) == 2 and named == "layer 2"


@pytest.mark.parametrize("after", [0, 2])
def test_a_stop_within_the_references_pass_gives_the_policy_its_own_weights_back(world, backend, after, monkeypatch):
    """Before its first micro-batch or between two of them; what is saved then is the policy."""
    monkeypatch.setattr(learners, "POLL_EVERY", 1)
    policy, groups = world
    ours = learner(policy, backend, tokens_per_micro_batch=1)
    update(ours, groups, check_logprobs=False)  # the policy has left its reference
    polls = iter([False] * after + [True])

    def poll() -> None:
        if next(polls):
            raise GenerationStopped

    before, places = weights(policy), {name: p.data_ptr() for name, p in policy.named_parameters()}
    with pytest.raises(GenerationStopped):
        ours.reference_logprobs(groups, policy.embed_media([g.prompt for g in groups]), poll=poll)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    assert {name: p.data_ptr() for name, p in policy.named_parameters()} == places, "the optimizer's own tensors"


def test_the_reference_keeps_its_own_encoders(world, backend):
    policy, groups = world
    ours = learner(policy, backend, train_towers=True)
    ours.snapshot_reference()
    prompts = [g.prompt for g in groups]
    before = ours.reference_logprobs(groups, policy.embed_media(prompts))
    with torch.no_grad():
        policy.towers.visual.merger.ln_q.weight.mul_(1.5)
    after = ours.reference_logprobs(groups, policy.embed_media(prompts))
    assert all(np.array_equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("tokens", "polls"), [(160, 1), (1, 3)])
def test_ranks_ask_each_other_seldom_within_an_update(world, backend, monkeypatch, tokens, polls):
    """Before it, and then before every second of its five micro-batches."""
    monkeypatch.setattr(learners, "POLL_EVERY", 2)
    policy, groups = world
    asked = []
    update(learner(policy, backend, tokens_per_micro_batch=tokens, guard=OFF), groups, poll=lambda: asked.append(1))
    assert len(asked) == polls


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("judge", [False, True])
def test_the_loss_never_waits_for_the_device(world, backend, level, judge):
    """Tensors without numbers stand no shape that depends on values, nor a copy to the host."""
    policy, groups = world
    ours = learner(policy, backend, ratio_level=level)
    tensors = {}
    ours.loss = lambda t, out, judge, plain=ours.loss: tensors.update(t) or plain(t, out, judge=judge)
    update(ours, groups, check_logprobs=False)
    names = {name: tensor.to("meta") for name, tensor in tensors.items()}
    out = torch.zeros(2, len(tensors["old"]), device="meta", requires_grad=True)
    value, stats, masked = Learner.loss(ours, names, out, judge=judge)
    value.backward()
    assert out.grad.shape == out.shape and masked.shape == tensors["old"].shape and len(stats) > 15
