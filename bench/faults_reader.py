"""Reads a run's files with libraries alone, none of the code that wrote them: are two runs equal, is anything lost?"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import h5py
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def newest(run: Path) -> Path | None:
    """The visible checkpoint of the highest step."""
    return max(run.glob("checkpoints/step_*"), default=None)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trajectories(run: Path) -> tuple[int, int, dict[str, Any]]:
    """(named by the newest checkpoint, of those not readable, those readable by serial number)."""
    path = newest(run)
    if path is None:
        return 0, 0, {}
    named, found = 0, {}
    for name, shard in json.loads((path / "state.json").read_text()).get("replay", {}).items():
        named += len(shard["live"])
        file = run / "replay" / name
        if not file.exists() or sha256(file) != shard["sha256"]:
            continue
        with h5py.File(file, "r", locking=False) as shard_file:
            rows, ids, logprobs = shard_file["rows"][:], shard_file["token_ids"][:], shard_file["logprobs"][:]
            meta, token, byte = shard_file["meta"][:].tobytes(), 0, 0
        for row in rows:
            tokens, size = int(row["tokens"]), int(row["meta"])
            if str(row["serial"]) in shard["live"]:
                found[str(row["serial"])] = (row.tolist(), ids[token : token + tokens].tolist(),
                                             logprobs[token : token + tokens].tolist(), meta[byte : byte + size])
            token, byte = token + tokens, byte + size
    return named, named - len(found), found


def damage(run: Path) -> list[str]:
    """Files of the visible checkpoints that are not what their manifests say."""
    wrong = []
    for path in sorted(run.glob("checkpoints/step_*")):
        try:
            files = json.loads((path / "manifest.json").read_text())["files"]
        except (OSError, ValueError) as error:
            wrong.append(f"{path.name}: {error}")
            continue
        wrong += [f"{path.name}/{name}" for name, entry in files.items()
                  if not (path / name).exists() or sha256(path / name) != entry["sha256"]]
    return wrong


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ; times, memory and the packing of shards don't count."""
    found = []
    exports = [{p.relative_to(run): load_file(p) for p in sorted(run.glob("export/*/*.safetensors"))}
               for run in (one, other)]
    found += [f"export {name}" for name in _unequal(*exports)]
    paths = [newest(run) for run in (one, other)]
    if None in paths or paths[0].name != paths[1].name:
        return [*found, f"newest checkpoints {paths}"]
    found += [f"checkpoint {name}" for name in _unequal(*map(_tensors, paths))]
    generators = [torch.load(path / "rng.pt", weights_only=True) for path in paths]
    found += ["random generators"] * (not _equal(*generators))
    states = [json.loads((path / "state.json").read_text()) for path in paths]
    for state in states:
        state.pop("replay", None)
    found += [f"state {key}" for key in _unequal(*states)]
    contents = [trajectories(run)[2] for run in (one, other)]
    found += [f"trajectory {serial}" for serial in _unequal(*contents)]
    records = [_metrics(run) for run in (one, other)]
    steps = [r["step"] for r in records[1]]
    if steps != list(range(1, len(records[0]) + 1)):
        found.append(f"metrics have steps {steps}")
    found += [f"metrics of step {a['step']}" for a, b in zip(*records, strict=False) if a != b]
    return found


def _metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time") and k != "peak_rss_mib"}
            for line in lines]


def _tensors(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint: weights, moments, reference; put together by torch's own reader."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(path / "weights", whole)
        state = torch.load(whole, weights_only=True)
    common = torch.load(path / "weights" / "common.pt", weights_only=True)
    return {**state, "common": common}


def _unequal(one: dict, other: dict) -> list[str]:
    return [str(key) for key in sorted({*one, *other}, key=str)
            if key not in one or key not in other or not _equal(one[key], other[key])]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return not _unequal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and one == other
