"""The replay buffer's shards of one run: written by the data-parallel ranks side by side, read once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_avatar.policy.backend import Backend
from megatron_avatar.records import Trajectory
from megatron_avatar.resilience import checkpoint
from megatron_avatar.rl.replay.store import Index, collect_garbage, read_shards, write_shards

log = logging.getLogger(__name__)


class ReplayShards:
    """RUN/replay. `index` names what the newest checkpoint holds, `damaged` counts the shards lost so far."""

    def __init__(self, run_dir: Path, backend: Backend) -> None:
        self.index: Index = {}
        self.damaged = 0
        self._run_dir, self._folder, self._backend = run_dir, run_dir / "replay", backend

    def write(self, trajectories: dict[int, Trajectory]) -> Index:
        """Write what the shards don't hold yet; the new index. Collective; CheckpointError on all ranks if the disk
        fails one."""
        backend, part, reason = self._backend, {}, None
        if backend.tp_rank == backend.pp_rank == 0:
            try:
                part = write_shards(self._folder, trajectories, known=self.index, writer=backend.dp_rank,
                                    writers=backend.dp)
            except OSError as error:
                reason = str(error)
        parts = backend.all_gather_object((part, reason))
        if failed := [reason for _, reason in parts if reason]:
            raise checkpoint.CheckpointError(failed[0])
        self.index = {name: shard for part, _ in parts for name, shard in part.items()}
        return self.index

    def read(self, index: Index, damaged: int) -> dict[int, Trajectory]:
        """The trajectories that a checkpoint's index names; `damaged` shards were lost before. Collective."""

        def share(read: Callable[[], bytes | None]) -> bytes | None:
            return self._backend.broadcast_object(read() if self._backend.rank == 0 else None)

        trajectories, lost = read_shards(self._folder, index, share=share)
        self.index = {name: shard for name, shard in index.items() if name not in lost}
        self.damaged = damaged + len(lost)
        if lost and self._backend.rank == 0:
            log.error("replay shards %s are damaged and set aside: this run is no longer bit-equal", lost)
        return trajectories

    def collect_garbage(self) -> None:
        """Remove shards that no checkpoint names: of checkpoints that are gone, and of attempts that died. Rank 0 does
        it, while nothing is written."""
        if self._backend.rank == 0:
            collect_garbage(self._folder, [s.get("replay", {}) for s in checkpoint.all_states(self._run_dir)])
