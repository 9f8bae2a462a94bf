"""A run's checkpoint as a Hugging Face folder: python -m megatron_avatar.export RUN out=FOLDER [step=N] [adapters=true]

Without step, the newest intact checkpoint. Adapters are merged into the weights; with adapters=true they are written
alone, as PEFT has them on transformers 5, with adapters=hub by the names that transformers 4 and vLLM know. One process
does for a checkpoint of any layout; under torchrun the run's own layout is used.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

USAGE = "usage: python -m megatron_avatar.export RUN out=FOLDER [step=N] [adapters=true|hub]"


class Request(NamedTuple):
    run: Path
    out: Path
    step: int | None
    adapters: str  # false: merged; true: alone, named as in transformers 5; hub: as in the hub's folders


def parse(arguments: list[str]) -> Request:
    """ValueError for anything that is not USAGE, for a folder without a run, and for an `out` that is in use."""
    from megatron_avatar.config.paths import home

    settings = dict(home(item).partition("=")[::2] for item in arguments[1:])
    step, adapters = settings.get("step"), settings.get("adapters", "false")
    if not arguments or not settings.get("out") or settings.keys() - {"out", "step", "adapters"}:
        raise ValueError(USAGE)
    if (step is not None and not step.isdecimal()) or adapters not in ("true", "false", "hub"):
        raise ValueError(f"step={step} adapters={adapters}: step is a number, adapters true, hub or false. {USAGE}")
    run, out = Path(arguments[0]), Path(settings["out"])
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run / 'config.yaml'} doesn't exist: name the output_dir of a run")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} holds something already: name another folder, or remove that one")
    return Request(run, out, None if step is None else int(step), adapters)


def export(request: Request) -> None:
    """Load the checkpoint and write it. Raises ValueError, CheckpointError or OSError, on all ranks alike."""
    from omegaconf import OmegaConf

    from megatron_avatar.config import Config
    from megatron_avatar.policy.backend import start, stop
    from megatron_avatar.policy.build import build_policy
    from megatron_avatar.policy.weights import export_adapters, export_hf
    from megatron_avatar.resilience import checkpoint

    saved = OmegaConf.load(request.run / "config.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    assert isinstance(config, Config)
    model, parallel = config.model, config.parallel
    alone = request.adapters != "false"
    if alone and not model.lora.rank:
        raise ValueError(f"{request.run} trained no adapters (model.lora.rank=0): leave adapters= out")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        parallel = replace(parallel, tp=1, pp=1, first_stage_layers=None, sequence_parallel=False)
    backend = start(parallel, seed=config.seed)
    try:
        path = checkpoint.find(request.run, request.step, backend)
        policy = build_policy(model.path, backend, model, parallel)
        state = checkpoint.load(path, policy=policy, optimization=None, reference=None, backend=backend)
        words = state.get("asked")
        if alone:
            towers = any(stage.train_towers for stage in config.stages.values())
            hub = request.adapters == "hub"
            export_adapters(policy, request.out, model.path, model.lora, towers=towers, hub=hub, asked=words)
        else:
            export_hf(policy, request.out, model.path, asked=words)
        if backend.rank == 0:
            print(f"{path} written to {request.out}")
    finally:
        stop()


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 done, 1 failed, 2 refused before it began."""
    try:
        request = parse(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from megatron_avatar.first_words import tell

    tell(f"exporting {request.run} to {request.out} ...")
    try:
        export(request)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
