"""What this machine can run, what is missing and what that means.

    python -m megatron_avatar.doctor [--json]
    python -m megatron_avatar.doctor --calibrate [FILE]
    python -m megatron_avatar.doctor --site

Reports and never fails: every check stands alone, and anything may be absent. With --calibrate it measures the rates
that a dry run's plan counts with, on one machine or, under torchrun or srun, on all ranks. With --site it prints a
draft of this site's settings (config/cluster), from what Slurm says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "missing"]
PACKAGES = ("torch", "megatron-core", "transformers", "av", "h5py", "hydra-core", "wandb")
SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
# Encoders that PyAV's wheels bring along; the decoders are what is being asked about.
CODECS = {"VP8": "libvpx", "VP9": "libvpx-vp9", "MJPEG": "mjpeg", "H.264": "libx264"}
GIB = 2**30
PYTHON = shlex.quote(sys.executable)


@dataclass(frozen=True)
class Result:
    """What a check found, what follows from it, and the command or option that mends it or says more."""

    state: State
    found: str
    meaning: str = ""
    command: str = ""


def examine() -> dict[str, Result]:
    """Run every check; one that breaks is reported as missing, with its error."""
    checks = {
        "Python": _python,
        "CPU": _cpu,
        "memory": _memory,
        "free disk": _disk,
        "shared memory": _shared_memory,
        "packages": _packages,
        "GPUs": _gpus,
        "collectives": _collectives,
        "DALI": _dali,
        "Apex": _apex,
        "Transformer Engine": _transformer_engine,
        "FlashAttention-3": _flash_attention_3,
        "own kernels": _own_kernels,
        "Slurm": _slurm,
    }
    results = {}
    for name, check in checks.items():
        try:
            results[name] = check()
        except Exception as error:  # a broken installation may raise anything
            results[name] = Result("missing", f"{type(error).__name__}: {error}".splitlines()[0])
    return results


def _python() -> Result:
    new_enough = sys.version_info >= (3, 11)
    return Result("ok" if new_enough else "missing", platform.python_version(), "" if new_enough else "3.11 is needed")


def _cpu() -> Result:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Result("ok", f"{cores} cores, {platform.machine()}")


def _memory() -> Result:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    enough = total >= 6 * GIB
    return Result("ok" if enough else "note", f"{total / GIB:.1f} GiB", "" if enough else "the demo wants 6")


def _disk() -> Result:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= 5 * GIB
    return Result(
        "ok" if enough else "note",
        f"{free / GIB:.1f} GiB in {Path.cwd()}",
        "" if enough else "checkpoints may not fit: set output_dir to a larger disk",
    )


def _shared_memory(folder: Path = Path("/dev/shm")) -> Result:
    """Decode workers and NCCL hand data over there."""
    meaning = "decode workers can't hand over frames: mount it, writable for this user"
    command = "docker run --shm-size=8g"
    if not folder.is_dir():
        return Result("missing", f"no {folder}", meaning, command)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"0" * 2**20)
    except OSError as error:
        return Result("missing", f"{folder} can't be written ({error.strerror})", meaning, command)
    free = shutil.disk_usage(folder).free / GIB
    if free < 1:
        return Result("note", f"{free:.1f} GiB free", "little: a node's decode workers may need a few GiB", command)
    return Result("ok", f"{free:.1f} GiB free")


def _packages() -> Result:
    found = {name: _version(name) for name in PACKAGES}
    lacking = [name for name, number in found.items() if number is None]
    return Result(
        "missing" if lacking else "ok",
        ", ".join(f"{k} {v}" for k, v in found.items() if v) or "none",
        f"not installed: {', '.join(lacking)}" if lacking else "",
        f"{PYTHON} -m pip install -r requirements.txt" if lacking else "",
    )


def _gpus() -> Result:
    import torch

    if not torch.cuda.is_available():
        from megatron_avatar.policy.devices import no_gpu

        meaning = f"{no_gpu()}; the tiny recipes run on the CPU, those of published models need GPUs"
        return Result("missing", "none", meaning)
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{d.name} ({d.total_memory / GIB:.0f} GiB)" for d in devices)
    return Result("ok", f"{len(devices)}: {names}")


def _collectives() -> Result:
    import torch.distributed as dist

    if dist.is_available() and dist.is_nccl_available():
        import torch

        return Result("ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, gloo")
    return Result("note", "gloo", "no NCCL in this PyTorch: ranks talk over gloo, on the CPU")


def _dali() -> Result:
    wheels = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali")
    number = next((f"{name} {_version(name)}" for name in wheels if _version(name)), None)
    if number is None:
        return Result("missing", "not installed", "PyAV decodes instead")
    # A separate process: a wheel that doesn't fit the driver may end its process.
    said, broken = _apart("print_decodable")
    if broken:
        return Result("missing", f"{number} doesn't work: {broken}", "PyAV decodes instead")
    decoded = json.loads(said)
    refused = [name for name in CODECS if name not in decoded]
    return Result(
        "ok" if decoded else "missing",
        f"{number}; decodes on the CPU: {', '.join(decoded) or 'nothing'}",
        f"{', '.join(refused)}: PyAV decodes instead" if refused else "",
    )


def _apart(function: str) -> tuple[str, str]:
    """The last line that a function of this module prints in a process of its own, and the last one of its error."""
    command = [sys.executable, "-c", f"from megatron_avatar.doctor import {function}; {function}()"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = (run.stderr if run.returncode else run.stdout).strip().splitlines() or ["no message"]
    return ("", lines[-1]) if run.returncode else (lines[-1], "")


def print_decodable() -> None:
    """Print the names of the codecs whose clips DALI decodes on the CPU, as a JSON list."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([name for name in CODECS if _dali_decodes(_clip(Path(folder), name))]))


def _clip(folder: Path, codec: str) -> bytes:
    """Four grey frames of 64 x 64, encoded."""
    import av
    import numpy as np

    path = folder / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[codec], rate=4)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = 64, 64
        stream.pix_fmt = "yuvj420p" if codec == "MJPEG" else "yuv420p"
        for level in (50, 100, 150, 200):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def _dali_decodes(clip: bytes) -> bool:
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[call-overload]  # None: without a GPU
    def pipeline() -> object:
        return fn.decoders.video(fn.external_source([[np.frombuffer(clip, np.uint8)]], cycle=True), device="cpu")

    try:
        built = pipeline()
        built.build()
        (frames,) = built.run()
        return frames.at(0).shape[0] == 4
    except RuntimeError:
        return False


def _apex() -> Result:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Result("note", "not installed", "optional: Megatron-Core uses PyTorch's kernels instead")
    if not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return Result("missing", f"{spec.origin} isn't NVIDIA's", "an unrelated package of that name, from PyPI",
                      f"{PYTHON} -m pip uninstall apex")  # fmt: skip
    return Result("ok", _version("apex") or "installed")


def _transformer_engine() -> Result:
    if importlib.util.find_spec("transformer_engine") is None:
        meaning = "optional: the language model uses Megatron-Core's local layers instead"
        return Result("note", "not installed", meaning)
    return Result("ok", _version("transformer-engine") or "installed")


def _flash_attention_3() -> Result:
    if importlib.util.find_spec("flash_attn_interface") is None:
        return Result("note", "not installed", "optional, on H100 and H200: PyTorch's FlashAttention-2 runs instead")
    return Result("ok", _version("flash-attn-3") or "installed")


def _own_kernels() -> Result:
    """Triton builds them at their first launch, with a C compiler, against Python's headers."""
    import torch

    if not torch.cuda.is_available():
        return Result("note", "not run", "they need a GPU; PyTorch's operations run on a CPU")
    said, broken = _apart("print_own_kernels")
    if not broken and said == "fine":
        return Result("ok", f"Triton {_version('triton')}: as PyTorch's operations in bfloat16")
    reason, meaning = broken or said, "PyTorch's operations run instead, several times slower in decoding"
    builds = any(word in reason for word in ("compiler", "Python.h", "gcc"))
    return Result("missing", reason, meaning, "apt install gcc python3-dev" if builds else "")


def print_own_kernels() -> None:
    """Print what speaks against the package's kernels on the first GPU, or `fine`."""
    import torch

    from megatron_avatar.policy.fusions import tested
    from megatron_avatar.policy.kernels.device import obstacle

    print(obstacle(0) or tested("kernels", torch.bfloat16) or "fine")


def _slurm() -> Result:
    lacking = [name for name in SLURM_COMMANDS if shutil.which(name) is None]
    if len(lacking) == len(SLURM_COMMANDS):
        return Result("note", "not installed", "jobs can't be submitted from here; local runs don't need it")
    if lacking:
        return Result("missing", f"without {', '.join(lacking)}", "the scripts in slurm/ need them")
    run = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=10)
    return Result("ok", run.stdout.strip() or "installed", "a draft of this site's settings can be made",
                  f"{PYTHON} -m megatron_avatar.doctor --site")  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(results: dict[str, Result]) -> None:
    """Print the results as a table, as plain lines where rich isn't installed; below it the commands, whole."""
    if importlib.util.find_spec("rich") is None:
        for name, result in results.items():
            print(f"{result.state:<8} {name}: {result.found}" + (f" ({result.meaning})" if result.meaning else ""))
    else:
        _table(results)
    for name, result in results.items():
        if result.command:
            print(f"{name}: {result.command}")


def _table(results: dict[str, Result]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What this machine can run")
    for column in ("", "state", "found", "what it means"):
        table.add_column(column, overflow="fold")
    colors = {"ok": "green", "note": "yellow", "missing": "red"}
    for name, result in results.items():
        table.add_row(name, Text(result.state, colors[result.state]), Text(result.found), Text(result.meaning))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--calibrate", nargs="?", const="runs/calibration.json", metavar="FILE", type=Path,
        help="measure the rates that a dry run's plan counts with (two minutes), into FILE (runs/calibration.json)",
    )
    parser.add_argument("--site", action="store_true", help="print a draft of this site's settings, for config/cluster")
    options = parser.parse_args()
    if options.site:
        from megatron_avatar import site

        site.show()
        return
    if options.calibrate is not None:
        from megatron_avatar.planning.calibrate import calibrate

        found = calibrate(Path(options.calibrate))
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(json.dumps(found, indent=None if options.json else 2))
            print(f"written to {options.calibrate}", file=sys.stderr)
        return
    print("looking at this machine: packages, GPUs, decoders ...", file=sys.stderr, flush=True)
    results = examine()
    if options.json:
        print(json.dumps({name: asdict(result) for name, result in results.items()}, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
