"""What a mistyped setting was probably meant to be, and what is there where nothing is near."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import SequenceMatcher

ALIKE = 0.74  # of the last part or of the whole key, from which on a name is offered
ALL = "all settings: python -m megatron_avatar.config.reference"

# What other trainers call it, by the last part of the key.
ALIASES = {
    "optim.lr": ("learning_rate", "lr", "base_lr", "max_lr"),
    "stages.NAME.prompts_per_step": ("batch_size", "train_batch_size", "global_batch_size", "bs", "batch"),
    "rl.n_on": ("group_size", "num_generations", "n_rollouts", "num_rollouts", "samples_per_prompt", "n", "rollout_n"),
    "stages.NAME.steps": ("epochs", "num_epochs", "num_train_epochs", "max_steps", "train_steps", "steps", "iters"),
    "rl.beta": ("kl_coef", "kl_coeff", "kl", "kl_beta", "kl_loss_coef"),
    "rl.clip_low": ("clip_eps", "epsilon", "cliprange", "clip_range", "clip_ratio"),
    "rl.sampling.temperature": ("temperature", "temp"),
    "rl.sampling.max_new_tokens": ("max_tokens", "max_new_tokens", "max_completion_length", "max_response_length"),
    "rl.tokens_per_micro_batch": ("micro_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "model.path": ("model_name_or_path", "model_name", "model_path", "checkpoint_path", "hf_model"),
    "model.context": ("max_length", "max_seq_len", "max_seq_length", "seq_length", "context_length", "seq_len"),
    "model.dtype": ("bf16", "fp16", "precision", "torch_dtype"),
    "model.lora.rank": ("lora_rank", "lora_r"),
    "data.manifest": ("dataset", "dataset_name", "data_path", "train_file", "train_data", "train_files"),
    "parallel.tp": ("tensor_parallel_size", "tensor_model_parallel_size", "tensor_parallel"),
    "parallel.pp": ("pipeline_parallel_size", "pipeline_model_parallel_size", "pipeline_parallel"),
    "parallel.recompute": ("gradient_checkpointing", "activation_checkpointing"),
    "checkpoint.every": ("save_steps", "save_every", "save_interval", "save_freq"),
    "eval.every": ("eval_steps", "eval_every", "eval_interval", "test_freq"),
    "output_dir": ("output", "out", "out_dir", "save_dir"),
    "cluster.gpus": ("gpus", "num_gpus", "n_gpus", "nproc_per_node"),
    "log.wandb": ("report_to", "use_wandb", "wandb_mode"),
    "optim.warmup_fraction": ("warmup_ratio", "warmup_steps", "warmup"),
    "optim.clip_grad": ("max_grad_norm", "grad_clip", "gradient_clip"),
}
_MEANT = {name: key for key, names in ALIASES.items() for name in names}


def unknown(key: str, pattern: str, schema: Collection[str], stages: Sequence[str] = ()) -> str:
    """A sentence on a key that the schema lacks. `pattern` is the key with the user's own names taken out."""
    stage = re.match(r"stages\.([^.]+)", key)
    named = stage[1] if stage else stages[0] if stages else "NAME"
    said = f"unknown key '{key}'."
    leaf = key.rpartition(".")[2]
    if near := closest(pattern, schema):
        return f"{said} The nearest valid name is '{near.replace('*', named)}'"
    if meant := _MEANT.get(leaf.casefold()):
        return f"{said} What others call {leaf} is '{meant.replace('NAME', named)}' here"
    group = next((g for g in _groups(pattern) if any(k.startswith(f"{g}.") for k in schema)), "")
    if group:
        names = sorted({k.removeprefix(f"{group}.").split(".")[0] for k in schema if k.startswith(f"{group}.")} - {"*"})
        return f"{said} Nothing in {group.replace('*', named)} is like it; it has {', '.join(names)}"
    return f"{said} Nothing is like it; {ALL}"


def closest(pattern: str, schema: Collection[str]) -> str | None:
    """The schema's key that is most like `pattern`, by its last part and as a whole; None where none is alike."""

    def likeness(candidate: str) -> tuple[float, float]:
        leaf = SequenceMatcher(None, pattern.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return leaf, SequenceMatcher(None, pattern, candidate).ratio()

    best = max((c for c in schema if not c.endswith("*")), key=lambda c: sum(likeness(c)))
    leaf, whole = likeness(best)
    return best if leaf >= ALIKE or (whole >= ALIKE and leaf >= ALIKE / 2) else None


def absent_stage(name: str, stages: Sequence[str]) -> str:
    """A sentence on a stage that the recipe lacks."""
    near = max(stages, key=lambda stage: SequenceMatcher(None, name, stage).ratio(), default="")
    if near and SequenceMatcher(None, name, near).ratio() >= ALIKE:
        return f"stages.{name}: the recipe has no such stage. The nearest is 'stages.{near}'"
    have = f"it has {', '.join(stages)}" if stages else "it has none"
    return (f"stages.{name}: the recipe has no such stage; {have}. To add one write "
            f"'+stages.{name}={{kind: rl, data: [...], steps: 100, prompts_per_step: 8, rewards: {{...}}}}'")


def _groups(pattern: str) -> list[str]:
    """a.b and a of a.b.c."""
    parts = pattern.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
