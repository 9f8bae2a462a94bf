"""A run small enough for tests: 22 synthetic clips, a random model of the demo's classes, three short RL stages.

`python -m tests.training.small FOLDER` makes model and data; everything else goes through the product's commands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def make(folder: Path) -> None:
    """FOLDER/base (random weights, scaled so that sampling is varied) and FOLDER/data."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    from data_tools.pretrain import save, tiny_config
    from data_tools.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    save(Qwen2_5OmniThinkerForConditionalGeneration(tiny_config(tokenizer)), tokenizer, folder / "base")
    subprocess.run([sys.executable, "-m", "data_tools.synthesize", "--out", str(folder / "data"), "--size", "tiny"],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def arguments(folder: Path, out: Path, *overrides: str, recipe: str = "tiny_avatar", steps: int = 2) -> list[str]:
    """Command-line settings of a short run on `make`'s folder."""
    stages = ["sft"] if recipe == "tiny_sft" else ["visual", "audio_visual", "localisation"]
    return [
        f"recipe={recipe}", f"model.path={folder / 'base'}", f"data.manifest={folder / 'data' / 'manifest.jsonl'}",
        f"output_dir={out}", "log.wandb=disabled", "rl.replay.min_fill=4", "rl.hints.patience=1",
        "rl.replay.live=false",  # a random model earns nothing: none of its completions has an advantage
        "rl.sampling.max_new_tokens=12",
        # A random model's groups often vanish: AdamW would make steps of full length from a gradient of rounding alone.
        "optim.eps=1e-5",
        *(f"stages.{s}.steps={steps}" for s in stages), *(f"stages.{s}.prompts_per_step=4" for s in stages), *overrides,
    ]


def train(
    *args: str, ranks: int = 1, module: tuple[str, ...] = ("megatron_avatar.train",), **kwargs
) -> subprocess.CompletedProcess:
    """Run the product's entry point, or a disturbed one, on several ranks through torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*launcher, "-m", *module, *args], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
