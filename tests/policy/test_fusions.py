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
from megatron_avatar.policy import flash, fusions, selftest
from megatron_avatar.policy.architecture import transformer_config
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.fusions import Fusions, choose_fusions
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.kernels import probe
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.training import provenance
from tests.policy.tiny import tiny_completions, tiny_config, tiny_prompts, tiny_thinker

HALF = torch.bfloat16
auto = partial(choose_fusions, "auto", on_cpu=False, dtype=HALF)


def pretend(monkeypatch, *, engine: bool, apex: bool, flash_3: bool = False, triton: bool = True) -> None:
    """Leave Megatron-Core's findings, and torch's switch, as they would be with these packages."""
    monkeypatch.setattr(fusions.device, "obstacle", lambda index: "" if triton else "no module")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    package = "transformer_engine.pytorch.optimizers" if engine else "apex.optimizers" if apex else "torch.optim"
    monkeypatch.setattr(fusions.transformer_engine, "HAVE_TE", engine)
    monkeypatch.setattr(fusions, "APEX_ACCUMULATES", apex)
    monkeypatch.setattr(fusions.megatron_optimizer, "Adam", type("Adam", (), {"__module__": package}))
    flags = [(m, name, not of_torch if engine or apex else of_torch, of_torch)
             for m, name, _, of_torch in fusions.FLAGS["adam"]]
    monkeypatch.setitem(fusions.FLAGS, "adam", flags)
    if engine or apex:
        multi = type("MultiTensor", (), {"__module__": package})()
        monkeypatch.setitem(fusions.FLAGS, "norms", [(m, name, multi, of_torch)
                                                     for m, name, _, of_torch in fusions.FLAGS["norms"]])
    monkeypatch.setattr(fusions, "fits_flash_3", lambda dtype: flash_3)
    monkeypatch.setattr(fusions, "find_spec", lambda name: flash_3 or None)
    monkeypatch.setattr(fusions, "tested", lambda part, dtype: "")
    monkeypatch.setattr(fusions, "refusals", functools.cache(fusions.refusals.__wrapped__))


def pretend_switch(monkeypatch, active: list) -> None:
    """torch's switch of FlashAttention, whose name of what is on is in `active`."""
    monkeypatch.setattr(fusions, "torch_attention", SimpleNamespace(
        current_flash_attention_impl=lambda: active[-1] if active else None,
        activate_flash_attention_impl=active.append, restore_flash_attention_impl=active.clear))  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "apex", "flash_3", "expected"),
    [
        (True, True, True, ("transformer_engine", "transformer_engine", "flash_attn_3", True, ())),
        (True, False, False, ("transformer_engine", "transformer_engine", "torch", True, ())),
        (False, True, False, ("torch", "apex", "torch", True, ("Transformer Engine",))),
        (False, False, True, ("torch", "torch", "flash_attn_3", False, ("Transformer Engine", "Apex with --cuda_ext"))),
    ],
)
def test_what_is_installed_is_taken(monkeypatch, engine, apex, flash_3, expected):
    pretend(monkeypatch, engine=engine, apex=apex, flash_3=flash_3)
    chosen = auto()
    assert (chosen.layers, chosen.adam, chosen.attention, chosen.weight_gradients, chosen.missing) == expected
    assert chosen.norms == chosen.adam and chosen.kernels == "triton" and "own kernels in Triton" in str(chosen)
    assert choose_fusions("torch", on_cpu=False, dtype=HALF) == choose_fusions("auto", on_cpu=True, dtype=HALF)
    assert choose_fusions("torch", on_cpu=False, dtype=HALF) == Fusions()
    for name in expected[-1]:
        assert name in str(chosen)
    assert ("AdamW of Transformer Engine" in str(chosen)) is engine and ("FlashAttention-3" in str(chosen)) is flash_3
    said = {"transformer_engine": "gradient norms of Transformer Engine", "apex": "gradient norms of Apex"}
    assert str(chosen).count("gradient norms") == (engine or apex) and said.get(chosen.norms, "") in str(chosen)
    assert str(Fusions()).startswith("layers of torch ") and "norms" not in str(Fusions())
    monkeypatch.setattr(fusions, "fits_flash_3", lambda dtype: True)
    monkeypatch.setattr(fusions, "find_spec", lambda name: None)
    assert auto().missing == (*expected[-1], "FlashAttention-3")


TAKEN = {"linear": "layers", "adam": "adam", "norms": "norms", "attention": "attention", "kernels": "kernels"}


@pytest.mark.parametrize("part", list(fusions.PARTS))
def test_what_disagrees_with_torch_is_left_aside_and_said(monkeypatch, part):
    """Where Transformer Engine's layers aren't taken, Apex's accumulation is; where theirs isn't, there is none."""
    pretend(monkeypatch, engine=True, apex=True, flash_3=True)
    monkeypatch.setattr(fusions, "tested", lambda name, dtype: "it differs" if name == part else "")
    chosen = auto()
    for name, field in TAKEN.items():
        assert (getattr(chosen, field) == "torch") is (name == part)
    assert chosen.weight_gradients is (part != "engine_accumulate") and not chosen.missing
    packages = {"accumulate": "Apex", "attention": "FlashAttention-3", "kernels": "Triton"}
    package = packages.get(part, "Transformer Engine")
    assert f"left aside: {package}'s {fusions.PARTS[part]} (it differs)" in str(chosen)


def test_our_kernels_run_where_the_choice_says_so_and_nowhere_else(monkeypatch):
    """`auto` without Triton, or where a rank's test fails, and `torch`, switch them off for every tensor on a GPU."""
    pretend(monkeypatch, engine=False, apex=False)
    on_gpu = SimpleNamespace(is_meta=False, is_cuda=True, device=torch.device("cuda", 0))
    try:
        for fails, kernels, runs in (("", "auto", True), ("", "torch", False), ("no compiler", "auto", False)):
            monkeypatch.setattr(fusions, "tested", lambda part, dtype, fails=fails: fails * (part == "kernels"))
            fusions.refusals.cache_clear()
            chosen = choose_fusions(kernels, on_cpu=False, dtype=HALF)
            fusions.pin(chosen)
            assert fusions.device.runs_triton(on_gpu) is runs and (chosen.kernels == "triton") is runs
            assert str(chosen).count("left aside: Triton's kernels of this package (no compiler)") == bool(fails)
        assert fusions.device.runs_triton(torch.empty(1, device="meta")), "a plan is of a good GPU"
        pretend(monkeypatch, engine=False, apex=False, triton=False)
        assert auto().kernels == "torch" and not auto().refused
    finally:
        fusions.device.switch(True)


def test_a_triton_that_cannot_build_costs_the_kernels_alone(monkeypatch):
    """As where there is no C compiler: the first launch raises, before the others are asked."""
    def launch(*arguments):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(probe, "OURS", probe.OURS | {"add_norm": launch})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    plain = selftest.verdict
    monkeypatch.setattr(selftest, "verdict", lambda test, make, device, dtype: plain(test, make, "cpu", dtype))
    assert fusions.tested("kernels", torch.float32).startswith("RuntimeError: Failed to find C compiler")


def test_one_ranks_refusal_is_every_ranks(monkeypatch, caplog):
    """Gathered once, and by every rank in `introduce`, before rank 0 alone speaks."""
    pretend(monkeypatch, engine=False, apex=True, flash_3=True)
    calls = []

    def gather(everyone, mine):
        calls.append(mine)
        everyone[:] = [mine, mine | {"adam": ("apex", "it differs")}, mine | {"accumulate": ("", "")},
                       mine | {"attention": ("", ""), "kernels": ("triton", "no compiler")}]  # fmt: skip

    monkeypatch.setattr(fusions, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 4, all_gather_object=gather))  # fmt: skip
    config = Config()
    config.model.dtype = "bfloat16"
    provenance.introduce(config, SimpleNamespace(rank=1, device=torch.device("cuda", 0)))
    assert len(calls) == 1 and not caplog.records
    chosen = auto()
    assert len(calls) == 1 and (chosen.adam, chosen.weight_gradients, chosen.attention) == ("torch", False, "torch")
    assert chosen.norms == "apex" and chosen.refused == (
        "Apex's AdamW (rank 1: it differs)", "Apex's gradient accumulation (rank 2: it has none)",
        "FlashAttention-3's attention (rank 3: it has none)",
        "Triton's kernels of this package (rank 3: no compiler)",
    )  # fmt: skip


class Linear(torch.nn.Linear):
    """As transformer_engine.pytorch.Linear is called; wrong by a share of its output, in column or in row layers, in
    one dtype, or in what it adds to the buffer."""

    def __init__(self, columns, rows, *, bias, parallel_mode, params_dtype, device, fuse_wgrad_accumulation=False,
                 wrong=0.0, wrong_mode=None, wrong_dtype=None, adds=1.0) -> None:  # fmt: skip
        super().__init__(columns, rows, bias=bias, dtype=params_dtype, device=device)
        hit = wrong_mode in (None, parallel_mode) and wrong_dtype in (None, params_dtype)
        self.wrong, self.fused, self.adds = wrong * hit, fuse_wgrad_accumulation, adds

    def forward(self, x):
        out = super().forward(x) + self.wrong * x.sum()
        if self.fused:
            out.register_hook(lambda g: self.add(g.float().t() @ x.detach().float()))
        return out

    def add(self, gradient):
        self.weight.main_grad += self.adds * gradient
        self.weight.grad_added_to_main_grad = True


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


def add(x, g, buffer):
    """As fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32."""
    buffer += g.float().t() @ x.float()


def norm_ignores_nan(lists, each):
    return fusions.l2_norm([[x.nan_to_num(0.0, math.inf, -math.inf) for x in lists[0]]], each)


def norm_ignores_infinity(lists, each):
    return fusions.l2_norm([[x.where(x.abs() < math.inf, x.nan_to_num(math.nan, 0, 0)) for x in lists[0]]], each)


def copies_nothing(lists, factor):
    """It scales, but writes nothing where it should only copy."""
    if factor != 1:
        fusions.scale_each(lists, factor)


FORMULAS = {name: formula for name, (_, formula) in probe.CASES.items()}
MULTI = (fusions.apply_at_once, fusions.l2_norm, fusions.scale_each)
RIGHT = {
    "linear": Linear, "engine_accumulate": Linear, "adam": Adam, "accumulate": add, "norms": MULTI,
    "attention": flash.FLASH_CPU, "kernels": FORMULAS,
}  # fmt: skip
WRONG = {
    "linear": [partial(Linear, wrong=0.1), partial(Linear, wrong=0.1, wrong_mode="row"),
               partial(Linear, wrong=0.1, wrong_mode="column")],
    "engine_accumulate": [partial(Linear, adds=0.5), partial(Linear, adds=math.nan)],
    "adam": [lambda params, **more: Adam(params, **more | {"eps": 1.0}),
             lambda params, **more: Adam(params, **more | {"weight_decay": 0})],
    "accumulate": [lambda x, g, buffer: None, lambda x, g, buffer: buffer.fill_(math.nan)],
    "norms": [(MULTI[0], lambda lists, each: (lists[0][0].norm()[None], None), MULTI[2]),
              (MULTI[0], MULTI[1], lambda lists, factor: None),
              (MULTI[0], MULTI[1], copies_nothing), (MULTI[0], norm_ignores_nan, MULTI[2]),
              (MULTI[0], norm_ignores_infinity, MULTI[2])],
    "attention": [flash.FLASH_CPU._replace(backward=lambda grad, *rest: flash.FLASH_CPU.backward(2 * grad, *rest)),
                  flash.FLASH_CPU._replace(forward=lambda *a: flash.FLASH_CPU.forward(*a[:6], 1.0))],
    "kernels": [{"draw": lambda logits, uniforms, *rest: FORMULAS["draw"](logits, uniforms + 1e-3, *rest)},
                {"add_norm": lambda x, residual, *rest: FORMULAS["add_norm"](x, None, *rest)},
                {"decode_rope": lambda mixed, angles, keys, values, *rest: FORMULAS["decode_rope"](
                    mixed, angles, keys.clone(), values, *rest)},
                {"attend": lambda *a: FORMULAS["attend"](*a[:7], a[7]._replace(empty=None), *a[8:])},
                {"attend": lambda *a: torch.full_like(FORMULAS["attend"](*a), math.nan)}],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", list(fusions.PARTS))
def test_the_self_tests_tell_right_kernels_from_wrong_ones_in_each_dtype(monkeypatch, part, dtype):
    """`tested`, with what each package would be in its place, on the CPU."""
    calls, plain = [], selftest.verdict
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for kernel in (RIGHT[part], *WRONG[part]):
        def verdict(test, make, device, asked, kernel=kernel):
            calls.append((device.type, asked))
            return plain(test, lambda: kernel, torch.device("cpu"), asked)

        monkeypatch.setattr(selftest, "verdict", verdict)
        reason = fusions.tested(part, dtype)
        assert (" differs from torch's by " in reason) if kernel is not RIGHT[part] else reason == ""
    assert set(calls) == {("cuda", dtype)}


@pytest.mark.parametrize("before", [[], ["FA3"]])
def test_a_test_leaves_the_attention_that_was_active(monkeypatch, before):
    active = [*before]
    pretend_switch(monkeypatch, active)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def verdict(test, make, device, dtype):
        assert make() is flash.FLASH_VARLEN and active == ["FA3"]
        return ""

    monkeypatch.setattr(selftest, "verdict", verdict)
    assert fusions.tested("attention", HALF) == "" and active == before


def test_a_fault_of_one_dtype_is_one_of_that_dtype():
    make = partial(Linear, wrong=0.1, wrong_dtype=torch.float16)
    reasons = [selftest.verdict(selftest.linear, lambda: make, torch.device("cpu"), dtype)
               for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert [bool(reason) for reason in reasons] == [False, True, False]
    missing = selftest.verdict(selftest.linear, lambda: import_module("no_such_package"), torch.device("cpu"), HALF)
    assert "ModuleNotFoundError" in missing


def test_what_was_chosen_is_pinned_and_taken_back(monkeypatch):
    """Megatron-Core's records, and torch's switch of FlashAttention."""
    pretend(monkeypatch, engine=False, apex=True)
    active = []
    pretend_switch(monkeypatch, active)
    flags = fusions.FLAGS["adam"] + fusions.FLAGS["norms"]
    for module, name, found, _ in flags:
        monkeypatch.setattr(module, name, found)
    monkeypatch.setattr(fusions.megatron_layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(fusions, "APEX_ACCUMULATES", False)
    for chosen, index in ((Fusions(), 3), (Fusions(adam="apex", norms="apex", attention="flash_attn_3"), 2)) * 2:
        fusions.pin(chosen)
        assert all(getattr(flag[0], flag[1]) is flag[index] for flag in flags)
        assert active == ["FA3"] * (index == 2)
    assert not fusions.megatron_layers._grad_accum_fusion_available
    fusions.pin(Fusions(layers="transformer_engine", weight_gradients=True))
    assert fusions.megatron_layers._grad_accum_fusion_available, "the output layer is built without Apex"
    fusions.pin(Fusions())
    assert not active and not fusions.megatron_layers._grad_accum_fusion_available


def test_flash_attention_3_is_for_half_precision_on_hopper(monkeypatch):
    for capability, fits in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert fusions.fits_flash_3(torch.float16) is fusions.fits_flash_3(torch.bfloat16) is fits
        assert not fusions.fits_flash_3(torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fusions, "torch_attention", SimpleNamespace())  # of an older torch
    assert not fusions.fits_flash_3(torch.float16)


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
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2), ("float16", 1e-2)])
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
