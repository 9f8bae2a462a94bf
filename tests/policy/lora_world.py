"""Runs on four ranks: the same adapters trained in every layout, one layout's checkpoint loaded in the others, and
round trips of the full Omni class in bfloat16.

main(FOLDER): FOLDER/hf holds the Thinker, FOLDER/omni the full class. Writes
FOLDER/results.json, each layout's adapters as PEFT folders FOLDER/LAYOUT.start and FOLDER/LAYOUT.end, its merged
weights FOLDER/LAYOUT.merged, and FOLDER/LAYOUT.omni.
"""

import json
import os
from pathlib import Path

from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_avatar.config.schema import LoraConfig, ModelConfig, OptimConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.weights import export_adapters, export_hf, load_hf
from megatron_avatar.resilience import checkpoint
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import tiny_completions, tiny_prompts

LORA = LoraConfig(rank=3, alpha=10.0, targets=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
# What four ranks leave over is data parallel, on the same prompts. tp 4 shares 2 key-value heads out.
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2-distributed": ParallelConfig(tp=2, distributed_optimizer=True),
    "pp2-recompute": ParallelConfig(pp=2, recompute="full"),
    "tp2-pp2-sp": ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    "tp4-sp": ParallelConfig(tp=4, sequence_parallel=True),
}
ROUND_TRIPS = {
    "uneven": ParallelConfig(tp=2, pp=2, first_stage_layers=1),
    "tp4-sp": LAYOUTS["tp4-sp"],
}
STEPS, SAVED = 4, 2
KINDS = ("audio_in_video", "text")


class Trainer:
    def __init__(self, folder: Path, parallel: ParallelConfig) -> None:
        self.backend = backends.start(parallel)
        self.policy = build_policy(folder / "hf", self.backend, ModelConfig(lora=LORA), parallel).train()
        load_hf(self.policy, folder / "hf")
        optim = OptimConfig(warmup_fraction=0.0, schedule="constant")
        self.optimization = build_optimizer(self.policy, optim, lr=1e-2, total_steps=STEPS, parallel=parallel)

    def step(self) -> tuple[float, float]:
        """One update on two prompts: (loss, gradient norm)."""
        prompts = tiny_prompts(self.policy.hf_config)

        def forward(kinds, model):
            prompt = prompts[next(kinds)]
            media = self.policy.embed_media([prompt])
            scores = model(pack_groups([prompt], [tiny_completions()]), media)
            return scores, lambda scores: (-scores[0].mean(), {"loss": -scores[0].detach().mean()})

        self.optimization.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(KINDS), model=[self.optimization.model],
            num_microbatches=len(KINDS), seq_length=1, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        loss = self.backend.broadcast_from_last_stage(float(sum(entry["loss"] for entry in losses)))
        norm, skipped = self.optimization.step()
        assert not skipped
        return loss, norm

    def save(self, folder: Path) -> Path:
        return checkpoint.save(
            folder, SAVED, policy=self.policy, optimization=self.optimization, reference=None, state={},
            backend=self.backend, keep=1,
        )  # fmt: skip

    def load(self, path: Path) -> None:
        checkpoint.load(
            path, policy=self.policy, optimization=self.optimization, reference=None, backend=self.backend
        )


def main(folder: Path) -> None:
    results, saved = {}, None
    for name, parallel in LAYOUTS.items():
        trainer = Trainer(folder, parallel)
        export_adapters(trainer.policy, folder / f"{name}.start", folder / "hf", LORA)
        curve = []
        for step in range(STEPS):
            if name == "tp2-pp2-sp" and step == SAVED:
                saved = trainer.save(folder)
            curve.append(trainer.step())
        export_adapters(trainer.policy, folder / f"{name}.end", folder / "hf", LORA)
        export_hf(trainer.policy, folder / f"{name}.merged", folder / "hf")
        results[name] = {"curve": curve}
        backends.stop()
    for name in ("tp1", "tp4-sp"):  # resharded
        trainer = Trainer(folder, LAYOUTS[name])
        trainer.load(saved)
        results[name]["continued"] = [trainer.step() for _ in range(SAVED, STEPS)]
        backends.stop()
    for name, parallel in ROUND_TRIPS.items():
        backend = backends.start(parallel)
        policy = build_policy(folder / "omni", backend, ModelConfig(dtype="bfloat16"), parallel)
        load_hf(policy, folder / "omni")
        export_hf(policy, folder / f"{name}.omni", folder / "omni")
        backends.stop()
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))

