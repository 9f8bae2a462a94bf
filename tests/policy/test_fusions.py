"""The choice of kernels, with fakes where Apex and Transformer Engine would be, and the stages that fit a model."""

from __future__ import annotations

import functools
import math
import re
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_avatar.config.schema import Config, ModelConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy import fusions, selftest
from megatron_avatar.policy.architecture import transformer_config
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.fusions import Fusions, choose_fusions
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.training import provenance
from tests.policy.tiny import tiny_completions, tiny_config, tiny_prompts, tiny_thinker


def pretend(monkeypatch, *, engine: bool, apex: bool) -> None:
    """Leave Megatron-Core's findings as they would be with these packages."""
    adam = "transformer_engine.pytorch.optimizers" if engine else "apex.optimizers" if apex else "torch.optim"
    monkeypatch.setattr(fusions.transformer_engine, "HAVE_TE", engine)
    monkeypatch.setattr(fusions.megatron_layers, "_grad_accum_fusion_available", apex)
    monkeypatch.setattr(fusions.megatron_optimizer, "Adam", type("Adam", (), {"__module__": adam}))
    flags = [(m, name, not of_torch if engine or apex else of_torch, of_torch)
             for m, name, _, of_torch in fusions.ADAM_FLAGS]
    monkeypatch.setattr(fusions, "ADAM_FLAGS", flags)
    monkeypatch.setattr(fusions, "tested", lambda part: "")
    monkeypatch.setattr(fusions, "refusals", functools.cache(fusions.refusals.__wrapped__))


@pytest.mark.parametrize(
    ("engine", "apex", "expected"),
    [
        (True, True, ("transformer_engine", "transformer_engine", True, ())),
        (True, False, ("transformer_engine", "transformer_engine", False, ("Apex with --cuda_ext",))),
        (False, True, ("torch", "apex", True, ("Transformer Engine",))),
        (False, False, ("torch", "torch", False, ("Transformer Engine", "Apex with --cuda_ext"))),
    ],
)
def test_what_is_installed_is_taken(monkeypatch, engine, apex, expected):
    pretend(monkeypatch, engine=engine, apex=apex)
    chosen = choose_fusions("auto", on_cpu=False)
    assert (chosen.layers, chosen.adam, chosen.weight_gradients, chosen.missing) == expected
    assert choose_fusions("torch", on_cpu=False) == choose_fusions("auto", on_cpu=True) == Fusions()
    for name in expected[3]:
        assert name in str(chosen)
    assert ("AdamW of Transformer Engine" in str(chosen)) is engine
    assert str(Fusions()).startswith("layers of torch ")


@pytest.mark.parametrize("part", ["linear", "adam", "accumulate"])
def test_what_disagrees_with_torch_is_left_aside_and_said(monkeypatch, part):
    pretend(monkeypatch, engine=True, apex=True)
    monkeypatch.setattr(fusions, "tested", lambda name: "it differs" if name == part else "")
    chosen = choose_fusions("auto", on_cpu=False)
    assert (chosen.layers == "torch") is (part == "linear") and (chosen.adam == "torch") is (part == "adam")
    assert chosen.weight_gradients is (part != "accumulate") and not chosen.missing
    assert f"left aside: {'Apex' if part == 'accumulate' else 'Transformer Engine'}'s" in str(chosen)


def test_one_ranks_refusal_is_every_ranks(monkeypatch, caplog):
    """Gathered once, and by every rank in `introduce`, before rank 0 alone speaks."""
    pretend(monkeypatch, engine=False, apex=True)
    calls = []

    def gather(everyone, mine):
        calls.append(mine)
        everyone[:] = [mine, mine | {"adam": ("apex", "it differs")}, mine | {"accumulate": ("", "")}]

    monkeypatch.setattr(fusions, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 3, all_gather_object=gather))  # fmt: skip
    provenance.introduce(Config(), SimpleNamespace(rank=1, device=torch.device("cuda", 0)))
    assert len(calls) == 1 and not caplog.records
    chosen = choose_fusions("auto", on_cpu=False)
    assert len(calls) == 1 and (chosen.adam, chosen.weight_gradients) == ("torch", False)
    assert chosen.refused == ("Apex's AdamW (rank 1: it differs)", "Apex's gradient accumulation (rank 2: it has none)")


class Linear(torch.nn.Linear):
    """As transformer_engine.pytorch.Linear is called."""

    def __init__(self, columns, rows, *, bias, params_dtype, device, wrong=0.0) -> None:
        super().__init__(columns, rows, bias=bias, dtype=params_dtype, device=device)
        self.wrong = wrong

    def forward(self, x):
        return super().forward(x) + self.wrong * x.sum()


class Adam:
    """Apex's FusedAdam in its formula: decay and update are added before the rate multiplies them."""

    def __init__(self, params, *, adam_w_mode, lr, betas, eps, weight_decay) -> None:
        assert adam_w_mode
        (self.weight,) = params
        self.lr, self.betas, self.eps, self.decay, self.steps = lr, betas, eps, weight_decay, 0
        self.mean, self.square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        (one, two), gradient = self.betas, self.weight.grad
        self.mean = one * self.mean + (1 - one) * gradient
        self.square = two * self.square + (1 - two) * gradient * gradient
        mean, square = self.mean / (1 - one**self.steps), self.square / (1 - two**self.steps)
        self.weight -= self.lr * (mean / (square.sqrt() + self.eps) + self.decay * self.weight)


def test_the_self_tests_tell_right_kernels_from_wrong_ones():
    cpu = torch.device("cpu")

    def add(x, g, buffer):
        buffer += g.float().t() @ x.float()

    assert selftest.verdict(selftest.linear, lambda: Linear, cpu) == ""
    assert selftest.verdict(selftest.adam, lambda: Adam, cpu) == ""
    assert selftest.verdict(selftest.accumulate, lambda: add, cpu) == ""
    wrong = [
        selftest.verdict(selftest.linear, lambda: partial(Linear, wrong=0.1), cpu),
        selftest.verdict(selftest.adam, lambda: lambda params, **more: Adam(params, **more | {"eps": 1.0}), cpu),
        selftest.verdict(selftest.adam, lambda: lambda params, **more: Adam(params, **more | {"weight_decay": 0}), cpu),
        selftest.verdict(selftest.accumulate, lambda: lambda x, g, buffer: None, cpu),
        selftest.verdict(selftest.accumulate, lambda: lambda x, g, buffer: buffer.fill_(math.nan), cpu),
    ]
    assert all(" differs from torch's by " in reason for reason in wrong), wrong
    assert "ModuleNotFoundError" in selftest.verdict(selftest.linear, lambda: import_module("no_such_package"), cpu)


def test_adam_is_switched_and_switched_back(monkeypatch):
    pretend(monkeypatch, engine=False, apex=True)
    for module, name, found, _ in fusions.ADAM_FLAGS:
        monkeypatch.setattr(module, name, found)
    for adam, index in (("torch", 3), ("apex", 2)):
        fusions.pin_adam(Fusions(adam=adam))
        assert all(getattr(flag[0], flag[1]) is flag[index] for flag in fusions.ADAM_FLAGS)


class FakeColumn(tensor_parallel.ColumnParallelLinear):
    """Transformer Engine's linear layers take the arguments of Megatron-Core's."""


class FakeRow(tensor_parallel.RowParallelLinear):
    pass



def test_layers_of_transformer_engine_keep_names_and_scores(backend, tmp_path, monkeypatch):
    """Our core attention stays, norms stay apart from linear layers: the same folder and checkpoints fit."""
    tiny_thinker(tiny_config(layers=2)).save_pretrained(tmp_path)
    for name, fake in (("TEColumnParallelLinear", FakeColumn), ("TERowParallelLinear", FakeRow)):
        monkeypatch.setattr(fusions.transformer_engine, name, fake)
    plain = build_policy(tmp_path, backend, ModelConfig(), ParallelConfig())
    config = transformer_config(plain.hf_config, ModelConfig(), ParallelConfig(), on_cpu=True)
    config.transformer_impl = Fusions(layers="transformer_engine").settings()["transformer_impl"]
    engine = OmniPolicy(plain.hf_config, config, backend)
    layer = engine.language_model.decoder.layers[0]
    assert isinstance(layer.self_attention.linear_qkv, FakeColumn) and isinstance(layer.mlp.linear_fc1, FakeColumn)
    assert isinstance(layer.self_attention.linear_proj, FakeRow) and isinstance(layer.mlp.linear_fc2, FakeRow)
    norms = layer.input_layernorm, layer.pre_mlp_layernorm, engine.language_model.decoder.final_layernorm
    assert all(isinstance(norm, fusions.RMSNorm) for norm in norms), "they have kernels of their own"
    assert [n for n, _ in engine.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert engine.sharded_state_dict().keys() == plain.sharded_state_dict().keys()
    batch = pack_groups([tiny_prompts(plain.hf_config)["text"]], [tiny_completions()])
    scores = []
    for policy in (plain, engine):
        load_hf(policy, tmp_path)
        scores.append(policy(batch))
    assert torch.equal(*scores)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_kernels_give_equal_losses_where_both_run(tmp_path, dtype, tolerance):
    backend = backends.start(ParallelConfig())
    tiny_thinker(tiny_config(qwen=True, layers=2)).save_pretrained(tmp_path)
    losses, gradients = [], []
    for kernels in ("torch", "auto"):
        policy = build_policy(tmp_path, backend, ModelConfig(dtype=dtype), ParallelConfig(kernels=kernels))
        load_hf(policy, tmp_path)
        policy.config.gradient_accumulation_fusion = False  # it writes into the data-parallel wrapper's buffers
        for module in policy.modules():
            for name in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation"):
                if hasattr(module, name):
                    setattr(module, name, False)
        batch = pack_groups([tiny_prompts(policy.hf_config)["text"]], [tiny_completions()]).to(backend.device)
        loss = -policy(batch)[0].mean()
        loss.backward()
        losses.append(float(loss))
        gradients.append(torch.stack([p.grad.float().norm() for p in policy.language_model.parameters()]))
    backends.stop()
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=10 * tolerance, atol=tolerance)


# ---- stages ------------------------------------------------------------------------------------


@given(layers=st.integers(1, 40), pp=st.integers(1, 8), first=st.none() | st.integers(1, 40))
def test_stages_hold_all_layers_or_the_message_names_what_would(layers, pp, first):
    config = tiny_config(layers=layers)

    def stages(first: int | None) -> list[int]:
        parallel = ParallelConfig(pp=pp, first_stage_layers=first)
        megatron = transformer_config(config, ModelConfig(), parallel, on_cpu=True)
        return [get_num_layers_to_build(megatron, pp_rank=rank) for rank in range(pp)]

    try:
        found = stages(first)
    except ValueError as error:
        if advice := re.search(r"write parallel.first_stage_layers=(\d+) \(then (\d+) on each", str(error)):
            better, rest = map(int, advice.groups())
            assert stages(better) == [better] + [rest] * (pp - 1)
        else:
            assert pp > layers or pp == 1
    else:
        assert sum(found) == layers and min(found) > 0
        assert found[0] == (layers // pp if first is None else first)


def test_stages_of_the_7b():
    config = tiny_config(layers=28)
    for parallel, message in (
        (ParallelConfig(pp=3), r"pp=3 doesn't divide the 28 layers.*first_stage_layers=8 \(then 10 on each other"),
        (ParallelConfig(pp=4, first_stage_layers=5), r"=5 leaves 23 of 28 layers for 3 further stages.*layers=4 "),
        (ParallelConfig(first_stage_layers=5), "needs parallel.pp of 2 or more"),
        (ParallelConfig(pp=29), "pp=29 is more than the 28 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_config(config, ModelConfig(), parallel, on_cpu=True)
