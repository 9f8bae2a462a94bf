"""Where the tests of the kernels run: in Triton's interpreter, on CPU tensors, or on a GPU, where there is one."""

import os

import pytest
import torch

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="runs in Triton's interpreter; tests/gpu has its like")
