"""Runs on four ranks: logits, scores, gradients and round trips of tiny models in every layout.

main(FOLDER) reads the models and transformers' figures that test_parity left there, and writes FOLDER/results.json:
layout -> check -> largest relative error.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.weights import export_hf, load_hf
from megatron_avatar.records import Prompt
from tests.policy.tiny import FAMILIES, Family, tiny_completions

# (tp, pp, sequence parallel); what four ranks leave over is data parallel. tp 4 shares 2 key-value heads out.
LAYOUTS = [(1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (2, 1, True), (2, 2, True), (4, 1, True)]
# model -> its family, and how its configuration is made. Deepstack wants three layers on the first of two stages.
MODELS: dict[str, tuple[str, dict]] = {
    "tiny": ("omni", {}),
    "tied": ("omni", dict(tied=True)),
    "vl": ("vl", {}),
    "vl3": ("vl3", dict(layers=6)),
    "vl3_tied": ("vl3", dict(layers=6, tied=True)),
    "omni3": ("omni3", dict(layers=6)),
    "omni3_tied": ("omni3", dict(layers=6, tied=True, normed=False)),
    "qwen": ("omni", dict(qwen=True, layers=2)),
}
TRAINED = ("tiny", "tied", "vl3", "vl3_tied", "omni3")  # with gradients and round trips


def family_of(name: str) -> Family:
    return FAMILIES[MODELS[name][0]]


def models_of(tp: int) -> list[str]:
    """Those whose heads tp divides: Qwen's proportions have 14."""
    return [name for name in MODELS if 14 % tp == 0 or name != "qwen"]


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, in units of its largest entry; of an audio encoder's biases of keys, which move
    all scores alike and so have a gradient of nothing but rounding, in those of queries."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    scale = {name: value.abs().max().clamp_min(1e-6) for name, value in theirs.items()}
    for name in scale:
        if name.startswith("audio_tower") and name.endswith("k_proj.bias"):
            scale[name] = scale[name.replace("k_proj", "q_proj")]
    return max(float((ours[name] - theirs[name]).abs().max() / scale[name]) for name in theirs)


def logits_errors(
    policy: OmniPolicy, prompts: dict[str, Prompt], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Largest error of the logits of each kind of prompt, in units of their standard deviation."""
    errors = {}
    for kind, prompt in prompts.items():
        logits = policy.logits(pack_groups([prompt], [[prompt.token_ids[:1]]]), policy.embed_media([prompt]))
        if logits is not None:
            theirs = reference[kind]
            errors[kind] = float((logits - theirs).abs().max() / theirs.std())
    return policy.backend.broadcast_from_last_stage(errors)


def share_error(policy: OmniPolicy, prompt: Prompt, tp: int) -> float:
    """How far the encoders of any rank of the first stage are from 1 / tp of a video's slices."""
    rows = []
    if policy.pre_process:
        hook = policy.towers.visual.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        policy.embed_media([prompt])
        hook.remove()
        rows[0] -= len(prompt.pixels) // tp
    return float(max(abs(row) for other in policy.backend.all_gather_object(rows) for row in other))


def train_step(
    policy: OmniPolicy, prompts: dict[str, Prompt], trained: tuple[str, ...], folder: Path, source: Path
) -> tuple[dict[str, torch.Tensor], ...]:
    """Scores by kind and gradients by Hugging Face name, of some micro-batches in Megatron-Core's schedule."""
    policy.set_train_towers(True)
    policy.config.finalize_model_grads_func = finalize_model_grads
    parallel = DistributedDataParallel(policy.config, DistributedDataParallelConfig(), policy)

    def forward_step(kinds, model):
        kind = next(kinds)
        batch = pack_groups([prompts[kind]], [tiny_completions()])
        scores = model(batch, policy.embed_media([prompts[kind]], grad=True), temperature=0.8)
        return scores, lambda scores: (-scores[0].sum(), {kind: scores.detach().clone()})

    scored = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(trained),
        model=[parallel],
        num_microbatches=len(trained),
        seq_length=1,  # shapes travel with the tensors
        micro_batch_size=1,
        forward_only=False,
    )
    with torch.no_grad():  # exported like weights
        for parameter in policy.parameters():
            parameter.copy_(getattr(parameter, "main_grad", torch.zeros(())))
    export_hf(policy, folder, source)
    scores = {f"scores.{kind}": scores for step in scored for kind, scores in step.items()}
    return policy.backend.broadcast_from_last_stage(scores), load_file(folder / "model.safetensors")


def check_layout(folder: Path, tp: int, pp: int, sequence_parallel: bool) -> dict[str, float]:
    parallel = ParallelConfig(tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    backend = backends.start(parallel)
    assert (backend.world, backend.dp) == (4, 4 // (tp * pp))
    assert backend.all_gather_object(backend.rank) == [0, 1, 2, 3]
    assert backend.all_gather_object_dp(backend.dp_rank) == list(range(backend.dp))
    assert backend.broadcast_from_last_stage(torch.tensor([backend.pp_rank, backend.tp_rank])).tolist() == [pp - 1, 0]
    backend.barrier()
    results = {}
    for name in models_of(tp):
        source, out = folder / name, folder / f"{name}-{tp}-{pp}-{sequence_parallel}"
        build = partial(build_policy, source, backend, ModelConfig(), parallel)
        policy = build()
        load_hf(policy, source)
        family = family_of(name)
        prompts = family.prompts(policy.hf_config)
        errors = logits_errors(policy, prompts, load_file(folder / f"{name}.logits"))
        results |= {f"{name}.{kind}": error for kind, error in errors.items()}
        if name not in TRAINED:
            continue
        results[f"{name}.share"] = share_error(policy, prompts["video"], tp)
        export_hf(policy, out, source)
        again = build()
        load_hf(again, out)  # on all ranks, from the exported folder
        results[f"{name}.round_trip"] = float(
            any(not torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
        )
        exported, original = (load_file(path / "model.safetensors") for path in (out, source))
        results[f"{name}.export"] = worst(exported, original)
        scores, gradients = train_step(policy, prompts, family.trained, out, source)
        results[f"{name}.scores"] = worst(scores, load_file(folder / f"{name}.scores"))
        results[f"{name}.gradients"] = worst(gradients, load_file(folder / f"{name}.gradients"))
    backends.stop()
    return results


def main(folder: Path) -> None:
    results = {"-".join(map(str, layout)): check_layout(folder, *layout) for layout in LAYOUTS}
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))

