"""Before training starts: does every node have what the job needs? One task a rank, under a minute, naming the node.

    srun python -m slurm.preflight RUN GPUS_A_NODE

Every rank looks at its own node (GPUs, the master's name, free space, clock, shared folder), then all of them sum a
number over the same network as training. Exit status 2 where anything is wrong.
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

from megatron_avatar.resilience.ended import leave_on_signals

DEADLINE_S = 40
SKEW_S = 5.0
FREE_BYTES = 2**30
MARK = ".preflight"


def own_node(gpus: int, run: Path) -> list[str]:
    """What is wrong with this node, seen from it alone."""
    import torch

    problems = []
    found = torch.cuda.device_count()
    if found < gpus:
        problems.append(f"{found} GPUs are visible, {gpus} processes need one each: check nvidia-smi, and that the job "
                        "asked for --gpus-per-node")  # fmt: skip
    for folder in (run, Path(tempfile.gettempdir())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if (free := shutil.disk_usage(there).free) < FREE_BYTES:
            problems.append(f"{there} has {free / 2**20:.0f} MiB free, below {FREE_BYTES / 2**20:.0f}: make room there")
    return problems


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


def main(run: Path, gpus: int) -> int:
    leave_on_signals()
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    host, address, port = socket.gethostname(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + DEADLINE_S
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        print(f"error: pre-flight on {host}: the first node's name, {address}, doesn't resolve ({error}): add it to "
              "DNS or /etc/hosts of this node", file=sys.stderr)  # fmt: skip
        return 2
    import torch
    import torch.distributed as dist

    try:
        store = dist.TCPStore(address, port, world, is_master=rank == 0, wait_for_workers=False,
                              timeout=timedelta(seconds=DEADLINE_S))  # fmt: skip
    except (RuntimeError, dist.DistError) as error:
        what = f"port {port} can't be opened" if rank == 0 else f"{address}:{port} can't be reached"
        print(f"error: pre-flight on {host}: {what} ({str(error).splitlines()[0]}): check firewalls between the nodes "
              "and what else listens there", file=sys.stderr)  # fmt: skip
        return 2
    token = secrets.token_hex(8)
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / MARK).write_text(token)
        store.set("token", token)
    problems = own_node(gpus, run)
    store.set(f"here {rank}", host)
    if missing := await_all(store, "here", world, end):
        if rank == 0:
            print(f"error: pre-flight: no answer within {DEADLINE_S} s from {missing}: look at these nodes, or leave "
                  "them out (sbatch --exclude)", file=sys.stderr)  # fmt: skip
            time.sleep(1)
        return 2
    if rank == 0:
        store.set("clock", str(time.time()))
    problems += skew(time.time() if rank == 0 else _time_of(store), float(store.get("clock")))
    problems += shared_folder(run, store.get("token").decode(), min(end, time.monotonic() + 10))
    try:
        cuda = gpus > 0 and not problems
        if cuda:
            torch.cuda.set_device(int(os.environ["SLURM_LOCALID"]))
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank,
                                world_size=world, timeout=timedelta(seconds=DEADLINE_S))  # fmt: skip
        total = torch.full((1 << 18,), float(rank), device="cuda" if cuda else "cpu")
        dist.all_reduce(total)
        if float(total[0]) != world * (world - 1) / 2:
            problems.append(f"an all-reduce gave {float(total[0])} instead of {world * (world - 1) / 2}")
    except (RuntimeError, dist.DistError) as error:
        problems.append(f"an all-reduce over all ranks failed: {str(error).splitlines()[0]}. NCCL_DEBUG=INFO says "
                        "more; NCCL's settings belong into cluster.env")  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    for problem in problems:
        print(f"error: pre-flight on {host}, rank {rank}: {problem}", file=sys.stderr)
    store.set(f"done {rank}", "bad" if problems else "good")
    late = await_all(store, "done", world, end + 10)
    bad = bool(late) or any(store.get(f"done {other}") == b"bad" for other in range(world))
    if rank == 0:
        (run / MARK).unlink(missing_ok=True)
        if not bad:
            print(f"pre-flight: {world} ranks, {gpus} GPUs a node, all-reduce good", file=sys.stderr)
    store.set(f"bye {rank}", "")
    if rank == 0:  # the others ask its store to the end
        await_all(store, "bye", world, time.monotonic() + 5)
    return 2 if bad else 0


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
    nodes = os.environ["AVATAR_NODES"].split()
    tasks = int(os.environ["SLURM_NTASKS_PER_NODE"].split("(")[0])
    return ", ".join(f"rank {rank} on {nodes[rank // tasks]}" for rank in sorted(waiting))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
