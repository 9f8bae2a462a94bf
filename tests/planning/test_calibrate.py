"""Calibration where layers add their weights' gradients to float32 buffers, as Apex's do: with a fake of Apex."""

from types import SimpleNamespace

import torch

from megatron_avatar.planning import calibrate
from megatron_avatar.planning.batches import pack
from megatron_avatar.policy import architecture, build, fusions
from megatron_avatar.policy.fusions import Fusions

FUSED = Fusions(weight_gradients=True)


def test_layers_that_accumulate_gradients_by_themselves_are_measured(monkeypatch, backend):
    added = []

    def add(x, grad, buffer):
        assert buffer.dtype == torch.float32 and x.dtype == torch.bfloat16
        added.append(float(buffer.abs().max()))
        buffer += grad.float().t() @ x.float()

    monkeypatch.setattr(fusions.megatron_layers, "fused_weight_gradient_mlp_cuda",
                        SimpleNamespace(wgrad_gemm_accum_fp32=add), raising=False)  # fmt: skip
    for module in (architecture, build):
        monkeypatch.setattr(module, "choose_fusions", lambda *_, **__: FUSED)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    try:
        found = calibrate._layer_rates(calibrate._read_shape("tiny_base"), backend, "bfloat16", pack([(8, [3, 2])]))
    finally:
        fusions.pin(Fusions())
    assert found["train_flops"] > 0 and found["memory_ratio"] is None, "which is of GPUs"
    assert added[0] == 0 and added[-1] > 0, "a later pass adds to what an earlier one left"
