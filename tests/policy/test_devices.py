"""Without a GPU: large recipes refuse, and PyTorch's build and the driver are named together."""

from __future__ import annotations

import subprocess

import pytest
import torch

from megatron_avatar.policy import devices
from megatron_avatar.train import main


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        (None, "", "is a build for CPUs, and nvidia-smi shows no driver"),
        (None, "570.1", "is a build for CPUs, the driver is 570.1: install a CUDA build"),
        ("13.0", "", "is built for CUDA 13.0, but nvidia-smi shows no driver"),
        ("13.0", "580.65", "the driver is 580.65, new enough .* and torch sees no GPU all the same: check nvidia-smi"),
        ("13.0", "not answering", "the driver is not answering and"),
        ("13.0", "535.9", "the driver is 535.9 and PyTorch .* is built for CUDA 13.0: .*580 or later.*-cuda120"),
    ],
)
def test_build_and_driver_are_named_together(monkeypatch, built, driver, words):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "driver_version", lambda: driver)
    with pytest.raises(ValueError, match=f"model.shape=qwen2_5_omni_7b: .*{words}.*cluster.gpu=cpu"):
        devices.refuse_cpu("qwen2_5_omni_7b", "h100")


@pytest.mark.parametrize("value", ["", " ", "-1"])
def test_gpus_that_are_hidden_are_no_drivers_fault(monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "driver_version", lambda: "535.9")
    assert devices.no_gpu().startswith("CUDA_VISIBLE_DEVICES is set and names no GPU: unset it")


def test_who_says_so_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.refuse_cpu("qwen2_5_omni_7b", "cpu")
    devices.refuse_cpu("tiny_base", "h100")
    devices.refuse_cpu("", "h100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices.refuse_cpu("qwen2_5_omni_7b", "h100")


def test_the_driver_is_asked_and_may_fail(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.driver_version() == ""
    for script, expected in (("echo 580.65", "580.65"), ("exit 9", "not answering")):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert devices.driver_version() == expected
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert devices.driver_version() == "of an unknown version"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_refuses(tmp_path, capsys):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "manifest.jsonl"):
        (tmp_path / name).write_text('{"model_type": "qwen2_5_omni"}')
    arguments = ["recipe=sft_3b", f"model.path={tmp_path}", f"data.manifest={tmp_path / 'manifest.jsonl'}",
                 f"output_dir={tmp_path / 'run'}", "parallel.tp=1", "parallel.pp=1",
                 "parallel.sequence_parallel=false"]  # fmt: skip
    assert main(arguments) == 2
    assert "torch finds no GPU for the recipe's model.shape=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
