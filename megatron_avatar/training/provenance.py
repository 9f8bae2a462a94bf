"""What made a number: the code's commit, the device, the processes, the versions, the model it began with."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_avatar.config.asked import other_words, read_asked
from megatron_avatar.config.checks import other_shape
from megatron_avatar.config.schema import Config
from megatron_avatar.data.decode import decoders
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.fusions import choose_fusions
from megatron_avatar.rl.rewards import own

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "av", "h5py")


def about(backend: Backend) -> dict[str, Any]:
    """The facts of this process; the same on every rank."""
    return {
        "commit": commit(), "device": device(backend), "processes": backend.world,
        "gpus": backend.world if backend.device.type == "cuda" else 0,
        "layout": f"tp {backend.tp}, pp {backend.pp}, dp {backend.dp}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }  # fmt: skip


def record(folder: Path, config: Config, backend: Backend) -> None:
    """Write a run's provenance.json. Of each reward of one's own it keeps the SHA-256 of every file that scored so far,
    the latest last; a continued run that scores with another one than before says so."""
    file = folder / "provenance.json"
    before = json.loads(file.read_text()).get("rewards", {}) if file.exists() else {}
    rewards = {}
    for name, place in config.rl.rewards.items():
        known, now = before.get(name, {}).get("sha256", []), own.digest(place)
        if known and known[-1] != now:
            log.warning("rl.rewards.%s: %s has changed since this run began; older scores stay", name, place)
        rewards[name] = {"place": place, "sha256": known if known[-1:] == [now] else [*known, now]}
    facts = about(backend) | ({"rewards": rewards} if rewards else {})
    file.write_text(json.dumps(facts, indent=1) + "\n")


def introduce(config: Config, backend: Backend) -> None:
    """Say what a run starts from, and what is unlike its recipe or its model's training. Rank 0 alone speaks; all ranks
    call it, since they agree on the kernels here."""
    fusions = choose_fusions(config.parallel.kernels, on_cpu=backend.device.type == "cpu",
                             dtype=getattr(torch, config.model.dtype))  # fmt: skip
    if backend.rank:
        return
    model = config.model
    if difference := other_shape(config):
        log.warning("%s is not of the recipe's model.shape=%s (%s): its layout and its plan are for that one",
                    model.path, model.shape, difference)  # fmt: skip
    if different := other_words(read_asked(model.path), config.data):
        log.warning("%s is asked in other words than in its training: %s", model.path, different)
    log.info("video: %s", decoders(config.data.decoder))
    log.info("kernels: %s", fusions)


def commit() -> str:
    """The commit of the code that runs, `-dirty` where it was changed: of a job's snapshot, or of the checkout; empty
    where neither is known."""
    snapshot = ROOT / "snapshot.json"
    if snapshot.is_file():
        known = json.loads(snapshot.read_text())
        return f"{(known['commit'] or '')[:12]}{'-dirty' if known['changed'] else ''}"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def device(backend: Backend) -> str:
    """The GPU's name, or the processor's."""
    if backend.device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
