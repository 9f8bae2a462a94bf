"""The test of our kernels before training: right ones pass, each wrong one is named."""

import pytest
import torch

from megatron_avatar.policy.kernels import probe
from tests.policy.kernels.where import DEVICE

CPU = torch.device("cpu")  # where torch's formulas run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.core), torch.float16])
def test_our_kernels_pass(dtype):
    assert probe.own_kernels(probe.OURS, DEVICE, dtype) == ""
    assert set(probe.OURS) == set(probe.CASES)


@pytest.mark.parametrize("name", list(probe.CASES))
def test_a_kernel_that_writes_something_else_is_named(name):
    """A formula whose first result is off by a twentieth, in its place and in another's."""
    _, formula = probe.CASES[name]

    def wrong(*arguments):
        out = formula(*arguments)
        first = arguments[0] if out is None else out[0] if isinstance(out, tuple) else out
        first += first.abs().amax().div(20).to(first.dtype) if first.is_floating_point() else 1
        return out

    right = {other: run for other, (_, run) in probe.CASES.items()}
    assert probe.own_kernels(right, CPU, torch.float32) == ""
    assert probe.own_kernels(right | {name: wrong}, CPU, torch.float32).startswith(f"{name} differs from torch's by ")
