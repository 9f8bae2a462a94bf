"""The policy equals transformers' models of every family: logits, scores of packed groups, and gradients.

Tolerance: 1e-5 of the logits' standard deviation, in float32. The layouts with several ranks share one launch.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.weights import load_hf, policy_slots
from tests.policy import parity_world
from tests.policy.mistakes import logits_error, mixture_mistakes, qwen3_mistakes
from tests.policy.parity_world import LAYOUTS, MODELS, TRAINED, family_of, models_of
from tests.policy.tiny import AUDIO, FAMILIES, tiny_completions, tiny_prompts
from tests.ranks import launch

TOLERANCE = 1e-5
GRADIENT_KINDS = FAMILIES["omni"].trained
OMNIS = [name for name, (family, _) in MODELS.items() if family == "omni"]


def write_references(folder):
    """The models, with transformers' logits, scores and gradients."""
    for name, (_, sizes) in MODELS.items():
        family = family_of(name)
        config = family.config(**sizes)
        model, prompts = family.model(config), family.prompts(config)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            logits = {kind: family.logits(model, prompts[kind]) for kind in family.kinds}
            save_file(logits, folder / f"{name}.logits")
        if name in TRAINED:
            scores = {f"scores.{kind}": row_scores(model, family, prompts[kind]) for kind in family.trained}
            (-sum(score[0].sum() for score in scores.values()) / len(scores)).backward()
            save_file({kind: score.detach() for kind, score in scores.items()}, folder / f"{name}.scores")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
            model.save_pretrained(folder / "gradients")
            (folder / "gradients" / "model.safetensors").rename(folder / f"{name}.gradients")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_references(tmp_path_factory.mktemp("parity"))


def row_scores(model, family, prompt, temperature=0.8):
    """transformers' log-probability and entropy [2, N] of the completions, each in a row of its own."""
    parts = []
    for completion in tiny_completions():
        logits = family.logits(model, prompt, completion)[len(prompt) - 1 : -1] / temperature
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        parts.append(torch.stack([logprobs[range(len(completion)), completion], entropy.detach()]))
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def results(folder):
    launch(parity_world.main, 4, folder, timeout=1700)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.core
def test_every_layout_equals_transformers(results, layout):
    """Logits of every kind of prompt; scores and gradients of groups; weights after export and import."""
    checks = results["-".join(map(str, layout))]
    kinds = {model: family_of(model).kinds for model in models_of(layout[0])}
    expected = {f"{model}.{kind}" for model in kinds for kind in kinds[model]}
    trained = ("export", "round_trip", "share", "scores", "gradients")
    expected |= {f"{model}.{check}" for model in TRAINED for check in trained}
    assert set(checks) == expected
    assert all(checks[name] == 0 for name in checks if name.endswith(("export", "round_trip")))
    assert {name: error for name, error in checks.items() if error > TOLERANCE} == {}


def load(folder, backend, **parallel):
    policy = build_policy(folder, backend, ModelConfig(), ParallelConfig(**parallel))
    load_hf(policy, folder)
    return policy



@pytest.mark.parametrize("name", OMNIS)
def test_one_rank_equals_transformers_and_mistakes_show(folder, backend, name):
    policy, references = load(folder / name, backend), load_file(folder / f"{name}.logits")
    prompts = tiny_prompts(policy.hf_config)
    for kind, prompt in prompts.items():
        assert references[kind].std() >= 1
        assert logits_error(policy, prompt, references[kind]) <= TOLERANCE

    prompt, reference = prompts["audio_in_video"], references["audio_in_video"]
    mistakes = {}
    flat = np.broadcast_to(np.arange(len(prompt)), (3, len(prompt)))
    mistakes["1-D positions"] = logits_error(policy, dataclasses.replace(prompt, positions=flat), reference)

    (media,) = policy.embed_media([prompt])
    heard = torch.from_numpy(prompt.token_ids[np.isin(prompt.token_ids, policy.placeholder_ids)] == AUDIO)
    shifted = media.clone()
    shifted[heard] = media[heard].roll(1, dims=0)
    mistakes["shifted audio"] = logits_error(policy, prompt, reference, [shifted])

    section = policy.language_model.mrope_section
    policy.language_model.mrope_section = section[1:] + section[:1]
    mistakes["permuted sections"] = logits_error(policy, prompt, reference)
    policy.language_model.mrope_section = section

    with torch.no_grad():
        for slot in policy_slots(policy):
            if any(".k_proj.weight" in tensor and "model.layers" in tensor for tensor in slot.shapes):
                query, key, value = slot.join(slot.parameter)
                slot.parameter.copy_(slot.take([query, value, key], 1, 0))
    mistakes["swapped k and v"] = logits_error(policy, prompt, reference)
    assert {name: error for name, error in mistakes.items() if error < 100 * TOLERANCE} == {}


def test_qwen3_omni_equals_transformers_and_mistakes_show(folder, backend, monkeypatch):
    policy, references = load(folder / "omni3", backend), load_file(folder / "omni3.logits")
    prompts = FAMILIES["omni3"].prompts(policy.hf_config)
    errors = {kind: logits_error(policy, prompt, references[kind]) for kind, prompt in prompts.items()}
    assert {kind: error for kind, error in errors.items() if error > TOLERANCE} == {}
    given = policy, prompts["audio_in_video"], references["audio_in_video"]
    mistakes = qwen3_mistakes(*given, monkeypatch) | mixture_mistakes(*given, monkeypatch)
    assert {name: error for name, error in mistakes.items() if error < 0.05} == {}
    assert logits_error(*given) <= TOLERANCE, "nothing of the mistakes stays"


@pytest.mark.parametrize("name, frozen", [("tiny", ""), ("tiny", "embedding"), ("vl3", ""), ("vl3", "towers"),
                                          ("omni3", "")])  # fmt: skip
def test_recomputation_gives_the_same_gradients(folder, backend, name, frozen):
    """Also where nothing in front of the first layer needs a gradient, and of encoders whose features go to several
    layers; without a gradient nothing is recomputed."""
    gradients, family = [], family_of(name)
    for recompute in ("none", "light", "selective", "full"):
        policy = load(folder / name, backend, recompute=recompute)
        policy.language_model.embedding.requires_grad_(frozen != "embedding")
        policy.set_train_towers(name != "tiny" and frozen != "towers")
        prompts = [family.prompts(policy.hf_config)[kind] for kind in family.trained]
        batch = pack_groups(prompts, [tiny_completions()] * len(prompts))
        media, calls = policy.embed_media(prompts, grad=True), []
        first = policy.language_model.decoder.layers[0]
        inner = getattr(first.mlp, "linear_fc2", first.mlp)
        hook = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            policy(batch, media)
        policy(batch, media)[0].sum().backward()
        hook.remove()
        assert len(calls) == (2 if recompute in ("none", "light") else 3)
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
        assert any(name.startswith("towers.") for name in gradients[-1]) == (name != "tiny" and not frozen)
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert all(torch.equal(gradient, other[name]) for other in gradients[1:]), name


def test_frozen_towers_and_encoders_of_many_prompts(folder, backend):
    """One call for all prompts gives what single calls give; frozen, the encoders are outside of the graph."""
    policy = load(folder / "tiny", backend)
    prompts = list(tiny_prompts(policy.hf_config).values())
    together = policy.embed_media(prompts)
    for prompt, media in zip(prompts, together, strict=True):
        (alone,) = policy.embed_media([prompt])
        if prompt.sample_id == "text":
            assert media is None and alone is None
        else:
            torch.testing.assert_close(media, alone, atol=1e-5, rtol=0)
            assert not media.requires_grad
    assert not any(value.requires_grad for value in policy.towers.parameters())
    assert policy.embed_media(prompts[:1], grad=True)[0].grad_fn is None, "frozen weights need no graph"
    kept = [dataclasses.replace(p, embedded=m, pixels=None, mel=None) if k % 2 else p
            for k, (p, m) in enumerate(zip(prompts, together, strict=True))]  # fmt: skip
    for k, (media, again) in enumerate(zip(together, policy.embed_media(kept), strict=True)):
        assert (again is media) if k % 2 or media is None else torch.equal(again, media)


def test_bfloat16_stays_close_and_scores_in_float32(folder, backend):
    policy = build_policy(folder / "tiny", backend, ModelConfig(dtype="bfloat16"), ParallelConfig())
    load_hf(policy, folder / "tiny")
    prompts = [tiny_prompts(policy.hf_config)[kind] for kind in GRADIENT_KINDS]
    scores = policy(pack_groups(prompts, [tiny_completions()] * 2), policy.embed_media(prompts), temperature=0.8)
    theirs = load_file(folder / "tiny.scores")
    theirs = torch.cat([theirs[f"scores.{kind}"] for kind in GRADIENT_KINDS], dim=1)
    assert scores.dtype == torch.float32
    assert 1e-4 < (scores - theirs).abs().mean() < 0.1


def test_features_that_do_not_fit_the_placeholders_are_refused(folder, backend):
    policy = load(folder / "tiny", backend)
    prompt = tiny_prompts(policy.hf_config)["audio"]
    with pytest.raises(ValueError, match="'audio'.*100 audio placeholders.*99 audio embeddings"):
        policy.embed_media([dataclasses.replace(prompt, mel=prompt.mel[:, :396], mel_lengths=torch.tensor([396]))])


@pytest.mark.parametrize(
    "name, tp, pp, match",
    [("tiny", 3, 1, "parallel.tp=3.*4 attention heads"), ("tiny", 1, 3, "parallel.pp=3.*4 layers"),
     ("vl3", 1, 3, "first stage would have 2 layers, less than the 3 .*deepstack.*: write .*first_stage_layers=4 "),
     ("omni3", 1, 3, "first stage would have 2 layers, less than the 3 .*deepstack"),
     ("omni3", 3, 1, "parallel.tp=3 doesn't divide the 4 attention heads, 2 key-value heads and 8 experts")],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(folder, backend, name, tp, pp, match):
    with pytest.raises(ValueError, match=match):
        load(folder / name, dataclasses.replace(backend, tp=tp, pp=pp), tp=tp, pp=pp)


def test_other_architectures_are_refused(folder, backend, tmp_path):
    with pytest.raises(ValueError, match="config.json doesn't exist"):
        load(tmp_path, backend)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        load(tmp_path, backend)
    with pytest.raises(ValueError, match="model.dtype='float8'"):
        build_policy(folder / "tiny", backend, ModelConfig(dtype="float8"), ParallelConfig())
    config = json.loads((folder / "tiny" / "config.json").read_text())
    config["text_config"]["use_sliding_window"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sliding windows"):
        load(tmp_path, backend)
