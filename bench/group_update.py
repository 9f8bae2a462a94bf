"""Forward and backward of one group, packed: against the same policy row by row, and against TRL's loss.

    python -m bench.group_update --json

One prompt of P = 512 tokens and G = 8 completions of L = 64. The policy is a Thinker of hidden 128, 4 layers, 4 heads
and 2 key-value heads in float32 that keeps the 7B's proportions: a feed-forward width of 5 times hidden, and a head of
7 % of all parameters. (The head works on completion tokens only, so a larger one would hide what is compared.) Three
contestants do the same work with the same weights, tokens, threads and loss, GRPO's with a KL term:

- ours: the group as one sequence of P - 1 + G * L tokens;
- rows: the same policy, G sequences of P - 1 + L tokens, in one micro-batch;
- trl: transformers' Qwen2ForCausalLM on [G, P + L] tokens, logits of the completions only, and GRPOTrainer's loss.

Losses and gradients of all parameters have to agree before anything is timed. token_bound is G (P + L) / (P + G L),
what the number of tokens alone would give. The sweep repeats it for other P, and with 4 fresh completions next to a
replayed group, 4 completions of another prompt as long: rows and TRL don't see the difference, their 8 rows are as long
as before. Memory is the process's peak beyond what it held before.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from bench.logprobs import peak_mib
from bench.timing import JSON_HELP, RESULTS, in_turns, is_default, medians, report
from eval.paper.figures.style import STYLE
from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import GroupBatch, pack_groups
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.slots import policy_slots
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Prompt
from megatron_avatar.rl.objective import policy_loss, token_weights

PROMPT, LENGTH, COMPLETIONS = 512, 64, 8
SWEEP = (128, 256, 512, 1024, 2048, 4096)
THREADS = 2
CLIP_LOW, CLIP_HIGH, BETA = 0.2, 0.28, 0.1
VOCABULARY = 768
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=640, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip


@dataclass
class Step:
    """One update's data. ids [G, P + L] are the rows; advantages, old and ref log-probabilities [G * L]."""

    prompts: list[Prompt]
    completions: list[list[np.ndarray]]
    ids: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor


def make_step(prompt_length: int, groups: int) -> Step:
    """G completions in all, shared out over `groups` prompts."""
    rng = np.random.default_rng(prompt_length)
    rows = rng.integers(0, 740, (COMPLETIONS, prompt_length + LENGTH))
    share = COMPLETIONS // groups
    rows[:, :prompt_length] = np.repeat(rows[::share, :prompt_length], share, axis=0)
    positions = np.tile(np.arange(prompt_length), (3, 1))
    noise = torch.from_numpy(rng.standard_normal((3, COMPLETIONS * LENGTH))).float()
    return Step(
        [Prompt(str(i), "plain", row[:prompt_length], positions) for i, row in enumerate(rows[::share])],
        [list(part[:, prompt_length:]) for part in np.split(rows, groups)],
        torch.from_numpy(rows),
        noise[0].view(COMPLETIONS, LENGTH)[:, :1].expand(-1, LENGTH).flatten(),
        -np.log(VOCABULARY) + 0.3 * noise[1],  # about what random weights give: some ratios are clipped
        -np.log(VOCABULARY) + 0.3 * noise[2],
    )


def our_loss(policy: OmniPolicy, batch: GroupBatch, step: Step) -> Tensor:
    weights = token_weights(batch.lengths, [True] * COMPLETIONS, COMPLETIONS, 0, alpha=1.0)
    index = torch.arange(COMPLETIONS).repeat_interleave(LENGTH)
    return policy_loss(
        policy(batch)[0], step.old, step.ref, step.advantages, *weights, index,
        clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=None, ratio_level="token", beta=BETA,
    )[0]  # fmt: skip


def packed(step: Step) -> GroupBatch:
    return pack_groups(step.prompts, step.completions)


def row_by_row(step: Step) -> GroupBatch:
    pairs = [(prompt, [c]) for prompt, outputs in zip(step.prompts, step.completions, strict=True) for c in outputs]
    return pack_groups(*zip(*pairs, strict=True))


def completion_scores(
    model: Qwen2ForCausalLM, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
):
    """In place of GRPOTrainer's own, which scores the prompt too where there is no Triton: its older form."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1).logits[:, :-1]
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return selective_log_softmax(logits, input_ids[:, -logits_to_keep:]), entropy, None


def trl_trainer(model: Qwen2ForCausalLM) -> GRPOTrainer:
    """GRPOTrainer with what its loss reads, and nothing else."""
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.model = model
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = "grpo", "token", BETA
    trainer.epsilon_low, trainer.epsilon_high = CLIP_LOW, CLIP_HIGH
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.use_vllm = trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = completion_scores
    return trainer


def trl_loss(trainer: GRPOTrainer, step: Step) -> Tensor:
    ids, shape = step.ids, (COMPLETIONS, LENGTH)
    return trainer._compute_loss(trainer.model, {
        "prompt_ids": ids[:, :-LENGTH], "prompt_mask": torch.ones_like(ids[:, :-LENGTH]),
        "completion_ids": ids[:, -LENGTH:], "completion_mask": torch.ones(shape, dtype=torch.long),
        "advantages": step.advantages.view(shape),
        "old_per_token_logps": step.old.view(shape), "ref_per_token_logps": step.ref.view(shape),
    })  # fmt: skip


def make_models(folder: str) -> tuple[OmniPolicy, Qwen2ForCausalLM]:
    """The policy, and transformers' model of a text-only Qwen with the same weights."""
    torch.manual_seed(0)
    tower = dict(hidden_size=32, num_heads=2, intermediate_size=64, fullatt_block_indexes=[0], depth=1)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(
        text_config=TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])),
        vision_config=tower | dict(out_hidden_size=128),
        audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, output_dim=128),
        audio_token_index=750, image_token_index=751, video_token_index=752, audio_start_token_id=753,
        audio_end_token_id=754, vision_start_token_id=755, vision_end_token_id=756,
    ))  # fmt: skip
    thinker.save_pretrained(folder)
    parallel = ParallelConfig(threads=THREADS)
    policy = build_policy(folder, backends.start(parallel), ModelConfig(path=folder), parallel)
    load_hf(policy, Path(folder))
    model = Qwen2ForCausalLM(
        Qwen2Config(**TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e6), use_cache=False)
    )
    saved = load_file(Path(folder) / "model.safetensors")
    model.load_state_dict({name: saved[name] for name in model.state_dict()})
    return policy.train(), model.train()


class Contest:
    """The three contestants, as functions that do forward and backward from no gradients."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.policy, self.model = make_models(folder)
        self.trainer = trl_trainer(self.model)
        self.slots = [slot for slot in policy_slots(self.policy) if slot.parameter.requires_grad]

    def contestants(self, step: Step) -> dict[str, Callable[[], float]]:
        """Each returns its loss. Packing is part of none: a learner packs once for all its passes."""
        group, rows = packed(step), row_by_row(step)
        return {
            "ours": lambda: self._pass(lambda: our_loss(self.policy, group, step)),
            "rows": lambda: self._pass(lambda: our_loss(self.policy, rows, step)),
            "trl": lambda: self._pass(lambda: trl_loss(self.trainer, step)),
        }

    def _pass(self, loss: Callable[[], Tensor]) -> float:
        for slot in self.slots:
            slot.parameter.grad = None
        self.model.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    def _our_gradients(self) -> dict[str, Tensor]:
        """By transformers' names."""
        return {
            name: part
            for slot in self.slots
            for name, part in zip(slot.shapes, slot.join(slot.parameter.grad), strict=True)
        }

    def largest_difference(self, step: Step) -> float:
        """Of losses, and of gradients in units of the largest entry of their tensor, between any two of the three."""
        results = []
        for name, work in self.contestants(step).items():
            loss = work()
            gradients = (
                {k: p.grad for k, p in self.model.named_parameters()} if name == "trl" else self._our_gradients()
            )
            results.append((loss, {k: g.clone() for k, g in gradients.items()}))
        assert results[0][1].keys() == results[2][1].keys()
        worst = 0.0
        for i, (loss, gradients) in enumerate(results):
            for other_loss, others in results[:i]:
                worst = max(worst, abs(loss - other_loss))
                for name, gradient in gradients.items():
                    scale = gradient.abs().max()
                    worst = max(worst, float((gradient - others[name]).abs().max() / scale))
        return worst


def token_bound(prompt_length: int, groups: int = 1) -> float:
    """Tokens of the rows per packed token."""
    return COMPLETIONS * (prompt_length + LENGTH) / (groups * prompt_length + COMPLETIONS * LENGTH)


def measure(contest: Contest, prompt_length: int, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Seconds and MiB of all three, and of ours with the replayed group."""
    work = contest.contestants(make_step(prompt_length, 1))
    work["replay"] = contest.contestants(make_step(prompt_length, 2))["ours"]
    seconds = medians(in_turns(work, rounds, warmup=warmup))
    return {f"{name}_s": value for name, value in seconds.items()} | {
        f"{name}_mib": peak_mib(one) for name, one in work.items()
    }


def plot(points: dict[int, dict[str, float]], path: Path) -> None:
    """Seconds and memory of an update over the prompt's length, for both settings."""
    lengths = list(points)
    looks = {"TRL": ("o", ":", "#8b949e"), "row by row": ("s", "--", "#d9822b"), "packed (ours)": ("^", "-", "#17407a")}
    with rc_context(STYLE | {"svg.hashsalt": "group_update"}):
        figure = Figure(figsize=(7.5, 5.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey="row")
        titles = ("8 fresh completions of one prompt", "4 fresh, 4 replayed of another prompt")
        for column, (title, ours) in enumerate(zip(titles, ("ours", "replay"), strict=True)):
            for row, unit in enumerate(("s", "mib")):
                axis = axes[row, column]
                for (label, (marker, line, color)), key in zip(looks.items(), ("trl", "rows", ours), strict=True):
                    values = [points[n][f"{key}_{unit}"] for n in lengths]
                    axis.plot(lengths, values, line, marker=marker, color=color, label=label, markersize=4.5)
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.set_xticks(lengths, [str(n) for n in lengths])
            axes[0, column].set_title(title)
            axes[1, column].set_xlabel("prompt tokens")
        axes[0, 0].set_ylabel("forward + backward, s")
        axes[1, 0].set_ylabel("peak memory, MiB")
        axes[0, 0].legend()
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=160, facecolor="white")


def compare(prompt_length: int, rounds: int) -> tuple[Contest, dict[str, float]]:
    """The contest and its figures at one length, once all three have proved to compute the same."""
    contest = Contest()
    difference = max(contest.largest_difference(make_step(prompt_length, groups)) for groups in (1, 2))
    assert difference < 1e-4, f"the contestants don't compute the same: {difference}"
    point = measure(contest, prompt_length, rounds)
    bound = token_bound(prompt_length)
    rows, trl = (point[f"{name}_s"] / point["ours_s"] for name in ("rows", "trl"))
    return contest, point | {
        "token_bound": bound, "speedup_rows": rows, "speedup_trl": trl, "fraction_of_bound": rows / bound,
        "token_bound_replay": token_bound(prompt_length, 2), "largest_difference": difference,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-sweep", action="store_true", help="P = 512 only")
    parser.add_argument("--json", action="store_true", help=f"{JSON_HELP}, and plot it")
    arguments = parser.parse_args()
    keep = is_default(parser, arguments)
    contest, result = compare(PROMPT, arguments.rounds)
    if not arguments.no_sweep:
        point = {name: value for name, value in result.items() if name.endswith(("_s", "_mib"))}
        points = {n: point if n == PROMPT else measure(contest, n, rounds=3, warmup=int(n < 2048)) for n in SWEEP}
        result["sweep"] = points
        if arguments.json and keep:
            plot(points, RESULTS / "group_update")
    backends.stop()
    report("group_update", result, as_json=arguments.json, keep=keep)


if __name__ == "__main__":
    main()
