"""What every test shares: no network, no screen, reproducible examples, and skips that give a reason."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from multiprocessing import forkserver

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small, and run side by side

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples on every run, or by night others: HYPOTHESIS_PROFILE=nightly. A busy machine must not fail a
# property by being slow.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))

# Worker processes of all kinds are forked by one process that has imported what they need; product code asks for the
# modules of one kind only, and what is asked for once that process runs comes too late.
PRELOADED = ["megatron_avatar.data.loader", "megatron_avatar.rl.rewards.symbolic", "eval.prepare"]


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # which runs many files
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


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
