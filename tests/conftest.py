"""What every test shares: no network, no screen, reproducible examples, and skips that give a reason."""

from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples on every run; a busy machine must not fail a property by being slow.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks; torch is asked for a GPU only if a test wants one."""
    if shutil.which("sbatch") is None:
        _skip(items, "slurm", "needs Slurm: sbatch is not on PATH")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA GPU")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def backend():
    """One process of the real backend for the tests of a module; torch is imported for those alone."""
    from megatron_avatar.config.schema import ParallelConfig
    from megatron_avatar.policy import backend as backends

    yield backends.start(ParallelConfig())
    backends.stop()
