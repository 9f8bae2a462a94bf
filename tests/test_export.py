"""A run's checkpoints as Hugging Face folders, through the entry point's own function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_avatar import export
from megatron_avatar.config import Config, ModelConfig, OptimConfig, ParallelConfig, StageConfig, save_config
from megatron_avatar.config.asked import read_asked
from megatron_avatar.config.schema import LoraConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.lora import lora_adapters
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.resilience import checkpoint
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import tiny_config, tiny_thinker
from tests.ranks import launch

WORDS = {"instruction": "Think between <think> and </think>.", "system": ""}


def make_run(folder: Path, parallel: ParallelConfig, rank: int) -> None:
    """FOLDER/run with checkpoints of steps 1 and 2: all weights times 1 and times 2, all B of the adapters 0.5."""
    model = ModelConfig(path=str(folder / "hf"), lora=LoraConfig(rank=rank, alpha=4.0))
    backend = backends.start(parallel)
    policy = build_policy(model.path, backend, model, parallel)
    load_hf(policy, model.path)
    optimization = build_optimizer(policy, OptimConfig(), lr=1e-3, total_steps=1)
    with torch.no_grad():
        for adapter in lora_adapters(policy):
            adapter.b.fill_(0.5)
        for step in (1, 2):
            if step == 2:
                for parameter in policy.parameters():
                    parameter.mul_(2)
            checkpoint.save(
                folder / "run", step, policy=policy, optimization=optimization, reference=None,
                state={"asked": WORDS} if step == 2 else {},
                backend=backend, keep=2,
            )  # fmt: skip
    config = Config(model=model, parallel=parallel, stages={"visual": StageConfig()})
    if backend.rank == 0:
        save_config(config, folder / "run" / "config.yaml")
    backend.barrier()
    backends.stop()


def export_in_its_layout(folder: Path) -> int:
    make_run(folder, ParallelConfig(tp=2), rank=2)
    return export.main([f"{folder}/run", f"out={folder}/together", "step=1"])


@pytest.fixture
def folder(tmp_path):
    tiny_thinker(tiny_config(layers=2)).save_pretrained(tmp_path / "hf")
    return tmp_path


def say(capsys, *arguments) -> tuple[int, str]:
    """The entry point's exit status, and what it printed."""
    status = export.main(list(map(str, arguments)))
    return status, "".join(capsys.readouterr())


def test_checkpoints_become_folders(folder, capsys):
    make_run(folder, ParallelConfig(), rank=0)
    run, source = folder / "run", load_file(folder / "hf" / "model.safetensors")
    assert say(capsys, run, f"out={folder / 'newest'}")[0] == 0
    assert say(capsys, run, f"out={folder / 'first'}", "step=1")[0] == 0
    for name, factor in (("newest", 2), ("first", 1)):
        exported = load_file(folder / name / "model.safetensors")
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[n], factor * source[n]) for n in source)
    assert read_asked(folder / "newest") == WORDS and read_asked(folder / "first") is None  # as the checkpoints note

    status, said = say(capsys, run, f"out={folder / 'third'}", "step=3")
    assert status == 1 and "no checkpoint of step 3: there are steps 1, 2" in said
    for adapters in ("true", "hub"):
        status, said = say(capsys, run, f"out={folder / 'third'}", f"adapters={adapters}")
        assert status == 1 and "trained no adapters" in said
    status, said = say(capsys, run, f"out={folder / 'third'}", "adapters=yes")
    assert status == 2 and "adapters true, hub or false" in said
    before = (folder / "first" / "model.safetensors").read_bytes()
    status, said = say(capsys, run, f"out={folder / 'first'}")
    assert status == 2 and "holds something already" in said
    assert (folder / "first" / "model.safetensors").read_bytes() == before
    part = next((run / "checkpoints" / "step_00000001" / "weights").glob("__0_*"))
    part.write_bytes(part.read_bytes()[:100])
    status, said = say(capsys, run, f"out={folder / 'third'}", "step=1")
    assert status == 1 and "step_00000001 is damaged" in said
    assert not (folder / "third").exists()


@pytest.mark.slow
def test_one_process_exports_adapters_of_two_ranks(folder, capsys):
    """Merged and alone, from a checkpoint of tp 2; and on two ranks, in the run's layout."""
    launch(export_in_its_layout, 2, folder)
    run, source = folder / "run", load_file(folder / "hf" / "model.safetensors")
    assert say(capsys, run, "step=1", f"out={folder / 'adapters'}", "adapters=true")[0] == 0
    assert say(capsys, run, "step=1", f"out={folder / 'merged'}")[0] == 0
    adapters = load_file(folder / "adapters" / "adapter_model.safetensors")
    merged = load_file(folder / "merged" / "model.safetensors")
    assert all(torch.equal(value, torch.full_like(value, 0.5)) for n, value in adapters.items() if "lora_B" in n)
    for name, value in merged.items():
        a = adapters.get(f"base_model.model.{name.replace('model.', 'model.language_model.').removesuffix('weight')}"
                         "lora_A.weight")  # fmt: skip
        update = 0 if a is None else 2 * 0.5 * a.sum(0)  # alpha / rank = 2, every entry of B 0.5
        torch.testing.assert_close(value, source[name] + update, atol=1e-6, rtol=0)
    together = load_file(folder / "together" / "model.safetensors")
    assert together.keys() == merged.keys()
    for name, value in together.items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=0)


def test_mistakes_are_named(folder, capsys):
    out = f"out={folder / 'out'}"
    for arguments in ((), ("run",), ("run", out, "stpe=3")):
        status, said = say(capsys, *arguments)
        assert status == 2 and "usage: python -m megatron_avatar.export RUN out=FOLDER" in said
    assert "step is a number" in say(capsys, "run", out, "step=last")[1]
    assert "config.yaml doesn't exist: name the output_dir of a run" in say(capsys, folder, out)[1]
    save_config(Config(model=ModelConfig(path=str(folder / "hf"))), folder / "config.yaml")
    status, said = say(capsys, folder, out)
    assert status == 1 and "has no checkpoint: the run has none" in said

