"""A layer's mixture against transformers' block, whole and in parts; the order of its rows; routes that are kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextSparseMoeBlock

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import build, mixture, selftest
from megatron_avatar.policy.mixture import Mixture, _Experts, sort_rows
from megatron_avatar.policy.routes import UNKNOWN, Recorder, Routes, assembled
from tests.policy.tiny import tiny_omni3_config

HIDDEN, INNER, EXPERTS, TOP = 16, 12, 8, 3


def make(normed=True):
    """Transformers' block in float32, and ours with the same weights."""
    text = dict(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=TOP,
                norm_topk_prob=normed)  # fmt: skip
    block = Qwen3OmniMoeThinkerTextSparseMoeBlock(Qwen3OmniMoeThinkerConfig(text_config=text).text_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    config = SimpleNamespace(
        tensor_model_parallel_size=1, experts=EXPERTS, experts_per_token=TOP, hidden_size=HIDDEN, expert_inner=INNER,
        params_dtype=torch.float32, sequence_parallel=False, normed_shares=normed,
    )  # fmt: skip
    ours = Mixture(config)
    ours.set_layer_number(1)
    with torch.no_grad():
        ours.router.copy_(block.gate.weight)
        ours.gate_up.copy_(block.experts.gate_up_proj.flatten(0, 1))
        ours.down.copy_(block.experts.down_proj.flatten(0, 1))
    return block, ours



@pytest.mark.parametrize("normed", [True, False])
def test_it_is_transformers_block(backend, normed):
    """Outputs, and gradients of tokens, router and experts."""
    block, ours = make(normed)
    tokens = torch.randn(21, HIDDEN, generator=torch.Generator().manual_seed(1))
    inputs = [tokens.clone().requires_grad_() for _ in range(2)]
    theirs, branch = block(inputs[0][None])[0], ours(inputs[1][:, None])[:, 0]
    torch.testing.assert_close(branch, theirs, atol=2e-6, rtol=0)
    probe = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (theirs * probe).sum().backward()
    (branch * probe).sum().backward()
    for mine, other in (
        (inputs[1].grad, inputs[0].grad),
        (ours.router.grad, block.gate.weight.grad),
        (ours.gate_up.grad, block.experts.gate_up_proj.grad.flatten(0, 1)),
        (ours.down.grad, block.experts.down_proj.grad.flatten(0, 1)),
    ):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-6)


def poisoned(a, b, ends):
    """`grouped` with no number behind the last group, and for groups without a row, as memory may hold there."""
    out, starts = mixture.F.grouped_mm(a, b, offs=ends), torch.cat([ends.new_zeros(1), ends[:-1]])
    if b.dim() == 3:
        out[int(ends[-1]) :] = float("nan")
    else:
        out[starts == ends] = float("nan")
    return out


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 7))
def test_parts_of_ranks_add_up_to_the_whole(data, tokens, ranks, favourite):
    """Whatever is chosen: experts without a token, ranks without one; and nothing reads what is undefined."""
    free = [k for k in range(EXPERTS) if k != favourite]
    chosen = torch.tensor([[favourite, *data.draw(st.permutations(free))[: TOP - 1]] for _ in range(tokens)])
    generator = torch.Generator().manual_seed(tokens)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    leaves = leaf(tokens, HIDDEN), leaf(tokens, TOP), leaf(EXPERTS * 2 * INNER, HIDDEN), leaf(EXPERTS * HIDDEN, INNER)
    x, shares, gate_up, down = leaves
    weights = gate_up.view(EXPERTS, 2 * INNER, HIDDEN)[chosen], down.view(EXPERTS, HIDDEN, INNER)[chosen]
    gate, up = torch.einsum("tkfh,th->tkf", weights[0], x).chunk(2, dim=-1)
    inside = torch.nn.functional.silu(gate) * up
    whole = torch.einsum("tkhf,tkf,tk->th", weights[1], inside, shares)
    probe = torch.randn(whole.shape, generator=generator)
    expected = torch.autograd.grad((whole * probe).sum(), leaves)

    own, total = EXPERTS // ranks, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "grouped", poisoned)
        patch.setattr(mixture, "leaves_out_empty", lambda device: True)
        for rank in range(ranks):
            rows = [part.chunk(ranks)[rank] for part in (gate_up, down)]
            order = sort_rows(chosen, rank * own, torch.arange(1, own + 1), EXPERTS)
            total = total + _Experts.apply(x, shares, *rows, order)
        torch.testing.assert_close(total, whole, atol=5e-5, rtol=1e-5)
        found = torch.autograd.grad((total * probe).sum(), leaves)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("fault", "says"), [
    (dict(grouped=poisoned), "its first weights' gradient differs from torch's by inf"),
    (dict(grouped=lambda a, b, ends: poisoned(a, b.flip(0), ends)), "its output differs"),
    (dict(_by_row=lambda shares, order: shares.flatten()[:, None]), "its output differs"),
    (dict(swiglu=lambda rows: rows.chunk(2, dim=1)[0]), "its output differs"),
    (dict(_stacked=lambda *_: 1 / 0), "ZeroDivisionError"),
])  # fmt: skip
def test_the_self_test_says_what_products_do_otherwise(monkeypatch, fault, says):
    """As on a GPU where an expert without a token gets what memory held, and nobody sets it to zero."""
    for name, value in fault.items():
        monkeypatch.setattr(mixture, name, value)
    found = selftest.verdict(selftest.experts, lambda: mixture.through_experts, torch.device("cpu"), torch.float32)
    assert found.startswith(says)


@pytest.mark.parametrize(("capability", "leaves"), [((8, 0), False), ((9, 0), False), ((10, 0), True), ((10, 3), True)])
def test_gradients_are_passed_over_again_on_blackwell_alone(monkeypatch, capability, leaves):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert mixture.leaves_out_empty(torch.device("cuda", 0)) == leaves
    assert not mixture.leaves_out_empty(torch.device("meta")) and not mixture.leaves_out_empty(torch.device("cpu"))


def test_a_mixture_whose_products_fail_is_not_built(tmp_path, monkeypatch):
    tiny_omni3_config().save_pretrained(tmp_path)
    monkeypatch.setattr(build, "tested", lambda part, dtype: f"{part} in {dtype}: its output differs")
    gpu = SimpleNamespace(device=torch.device("cuda", 3))
    with pytest.raises(ValueError, match=r"cuda:3 in model.dtype=bfloat16 \(experts in torch.bfloat16: its .* set"):
        build.build_policy(tmp_path, gpu, ModelConfig(dtype="bfloat16"), ParallelConfig(kernels="torch"))


def test_frozen_experts_get_no_gradient(backend, monkeypatch):
    """As with adapters on attention alone: two products backwards, those of the tokens."""
    _, ours = make()
    ours.requires_grad_(False)
    calls, plain = [], mixture.grouped
    monkeypatch.setattr(mixture, "grouped", lambda *args: calls.append(1) or plain(*args))
    x = torch.randn(5, 1, HIDDEN, requires_grad=True)
    ours(x).sum().backward()
    assert len(calls) == 4 and x.grad.abs().max() > 0 and ours.down.grad is None


def test_routes_are_compared_and_taken(backend):
    """A token whose set of experts differs is a flip, another order is none; unknown ones are left out."""
    _, ours = make()
    x = torch.randn(6, 1, HIDDEN)
    recorder = Recorder()
    plain = ours(x, recorder)
    chosen = recorder.stacked()[:, 0]
    recorded = chosen.clone()
    recorded[0] = chosen[0].flip(0)
    recorded[2, 0] = next(k for k in range(EXPERTS) if k not in chosen[2])
    recorded[3] = UNKNOWN
    places = torch.tensor([0, 2, 3, 5])
    for replay in (False, True):
        routes = Routes(recorded[places, None].to(torch.uint8), places, 1, replay=replay)
        out = ours(x, routes)
        assert routes.counts.tolist() == [1, 3]
        same = [k for k in range(6) if k != 2 or not replay]
        torch.testing.assert_close(out[same], plain[same], atol=2e-6, rtol=0)
        assert torch.allclose(out[2], plain[2]) != replay
    again = Recorder()
    ours(x, again)
    assert torch.equal(again.stacked()[:, 0], chosen)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 2**16))
def test_routes_come_together_by_completion(lengths, seed):
    """Rows come and go between steps, in any order, and may have drawn a token too many."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    drawn = lengths + rng.integers(0, 2, len(lengths))
    wanted = [rng.integers(0, 200, (n, 2, 3)).astype(np.uint8) for n in drawn]
    ahead, steps = np.zeros(len(lengths), int), []
    while (ahead < drawn).any():
        open_rows = np.flatnonzero(ahead < drawn)
        rows = rng.permutation(open_rows)[: rng.integers(1, len(open_rows) + 1)]
        steps.append((rows, ahead[rows], torch.from_numpy(np.stack([wanted[r][ahead[r]] for r in rows]))))
        ahead[rows] += 1
    if steps:
        for found, routes, length in zip(assembled(steps, lengths), wanted, lengths, strict=True):
            assert np.array_equal(found, routes[:length])
