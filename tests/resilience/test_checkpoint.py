"""Checkpoints: bit-exact, whole or absent, verified before use, free of code, loadable on other layouts."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_avatar.config.schema import OptimConfig, ParallelConfig
from megatron_avatar.policy.backend import Backend
from megatron_avatar.resilience import checkpoint, room
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import thinker_logits, tiny_completions, tiny_config, tiny_prompts, tiny_thinker
from tests.ranks import launch
from tests.training.gpt import build_gpt, train_step


@dataclass
class Trainer:
    """A policy in training and its reference, as the loop holds them."""

    backend: Backend
    seed: int = 0
    hidden: int = 32
    layers: int = 2
    dtype: torch.dtype = torch.float32
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.1))
    lr: float = 1e-2

    def __post_init__(self) -> None:
        self.policy = build_gpt(
            self.backend, hidden=self.hidden, layers=self.layers, seed=self.seed, dtype=self.dtype
        )
        self.reference = {name: p.detach().clone() for name, p in self.policy.named_parameters()}
        self.optimization = build_optimizer(
            self.policy, self.optim, lr=self.lr, total_steps=20, parallel=self.parallel
        )

    def train(self, first: int, last: int) -> list[float]:
        return [train_step(self.optimization, step)[0] for step in range(first, last)]

    def save(self, run: Path, step: int, *, keep: int = 2, milestones=(), **state) -> Path:
        return checkpoint.save(
            run, step, policy=self.policy, optimization=self.optimization, reference=self.reference, state=state,
            backend=self.backend, keep=keep, milestones=milestones,
        )

    def load(self, path: Path) -> dict:
        return checkpoint.load(
            path, policy=self.policy, optimization=self.optimization, reference=self.reference, backend=self.backend
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        adamw = self.optimization._optimizer.optimizer
        found = {f"reference.{name}": value for name, value in self.reference.items()}
        for name, parameter in self.policy.named_parameters():
            found[name] = parameter
            main = getattr(parameter, "main_param", parameter)  # bf16 weights have a master copy
            found |= {f"{key}.{name}": value for key, value in adamw.state.get(main, {}).items()}
            found[f"main.{name}"] = main
        if self.parallel.distributed_optimizer:  # float32 shares are views of the weights, without a name
            for number, share in enumerate(self.optimization._optimizer.get_parameters()):
                found |= {f"share.{key}.{number}": value for key, value in adamw.state[share].items()}
        return {name: value.detach().clone() for name, value in found.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def visible(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


@pytest.fixture
def trainer(backend) -> Trainer:
    trainer = Trainer(backend)
    trainer.train(0, 1)
    return trainer


def skip_update(trainer: Trainer) -> None:
    trainer.optimization.zero_grad()
    next(trainer.policy.parameters()).main_grad.fill_(float("nan"))
    assert trainer.optimization.step()[1]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("updates", "dtype"), [(0, torch.float32), (3, torch.float32), (3, torch.bfloat16)])
def test_restored_run_continues_bit_for_bit(backend, tmp_path, updates, dtype, distributed):
    parallel = ParallelConfig(distributed_optimizer=distributed)
    one = Trainer(backend, dtype=dtype, parallel=parallel)
    one.train(0, updates)
    skip_update(one)  # Adam's own count goes on without it
    state = {"loader": [3, 1, 2], "rate": 0.1, "nothing": None, "nested": {"a": [1e-300, 2**60]}}
    path = one.save(tmp_path, updates, **state)
    at_save = one.tensors()
    norms, random_numbers = one.train(updates, updates + 2), torch.rand(3)

    two = Trainer(backend, seed=1, dtype=dtype, parallel=parallel)
    two.train(7, 8)  # its own moments, steps and rate must all give way
    assert not same(two.tensors(), at_save)
    assert checkpoint.latest(tmp_path, backend) == path
    assert two.load(path) == state == checkpoint.read_state(path)
    assert same(two.tensors(), at_save)
    assert two.train(updates, updates + 2) == norms
    assert torch.equal(torch.rand(3), random_numbers)
    assert same(two.tensors(), one.tensors())
    assert two.optimization.lr == one.optimization.lr
    steps = [s["step"] for s in two.optimization._optimizer.optimizer.state.values()]
    assert len({s.data_ptr() for s in steps}) == len(steps)  # one each: a shared one would advance many times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_by", [False, True])
def test_a_checkpoint_fits_with_and_without_the_distributed_optimizer(backend, tmp_path, saved_by, dtype):
    one, two = (
        Trainer(backend, seed=seed, dtype=dtype, parallel=ParallelConfig(distributed_optimizer=distributed))
        for seed, distributed in ((0, saved_by), (1, not saved_by))
    )
    one.train(0, 3)
    two.train(7, 8)
    path = one.save(tmp_path, 3)
    two.load(path)
    for (name, main), theirs in zip(two.optimization.main_weights().items(),
                                    one.optimization.main_weights().values(), strict=True):
        assert torch.equal(main.flatten(), theirs.flatten()), name  # one process: its share is all of it
        assert torch.equal(two.policy.get_parameter(name).flatten(), main.to(dtype).flatten())
    assert two.train(3, 6) == pytest.approx(one.train(3, 6), rel=1e-5)
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_skipped_updates_survive_and_settings_are_those_of_today(trainer, backend, tmp_path):
    for _ in range(2):
        skip_update(trainer)
    path = trainer.save(tmp_path, 2)
    settings = OptimConfig(warmup_fraction=0.0, schedule="constant", beta1=0.5)
    other = Trainer(backend, optim=settings, lr=3e-3)
    other.load(path)
    assert other.optimization.skipped_in_row == 2
    other.train(2, 3)
    assert other.optimization.skipped == 2 and other.optimization.skipped_in_row == 0
    assert other.optimization.lr == 3e-3
    assert other.optimization._groups[0]["betas"] == (0.5, 0.95)


def test_weights_alone_can_be_loaded(trainer, backend, tmp_path):
    path = trainer.save(tmp_path, 1, stage="visual")
    policy = build_gpt(backend, seed=3)
    state = checkpoint.load(path, policy=policy, optimization=None, reference=None, backend=backend)
    assert state == {"stage": "visual"}
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), trainer.policy.parameters(), strict=True))


def test_saving_starts_no_process(trainer, tmp_path, monkeypatch):
    """Megatron-Core's own writer starts helpers, which import the entry script anew."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: pytest.fail("a process was started"))
    trainer.save(tmp_path, 1)


# ---- what stays and what goes ------------------------------------------------------------------


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_the_newest_are_kept_and_of_milestones_the_weights(trainer, backend, tmp_path):
    for step in (5, 10, 15, 20, 25):
        trainer.save(tmp_path, step, milestones=[10, 25, 30], index=step)
    assert visible(tmp_path) == ["step_00000020", "step_00000025"]
    assert [s["index"] for s in checkpoint.all_states(tmp_path)] == [20, 25], "milestones hold no replay shards back"
    kept = tmp_path / "milestones"
    assert sorted(os.listdir(kept)) == ["step_00000010", "step_00000025"]
    assert size(kept / "step_00000010") < 0.4 * size(tmp_path / "checkpoints" / "step_00000020")
    found = {step: checkpoint.find(tmp_path, step, backend).parent.name for step in (10, 20, 25, None)}
    assert found == {10: "milestones", 20: "checkpoints", 25: "checkpoints", None: "checkpoints"}
    trainer.save(tmp_path, 20)  # the run went back and came here again
    assert visible(tmp_path) == ["step_00000020"] and os.listdir(kept) == ["step_00000010"]
    checkpoint.drop(tmp_path)
    assert visible(tmp_path) == [] and checkpoint.find(tmp_path, None, backend) == kept / "step_00000010"
    with pytest.raises(ValueError, match="no checkpoint of step 20: there are steps 10"):
        checkpoint.find(tmp_path, 20, backend)


def test_a_milestones_weights_are_loaded_and_nothing_else_can_be(trainer, backend, tmp_path):
    trainer.save(tmp_path, 4, milestones=[4])
    other, path = Trainer(backend, seed=1), tmp_path / "milestones" / "step_00000004"
    checkpoint.load(path, policy=other.policy, optimization=None, reference=None, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(other.policy.parameters(), trainer.policy.parameters(), strict=True))
    with pytest.raises(checkpoint.CheckpointError, match="doesn't fit this model"):
        other.load(path)


def test_milestones_of_an_earlier_version_stay_whole(trainer, tmp_path):
    for step in (10, 20):
        trainer.save(tmp_path, step)
    trainer.save(tmp_path, 30, keep=1, milestones=[10])
    assert visible(tmp_path) == ["step_00000010", "step_00000030"]


def test_without_memory_for_a_copy_nothing_is_copied(backend, tmp_path, monkeypatch):
    """The tensors of the snapshot are the run's own, and what is written is equal."""
    parallel = ParallelConfig(distributed_optimizer=True)
    one, two = (Trainer(backend, seed=seed, parallel=parallel) for seed in (0, 1))
    one.train(0, 2)
    things = dict(policy=one.policy, optimization=one.optimization, reference=one.reference, state={}, backend=backend)
    need = checkpoint.take(1, **things).size
    for free, copied in ((need + room.SLACK, True), (need + room.SLACK - 1, False)):
        monkeypatch.setattr(room, "available", lambda free=free: free)
        snapshot = checkpoint.take(2, **things)
        own = {t.untyped_storage().data_ptr() for t in [*one.policy.parameters(), *one.reference.values()]}
        seen = {t.data.untyped_storage().data_ptr() for t in nested_values(snapshot.sharded)}
        assert snapshot.copied is copied is not bool(own & seen)
    path = checkpoint.write(tmp_path, snapshot, backend=backend, keep=1)
    two.train(7, 8)
    two.load(path)
    assert same(two.tensors(), one.tensors())


def test_run_without_checkpoints(backend, tmp_path):
    assert checkpoint.latest(tmp_path, backend) is None
    assert checkpoint.all_states(tmp_path) == []


def test_keeping_none_is_refused(trainer, tmp_path):
    with pytest.raises(ValueError, match="checkpoint.keep=0"):
        trainer.save(tmp_path, 1, keep=0)


# ---- failures while saving ---------------------------------------------------------------------


def test_a_killed_save_is_invisible_and_cleared_by_the_next(trainer, backend, tmp_path, monkeypatch):
    first = trainer.save(tmp_path, 1)

    rename = Path.rename

    def killed(path, target):
        if target.name == "step_00000002":
            raise KeyboardInterrupt  # nothing catches it, as nothing catches SIGKILL
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        trainer.save(tmp_path, 2)
    assert len(visible(tmp_path)) == 2 and visible(tmp_path)[0].startswith(".")
    assert checkpoint.latest(tmp_path, backend) == first
    second = trainer.save(tmp_path, 2)
    assert visible(tmp_path) == [first.name, second.name]
    assert checkpoint.latest(tmp_path, backend) == second


def test_full_disk_at_any_moment_leaves_the_previous_checkpoint(trainer, backend, tmp_path, monkeypatch):
    first = trainer.save(tmp_path, 1)
    real, disk = os.fsync, SimpleNamespace(flushes=0, full_at=None)

    def fsync(descriptor):
        disk.flushes += 1
        if disk.flushes == disk.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    trainer.save(tmp_path / "count", 2)
    flushes = disk.flushes
    assert flushes >= 8  # state, common, header, tensors, index, generators, manifest, folders
    for moment in range(1, flushes):  # the last one comes after the rename
        disk.flushes, disk.full_at = 0, moment
        with pytest.raises(checkpoint.CheckpointError, match="No space left") as caught:
            trainer.save(tmp_path, 2)
        for part in (str(tmp_path), "MiB free", "checkpoint.keep", "untouched"):
            assert part in str(caught.value)
        assert visible(tmp_path) == [first.name]
        assert checkpoint.latest(tmp_path, backend) == first
    disk.full_at = None
    second = trainer.save(tmp_path, 2)
    assert checkpoint.latest(tmp_path, backend) == second


def test_all_is_on_the_disk_before_it_has_its_name(trainer, tmp_path, monkeypatch):
    """A name that outlives a power failure without its content would be the newest checkpoint."""
    events, fsync, rename = [], os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(target)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    final = trainer.save(tmp_path, 1)
    named = events.index(final)
    working = final.with_name(f".unfinished_{final.name}")
    inside = {working, *(working / path.relative_to(final) for path in final.rglob("*"))}
    assert inside <= set(events[:named])
    assert events.index(working / "weights") > max(events.index(p) for p in inside if p.parent.name == "weights")
    assert final.parent in events[named:], "the name itself"


# ---- damage ------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *itertools.product(["weights/__0_0.distcp", "weights/.metadata", "state.json"], [cut, flip, Path.unlink]),
        *itertools.product(["manifest.json"], [cut, Path.unlink]),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_used(trainer, backend, tmp_path, capsys, name, harm):
    first, second = trainer.save(tmp_path, 1), trainer.save(tmp_path, 2)
    harm(second / name)
    assert checkpoint.latest(tmp_path, backend) == first
    assert "DAMAGED" in (line := capsys.readouterr().err) and str(second) in line and name in line
    harm(first / name)
    with pytest.raises(checkpoint.CheckpointError, match="every checkpoint"):
        checkpoint.latest(tmp_path, backend)


def test_a_checkpoint_from_a_gpu_is_read_without_one(trainer, backend, tmp_path, monkeypatch):
    """AdamW's step, saved beside the sharded tensors, was on the device of the weights."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        snapshot = checkpoint.take(
            1, policy=trainer.policy, optimization=trainer.optimization, reference=trainer.reference,
            state={"note": 1}, backend=backend,
        )  # fmt: skip
    path = checkpoint.write(tmp_path, snapshot, backend=backend, keep=1)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path / "weights" / "common.pt", weights_only=True)
    assert trainer.load(path) == {"note": 1}


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_files_that_would_run_code_are_refused(trainer, tmp_path, name):
    path, proof = trainer.save(tmp_path, 1), tmp_path / "code_ran"
    if name == "common.pt":
        torch.save({"optimization": Payload(proof)}, path / "weights" / name)
    else:
        (path / "weights" / name).write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} could run code"):
        trainer.load(path)
    assert not proof.exists()


def test_another_model_is_refused(trainer, backend, tmp_path):
    path = trainer.save(tmp_path, 1)
    with pytest.raises(checkpoint.CheckpointError, match="doesn't fit this model.*model.path"):
        Trainer(backend, hidden=64).load(path)
    frozen = Trainer(backend)
    for parameter in frozen.policy.decoder.parameters():
        parameter.requires_grad_(False)
    trained_less = checkpoint.save(
        tmp_path / "frozen", 1, policy=frozen.policy, optimization=build_optimizer(
            frozen.policy, OptimConfig(), lr=1e-3, total_steps=2),
        reference=None, state={}, backend=backend, keep=1,
    )
    with pytest.raises(checkpoint.CheckpointError, match="train_towers"):
        trainer.load(trained_less)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_without_main_weights_is_named_before_anything_is_loaded(backend, tmp_path, distributed):
    """Saved in float32 and gone on with in bfloat16, and the other way round; weights alone may change their type."""
    parallel = ParallelConfig(distributed_optimizer=distributed)
    full, half = (Trainer(backend, dtype=dtype, parallel=parallel) for dtype in (torch.float32, torch.bfloat16))
    paths = full.save(tmp_path / "full", 7), half.save(tmp_path / "half", 7)
    before = half.tensors()
    named = r"no float32 main weights for \d+ of the tensors.*model\.dtype.*export \S+full out=FOLDER step=7"
    with pytest.raises(checkpoint.CheckpointError, match=named):
        half.load(paths[0])
    assert same(half.tensors(), before)
    with pytest.raises(checkpoint.CheckpointError, match="would leave behind. Go on with the model.dtype"):
        full.load(paths[1])
    checkpoint.load(paths[1], policy=full.policy, optimization=None, reference=None, backend=backend)
    for parameter, theirs in zip(full.policy.parameters(), half.policy.parameters(), strict=True):
        assert torch.equal(parameter, theirs.float())


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["rmtree", "rename"])
def test_an_old_checkpoint_that_stays_is_a_warning(trainer, backend, tmp_path, monkeypatch, capsys, refused):
    """As on NFS, where a file that another node has open leaves one behind in its folder."""
    trainer.save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        remove, rename = shutil.rmtree, Path.rename

        def keeps_a_file(path, ignore_errors=False, **more):
            remove(path, ignore_errors=ignore_errors, **more)
            path.mkdir(parents=True)
            (path / ".nfs0001").touch()
            if not ignore_errors:
                raise OSError(39, "Directory not empty")

        def stays(path, target):
            if path.name == "step_00000001":
                raise OSError(16, "Device or resource busy")
            return rename(path, target)

        patch.setattr(shutil, "rmtree", keeps_a_file) if refused == "rmtree" else patch.setattr(Path, "rename", stays)
        for step in (2, 3, 3):
            trainer.save(tmp_path, step, keep=1)
    said = capsys.readouterr().err
    assert "warning: " in said and ("Directory not empty" if refused == "rmtree" else "resource busy") in said
    assert checkpoint.latest(tmp_path, backend).name == "step_00000003"
    shown = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert set(shown) == {"step_00000003"} | ({"step_00000001"} if refused == "rename" else set())
    trainer.save(tmp_path, 4, keep=1)
    assert visible(tmp_path) == ["step_00000004"]


def norms_of_transformers(model) -> list[float]:
    """Gradient norms of the first four updates of two_ranks.py, by transformers' forward pass and torch's AdamW."""
    prompt, norms = tiny_prompts(model.config)["audio_in_video"], []
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    for rate in (1e-3, 0.95e-3, 0.9e-3, 0.85e-3):  # linear over 20 updates, the first of which warms up
        adamw.zero_grad()
        scores = []
        for completion in tiny_completions():
            logits = thinker_logits(model, prompt, completion)[len(prompt) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(completion)), completion])
        (-torch.cat(scores).mean()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    return norms


@pytest.mark.slow
@pytest.mark.core
def test_two_ranks_reshard_and_agree(tmp_path):
    """Tensor parallel -> pipeline and data parallel with equal bits; one verdict on damage and on stopping."""
    model = tiny_thinker(tiny_config(layers=2))
    model.save_pretrained(tmp_path / "hf")
    from tests.resilience import two_ranks  # it needs the Trainer of this file

    launch(two_ranks.main, 2, tmp_path)
    checks, other = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert checks == other
    assert checks["equal"] == {"tp2 pp1 dp1": True, "tp1 pp2 dp1": True, "tp1 pp1 dp2": True, "bfloat16": True}
    assert checks["finer"] is True  # main weights hold more than bfloat16 does
    assert checks["negative_control"] is False and checks["generators"] == [True, True]
    assert checks["norms"][:4] == pytest.approx(norms_of_transformers(model), rel=1e-4)
    for part in ("exp_avg.towers.visual", "exp_avg_sq.towers.audio_tower", "step.", "reference.language_model",
                 "output_layer"):
        assert any(part in name for name in checks["tensors"]), part
    assert checks["norms"][3:] == pytest.approx([checks["norms"][3]] * 6, rel=1e-5)
    assert checks["repeated"] == [True, True]  # with the distributed optimizer, bit for bit
    assert checks["fell_back_to"] == "step_00000003"
    assert checks["stop"] == [False, True]
