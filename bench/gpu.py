"""One GPU, Qwen2.5-Omni-3B's shape with random weights in bfloat16: how near decoding and updates come to its limits.

    python -m bench.gpu --json        (--tiny runs all of it on a machine without a GPU, to see that it works)

A step of reinforcement learning as the trainer takes it: 8 prompts of 3.5k tokens (12 slices of video at 448 x 448
pixels, 12 s of sound, a question), 8 completions of 512 tokens each, groups of 7.6k packed tokens. Measured are

- its parts: encoders, reading the prompts, decoding, scoring by the reference, update;
- decoding: tokens a second, and the share of what memory bandwidth allows, weights and cache being read once a token,
  as a copy on this GPU reaches it and as published; with the step as a CUDA graph, and without;
- the update, forward, backward and AdamW: the share of the GPU's peak (MFU), recomputation not counted as work; and
  how much longer the same completions take row by row, each with its prompt;
- mean exp|log-probability difference| of the same tokens between generation and training;
- and what gpu_parts.py has: sure heads, rows, recomputation, profiles, transformers and DALI beside it. Each part is
  printed when it ends; one that fails says so and ends no other. --parts=none leaves them out, --trace keeps traces.

Weights have unit gain and logits a deviation of 3, so that rounding matters as much as in a trained model. Needs
torch, transformers and Megatron-Core. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_parts import PARTS, published_peak, share_of_peak, timed, without
from bench.timing import JSON_HELP, in_turns, is_default, medians, report, write
from megatron_avatar import config
from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig, RLConfig, SamplingConfig
from megatron_avatar.planning.seconds import forward_flops
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.records import Completion, Group, Prompt, Trajectory
from megatron_avatar.training.balance import packed_tokens
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer

SHAPES = Path(config.__file__).parent / "shapes"
ROUNDS = 3
NO_RECOMPUTE_GIB = 110  # 56 of weights, gradients and moments, about 35 of activations, and room


@dataclass(frozen=True)
class Size:
    """What is measured: a shape, and a step's prompts and completions. grid: slices of video, patches high and wide."""

    shape: str = "qwen2_5_omni_3b"
    prompts: int = 8
    completions: int = 8
    new_tokens: int = 512
    grid: tuple[int, int, int] = (12, 32, 32)
    mel_frames: int = 1200
    text: int = 120
    text_ids: int = 150_000  # ids from here on are no text
    matmul: int = 8192
    copied: int = 1 << 32


TINY = Size("tiny_base", prompts=2, completions=3, new_tokens=6, grid=(2, 4, 4), mel_frames=200, text=12, text_ids=300,
            matmul=256, copied=1 << 24)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model and a step for any machine; nothing is kept")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}; none")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="keep the profiles' traces there")
    options = parser.parse_args(arguments)
    parts = [part for part in options.parts if part != "none"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --tiny runs without one")
    size, keeps = TINY if options.tiny else Size(), options.json and is_default(parser, options)
    backend = backends.start(ParallelConfig())
    try:
        bench = Bench(size, backend)
        result = bench.run()
        tell("step", result)
        result["parts"] = {}
        for part in parts:
            if keeps:
                write("gpu", result)  # a run that is cut short leaves what it knows
            result["parts"][part] = bench.part(part, options.trace)
    finally:
        backends.stop()
    report("gpu", result, as_json=options.json, keep=keeps)


def tell(part: str, found: dict[str, Any]) -> None:
    """A part's figures on a line of their own, once they are known."""
    print(json.dumps({part: found}, default=lambda value: value.tolist()), flush=True)


class Bench:
    """The policy, its learner, and one step's data."""

    def __init__(self, size: Size, backend: backends.Backend) -> None:
        self.size, self.backend = size, backend
        on_gpu = backend.device.type == "cuda"
        free = torch.cuda.mem_get_info()[0] / 2**30 if on_gpu else 0.0
        self.recompute = "none" if free > NO_RECOMPUTE_GIB or not on_gpu else "full"
        parallel = ParallelConfig(recompute=self.recompute)
        self.policy = build_policy(SHAPES / size.shape, backend, ModelConfig(dtype="bfloat16"), parallel)
        fill_at_random(self.policy)
        self.policy.hf_config.eos_token_id = self.policy.vocab_size  # never drawn: nothing ends early
        self.prompts = [make_prompt(self.policy, size, number) for number in range(size.prompts)]
        self.group_tokens = packed_tokens(len(self.prompts[0]), [size.new_tokens] * size.completions)
        optimization = build_optimizer(self.policy, OptimConfig(), lr=1e-6, total_steps=100, parallel=parallel)
        self.learner = Learner(self.policy, optimization, backend, RLConfig(tokens_per_micro_batch=self.group_tokens))
        self.learner.snapshot_reference()

    def run(self) -> dict[str, Any]:
        flops, bandwidth = self.machine_rates()
        parts, groups, media = self.step()
        error = self.groups_update(groups, media)["logprob_error"]  # of the weights that sampled
        decode = self.decoding(bandwidth, media, parts)
        parts["update"] = statistics.median(
            timed(lambda: self.groups_update(groups, media)) for _ in range(ROUNDS)
        )
        update = self.updating(groups, media, parts["update"], flops)
        total = sum(parts.values())
        for name, seconds in parts.items():
            print(f"{name:<10} {seconds:9.3f} s {seconds / total:6.1%}", flush=True)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.backend.device.type == "cuda" else None
        return {
            "shape": self.size.shape, "prompt_tokens": len(self.prompts[0]), "group_tokens": self.group_tokens,
            "prompts": self.size.prompts, "completions": self.size.completions, "new_tokens": self.size.new_tokens,
            "recompute": self.recompute, "matmul_tflops": flops / 1e12, "copy_tb_s": bandwidth / 1e12,
            **{f"{name}_s": seconds for name, seconds in parts.items()}, **decode, **update,
            "logprob_error": float(error), "peak_gib": peak,
        }

    # ---- parts ---------------------------------------------------------------------------------

    def machine_rates(self) -> tuple[float, float]:
        """FLOP/s of a large bfloat16 matrix product, and bytes/s that a copy reads and writes."""
        device, n = self.backend.device, self.size.matmul
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.zeros(self.size.copied // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = medians(in_turns({"matmul": lambda: [a @ b for _ in range(10)],
                                    "copy": lambda: [target.copy_(source) for _ in range(10)]}, ROUNDS))
        return 20 * n**3 / seconds["matmul"], 10 * self.size.copied / seconds["copy"]

    def step(self) -> tuple[dict[str, float], list[Group], list]:
        """Seconds of a step's parts before the update, each after a first call that isn't counted; and its groups."""
        media = self.policy.embed_media(self.prompts)
        rows = self.generate(self.size.new_tokens, media)
        groups = self.groups(rows)
        self.learner.reference_logprobs(groups, media)
        parts = {
            "towers": timed(lambda: self.policy.embed_media(self.prompts)),
            "prefill": timed(lambda: self.generate(1, media)),  # with the first token
            "decode": timed(lambda: self.generate(self.size.new_tokens, media)),
            "reference": timed(lambda: self.learner.reference_logprobs(groups, media)),
        }
        parts["decode"] -= parts["prefill"]
        return parts, groups, media

    def part(self, name: str, trace: Path | None) -> dict[str, Any]:
        """A part of gpu_parts.py, told; what it failed by where it did."""
        try:
            found = PARTS[name](self, trace) if name == "profiles" else PARTS[name](self)
        except Exception as error:  # the others are worth having
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        tell(name, found)
        return found

    def groups(self, rows: list[list[Completion]]) -> list[Group]:
        return [make_group(prompt, part) for prompt, part in zip(self.prompts, rows, strict=True)]

    def generate(self, new_tokens: int, media: list) -> list[list[Completion]]:
        sampling = SamplingConfig(max_new_tokens=new_tokens)
        keys = [prompt.sample_id for prompt in self.prompts]
        return generate(self.policy, self.prompts, self.size.completions, sampling, keys, media=media)

    def decoding(self, bandwidth: float, media: list, parts: dict[str, float]) -> dict[str, float]:
        """Tokens a second, and of what the bandwidth allows: every step reads the weights, each prompt once, and
        every row's own tokens, of which there are half as many as in the end."""
        size, text = self.size, self.policy.hf_config.text_config
        rows, steps = size.prompts * size.completions, size.new_tokens - 1
        weights = sum(p.numel() for p in self.policy.language_model.parameters())
        if not self.policy.share_embeddings_and_output_weights:
            weights -= text.vocab_size * text.hidden_size  # a look-up reads next to nothing of the embedding
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kept = 2 * text.num_hidden_layers * text.num_key_value_heads * head
        cached = size.prompts * len(self.prompts[0]) + rows * size.new_tokens / 2
        seconds_bound = 2 * (weights + kept * cached) / bandwidth
        speed = rows * steps / parts["decode"]
        found = {
            "decode_tok_s": speed, "decode_step_ms": 1e3 * parts["decode"] / steps,
            "decode_bound_tok_s": rows / seconds_bound, "decode_fraction": speed * seconds_bound / rows,
        }
        if peak := published_peak():
            found["decode_fraction_of_published"] = found["decode_fraction"] * bandwidth / peak.bandwidth
        if self.backend.device.type == "cuda":
            few = min(64, size.new_tokens)
            with without(self.policy, graphs=True, kernels=False):
                self.generate(few, media)
                eager = timed(lambda: self.generate(few, media)) - parts["prefill"]
            found["decode_eager_tok_s"] = rows * (few - 1) / eager
        return found

    def groups_update(self, groups: list[Group], media: list) -> dict[str, Any]:
        """One update of all weights of the language model; the reference doesn't matter to its time."""
        count = sum(len(group.trajectories) for group in groups)
        scores = [[t.completion.logprobs for t in group.trajectories] for group in groups]
        return self.learner.update(groups, media, scores, n_on=count, n_off=0, check_logprobs=False)

    def updating(self, groups: list[Group], media: list, seconds: float, measured: float) -> dict[str, float | None]:
        """MFU of the update, and packed groups against rows, each a micro-batch of its own with its prompt."""
        size, prompt, config = self.size, len(self.prompts[0]), self.policy.hf_config
        prefix, tokens = prompt - 1, size.completions * size.new_tokens
        pairs = prefix * (prefix + 1) / 2 + tokens * prefix + tokens * (size.new_tokens + 1) / 2
        forward = forward_flops(config, prefix + tokens, pairs, tokens)
        done = 3 * size.prompts * (forward.layers + forward.head) / seconds
        few, part = groups[:2], media[:2]
        rows = [make_group(g.prompt, [t.completion]) for g in few for t in g.trajectories]
        row_media = [m for m in part for _ in range(size.completions)]
        turns = medians(in_turns({"groups": lambda: self.groups_update(few, part),
                                  "rows": lambda: self.groups_update(rows, row_media)}, ROUNDS))
        return {
            "update_tflops": done / 1e12, "mfu": share_of_peak(done), "mfu_of_matmul": done / measured,
            "update_tok_s": size.prompts * (prefix + tokens) / seconds,
            "speedup_rows": turns["rows"] / turns["groups"],
            "token_bound": size.completions * (prefix + size.new_tokens) / (prefix + tokens),
        }


@torch.no_grad()
def fill_at_random(policy: OmniPolicy) -> None:
    """Unit gain everywhere, branches scaled so that their sum stays, norms of 1, no biases, logits' deviation 3."""
    torch.manual_seed(0)
    layers = policy.config.num_layers
    for name, parameter in policy.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        gain = 3.0 if "embedding" in name or "output_layer" in name else 1.0
        if "linear_proj" in name or "linear_fc2" in name:
            gain = (2 * layers) ** -0.5
        fan_in = parameter.shape[-1] if "embedding" in name else parameter[0].numel()
        parameter.normal_(std=gain * fan_in**-0.5)


def make_prompt(policy: OmniPolicy, size: Size, number: int) -> Prompt:
    """Video, sound and text of random contents, at one-dimensional positions."""
    config, rng = policy.hf_config, np.random.default_rng(number)
    patches = int(np.prod(size.grid))
    vision = config.vision_config
    # Ids below 20 are special tokens of the tiny model.
    text = rng.integers(20, size.text_ids, size.text)
    ids = np.concatenate([
        text[:5],
        np.full(patches // vision.spatial_merge_size**2, config.video_token_id),
        np.full(size.mel_frames // 4, config.audio_token_id),
        text[5:],
    ])  # fmt: skip
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return Prompt(
        f"prompt {number}", "plain", ids, np.tile(np.arange(len(ids)), (3, 1)),
        pixels=torch.from_numpy(rng.standard_normal((patches, width), np.float32)),
        grid_thw=torch.tensor([size.grid]),
        mel=torch.from_numpy(rng.standard_normal((128, size.mel_frames), np.float32)),
        mel_lengths=torch.tensor([size.mel_frames]),
    )  # fmt: skip


def make_group(prompt: Prompt, completions: list[Completion]) -> Group:
    rows = [Trajectory(prompt.sample_id, "plain", c, 0.0, {}, 0.0, "", "", 0, 0) for c in completions]
    advantages = np.where(np.arange(len(rows)) % 2, -1.0, 1.0).astype(np.float32)
    return Group(prompt, rows, advantages, np.ones(len(rows), bool))


if __name__ == "__main__":
    main()
