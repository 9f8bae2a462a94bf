"""This rank's part of a policy, built from a Hugging Face folder's config.json."""

from __future__ import annotations

from pathlib import Path

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy.architecture import read_config, transformer_config
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.fusions import choose_fusions, pin, tested
from megatron_avatar.policy.lora import add_lora
from megatron_avatar.policy.model import OmniPolicy


def build_policy(
    hf_folder: str | Path, backend: Backend, model: ModelConfig, parallel: ParallelConfig, *, seed: int = 0
) -> OmniPolicy:
    """This rank's part of the policy that `hf_folder`/config.json describes; weights.load_hf fills it.

    With model.lora the language model is frozen and adapters train, whose first values depend on `seed`.

    Raises ValueError where the folder holds another architecture, doesn't split into tp and pp, or has experts, whose
    products fail a self-test on this GPU.
    """
    hf_config = read_config(hf_folder)
    config = transformer_config(hf_config, model, parallel, on_cpu=backend.device.type != "cuda")
    pin(choose_fusions(parallel.kernels, on_cpu=backend.device.type != "cuda", dtype=config.params_dtype))
    if config.experts and backend.device.type == "cuda" and (reason := tested("experts", config.params_dtype)):
        raise ValueError(
            f"the products of all experts, which torch makes at once, fail their test on {backend.device} in "
            f"model.dtype={model.dtype} ({reason}): install another torch, or set another model.dtype (bfloat16's are "
            "one kernel on Hopper and Blackwell; float16's and float32's go through the experts one by one)"
        )
    policy = OmniPolicy(hf_config, config, backend).to(backend.device)
    policy.set_train_towers(False)
    if model.lora.rank:
        add_lora(policy, model.lora, seed)
    return policy
