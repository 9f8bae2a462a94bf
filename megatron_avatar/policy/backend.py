"""Process groups and devices: the only file that knows that Megatron-Core expects CUDA.

With GPUs a rank owns one of them and talks NCCL. Without, gloo carries the messages and Megatron's
requests for CUDA are answered by the CPU, so that every layout runs, and is tested, anywhere.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import re
import socket
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from megatron_avatar.config.schema import ParallelConfig
from megatron_avatar.config.world import in_step, place
from megatron_avatar.policy.devices import claim, own_device

# A rank that finished generation waits for the slowest one: longer than NCCL's default of 10 minutes.
TIMEOUT = timedelta(minutes=60)
# Sums in one order, whatever the alignment in memory, at full speed (COMPATIBLE would be 2.3 times slower).
MKL_REPRODUCIBLE = "AUTO,STRICT"
FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand rand_like randint randn "
    "randn_like randperm tensor zeros zeros_like"
).split()

_starts = itertools.count()


@dataclass(frozen=True)
class Backend:
    """Where this rank stands in the world of tp * pp * dp processes, and the collectives of training."""

    device: torch.device
    rank: int
    world: int
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    group: dist.ProcessGroup | None = None  # of messages between all ranks; None: the world

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        group = self.group or dist.group.WORLD
        assert group is not None, "start() comes first"
        return _gather_objects(value, group)

    def broadcast_object(self, value: Any) -> Any:
        """`value` of rank 0 on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, self.group or dist.group.WORLD)
        return box[0]

    def all_gather_object_dp(self, value: Any) -> list[Any]:
        """`value` of every data-parallel rank, in their order. Equal on all ranks of a replica if `value` is."""
        return _gather_objects(value, parallel_state.get_data_parallel_group())

    def broadcast_from_last_stage(self, value: Any) -> Any:
        """`value` of the last pipeline stage's first tensor rank, on every rank of the model replica.

        A tensor is filled in place and returned: every rank passes one of the same shape and dtype. Anything
        else travels pickled; what the other ranks pass is ignored.
        """
        if self.tp * self.pp == 1:
            return value
        group = parallel_state.get_model_parallel_group()
        source = dist.get_process_group_ranks(group)[-self.tp]
        if isinstance(value, torch.Tensor):
            dist.broadcast(value, source, group)
            return value
        box = [value]
        dist.broadcast_object_list(box, source, group)
        return box[0]

    def apart(self) -> Backend:
        """This place with a group of its own for messages between all ranks, through the hosts: for a second thread,
        whose messages must not mix with training's. Called by all ranks together."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def start(parallel: ParallelConfig, *, seed: int = 0) -> Backend:
    """Start the process groups and return this rank's place in them.

    Ranks come from torchrun's variables, from an `srun` step, or there is one process. Raises ValueError where
    the number of processes doesn't fit `parallel`, or the master's address can't be resolved.
    """
    # Megatron-Core calls collectives by names that torch has left behind; said once a rank, it would bury the log.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ.setdefault("MKL_CBWR", MKL_REPRODUCIBLE)  # read by MKL at its first call
    torch.set_num_threads(parallel.threads)
    if starts := next(_starts):  # circles keep an earlier policy's groups, and gloo's threads poll as long as they live
        gc.collect()
    rank, local_rank, world = _place_from_environment()
    if parallel.tp < 1 or parallel.pp < 1 or world % (parallel.tp * parallel.pp):
        raise ValueError(
            f"{world} processes don't split into parallel.tp={parallel.tp} x parallel.pp={parallel.pp}: "
            "start a multiple of tp * pp processes, or change parallel.tp and parallel.pp"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", own_device(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 0))))
        torch.cuda.set_device(device)
        sum_in_float32()
    else:
        redirect_cuda_to_cpu()
        device = torch.device("cpu")

    backend = "nccl" if device.type == "cuda" else "gloo"
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        _check_master()
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))
        store = dist.PrefixStore(f"start_{starts}", store)  # apart from the addresses of an earlier start
        if device.type == "cuda":
            claim(device.index, rank, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    if parallel.pp > 1:  # NCCL wants all ranks at a group's first call; not every tick of generation sends everywhere
        dist.all_reduce(torch.zeros(1, device=device), group=parallel_state.get_pipeline_model_parallel_group())
    torch.manual_seed(seed)
    megatron_random.model_parallel_cuda_manual_seed(seed)
    return Backend(
        device=device,
        rank=rank,
        world=world,
        tp=parallel.tp,
        pp=parallel.pp,
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
    )


def sum_in_float32() -> None:
    """Parts of a product along its inner axis, which cuBLAS would sum in half precision: that overflows float16, and
    where it splits depends on the shape, so generation and training would differ."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def stop() -> None:
    """Leave the process groups. `start` may be called again afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _place_from_environment() -> tuple[int, int, int]:
    """`place`; inside an `srun` step also sets MASTER_ADDR and MASTER_PORT if missing."""
    env = os.environ
    if in_step():
        host = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
        assert host is not None, env["SLURM_STEP_NODELIST"]
        env.setdefault("MASTER_ADDR", host[1] + (host[2] or ""))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    return place()


def _check_master() -> None:
    """An address that doesn't resolve would hang torch's rendezvous for minutes."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        socket.getaddrinfo(address or None, int(port))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MASTER_ADDR={address!r} MASTER_PORT={port!r} can't be used to meet the other ranks ({error}): "
            "export the first node's name or IP address and a free port"
        ) from error


# ----------------------------------------------------------------------------------------------------------------
# Megatron-Core without CUDA


def redirect_cuda_to_cpu() -> None:
    """Let the CPU answer requests for CUDA, process-wide; does nothing where CUDA is available, or when repeated.

    The functions themselves are replaced: a TorchFunctionMode is off inside backward(), where recomputation runs.
    """
    if torch.cuda.is_available() or getattr(redirect_cuda_to_cpu, "done", False):
        return
    setattr(redirect_cuda_to_cpu, "done", True)  # noqa: B010  (a function's own attribute has no type)
    with torch.device("cpu"):  # `with torch.device(...)` remembers the factories of its first use: the real ones
        torch.empty(0)

    for name in FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type
    tensor: Any = torch.Tensor  # whose methods are replaced
    tensor.to = lambda self, *args, **kwargs: tensor_to(
        self, *map(_cpu_if_cuda, args), **{key: _cpu_if_cuda(value) for key, value in kwargs.items()}
    )
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self

    def type_name_of_cuda(self, *args, **kwargs):  # Megatron's optimizer and clipping compare these names
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    tensor.type = type_name_of_cuda

    def get_rng_state(device=None, clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set_rng_state(new_state, device=None, graph_safe=False):
        torch.set_rng_state(new_state)

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state
    megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state = get_rng_state, set_rng_state


def _cpu_if_cuda(value: Any) -> Any:
    """The string "cpu" for a CUDA device in any spelling; every other argument as it is."""
    if isinstance(value, torch.device):
        return "cpu" if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def _factory_on_cpu(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _cpu_if_cuda(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu
