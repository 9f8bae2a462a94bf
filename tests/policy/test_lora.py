"""Adapters equal PEFT's, in value, gradient and file, merged and beside the weights; layouts with several ranks share
one launch."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
)

from megatron_avatar.config.schema import (
    LORA_TARGETS,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RLConfig,
    SamplingConfig,
)
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.lora import LoraAdapter, lora_adapters
from megatron_avatar.policy.weights import export_adapters, export_hf, load_hf
from megatron_avatar.records import Completion, Group, Trajectory
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from tests.policy import lora_world
from tests.policy.tiny import (
    FAMILIES,
    thinker_logits,
    tiny_completions,
    tiny_config,
    tiny_omni3_config,
    tiny_omni3_prompts,
    tiny_prompts,
    tiny_thinker,
)
from tests.policy.tiny_omni import tiny_omni
from tests.policy.tiny_omni3 import tiny_whole_omni3
from tests.ranks import launch

LORA = LoraConfig(rank=3, alpha=10.0)  # a weight that no float holds exactly
ATTENTION = LoraConfig(rank=3, alpha=10.0, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
TARGETS = [list(LORA_TARGETS), ["k_proj", "up_proj"], ["q_proj", "v_proj", "o_proj"], ["down_proj", "gate_proj"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny_thinker(tiny_config(layers=2)).save_pretrained(folder)
    return folder


def load(folder, backend, lora=LORA, **model):
    policy = build_policy(folder, backend, ModelConfig(lora=lora, **model), ParallelConfig())
    load_hf(policy, folder)
    return policy


def shake(policy, scale=0.3):
    """Adapters that do something: B is no longer zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in lora_adapters(policy):
            used = adapter.owners.any(1, keepdim=True)
            adapter.b.copy_(scale * torch.randn(adapter.b.shape, generator=generator) * used)


def logits_of(policy, prompt):
    return policy.logits(pack_groups([prompt], [[prompt.token_ids[:1]]]), policy.embed_media([prompt]))


def group(prompt):
    """The prompt with its completions, as supervised fine-tuning sees them."""
    rows = [Completion(ids, np.zeros(len(ids), np.float32), True) for ids in tiny_completions()]
    trajectories = [Trajectory("", "plain", row, 0.0, {}, 0.0, "", "", 0, 0) for row in rows]
    return Group(prompt, trajectories, np.zeros(len(rows), np.float32), np.ones(len(rows), bool))


def with_adapters(model, folder):
    """The model with the exported adapters, every one of them found."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")
        return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_adapters_are_peft_s(folder, backend, tmp_path, targets):
    """Logits with the exported adapters in PEFT, and of the merged export in transformers, are the policy's."""
    lora = LoraConfig(rank=3, alpha=10.0, targets=targets)
    policy = load(folder, backend, lora)
    shake(policy)
    export_adapters(policy, tmp_path / "adapters", folder, lora)
    export_hf(policy, tmp_path / "merged", folder)
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).eval()
    prompt = tiny_prompts(model.config)["audio_in_video"]
    ours = logits_of(policy, prompt)
    with torch.no_grad():
        base = thinker_logits(model, prompt)
        merged = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        assert (ours - base).abs().max() > 0.1
        torch.testing.assert_close(thinker_logits(merged, prompt), ours, atol=1e-4, rtol=0)
        adapted = with_adapters(model, tmp_path / "adapters")
        torch.testing.assert_close(thinker_logits(adapted, prompt), ours, atol=1e-4, rtol=0)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    names = load_file(tmp_path / "adapters" / "adapter_model.safetensors").keys()
    assert {name.split(".")[-3] for name in names} == set(targets) and len(names) == 2 * 2 * len(targets)


@pytest.mark.parametrize("kind, hub", [("omni", False), ("vl", False), ("vl3", False), ("vl3", True), ("omni3", False)])
def test_full_classes_with_trained_encoders(backend, tmp_path, kind, hub):
    """Adapters find their layers in the full Omni class and in the VLs; encoders that trained come with them. The hub's
    names are transformers' own in Qwen3-VL."""
    source, out, lora = tmp_path / "source", tmp_path / "out", ATTENTION if kind == "omni3" else LORA
    if kind == "omni":
        config = tiny_omni(source).config.thinker_config
        prompt, cls = tiny_prompts(config)["audio_in_video"], Qwen2_5OmniForConditionalGeneration
    elif kind == "omni3":
        config = tiny_whole_omni3(source).config.thinker_config
        prompt, cls = tiny_omni3_prompts(config)["audio_in_video"], Qwen3OmniMoeForConditionalGeneration
    else:
        family = FAMILIES[kind]
        config = family.config(layers=3)
        model = family.model(config)
        model.save_pretrained(source)
        prompt, cls = family.prompts(config)["video"], type(model)
    policy = load(source, backend, lora)
    shake(policy)
    with torch.no_grad():
        for parameter in policy.towers.parameters():
            parameter.mul_(1.1)
    export_adapters(policy, out, source, lora, towers=True, hub=hub)
    model = with_adapters(cls.from_pretrained(source).eval(), out).base_model.model
    with torch.no_grad():
        theirs = thinker_logits(model.thinker, prompt) if "omni" in kind else family.logits(model, prompt)
    torch.testing.assert_close(logits_of(policy, prompt), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("make", "lora"), [(tiny_omni, LORA), (tiny_whole_omni3, ATTENTION)], ids=["omni", "omni3"])
def test_adapters_named_as_in_the_hubs_folders(backend, tmp_path, make, lora):
    """Transformers 4 and vLLM know a full Omni's layers by the names of its weights' files."""
    make(tmp_path / "source")
    policy = load(tmp_path / "source", backend, lora)
    shake(policy)
    for name in ("new", "hub"):
        export_adapters(policy, tmp_path / name, tmp_path / "source", lora, hub=name == "hub")
    new, hub = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("new", "hub"))
    weights = load_file(tmp_path / "source" / "model.safetensors").keys()
    for name, value in hub.items():
        assert name.startswith("base_model.model.thinker.model.layers.")
        assert torch.equal(value, new[name.replace("thinker.model.", "thinker.model.language_model.")])
    layers = {re.sub(r"^base_model\.model\.(.*)\.lora_[AB]\.weight$", r"\1", name) for name in hub}
    assert {f"{layer}.weight" for layer in layers} <= weights
    pattern = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["target_modules"]
    assert {name.removesuffix(".weight") for name in weights if re.fullmatch(pattern + r"\.weight", name)} == layers


def test_generation_makes_the_dense_product_once_and_follows_changes(folder, backend, monkeypatch):
    policy, calls, plain = load(folder, backend), [], LoraAdapter._up
    prompt, sampling = tiny_prompts(policy.hf_config)["text"], SamplingConfig(max_new_tokens=4)
    policy.hf_config.eos_token_id = 7

    def up(adapter):
        calls.append(adapter)
        return plain(adapter)

    monkeypatch.setattr(LoraAdapter, "_up", up)
    for scale in (0.3, 0.6):
        shake(policy, scale)
        calls.clear()
        ((row,),) = generate(policy, [prompt], 1, sampling, ["key"])
        assert calls == list(lora_adapters(policy))
        scores = policy(pack_groups([prompt], [[row.token_ids]]), policy.embed_media([prompt]))[0]
        np.testing.assert_allclose(scores.detach().numpy(), row.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind, recompute", [("omni", "none"), ("omni", "full"), ("omni", "light"),
                                             ("vl3", "full"), ("omni3", "light")])
def test_gradients_are_peft_s(backend, tmp_path, kind, recompute):
    """Those of every A and B, at values where none is zero, and none of the weights'."""
    family, layers, lora = FAMILIES[kind], 4 if kind == "omni3" else 2, ATTENTION if kind == "omni3" else LORA
    model = family.model(family.config(layers=layers))
    model.save_pretrained(tmp_path)
    policy = build_policy(tmp_path, backend, ModelConfig(lora=lora), ParallelConfig(recompute=recompute)).train()
    load_hf(policy, tmp_path)
    shake(policy)
    prompt, completion = family.prompts(policy.hf_config)[family.trained[0]], tiny_completions()[0]
    policy(pack_groups([prompt], [[completion]]), policy.embed_media([prompt]))[0].sum().backward()
    trained = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in policy.named_parameters() if re.search(r"lora_\w+\.[ab]$", name)}

    targets = rf"model\.language_model\.layers\.\d+\.\w+\.({'|'.join(lora.targets)})"
    model = get_peft_model(model, PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    theirs = {
        name.replace("base_model.model.model.language_model", "model").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and "language_model" in name  # PEFT puts some beside a mixture's encoders, of no effect
    }
    slots = [slot for adapter in lora_adapters(policy) for slot in (adapter.a_slot, adapter.b_slot)]
    with torch.no_grad():
        for slot in slots:
            for name, value in zip(slot.shapes, slot.join(slot.parameter), strict=True):
                theirs[name].copy_(value)
    logits = family.logits(model.base_model.model, prompt, completion)[len(prompt) - 1 : -1]
    logits.log_softmax(-1)[range(len(completion)), completion].sum().backward()
    ours = {
        name: value
        for slot in slots
        for name, value in zip(slot.shapes, slot.join(slot.parameter.grad), strict=True)
    }
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(lora.targets) * layers
    for name, value in ours.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(value, theirs[name].grad, atol=1e-4, rtol=1e-4)


def test_starts_as_the_model_itself_with_peft_s_distribution(folder, backend):
    """B is zero, so the logits are the base's bit for bit; A is PEFT's kaiming uniform, keyed by seed and layer."""
    policy, base = load(folder, backend), load(folder, backend, LoraConfig())
    prompt = tiny_prompts(policy.hf_config)["audio_in_video"]
    assert torch.equal(logits_of(policy, prompt), logits_of(base, prompt))
    a = {name: value for name, value in policy.named_parameters() if name.endswith(".a")}
    for value in a.values():
        bound = value.shape[1] ** -0.5  # of kaiming uniform with a = sqrt 5
        assert 0.9 * bound < value.abs().max() <= bound and abs(value.std() * 3**0.5 / bound - 1) < 0.15
    assert len({float(value[0, 0]) for value in a.values()}) == len(a)
    other = build_policy(folder, backend, ModelConfig(lora=LORA), ParallelConfig(), seed=1)
    assert not any(torch.equal(value, other.get_parameter(name)) for name, value in a.items())


def test_bfloat16_trains_adapters_only(folder, backend):
    """Float32 main weights of the adapters alone; the frozen weights keep their bits."""
    policy = load(folder, backend, dtype="bfloat16").train()
    before = {name: value.clone() for name, value in policy.named_parameters()}
    optimization = build_optimizer(policy, OptimConfig(warmup_fraction=0.0), lr=1e-2, total_steps=2)
    prompt = tiny_prompts(policy.hf_config)["audio_in_video"]
    learner = Learner(policy, optimization, backend, RLConfig())
    moved = []
    for _ in range(2):
        stats = learner.update_sft([group(prompt)], policy.embed_media([prompt]))
        moved.append(stats["loss"])
    assert moved[1] < moved[0]
    after = dict(policy.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
    main = {name: value.clone() for name, value in optimization.main_weights().items()}
    assert main.keys() == changed and {value.dtype for value in main.values()} == {torch.float32}
    assert any(not torch.equal(value, after[name].float()) for name, value in main.items())  # more than bfloat16 holds
    optimization.renew(OptimConfig(), lr=1e-2, total_steps=2)  # the next stage
    assert all(torch.equal(value, main[name]) for name, value in optimization.main_weights().items())


def test_reference_is_the_model_without_adapters_at_first(folder, backend):
    """After training, the reference still scores like the base; a later stage's reference is its own start."""
    policy, base = load(folder, backend).train(), load(folder, backend, LoraConfig())
    prompt = tiny_prompts(policy.hf_config)["text"]
    optimization = build_optimizer(policy, OptimConfig(warmup_fraction=0.0), lr=1e-2, total_steps=4)
    learner = Learner(policy, optimization, backend, RLConfig())
    learner.snapshot_reference()
    assert sum(value.numel() for value in learner.reference.values()) < 0.1 * sum(
        value.numel() for value in policy.language_model.parameters()
    )
    learner.update_sft([group(prompt)], [None])
    with torch.no_grad():
        start = base(pack_groups([prompt], [tiny_completions()]))[0].numpy()
        now = policy(pack_groups([prompt], [tiny_completions()]))[0].numpy()
    (reference,) = learner.reference_logprobs([group(prompt)], [None])
    assert np.array_equal(np.concatenate(reference), start) and not np.allclose(now, start)
    learner.snapshot_reference()  # the next stage begins
    learner.update_sft([group(prompt)], [None])
    (reference,) = learner.reference_logprobs([group(prompt)], [None])
    assert np.array_equal(np.concatenate(reference), now)


def test_experts_take_no_adapters(backend, tmp_path):
    tiny_omni3_config(layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"down_proj, gate_proj, up_proj matches no .*\(experts take no adapters\): "):
        build_policy(tmp_path, backend, ModelConfig(lora=LORA), ParallelConfig())


def test_target_without_a_layer_is_refused(folder, backend):
    with pytest.raises(ValueError, match="model.lora.targets: wq matches no linear layer.*choose from down_proj, gate"):
        load(folder, backend, LoraConfig(rank=2, targets=["q_proj", "wq"]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_thinker(tiny_config(layers=2)).save_pretrained(folder / "hf")
    tiny_omni(folder / "float32", layers=3)
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    model.save_pretrained(folder / "omni", max_shard_size="300KB")
    launch(lora_world.main, 4, folder)
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_layout_trains_the_same_adapters(world):
    """Losses, gradient norms and exported adapters over four updates, and a checkpoint loaded on other layouts."""
    folder, results = world
    losses = [loss for loss, _ in results["tp1"]["curve"]]
    assert losses[-1] < 0.9 * losses[0]
    for layout, found in results.items():
        np.testing.assert_allclose(found["curve"], results["tp1"]["curve"], rtol=1e-4, err_msg=layout)
        if "continued" in found:
            np.testing.assert_allclose(found["continued"], results["tp1"]["curve"][2:], rtol=1e-4, err_msg=layout)
        for moment, tolerance in (("start", 0), ("end", 1e-4), ("merged", 1e-4)):
            file = "model.safetensors" if moment == "merged" else "adapter_model.safetensors"
            ours, first = (load_file(folder / f"{name}.{moment}" / file) for name in (layout, "tp1"))
            assert ours.keys() == first.keys()
            for name, value in ours.items():
                torch.testing.assert_close(value, first[name], atol=tolerance, rtol=0)
    assert {layout for layout, found in results.items() if "continued" in found} == {"tp1", "tp4-sp"}


@pytest.mark.slow
def test_full_class_in_bfloat16_round_trips_in_every_layout(world):
    """Uneven pipeline stages, more tensor ranks than key-value heads: every file's every tensor bit for bit."""
    folder, _ = world
    files = sorted(folder.glob("omni/*.safetensors"))
    assert len(files) > 2
    for layout in ("uneven", "tp4-sp"):
        for file in files:
            ours, theirs = load_file(folder / f"{layout}.omni" / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
