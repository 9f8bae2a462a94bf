"""What a checkpoint's tensors are, read without running code before anything is loaded: torch pickles its index."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_avatar.policy.backend import Backend

WEIGHTS = "weights"  # the folder of tensors in a checkpoint's
MAIN = "optimizer.state.fp32_param."  # Megatron-Core's name of float32 main weights

INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"PosixPath"},
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or used; the message names the folder and the remedy."""


def refuse_code(path: Path) -> set[str]:
    """The names of the checkpoint's tensors; CheckpointError where its files would run code.

    torch unpickles its index without restriction, and Megatron its common state as the environment says: both are read
    with care here first.
    """
    try:
        name = ".metadata"
        names = read_index(path / WEIGHTS / name)
        name = "common.pt"
        torch.load(path / WEIGHTS / name, map_location="cpu", weights_only=True)  # AdamW's step was saved on a GPU
        return names
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path / WEIGHTS / name} could run code on loading ({error}): it was not written by this program; use "
            "another checkpoint"
        ) from error


def check_main_weights(path: Path, saved: set[str], wanted: set[str], backend: Backend) -> None:
    """CheckpointError where the checkpoint's float32 main weights aren't those that the run goes on with."""
    saved, wanted = ({n for n in names if n.startswith(MAIN)} for names in (saved, wanted))
    wanted = wanted.union(*backend.all_gather_object(wanted))  # of all pipeline stages
    remedy = (f"or make a folder of it (python -m megatron_avatar.export {path.parents[1]} out=FOLDER step="
              f"{int(path.name.removeprefix('step_'))}) and start a run of its own there, with model.path=FOLDER")
    if missing := sorted(wanted - saved):
        raise CheckpointError(
            f"the checkpoint {path} has no float32 main weights for {len(missing)} of the tensors that half "
            f"precision trains ({missing[0].removeprefix(MAIN)}, …): it was saved with model.dtype=float32, or without "
            f"training these. Go on with the model.dtype and the stages (train_towers) that it was saved with, {remedy}"
        )
    if dropped := sorted(saved - wanted):
        raise CheckpointError(
            f"the checkpoint {path} has float32 main weights beside half-precision ones "
            f"({dropped[0].removeprefix(MAIN)}, …) that the run's settings would leave behind. Go on with "
            f"the model.dtype and the stages (train_towers) that it was saved with, {remedy}"
        )


def read_index(path: Path) -> set[str]:
    """The names of the tensors that `path` (weights/.metadata) lists. Raises UnpicklingError where it asks for anything
    but torch's own records."""
    with open(path, "rb") as file:
        return set(_IndexUnpickler(file).load().state_dict_metadata)


def _memory_format(owner: Any, name: Any) -> Any:
    """What `getattr` may do in an index: Python 3.11.2 pickles an enumeration's member as getattr(class, name)."""
    if owner is not _MEM_FORMAT_ENCODING or name not in owner.__members__:
        raise pickle.UnpicklingError(f"it asks for builtins.getattr({owner!r}, {name!r})")
    return owner[name]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
