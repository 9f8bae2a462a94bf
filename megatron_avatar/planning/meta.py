"""A rank of any layout in this one process, on the meta device: shapes without numbers, for plans.

The rank's policy is the real one, built and run by the code that trains. Its process groups answer without a message,
and the bytes that its tensors would take are counted while they live. Its linear layers are torch's; the
package's kernels count as they run on a GPU.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy.backend import Backend, redirect_cuda_to_cpu
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.model import OmniPolicy

META = torch.device("meta")


@contextmanager
def shard_on_meta(
    hf_folder: str, model: ModelConfig, parallel: ParallelConfig, tp_rank: int, pp_rank: int
) -> Iterator[OmniPolicy]:
    """The policy's shard of one rank of a tp x pp layout. Process groups must not be running.

    Raises ValueError where the model doesn't split into that layout.
    """
    redirect_cuda_to_cpu()
    tp, pp = parallel.tp, parallel.pp
    rank = pp_rank * tp + tp_rank
    cuda: Any = torch.cuda
    current_device = cuda.current_device
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
    try:
        parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
        megatron_random.model_parallel_cuda_manual_seed(0)
        cuda.current_device = lambda: META  # where Megatron-Core puts its buffers
        backend = Backend(META, rank, tp * pp, tp, pp, 1, tp_rank, pp_rank, 0)
        with META:
            policy = build_policy(hf_folder, backend, model, parallel)
        rotary = policy.language_model.rotary_pos_emb
        rotary.inv_freq = rotary.inv_freq.to(META)  # neither parameter nor buffer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Megatron-Core's names of collectives
            yield policy
    finally:
        cuda.current_device = current_device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on: `live` now, and `peak` since `peak` was set.

    Tensors from before don't count. A storage counts once, until its last view is gone, and as large as it is resized:
    what is computed again in the backward pass is dropped that way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            if storage._cdata in self._storages:
                self._grow(storage._cdata, size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        del torch.UntypedStorage.resize_  # StorageBase's own again
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= self._sizes.pop(key)

        self._storages[key], self._sizes[key] = weakref.ref(storage, gone), 0
        self._grow(key, storage.nbytes())

    def _grow(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)
