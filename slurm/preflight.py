"""Before training starts: does every node have what the job needs? One task a rank, naming the node.

    srun python -m slurm.preflight RUN GPUS_A_NODE FREE_GIB

All ranks meet and import torch, however long that takes (meeting.py). Then every rank looks at its own node (GPUs, free
space, clock, shared folder), and all of them sum a number over the same networks as training: NCCL's, and gloo's, which
checkpoints use. Exit status 1 where anything is wrong, within a minute and a half: on other nodes it may not be.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from megatron_avatar.resilience.ended import FAILED, leave_on_signals, tell
from slurm.meeting import Missing, meet

DEADLINE_S = 90  # once all have imported torch
LATER_S = 2.0  # than rank 0
SKEW_S = 5.0
FREE_BYTES = 2**30  # for the run's logs; space for checkpoints is looked at before
MARK = ".preflight"


def own_node(run: Path, tmp_bytes: float) -> list[str]:
    """What is wrong with this node's folders, seen from it alone."""
    problems = []
    for folder, least, remedy in ((run, FREE_BYTES, ""), (Path(tempfile.gettempdir()), tmp_bytes,
                                  ", set TMPDIR, or lower cluster.tmp_gib")):  # fmt: skip
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if (free := shutil.disk_usage(there).free) < least:
            problems.append(f"{there} has {free / 2**20:.0f} MiB free, below {least / 2**20:.0f}: make room "
                            f"there{remedy}")  # fmt: skip
    return problems


def own_gpu(rank: int, gpus: int, store) -> list[str]:
    """Take this rank's GPU; what is wrong with it."""
    import torch

    from megatron_avatar.policy.devices import claim, own_device

    try:
        device = own_device(int(os.environ["SLURM_LOCALID"]), gpus)
        torch.cuda.set_device(device)
        claim(device, rank, store)
    except (ValueError, RuntimeError) as error:
        return [str(error).splitlines()[0]]
    return []


def shared_folder(run: Path, token: str, deadline: float) -> list[str]:
    """Whether what rank 0 wrote into `run` can be read here; file systems may take seconds to show it."""
    path, seen = run / MARK, None
    while time.monotonic() < deadline:
        try:
            seen = path.read_text()
        except OSError as error:
            seen = error.strerror
        if seen == token:
            return []
        time.sleep(0.2)
    return [f"{path}, which rank 0 wrote, can't be read ({seen}): output_dir must lie on a file system that all nodes "
            "share"]  # fmt: skip


def skew(mine: float, first: float) -> list[str]:
    """Whether this node's clock and rank 0's, read at about the same moment, agree."""
    if abs(mine - first) <= SKEW_S:
        return []
    return [f"its clock is {abs(mine - first):.0f} s {'ahead of' if mine > first else 'behind'} the first node's: "
            "synchronise it (chrony, ntpd)"]  # fmt: skip


def networks(cuda: bool, rank: int, world: int, store) -> list[str]:
    """Sum a number over all ranks, on each network that training uses; what went wrong."""
    import torch
    import torch.distributed as dist

    problems, timeout = [], timedelta(seconds=DEADLINE_S)
    for backend in ("nccl", "gloo") if cuda else ("gloo",):
        more = "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        try:
            dist.init_process_group(backend, store=dist.PrefixStore(backend, store), rank=rank, world_size=world,
                                    timeout=timeout)  # fmt: skip
            total = torch.full((1 << 18,), float(rank), device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(total)
            if float(total[0]) != world * (world - 1) / 2:
                problems.append(f"{backend}: an all-reduce gave {float(total[0])} instead of {world * (world - 1) / 2}")
        except (RuntimeError, dist.DistError) as error:
            problems.append(f"an all-reduce over all ranks by {backend} failed: {str(error).splitlines()[0]}. {more} "
                            "and the like belong into cluster.env")  # fmt: skip
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return problems


def main(run: Path, gpus: int, tmp_gib: float) -> int:
    leave_on_signals()
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    host, address, port = socket.gethostname(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def refuse(problem: str, own: bool = True) -> int:
        """`own`: neither another rank's end nor a stop signal is behind it. Then it is told, as the ranks that srun
        stops tell that they were asked to leave."""
        print(f"error: pre-flight on {host}: {problem}", file=sys.stderr, flush=True)
        if own:
            tell(FAILED)
        return FAILED

    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        return refuse(f"the first node's name, {address}, doesn't resolve ({error}): add it to DNS or /etc/hosts of "
                      "this node, or correct cluster.master")  # fmt: skip
    try:
        meet(rank, world, address, port, os.environ["SLURM_JOB_ID"], _import_torch, where, refuse)
    except Missing:
        return FAILED
    except Exception as error:  # as many as there are ways to install torch
        return refuse(f"it can't begin ({type(error).__name__}: {error}). Where torch can't be imported, see "
                      "cluster.python, cluster.modules and the container")  # fmt: skip
    try:
        return _together(run, gpus, tmp_gib, rank, world)
    except OSError as error:  # of a folder
        return refuse(str(error))


def _import_torch() -> None:
    import torch.distributed  # noqa: F401


def _together(run: Path, gpus: int, tmp_gib: float, rank: int, world: int) -> int:
    """What is looked at once all are there; the same exit status on all ranks."""
    import torch.distributed as dist

    host, address, port = socket.gethostname(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + DEADLINE_S
    try:
        store = dist.TCPStore(address, port, world, is_master=rank == 0, wait_for_workers=False,
                              timeout=timedelta(seconds=DEADLINE_S))  # fmt: skip
    except (RuntimeError, dist.DistError) as error:
        print(f"error: pre-flight on {host}: torch can't meet at {address}:{port} ({str(error).splitlines()[0]})",
              file=sys.stderr, flush=True)  # fmt: skip
        if rank == 0:  # the others may miss it
            tell(FAILED)
        return FAILED
    token = secrets.token_hex(8)
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / MARK).write_text(token)
        store.set("token", token)
    problems = own_node(run, tmp_gib * 2**30) + (own_gpu(rank, gpus, store) if gpus else [])
    store.set(f"here {rank}", host)
    if missing := await_all(store, "here", world, end):
        if rank == 0:
            _late(missing)
        else:
            time.sleep(LATER_S)  # rank 0's words come first
        return FAILED
    if rank == 0:
        store.set("clock", str(time.time()))
    problems += skew(time.time() if rank == 0 else _time_of(store), float(store.get("clock")))
    problems += shared_folder(run, store.get("token").decode(), min(end, time.monotonic() + 10))
    if problems:
        tell(FAILED)
    store.set(f"fit {rank}", "bad" if problems else "good")
    late = await_all(store, "fit", world, end)
    if not late and all(store.get(f"fit {other}") == b"good" for other in range(world)):
        problems += networks(gpus > 0, rank, world, store)
    for problem in problems:
        print(f"error: pre-flight on {host}, rank {rank}: {problem}", file=sys.stderr, flush=True)
    store.set(f"done {rank}", "bad" if problems or late else "good")
    late = await_all(store, "done", world, end + 10) or late
    if late and rank == 0:
        _late(late)
    if problems and not late:  # all are here: a network's fault is no stopped rank's
        tell(FAILED)
    bad = bool(late) or any(store.get(f"done {other}") == b"bad" for other in range(world))
    if rank == 0:
        (run / MARK).unlink(missing_ok=True)
        if not bad:
            print(f"pre-flight: {world} ranks, {gpus} GPUs a node, all-reduce good over "
                  f"{'NCCL and gloo' if gpus else 'gloo'}", file=sys.stderr)  # fmt: skip
    store.set(f"bye {rank}", "")
    if rank == 0:  # the others ask its store to the end
        await_all(store, "bye", world, time.monotonic() + 5)
    return FAILED if bad else 0


def _late(ranks: str) -> None:
    print(f"error: pre-flight: no answer within {DEADLINE_S} s from {ranks}: look at these nodes, or leave them out "
          "(sbatch --exclude)", file=sys.stderr, flush=True)  # fmt: skip
    tell(FAILED)  # of a preempted one srun would have told within seconds


def _time_of(store) -> float:
    """This node's clock at the moment at which rank 0's is known."""
    store.wait(["clock"])
    return time.time()


def await_all(store, key: str, world: int, end: float) -> str:
    """Wait until every rank has set `key`; the ranks, with their nodes, that haven't by `end`."""
    waiting = set(range(world))
    while waiting and time.monotonic() < end:
        waiting = {rank for rank in waiting if not store.check([f"{key} {rank}"])}
        time.sleep(0.05)
    return ", ".join(where(rank) for rank in sorted(waiting))


def where(rank: int) -> str:
    """A rank and its node's name."""
    nodes = os.environ["AVATAR_NODES"].split()
    return f"rank {rank} on {nodes[rank // int(os.environ['SLURM_NTASKS_PER_NODE'])]}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
