"""What every test shares: no network, no screen, reproducible examples, and skips that give a reason."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small, and run side by side

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests import ranks  # noqa: E402
from tests.fake_slurm import fake_slurm  # noqa: E402, F401

# The same examples on every run, or by night others: HYPOTHESIS_PROFILE=nightly. A busy machine must not fail a
# property by being slow.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


# Files that take minutes, in the order in which workers begin them: else the last one runs alone.
LONGEST = ("training/test_layouts.py", "training/test_loop.py", "planning/test_plan.py",
           "planning/test_plan_recipes.py", "bench/test_reference.py", "test_sweep.py",
           "training/test_scoring.py", "training/test_replay_step.py",
           "policy/test_parity.py", "slurm/test_training.py")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and config.option.markexpr != "slurm":  # runs many files; jobs aren't forked
        ranks.start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks; torch is asked for a GPU only if a test wants one. Workers begin with the longest
    files."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {str(Path(__file__).parent / name): number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(str(item.path), len(place)))
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


@pytest.fixture(scope="session")
def made_world(tmp_path_factory) -> Path:
    """A small model and its data, made once for all workers; to be read only."""
    from tests.training import small

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "made_world"
    with open(shared / "made_world.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            small.make(shared / "making_world")
            (shared / "making_world").rename(folder)
    return folder


@pytest.fixture(scope="module")
def world(made_world, tmp_path_factory) -> Path:
    """A copy of it, for the tests of a module to write into."""
    return shutil.copytree(made_world, tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="module")
def backend():
    """One process of the real backend for the tests of a module; torch is imported for those alone."""
    from megatron_avatar.config.schema import ParallelConfig
    from megatron_avatar.policy import backend as backends

    yield backends.start(ParallelConfig())
    backends.stop()
