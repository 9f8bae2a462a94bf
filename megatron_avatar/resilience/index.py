"""A checkpoint's index of tensors, which torch pickles, read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

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
