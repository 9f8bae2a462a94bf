"""Checkpoints: one directory a step, whole or absent, loadable on any tensor, pipeline and data-parallel layout.

    RUN/checkpoints/step_00000050/      and RUN/milestones/step_00000100/, with the weights alone
        weights/         Megatron-Core's torch_dist format: policy, optimizer, the stage's reference weights
        rng.pt           torch's random generators, a rank after the other
        state.json       everything else that continues a run
        manifest.json    size and SHA-256 of every other file, layout and versions

A save writes into a hidden folder, flushes it to the disk and renames it. Nothing that is read back can run code: JSON,
tensors (weights_only), and torch's index of them, a pickle whose classes are checked against a list first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_avatar.files import step_folders
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.weights import put_away
from megatron_avatar.resilience import room
from megatron_avatar.resilience.index import WEIGHTS, CheckpointError, check_main_weights, refuse_code

FORMAT = 4
HIDDEN = ".unfinished_"
CHECKPOINTS, MILESTONES = "checkpoints", "milestones"
STATE, GENERATORS, MANIFEST = "state.json", "rng.pt", "manifest.json"
POLICY = "policy."
CHUNK = 1 << 22


class Resumable(Protocol):
    """What a checkpoint asks of a stage's optimizer (training/optim.py)."""

    def sharded_state_dict(self, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# ----------------------------------------------------------------------------------------------------------------
# Saving


@dataclass
class Snapshot:
    """All that one rank contributes to a checkpoint. `copied`: training may go on while it is written; else its tensors
    are the run's own, and training waits."""

    step: int
    sharded: dict[str, Any]  # Megatron's description, its tensors on the host where they are copied
    common: bytes
    generators: dict[str, Any]  # of this rank
    state: dict[str, Any]
    copied: bool

    @property
    def size(self) -> int:
        """Bytes of the tensors that this rank writes."""
        return _own_bytes(self.sharded)

    def weights(self) -> Snapshot:
        """The policy's weights of it alone."""
        return replace(self, sharded={"policy": self.sharded["policy"]})


def take(
    step: int,
    *,
    policy: nn.Module,
    optimization: Resumable,
    reference: dict[str, Tensor] | None,
    state: dict[str, Any],
    backend: Backend,
) -> Snapshot:
    """Everything that continues the run after global step `step`; called by all ranks alike. It is copied to the host
    where every node has memory for that.

    `reference` maps names of `policy.named_parameters()` to this rank's tensors of the same shapes. `state` must
    survive JSON; rank 0's is written.
    """
    sharded, common = save_preprocess(_sharded_state(policy, optimization, reference, loading=False))
    copied = room.enough(_own_bytes(sharded), backend)
    for shard in nested_values(sharded) if copied else ():
        if is_main_replica(shard.replica_id):
            shard.data = shard.data.detach().to("cpu", copy=True)
    state = json.loads(json.dumps(state)) if backend.rank == 0 else {}
    return Snapshot(step, sharded, _serialise(common), _generators(), state, copied)


def _own_bytes(sharded: dict[str, Any]) -> int:
    return sum(t.data.nbytes for t in nested_values(sharded) if is_main_replica(t.replica_id))


def save(
    run_dir: Path,
    step: int,
    *,
    policy: nn.Module,
    optimization: Resumable,
    reference: dict[str, Tensor] | None,
    state: dict[str, Any],
    backend: Backend,
    keep: int,
    milestones: Collection[int] = (),
) -> Path:
    """`take` and `write` at once."""
    taken = take(step, policy=policy, optimization=optimization, reference=reference, state=state, backend=backend)
    return write(run_dir, taken, backend=backend, keep=keep, milestones=milestones)


def write(
    run_dir: Path, snapshot: Snapshot, *, backend: Backend, keep: int, milestones: Collection[int] = ()
) -> Path:
    """Write a checkpoint and make it visible; called by all ranks, each with its own snapshot of the step.

    From a second thread with `backend.apart()`. Afterwards the newest `keep` checkpoints remain, and the weights of
    every one of `milestones`, in a folder of their own. Raises CheckpointError where the disk refuses, with every
    earlier checkpoint untouched.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.keep={keep}: keep at least one checkpoint")
    if snapshot.step in milestones:  # first: a checkpoint that is there has its milestone
        _write_folder(Path(run_dir) / MILESTONES, snapshot.weights(), backend, lambda root: None)
    return _write_folder(Path(run_dir) / CHECKPOINTS, snapshot, backend,
                         lambda root: _prune(root, snapshot.step, keep, milestones))  # fmt: skip


def _write_folder(root: Path, snapshot: Snapshot, backend: Backend, behind: Callable[[Path], None]) -> Path:
    """Write a snapshot below `root` and make it visible; rank 0 then calls `behind`."""
    final = root / f"step_{snapshot.step:08d}"
    working = root / f"{HIDDEN}{final.name}"

    def prepare() -> None:
        if backend.rank == 0:
            for leftover in root.glob(f"{HIDDEN}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if working.exists():
                put_away(working)
            (working / WEIGHTS).mkdir(parents=True)
            _write(working / STATE, json.dumps(snapshot.state).encode())
            _write(working / GENERATORS, _serialise(generators))
            _write(working / WEIGHTS / "common.pt", snapshot.common)
            header = asdict(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1))
            _write(working / WEIGHTS / "metadata.json", json.dumps(header).encode())

    def describe() -> dict[str, dict[str, Any]]:
        return {str(path.relative_to(working)): _measure(path) for path in _own_files(working, backend.rank)}

    def publish() -> None:
        if backend.rank == 0:
            manifest = {
                "format": FORMAT,
                "step": snapshot.step,
                "layout": {"tp": backend.tp, "pp": backend.pp, "dp": backend.dp},
                "versions": _versions(),
                "files": {name: entry for part in files for name, entry in sorted(part.items())},
            }
            _write(working / MANIFEST, json.dumps(manifest, indent=1).encode())
            for folder in (working / WEIGHTS, working):
                _flush_folder(folder)
            _publish(working, final)
            behind(root)

    size, generators = snapshot.size, backend.all_gather_object(snapshot.generators)
    _on_all_ranks(prepare, backend, final, size)
    _on_all_ranks(lambda: _write_sharded(snapshot.sharded, working / WEIGHTS, backend), backend, final, size)
    files = _on_all_ranks(describe, backend, final, size)
    _on_all_ranks(publish, backend, final, size)
    return final


def _publish(working: Path, final: Path) -> None:
    """Give a finished checkpoint its name: the one moment at which it comes to be."""
    if final.exists():  # damaged, or abandoned by a run that went back further
        _discard(final)
    working.rename(final)
    _flush_folder(final.parent)


def _on_all_ranks(action: Callable[[], Any], backend: Backend, final: Path, size: int) -> list[Any]:
    """What `action` returned on every rank; CheckpointError on all of them if the disk failed one."""
    result, error = None, None
    try:
        result = action()
    except (OSError, RuntimeError, CheckpointException) as failure:
        error = failure
    outcomes = backend.all_gather_object((result, _reason(error) if error else None, size))
    reasons = [reason for _, reason, _ in outcomes if reason]
    if not reasons:
        return [value for value, _, _ in outcomes]
    free = shutil.disk_usage(next(folder for folder in final.parents if folder.exists())).free
    if backend.rank == 0:
        for leftover in final.parent.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    raise CheckpointError(
        f"the checkpoint {final} could not be written: it takes {sum(n for *_, n in outcomes) / 2**20:.1f} MiB and its "
        f"disk has {free / 2**20:.1f} MiB free. Free space or raise the quota there, or lower checkpoint.keep, and run "
        f"the same command again: it continues from the previous checkpoint, which is untouched. Reported: {reasons[0]}"
    ) from error


def _sharded_state(
    policy: nn.Module, optimization: Resumable | None, reference: dict[str, Tensor] | None, *, loading: bool
) -> dict[str, Any]:
    """Megatron's description of this rank's tensors and their place in the whole."""
    # Extra states are objects, hold nothing without FP8, and would be unpickled on loading.
    _, weights = extract_matching_values(
        policy.sharded_state_dict(prefix=POLICY),  # type: ignore[operator]  # a method of Megatron-Core's modules
        lambda value: isinstance(value, ShardedObject)
    )
    state: dict[str, Any] = {"policy": weights}
    if optimization is not None:
        state["optimization"] = optimization.sharded_state_dict(weights, loading=loading)
    if reference is not None:
        by_parameter = {id(shard.data): shard for shard in weights.values()}
        state["reference"] = {
            name: make_sharded_optimizer_tensor(by_parameter[id(parameter)], reference[name], "reference")
            for name, parameter in policy.named_parameters()
            if name in reference
        }
        assert len(state["reference"]) == len(reference), "the reference has names that the policy lacks"
    return state


def _write_sharded(sharded: dict[str, Any], folder: Path, backend: Backend) -> None:
    """Megatron's torch_dist format written by this process: Megatron's own writer starts helpers that import the entry
    script anew, 10 s a save."""
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's ShardedTensor, which Megatron builds
        torch_checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(by_key),
            storage_writer=torch_checkpoint.FileSystemWriter(folder),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=backend.group,
        )


def _own_files(working: Path, rank: int) -> list[Path]:
    """The files whose checksums this rank computes: those it wrote; rank 0 also takes what is written once."""
    own = list((working / WEIGHTS).glob(f"__{rank}_*"))
    if rank == 0:
        own += [working / STATE, working / GENERATORS]
        own += [working / WEIGHTS / name for name in (".metadata", "common.pt", "metadata.json")]
    return own


def _prune(root: Path, step: int, keep: int, milestones: Collection[int]) -> None:
    """Keep the newest `keep`, and milestones that have no folder of their own yet (as earlier versions wrote them);
    later steps than this one belong to an abandoned continuation."""
    steps, apart = step_folders(root), step_folders(root.parent / MILESTONES)
    kept = {*[s for s in sorted(steps) if s <= step][-keep:], *(s for s in milestones if s <= step and s not in apart)}
    for number, path in [*steps.items(), *((s, path) for s, path in apart.items() if s > step)]:
        if number not in kept:
            try:
                _discard(path)
            except OSError as error:
                _say(f"warning: the old checkpoint {path} can't be removed ({error.strerror}): it takes up space")


def _discard(path: Path) -> None:
    """Remove a checkpoint; where the file system keeps a part of it, that stays hidden and is said."""
    if problem := put_away(path):
        _say(f"warning: of the old checkpoint {path} something can't be removed ({problem.strerror}) and takes up "
             f"space in {path.parent}, under a hidden name")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Finding and loading


def latest(run_dir: Path, backend: Backend) -> Path | None:
    """The newest intact checkpoint, the same on all ranks; None where the run has none yet.

    Every file's size and checksum is verified, the work shared among the ranks. A damaged checkpoint is named on
    stderr and the one before it is tried; CheckpointError if all are damaged. Nothing is changed on the disk.
    """
    root = Path(run_dir) / CHECKPOINTS
    steps = backend.all_gather_object(step_folders(root))[0]
    for step in sorted(steps, reverse=True):
        damage = [d for part in backend.all_gather_object(_damage(steps[step], backend)) for d in part]
        if not damage:
            return steps[step]
        if backend.rank == 0:
            _say(f"DAMAGED CHECKPOINT {steps[step]} is passed over: {'; '.join(damage)}")
    if steps:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged (see above): restore one from a copy, or remove that folder to "
            "start over"
        )
    return None


def find(run_dir: Path, step: int | None, backend: Backend) -> Path:
    """The intact checkpoint or milestone of global step `step`, or without one the newest; the same on all ranks.

    Raises ValueError naming the steps that are there where that one isn't, CheckpointError where it is damaged.
    """
    run_dir = Path(run_dir)
    own = step_folders(run_dir / MILESTONES), step_folders(run_dir / CHECKPOINTS)
    milestones, whole = backend.all_gather_object(own)[0]
    steps = milestones | whole
    if step is None:
        if whole and (newest := latest(run_dir, backend)):
            return newest
        step = max(milestones, default=None)
    if step not in steps:
        there = f"there are steps {', '.join(map(str, sorted(steps)))}" if steps else "the run has none"
        if exports := sorted(path.parent.name for path in run_dir.glob("export/*/config.json")):
            there += f"; {run_dir / 'export'} has the weights after {', '.join(exports)}"
        raise ValueError(f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}: {there}")
    damage = [d for part in backend.all_gather_object(_damage(steps[step], backend)) for d in part]
    if damage:
        raise CheckpointError(f"the checkpoint {steps[step]} is damaged ({'; '.join(damage)}): use another step")
    return steps[step]


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state alone: what must be known (the stage) before policy and optimizer are built."""
    return json.loads((path / STATE).read_text())


def drop(run_dir: Path) -> None:
    """Delete a finished run's checkpoints; its milestones and exports stay. Called by rank 0 alone."""
    for path in step_folders(Path(run_dir) / CHECKPOINTS).values():
        _discard(path)


def all_states(run_dir: Path) -> list[dict[str, Any]]:
    """The readable states of the checkpoints that are there, oldest first; empty where there is none."""
    states = []
    for path in step_folders(Path(run_dir) / CHECKPOINTS).values():
        try:
            states.append(read_state(path))
        except (OSError, ValueError) as error:
            _say(f"{path / STATE} can't be read ({error}): what it names is not kept for it")
    return states


def load(
    path: Path,
    *,
    policy: nn.Module,
    optimization: Resumable | None,
    reference: dict[str, Tensor] | None,
    backend: Backend,
) -> dict[str, Any]:
    """Fill policy, optimizer and reference in place from a checkpoint of any layout; returns the saved `state`.

    What is passed as None is not loaded. The random generators are restored where the layout is the saved one.
    Raises CheckpointError where tensors don't fit the model, or the files would run code.
    """
    names = refuse_code(path)
    wanted = _sharded_state(policy, optimization, reference, loading=True)
    if optimization is not None:
        asked = {shard.key for shard in nested_values(wanted) if isinstance(shard, ShardedBase)}
        check_main_weights(path, names, asked, backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(wanted, str(path / WEIGHTS))
    except (CheckpointException, CheckpointingException, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {path} doesn't fit this model: {_reason(error)}. Use the model.path and the stages "
            "(train_towers) that it was saved with"
        ) from error
    own = policy.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in loaded["policy"].items():
            own[name.removeprefix(POLICY)].copy_(tensor)
        for name, tensor in (reference or {}).items():
            tensor.copy_(loaded["reference"][name])
    if optimization is not None:
        optimization.load_state_dict(loaded["optimization"])
    _restore_generators(path, backend)
    return read_state(path)


def _damage(path: Path, backend: Backend) -> list[str]:
    """What is wrong with the files that this rank checks; rank 0 also reports an unreadable manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = sorted(manifest["files"].items())
        if manifest["format"] != FORMAT:
            return (backend.rank == 0) * [
                f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}: go on with the version that "
                "wrote it, or export it there and start a run from that folder"
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} can't be read ({error})"] * (backend.rank == 0)
    damage = []
    for name, entry in files[backend.rank :: backend.world]:
        try:
            found = _measure(path / name)
        except OSError as error:
            damage.append(f"{name} can't be read ({error.strerror})")
            continue
        if found["bytes"] != entry["bytes"]:
            damage.append(f"{name} has {found['bytes']} bytes instead of {entry['bytes']}")
        elif found["sha256"] != entry["sha256"]:
            damage.append(f"{name} has other contents than were written")
    return damage


def _reason(error: BaseException) -> str:
    """One line; torch's CheckpointException holds the ranks' own errors."""
    failures = getattr(error, "failures", None)
    error = next(iter(failures.values()))[0] if failures else error
    return f"{type(error).__name__}: {str(error)[:300]}".splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------
# Files and generators


def _serialise(value: Any) -> bytes:
    buffer = io.BytesIO()  # torch.save on a file hides the disk's error
    torch.save(value, buffer)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _measure(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "megatron-core", "numpy")}}


def _generators() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_generators(path: Path, backend: Backend) -> None:
    saved, now = json.loads((path / MANIFEST).read_text()), {"tp": backend.tp, "pp": backend.pp, "dp": backend.dp}
    if backend.rank == 0 and saved["versions"] != _versions():
        _say(f"{path} was saved with {saved['versions']}, now {_versions()}: results may differ in the last bits")
    if saved["layout"] != now:
        if backend.rank == 0:
            _say(f"{path} was saved on the layout {saved['layout']}, now {now}: random generators start afresh")
        return
    state = torch.load(path / GENERATORS, weights_only=True)[backend.rank]
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
