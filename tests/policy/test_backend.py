"""Where ranks come from, and the CPU's answers to requests for CUDA. Several ranks: see test_parity."""

import os

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_avatar.config.schema import ParallelConfig
from megatron_avatar.policy import backend as backends

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_single_process_starts_and_starts_again():
    for seed in (0, 1):
        backend = backends.start(ParallelConfig(), seed=seed)
        assert (backend.world, backend.dp, backend.rank) == (1, 1, 0)
        assert backend.is_first_stage and backend.is_last_stage
        assert torch.get_num_threads() == 1 and os.environ["MKL_CBWR"]
        assert backend.all_gather_object({"a": 1}) == [{"a": 1}] == backend.all_gather_object_dp({"a": 1})
        assert backend.broadcast_from_last_stage("x") == "x"
        backends.stop()
        assert not torch.distributed.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_products_are_summed_in_float32():
    settings = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = [getattr(settings, name) for name in names]
    backends.sum_in_float32()
    assert [getattr(settings, name) for name in names] == [False, False]
    for name, value in zip(names, before, strict=True):
        setattr(settings, name, value)


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (0, 1)])
def test_layout_that_needs_other_processes_is_refused(tp, pp):
    with pytest.raises(ValueError, match=f"1 processes.*parallel.tp={tp} x parallel.pp={pp}"):
        backends.start(ParallelConfig(tp=tp, pp=pp))


def test_unresolvable_master_is_refused(monkeypatch):
    for name, value in zip(LAUNCHER, ("0", "2", "0", "no-such-host.invalid", "29500"), strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR='no-such-host.invalid'"):
        backends.start(ParallelConfig())


@pytest.mark.parametrize(
    "nodes, first", [("n1", "n1"), ("gpu-a[03-05,7],gpu-b1", "gpu-a03"), ("x-1,x-2", "x-1"), ("c[2,4]", "c2")]
)
def test_ranks_of_a_slurm_step(monkeypatch, nodes, first):
    step = dict(STEP_ID="0", PROCID="5", LOCALID="1", STEP_NUM_TASKS="8", STEP_NODELIST=nodes, JOB_ID="40123")
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # the function sets them; monkeypatch restores
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert backends._place_from_environment() == (5, 1, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "20123")


def test_batch_script_is_a_single_process(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert backends._place_from_environment() == (0, 0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine answers for itself")
def test_cpu_answers_for_cuda():
    backends.start(ParallelConfig())
    x = torch.zeros(2, device="cuda", pin_memory=True)
    assert x.device.type == "cpu" and x.to("cuda:0", torch.float64).device.type == "cpu" and x.cuda() is x
    assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.int64).dtype == torch.int64
    assert torch.empty(1, device=torch.cuda.current_device()).device == torch.device("cpu")
    assert torch.empty(1, device="meta").device.type == "meta" and x.to(torch.bfloat16).dtype == torch.bfloat16
    assert not torch.cuda.is_available(), "others still see the truth"
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)
    backends.stop()
