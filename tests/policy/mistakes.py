"""What a policy must not compute, each far from transformers' logits: negative controls of the newer families."""

import dataclasses

import numpy as np
import torch

from megatron_avatar.policy import layer
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.layer import Angles, InterleavedAngles


def logits_error(policy, prompt, reference, media=None):
    """Largest difference of the logits in units of their standard deviation."""
    media = policy.embed_media([prompt]) if media is None else media
    logits = policy.logits(pack_groups([prompt], [[prompt.token_ids[:1]]]), media)
    return float((logits - reference).abs().max() / reference.std())


def qwen3_mistakes(policy, prompt, reference, monkeypatch):
    """What Qwen3 does otherwise than Qwen2.5, done as there, or wrongly."""
    found, (media,), width = {}, policy.embed_media([prompt]), policy.config.hidden_size
    embedding, first, second, third = media.split(width, dim=1)
    nothing = torch.zeros_like(embedding)
    for name, columns in {
        "no deepstack": (embedding, nothing, nothing, nothing),
        "no feature behind the third layer": (embedding, first, second, nothing),
        "deepstack one layer early": (embedding + first, second, third, nothing),
    }.items():
        found[name] = logits_error(policy, prompt, reference, [torch.cat(columns, dim=1)])
    with monkeypatch.context() as patch:
        patch.setattr(InterleavedAngles, "forward", Angles.forward)
        found["mrope in blocks"] = logits_error(policy, prompt, reference)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "head_norms", lambda attention: None)
        found["no norms of queries and keys"] = logits_error(policy, prompt, reference)
    weight = policy.language_model.decoder.layers[0].self_attention.q_layernorm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(1)
        found["a query norm's weight"] = logits_error(policy, prompt, reference)
        weight.copy_(kept)
    return found


def mixture_mistakes(policy, prompt, reference, monkeypatch):
    """Of Qwen3-Omni: other shares, other experts, and times cut to whole positions."""
    cut = dataclasses.replace(prompt, positions=np.trunc(prompt.positions))
    found = {"whole positions": logits_error(policy, cut, reference)}
    mixtures = [layer.mlp for layer in policy.language_model.decoder.layers]
    with monkeypatch.context() as patch:
        patch.setattr(policy.config, "normed_shares", not policy.config.normed_shares)
        found["shares normed otherwise"] = logits_error(policy, prompt, reference)
    with monkeypatch.context() as patch:
        for mixture in mixtures:
            patch.setattr(mixture, "top", mixture.top - 1)
        found["an expert less"] = logits_error(policy, prompt, reference)
    own, (gate_up, down) = mixtures[0].own, (mixtures[0].gate_up, mixtures[0].down)
    with torch.no_grad():
        for name, parameter, other in (
            ("gate and up swapped", gate_up, gate_up.unflatten(0, (own, 2, -1)).flip(1)),
            ("experts one further", down, down.unflatten(0, (own, -1)).roll(1, dims=0)),
        ):
            kept = parameter.detach().clone()
            parameter.copy_(other.reshape(parameter.shape).clone())
            found[name] = logits_error(policy, prompt, reference)
            parameter.copy_(kept)
    return found
