"""What two ranks check together in one launch, on a tiny policy with its encoders trained: main(FOLDER).

FOLDER/hf holds the policy. Its vocabulary is odd, so that the layouts pad it differently.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_avatar.config.schema import ModelConfig, OptimConfig, ParallelConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.resilience import checkpoint
from megatron_avatar.resilience.stopping import StopSignal
from megatron_avatar.training.optim import build_optimizer
from tests.policy.tiny import VOCABULARY, tiny_completions, tiny_prompts
from tests.resilience.test_checkpoint import Trainer, cut, same


class OmniTrainer(Trainer):
    """The real policy with its encoders in training, on one prompt with video and sound."""

    def __init__(
        self, layout: ParallelConfig, folder: Path, *, blank: bool = False, dtype: str = "float32"
    ) -> None:
        self.backend, self.parallel = backends.start(layout), layout
        self.policy = build_policy(folder / "hf", self.backend, ModelConfig(dtype=dtype), layout)
        self.policy.set_train_towers(True)
        load_hf(self.policy, folder / "hf")
        if blank:
            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter.fill_(0.5)
        self.reference = {n: p.detach().clone() for n, p in self.policy.named_parameters() if p.requires_grad}
        self.optimization = build_optimizer(
            self.policy, OptimConfig(), lr=1e-3, total_steps=20, parallel=layout
        )
        self.prompt = tiny_prompts(self.policy.hf_config)["audio_in_video"]

    def train(self, first: int, last: int) -> list[float]:
        def forward(_, model):
            media = self.policy.embed_media([self.prompt], grad=True)
            output = model(pack_groups([self.prompt], [tiny_completions()]), media)
            return output, lambda scores: (-scores[0].mean(), {})

        norms = []
        for _ in range(first, last):
            self.optimization.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward, data_iterator=iter(()), model=[self.optimization.model], num_microbatches=1,
                seq_length=1, micro_batch_size=1, forward_only=False,
            )
            norms.append(self.optimization.step()[0])
        return norms


def whole_tensors(trainer: OmniTrainer) -> dict[str, torch.Tensor]:
    """Weights, moments and reference put together from all ranks by hand, without any checkpointing code."""
    tp, pieces = trainer.backend.tp, {}
    parameters = dict(trainer.policy.named_parameters())
    for name, tensor in trainer.tensors().items():
        parameter = next(p for n, p in parameters.items() if name == n or name.endswith(f".{n}"))
        axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) and tensor.dim() else None
        if layer := re.search(r"decoder\.layers\.(\d+)\.", name):
            number = trainer.policy.language_model.decoder.layers[int(layer[1])].layer_number - 1
            name = name.replace(layer[0], f"decoder.layers.{number}.")
        pieces[name] = (tensor, axis)
    ranks = trainer.backend.all_gather_object((trainer.backend.tp_rank, pieces))
    whole = {}
    for name in {name for _, part in ranks for name in part}:
        shards = {tp_rank: part[name] for tp_rank, part in ranks if name in part}
        tensors, axis = [shards[rank][0] for rank in sorted(shards)], shards[0][1]
        if axis is None or tp == 1:
            assert all(torch.equal(t, tensors[0]) for t in tensors)
            whole[name] = tensors[0]
        elif "linear_fc1" in name:  # each rank holds its part of the gate, then of the up projection
            halves = [t.chunk(2) for t in tensors]
            whole[name] = torch.cat([half[k] for k in (0, 1) for half in halves])
        else:
            whole[name] = torch.cat(tensors, dim=axis)
        if ("word_embeddings" in name or "output_layer" in name) and axis is not None:
            whole[name] = whole[name][:VOCABULARY]
    return whole


def main(folder: Path) -> None:
    trainer = OmniTrainer(ParallelConfig(tp=2), folder)
    backend = trainer.backend
    norms = trainer.train(0, 3)
    torch.manual_seed(backend.rank)
    path = trainer.save(folder, 3, note="from tensor parallel")
    expected, drawn = whole_tensors(trainer), torch.rand(3)
    norms += trainer.train(3, 4)
    still_equal = same(whole_tensors(trainer), expected)

    damaged = trainer.save(folder, 4)
    if backend.rank == 0:
        cut(next(damaged.glob("weights/__1_*")))  # rank 1's file
    backend.barrier()
    fell_back_to = checkpoint.latest(folder, backend)

    stop = StopSignal()
    agreed = [stop.agree(backend)]
    if backend.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    agreed.append(stop.agree(backend))
    backends.stop()

    equal = {}
    for layout in (ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig()):
        trainer = OmniTrainer(layout, folder, blank=True)
        assert trainer.load(path) == {"note": "from tensor parallel"}
        backend = trainer.backend
        if layout.tp == 2:  # that of the checkpoint
            generators = backend.all_gather_object(torch.equal(torch.rand(3), drawn))
        equal[f"tp{backend.tp} pp{backend.pp} dp{backend.dp}"] = same(whole_tensors(trainer), expected)
        norms += trainer.train(3, 4)
        backends.stop()

    repeated = []
    for layout in (ParallelConfig(distributed_optimizer=True), ParallelConfig(pp=2, distributed_optimizer=True)):
        trainer = OmniTrainer(layout, folder, blank=True)
        trainer.load(path)
        norms += trainer.train(3, 4)
        shared = trainer.save(folder, 10 + layout.pp, keep=9)
        further = trainer.train(4, 6)
        backends.stop()
        trainer = OmniTrainer(layout, folder, blank=True)
        trainer.load(shared)
        repeated.append(trainer.train(4, 6) == further)
        backends.stop()

    # Main weights of bfloat16 ones: tensor parallel -> shares of two replicas -> pipeline.
    trainer = OmniTrainer(ParallelConfig(tp=2), folder, dtype="bfloat16")
    trainer.train(0, 3)
    path, whole = trainer.save(folder / "half", 3), whole_tensors(trainer)
    backends.stop()
    finer = any(not torch.equal(value, whole[f"main.{n}"]) for n, value in whole.items() if f"main.{n}" in whole)
    for step, layout in ((4, ParallelConfig(distributed_optimizer=True)), (5, ParallelConfig(pp=2))):
        trainer = OmniTrainer(layout, folder, blank=True, dtype="bfloat16")
        trainer.load(path)
        path = trainer.save(folder / "half", step)
        if layout.pp == 2:
            equal["bfloat16"] = same(whole_tensors(trainer), whole)
        backends.stop()

    results = {
        "finer": finer, "tensors": sorted(expected), "equal": equal, "norms": norms, "negative_control": still_equal,
        "fell_back_to": fell_back_to.name, "stop": agreed,
        "repeated": repeated, "generators": generators,
    }
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(results))

