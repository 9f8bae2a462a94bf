"""Each of the package's kernels on the GPU against torch's function there, at Qwen's sizes."""

import pytest
import torch

from megatron_avatar.policy.kernels import device, probe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", list(probe.OURS))
def test_a_kernel_is_torchs(name, dtype):
    if reason := device.obstacle(0):
        pytest.skip(reason)
    assert probe.own_kernels({name: probe.OURS[name]}, torch.device("cuda", 0), dtype) == ""
