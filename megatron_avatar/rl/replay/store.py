"""Replay trajectories on disk: immutable, checksummed HDF5 shards, named by an index.

The index lives in a checkpoint and is the truth: a shard that no kept index names is garbage. It maps a
shard's file name to {"sha256", "rows" (in the file), "live" (serial -> mark)}; rows that are not live
belong to evicted trajectories. Shards are built and parsed in memory and moved as whole files, so HDF5
never opens one: no HDF5 file locks, which shared file systems lack, and a torn write never has a name.

A shard holds, for its n trajectories of T tokens and M bytes of strings in all, `rows` [n] (scalars),
`token_ids` [T] int32, `logprobs` [T] float32 and `meta` [M] (one JSON object a trajectory): reading takes
four bulk reads. Data-parallel ranks write shards side by side, one rank reads them for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from megatron_avatar.records import Completion, Trajectory

log = logging.getLogger(__name__)

Index = dict[str, dict[str, Any]]

ROWS_PER_SHARD = 256  # 4 MB of completions of 2,048 tokens: what a reader holds three times for a moment
MIN_ROWS_PER_SHARD = 64  # fewer are not worth a writer of their own
NAME_DIGITS = 16  # of its SHA-256 in a shard's name, so that it can be checked without an index
MIN_LIVE_SHARE = 0.5  # a shard with fewer live rows is compacted: its live rows are written anew

_ROW = np.dtype([
    ("serial", "<i8"), ("tokens", "<i8"), ("meta", "<i8"), ("step", "<i8"), ("policy_version", "<i8"),
    ("reward", "<f8"), ("kl_ref", "<f8"), ("finished", "?"),
])  # fmt: skip
TABLES = {"rows": _ROW, "token_ids": np.dtype(np.int32), "logprobs": np.dtype(np.float32), "meta": np.dtype(np.uint8)}


def write_shards(
    folder: Path, trajectories: Mapping[int, Trajectory], *, known: Index, writer: int = 0, writers: int = 1
) -> Index:
    """Write this writer's part of what the shards of `known` don't hold yet; returns its part of the index.

    `trajectories` maps serial number to trajectory (`ReplayBuffer.trajectories`); every writer passes the same ones,
    and the same `known`. The parts of all writers make the index of exactly `trajectories`. Shards of `known` without a
    live trajectory leave it; their files stay until `collect_garbage`, since an older checkpoint may name them. Raises
    OSError when the disk is full; nothing already written is touched.
    """
    marks = {serial: _mark(serial, trajectory) for serial, trajectory in trajectories.items()}
    kept: Index = {}
    stored: set[int] = set()
    for name, shard in known.items():
        live = {serial: mark for serial, mark in shard["live"].items() if marks.get(int(serial)) == mark}
        if live and len(live) >= MIN_LIVE_SHARE * shard["rows"]:
            kept[name] = {**shard, "live": live}
            stored.update(map(int, live))
    fresh = [serial for serial in trajectories if serial not in stored]
    size = min(max(-(-len(fresh) // writers), MIN_ROWS_PER_SHARD), ROWS_PER_SHARD)
    index = kept if writer == 0 else {}
    for start in range(writer * size, len(fresh), writers * size):
        serials = fresh[start : start + size]
        image = _encode({serial: trajectories[serial] for serial in serials})
        digest = hashlib.sha256(image).hexdigest()
        name = f"shard-{digest[:NAME_DIGITS]}.h5"
        _write_whole(folder, name, image)
        live = {str(serial): marks[serial] for serial in serials}
        index[name] = {"sha256": digest, "rows": len(serials), "live": live}
    return index


def read_shards(
    folder: Path, index: Index, *, share: Callable[[Callable[[], bytes | None]], bytes | None] = lambda read: read()
) -> tuple[dict[int, Trajectory], list[str]]:
    """Read the live trajectories of `index` by serial number, oldest first, and name damaged shards.

    A shard that is missing, altered or no shard is set aside as NAME.damaged, reported and left out: replay goes on
    with the rest.
    `share` may call `read` on one rank and pass what it returned to the others, so that the disk is read once.
    """
    found: dict[int, Trajectory] = {}
    damaged = []
    for name, shard in index.items():
        if Path(name).name != name:
            log.error("replay shard %s is left out: its name leads out of %s", name, folder)
            damaged.append(name)
            continue
        try:
            image = share(partial(_read_whole, folder / name, shard))
            if image is None:
                damaged.append(name)
            else:
                found.update(_decode(image, shard["live"]))
        except ValueError as error:  # on all ranks alike
            _set_aside(folder / name, str(error), len(shard["live"]))
            damaged.append(name)
    return {serial: found[serial] for serial in sorted(found)}, damaged


def damage(path: Path, sha256: str) -> str:
    """What is wrong with a shard, in words; empty for a sound one. `sha256` may be its first digits, as in its name."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error.strerror or str(error)
    return "" if found.startswith(sha256) else "its checksum is wrong"


def collect_garbage(folder: Path, kept_indices: Iterable[Index]) -> list[str]:
    """Remove shards that no kept index names, and what interrupted writes left; returns their names.

    To be called while nothing writes to `folder`. Damaged shards stay, for the user to look at.
    """
    kept = {name for index in kept_indices for name in index}
    unwanted = [path for path in sorted(folder.glob("shard-*.h5")) if path.name not in kept]
    removed = []
    for path in (*unwanted, *sorted(folder.glob(".shard-*.tmp"))):
        try:
            path.unlink(missing_ok=True)
            removed.append(path.name)
        except OSError as error:
            log.warning("%s can't be removed (%s): it takes up space", path, error.strerror)
    return removed


def _mark(serial: int, trajectory: Trajectory) -> str:
    """Tells a stored trajectory from another one that has its serial, say in a later stage's buffer."""
    t = trajectory
    numbers = np.array([serial, t.step, t.policy_version, len(t.completion), t.reward, t.kl_ref])
    names = json.dumps([t.sample_id, t.variant, t.stage, t.ref_id])
    return hashlib.blake2b(numbers.tobytes() + names.encode(), digest_size=8).hexdigest()


def _encode(trajectories: Mapping[int, Trajectory]) -> bytes:
    """The file image of a shard."""
    meta = [
        json.dumps({
            "sample_id": t.sample_id, "variant": t.variant, "ref_id": t.ref_id, "stage": t.stage, "text": t.text,
            "parts": {name: float(value) for name, value in t.parts.items()},
        }).encode()
        for t in trajectories.values()
    ]
    rows = np.array([
        (serial, len(t.completion), len(m), t.step, t.policy_version, t.reward, t.kl_ref, t.completion.finished)
        for (serial, t), m in zip(trajectories.items(), meta, strict=True)
    ], _ROW)
    completions = [t.completion for t in trajectories.values()]
    with h5py.File.in_memory() as file:
        file["rows"] = rows
        file["token_ids"] = np.concatenate([c.token_ids for c in completions]).astype(np.int32)
        file["logprobs"] = np.concatenate([c.logprobs for c in completions]).astype(np.float32)
        file["meta"] = np.frombuffer(b"".join(meta), np.uint8)
        file.flush()
        return file.id.get_file_image()


def read_tables(image: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytes]:
    """A shard's rows [n], token_ids [T] int32, logprobs [T] float32 and meta. ValueError for any other content.

    The file may be foreign: what lies outside of it is not followed, and nothing is allocated whose bytes aren't there.
    """
    try:
        with h5py.File.in_memory(image) as file:
            rows, token_ids, logprobs, meta = (_table(file, name, dtype) for name, dtype in TABLES.items())
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # as HDF5 and h5py raise on damaged files
        raise ValueError(f"it is no shard ({type(error).__name__}: {error})") from None
    sizes = {"tokens": len(token_ids), "meta": len(meta)}
    if len(token_ids) != len(logprobs) or any(
        (rows[name] < 0).any() or sum(rows[name].tolist()) != size for name, size in sizes.items()
    ):
        raise ValueError("its rows don't add up to its tokens and texts")
    return rows, token_ids, logprobs, meta.tobytes()


def _table(file: h5py.File, name: str, dtype: np.dtype) -> np.ndarray:
    """One dataset of the file itself, whole in it as it was written."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise ValueError(f"its {name} is no dataset of its own")
    table = file[name]
    if table.ndim != 1 or table.dtype != dtype or table.external is not None or table.is_virtual:
        raise ValueError(f"its {name} is not what a shard holds")
    if table.id.get_storage_size() != table.size * dtype.itemsize:
        raise ValueError(f"its {name} declares {table.size} values, whose bytes it doesn't hold")
    return table[:]


def _decode(image: bytes, live: Mapping[str, str]) -> dict[int, Trajectory]:
    """The live trajectories of a shard's file image, by serial number. ValueError where it doesn't hold them."""
    rows, token_ids, logprobs, meta = read_tables(image)
    trajectories = {}
    token_end = meta_end = 0
    for serial, tokens, meta_bytes, step, version, reward, kl_ref, finished in rows.tolist():
        token_start, meta_start = token_end, meta_end
        token_end, meta_end = token_start + tokens, meta_start + meta_bytes
        if str(serial) not in live:
            continue
        # Copies: a view would keep the whole shard in memory for one survivor.
        completion = Completion(
            token_ids=token_ids[token_start:token_end].copy(),
            logprobs=logprobs[token_start:token_end].copy(),
            finished=finished,
        )
        try:
            about = json.loads(meta[meta_start:meta_end])
            trajectories[serial] = Trajectory(
                completion=completion, reward=reward, kl_ref=kl_ref, step=step, policy_version=version, **about
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"row {serial} can't be read ({type(error).__name__}: {error})") from None
    if trajectories.keys() != set(map(int, live)):
        raise ValueError("it doesn't hold the rows that the index names")
    return trajectories


def _read_whole(path: Path, shard: Mapping[str, Any]) -> bytes | None:
    """The file image of a shard; None, with the file set aside, where it is missing or altered."""
    if reason := damage(path, shard["sha256"]):
        _set_aside(path, reason, len(shard["live"]))
        return None
    return path.read_bytes()


def _set_aside(path: Path, reason: str, rows: int) -> None:
    with suppress(OSError):  # missing, or a read-only folder: the loss is logged either way
        path.rename(path.with_name(path.name + ".damaged"))
    log.error("replay shard %s is lost (%s): its %d trajectories are left out of the buffer; "
              "restore the file from a copy to have them back", path, reason, rows)


def _write_whole(folder: Path, name: str, image: bytes) -> None:
    """Write aside, fsync, rename: the name exists only with its whole content."""
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(
            error.errno,
            f"cannot write {len(image)} bytes of replay shards ({error.strerror}); earlier checkpoints are intact: "
            "make room, or correct output_dir's permissions, and run the same command again",
            str(folder / name),
        ) from error

