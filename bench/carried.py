"""How much of what a stage moves is still there after a stage change, where the weights are bfloat16.

    python -m bench.carried --json

A small GPT trains for three stages of 134 updates at a learning rate of 5e-7, the published ones, through the product's
optimizer. A stage moves a weight by about a tenth of bfloat16's step: float32 main weights hold it, bfloat16 weights
don't. `carried` is the share of the movement that is left behind a stage change, `differ` the share of bfloat16 weights
that are no longer those of the start, after each stage. `rebuilt` says the same of main weights that every stage makes
anew out of the bfloat16 ones.
"""

from __future__ import annotations

import argparse

import torch

from bench.timing import JSON_HELP, is_default, report
from megatron_avatar.config.schema import OptimConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.backend import Backend
from megatron_avatar.training.optim import Optimization, build_optimizer
from tests.training.gpt import build_gpt, train_step

STAGES, STEPS, LR = 3, 134, 5e-7
BATCHES = 8  # taken in turn


def carried(stages: int = STAGES, steps: int = STEPS, lr: float = LR) -> dict:
    """Shares in 0 … 1: carried, differ (by stage), moved (mean |movement| of a main weight, by stage), rebuilt (the
    same two where main weights are made anew). Under a minute on one core."""
    backend = backends.start(ParallelConfig(), seed=0)
    try:
        return _train(backend, stages, steps, lr) | {"rebuilt": _train(backend, stages, steps, lr, rebuild=True)}
    finally:
        backends.stop()


def _train(backend: Backend, stages: int, steps: int, lr: float, *, rebuild: bool = False) -> dict:
    policy = build_gpt(backend, dtype=torch.bfloat16)
    first = [parameter.detach().clone() for parameter in policy.parameters()]
    optim, step = OptimConfig(), 0
    optimization = build_optimizer(policy, optim, lr=lr, total_steps=steps)
    left, differ, moved = [], [], []
    for stage in range(stages):
        begin = _main(optimization)
        for _ in range(steps):
            train_step(optimization, step % BATCHES)
            step += 1
        end = _main(optimization)
        if stage + 1 < stages:
            optimization.renew(optim, lr=lr, total_steps=steps)
            if rebuild:
                with torch.no_grad():
                    for name, main in optimization.main_weights().items():
                        main.copy_(policy.get_parameter(name))
            left.append(1 - float((_main(optimization) - end).abs().sum() / (end - begin).abs().sum()))
        changed = sum(int((now != then).sum()) for now, then in zip(policy.parameters(), first, strict=True))
        differ.append(changed / end.numel())
        moved.append(float((end - begin).abs().mean()))
    return {"carried": sum(left) / len(left), "differ": differ, "moved": moved}


def _main(optimization: Optimization) -> torch.Tensor:
    """All main weights in one row, copied."""
    return torch.cat([main.flatten() for main in optimization.main_weights().values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    report("carried", carried(), as_json=arguments.json, keep=is_default(parser, arguments))


if __name__ == "__main__":
    main()
