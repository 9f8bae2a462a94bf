"""Folders of safetensors files as Hugging Face writes them, read and written one tensor at a time.

A file is never held in memory: reading maps one tensor, writing puts each tensor at its place in a file whose header
was written first. The header is documented at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """Where a tensor lies and what it is."""

    file: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a Hugging Face folder by name, read on demand. Raises ValueError that names the file at fault."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        where = self._weight_map()
        for file in sorted(set(where.values())) or [WHOLE]:
            self._list(file)
        absent = [name for name in where if name not in self.entries]
        if absent:
            path = self.folder / where[absent[0]]
            raise ValueError(f"{path} lacks {absent[0]}, which {INDEX} names: download or export the folder again")

    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file; empty where one file holds all of them."""
        index = self.folder / INDEX
        if (self.folder / WHOLE).is_file():  # before an index, like transformers
            return {}
        if not index.is_file():
            raise ValueError(
                f"{self.folder} has neither {WHOLE} nor {INDEX}: model.path needs weights as safetensors; download or "
                "export it again"
            )
        try:
            where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            strangers = [file for file in where.values() if Path(file).name != file]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} can't be read ({error!r}): download or export it again") from None
        if strangers:
            raise ValueError(f"{index} names {strangers[0]!r}, which is no file of this folder: download it again")
        return where

    def _list(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{path} doesn't exist, but {INDEX} names it: download or export the folder again")
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    self.entries[name] = Entry(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} can't be read ({error}): it is damaged or half written; download or export it again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that is mapped, not read: its pages come in where they are used, and go with it."""
        path = self.folder / self.entries[name].file
        try:
            with safe_open(path, framework="pt") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} can't be read ({error}): it changed while it was in use") from error


class SafetensorsWriter:
    """New files in `folder`, whose tensors are listed beforehand and then written one by one in any order."""

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}  # descriptor, offset
        self._files = {file: self._begin(file) for file in sorted({entry.file for entry in entries.values()})}

    def _begin(self, file: str) -> int:
        """Write the header of a file and return its descriptor."""
        own = {name: entry for name, entry in self.entries.items() if entry.file == file}
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in sorted(own, key=lambda name: (-own[name].dtype.itemsize, name)):  # wide types first: all aligned
            entry, offsets[name] = own[name], end
            end += entry.nbytes
            dtype = next(key for key, value in DTYPES.items() if value == entry.dtype)
            header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _write_at(descriptor, len(text).to_bytes(8, "little") + text, 0)
        self._places |= {name: (descriptor, 8 + len(text) + begin) for name, begin in offsets.items()}
        return descriptor

    def write(self, name: str, tensor: Tensor) -> None:
        entry = self.entries[name]
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), f"{name} is not what was listed"
        descriptor, offset = self._places.pop(name)
        _write_at(descriptor, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, offset)

    def finish(self) -> None:
        """Flush the files to the disk."""
        assert not self._places, f"never written: {', '.join(self._places)}"
        for descriptor in self._files.values():
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def write_index(folder: Path, entries: dict[str, Entry]) -> None:
    """Say which file of the folder holds which tensor."""
    weight_map = {name: entry.file for name, entry in sorted(entries.items())}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
