"""The plan's numbers against real models: published sizes, real ranks' bytes, real saved tensors, torch's FLOP."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import socket
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from megatron_avatar.config.load import CONFIG_DIR, load_config
from megatron_avatar.config.schema import LoraConfig, ModelConfig, OptimConfig, ParallelConfig, SamplingConfig
from megatron_avatar.planning import meta
from megatron_avatar.planning.batches import micro_batches, pack, seen_pairs
from megatron_avatar.planning.memory import (
    DRAWN_BYTES,
    GIB,
    SAMPLING_BYTES,
    Device,
    add_dynamic,
    device_of,
    drop_gradients,
    generation_room,
    measure_update,
    parameter_bytes,
    static_memory,
)
from megatron_avatar.planning.meta import LiveBytes, shard_on_meta
from megatron_avatar.planning.plan import _changes, _layouts
from megatron_avatar.planning.work import Work
from megatron_avatar.policy import generate, kept
from megatron_avatar.policy.architecture import read_config
from megatron_avatar.policy.backend import start, stop
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.kernels.device import Operation
from megatron_avatar.policy.kernels.draw import draw_tokens
from megatron_avatar.policy.shape import read_shape, text_parameters, tower_parameters
from megatron_avatar.records import Prompt
from megatron_avatar.train import main
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import build_optimizer
from tests.planning.models import SIZES, one_rank, plan, save
from tests.policy.tiny import tiny_config

ROOT = Path(__file__).parents[2]
SHAPES = CONFIG_DIR / "shapes"
# Parameters of the published weights: the Thinkers of Qwen2.5-Omni, Qwen2.5-VL-7B-Instruct and Qwen3-VL.
PUBLISHED = {"qwen2_5_omni_7b": 8_931_813_888, "qwen2_5_omni_3b": 4_703_464_448, "qwen2_5_vl_7b": 8_292_166_656,
             "qwen3_vl_2b": 2_127_532_032, "qwen3_vl_4b": 4_437_815_808, "qwen3_vl_8b": 8_767_123_696,
             "qwen3_omni_30b": 31_719_205_488}  # fmt: skip
CLASSES = {
    "qwen2_5_omni_thinker": (Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_omni_moe_thinker": (Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration),
}


# ---- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_are_those_of_the_published_models(shape):
    config = json.loads((SHAPES / shape / "config.json").read_text())
    settings, cls = CLASSES[config["model_type"]]
    with torch.device("meta"):
        model = cls(settings.from_dict(config))
    theirs = sum(p.numel() for p in model.parameters())
    with shard_on_meta(str(SHAPES / shape), ModelConfig(), ParallelConfig(), 0, 0) as policy:
        ours = sum(p.numel() for p in policy.parameters())
        assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert ours == theirs == PUBLISHED[shape]


@pytest.mark.parametrize("name", ["tiny_base", "tiny_omni3"])
def test_a_tiny_shape_is_its_base(name):
    shape, base = (json.loads((folder / name / "config.json").read_text()) for folder in (SHAPES, ROOT / "assets"))
    assert shape == base


REAL = [  # a model, a layout of four ranks
    (dict(), ParallelConfig(tp=2, pp=2)),
    (dict(tied=True, layers=6), ParallelConfig(tp=1, pp=4, first_stage_layers=3)),
    (dict(), ParallelConfig(tp=4, sequence_parallel=True)),  # more than there are key-value heads
]
LORA = ModelConfig(lora=LoraConfig(rank=3))


HALF = ("bfloat16", "float16")


def half(dtype: str) -> ModelConfig:
    return ModelConfig(dtype=dtype)


def real_rank(rank: int, port: int, folders: list[str], results: multiprocessing.Queue) -> None:
    """Build the real shards of one of four processes, and report their bytes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number, (folder, (_, parallel)) in enumerate(zip(folders, REAL, strict=True)):
        backend = start(parallel)
        for model in (ModelConfig(), *map(half, HALF), LORA):
            policy = build_policy(folder, backend, model, parallel)
            trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
            key = number, model.dtype, model.lora.rank, backend.tp_rank, backend.pp_rank
            results.put((key, (parameter_bytes(list(policy.parameters())), trained)))
        stop()


def test_parameter_bytes_are_those_of_real_ranks(tmp_path):
    folders = [save(tmp_path / str(i), **kwargs) for i, (kwargs, _) in enumerate(REAL)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # everything is imported already
    results = context.Queue()
    ranks = [context.Process(target=real_rank, args=(rank, port, folders, results)) for rank in range(4)]
    for process in ranks:
        process.start()
    real = dict(results.get(timeout=120) for _ in range(4 * 4 * len(REAL)))
    for process in ranks:
        process.join(60)
    for (number, dtype, lora, tp_rank, pp_rank), (size, trained) in real.items():
        parallel, model = REAL[number][1], ModelConfig(dtype=dtype, lora=LoraConfig(rank=lora))
        work = Work(True, False, 0, 0, 8, 4, 1, (2,), 64)
        with shard_on_meta(folders[number], model, parallel, tp_rank, pp_rank) as policy:
            memory = static_memory(policy, model, parallel, work, dp=1)
        assert memory.weights + memory.tower_weights == size
        assert memory.trainable == trained and memory.gradients == 4 * trained
        assert memory.optimizer == trained * (12 if dtype in HALF else 8)
        assert memory.reference == trained * (2 if dtype in HALF else 4)


@pytest.mark.parametrize("train_towers", [False, True])
def test_the_reference_is_what_a_learner_copies(tmp_path, train_towers):
    folder, work = save(tmp_path), Work(True, train_towers, 0, 0, 8, 4, 1, (2,), 64)
    with shard_on_meta(folder, LORA, ParallelConfig(), 0, 0) as policy:
        memory = static_memory(policy, LORA, ParallelConfig(), work, dp=1)
    with one_rank(folder, LORA, ParallelConfig()) as policy:
        policy.set_train_towers(train_towers)
        learner = Learner.__new__(Learner)  # its optimizer doesn't matter here
        learner.policy = policy
        learner.snapshot_reference()
        assert memory.reference == sum(t.nbytes for t in learner.reference.values())
        assert train_towers == (memory.reference > parameter_bytes(list(policy.towers.parameters())) / 2)


@pytest.mark.parametrize("stages", [(True, True), (True, False)], ids=["train", "rest"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_optimizer_s_bytes_are_those_of_main_weights_and_moments(tmp_path, dtype, stages):
    """In half precision, encoders included that train in some stage only: their state stays in every stage."""
    model, (ever, now) = half(dtype), stages
    folder, work = save(tmp_path), Work(True, now, 0, 0, 8, 4, 1, (2,), 64)
    with shard_on_meta(folder, model, ParallelConfig(), 0, 0) as policy:
        memory = static_memory(policy, model, ParallelConfig(), work, dp=1, towers_ever=ever)
    with one_rank(folder, model, ParallelConfig()) as policy:
        policy.set_train_towers(ever)
        optimization = build_optimizer(policy, OptimConfig(), lr=1e-3, total_steps=1)
        policy.set_train_towers(now)
        main = optimization.main_weights().values()
        assert {value.dtype for value in main} == {torch.float32}
        assert memory.optimizer == 3 * sum(value.nbytes for value in main)
        assert memory.gradients == sum(p.main_grad.nbytes for p in policy.parameters() if hasattr(p, "main_grad"))


def test_the_distributed_optimizer_shares_out_its_state(tmp_path):
    work = Work(True, False, 0, 0, 8, 4, 1, (2,), 64)
    parallel = ParallelConfig(distributed_optimizer=True)
    with shard_on_meta(save(tmp_path), ModelConfig(), parallel, 0, 0) as policy:
        memory = static_memory(policy, ModelConfig(), parallel, work, dp=4)
    assert memory.optimizer == 2 * memory.trainable


# ---- activations -------------------------------------------------------------------------------


def saved_bytes(policy, batch) -> int:
    """Bytes that a forward pass keeps for its backward pass: each storage once, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    own |= {x.untyped_storage().data_ptr() for x in vars(batch).values() if isinstance(x, torch.Tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack_tensor(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return tensor

    policy.train()
    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        output = policy(batch)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", ["none", "light", "selective", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_the_saved_tensors_of_a_real_model(tmp_path, size, recompute):
    kwargs, groups = SIZES[size]
    folder, batch = save(tmp_path, **kwargs), pack(groups)
    model, parallel = ModelConfig(), ParallelConfig(recompute=recompute, kernels="torch")
    with shard_on_meta(folder, model, parallel, 0, 0) as policy:
        planned = measure_update(policy, batch)
    with one_rank(folder, model, parallel) as policy:
        real = saved_bytes(policy, batch)
    assert planned.kept == pytest.approx(real, rel=0.02)
    assert planned.peak >= planned.kept


@pytest.mark.parametrize("residual", ["float32", "model"])
def test_a_later_stage_keeps_the_stream_as_it_is_sent(tmp_path, monkeypatch, residual):
    """In bfloat16, against the tensors that the second of two stages saves on a CPU."""
    model, parallel = ModelConfig(dtype="bfloat16", residual=residual), ParallelConfig(pp=2)
    folder, batch = save(tmp_path, layers=4), pack([(90, [60, 50])])
    with shard_on_meta(folder, model, parallel, 0, 1) as policy:
        planned = measure_update(policy, batch)
    monkeypatch.setattr(meta, "META", torch.device("cpu"))
    with shard_on_meta(folder, model, parallel, 0, 1) as policy:
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        assert policy.config.pipeline_dtype == (torch.float32 if residual == "float32" else torch.bfloat16)
        stream = torch.randn(len(batch), 1, policy.config.hidden_size, dtype=policy.config.pipeline_dtype)
        policy.set_input_tensor(stream.requires_grad_())
        real = saved_bytes(policy, batch)
    assert planned.kept == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(("pp_rank", "groups", "in_flight"), [(0, 3, 3), (0, 2, 2), (1, 3, 2), (2, 3, 1)])
def test_a_stage_keeps_what_is_in_flight_behind_it(tmp_path, pp_rank, groups, in_flight):
    """One forward, one backward: stage k of three waits for the gradients of 3 - k micro-batches."""
    work = Work(True, False, 0, 0, 40, 8, 0, (2,) * groups, 64)
    parallel = ParallelConfig(pp=3)
    assert len(micro_batches(work)) == groups
    with shard_on_meta(save(tmp_path, layers=6), ModelConfig(), parallel, 0, pp_rank) as policy:
        memory = static_memory(policy, ModelConfig(), parallel, work, dp=1)
        add_dynamic(memory, policy, work, 2, 1.0, Device())
        alone = measure_update(policy, micro_batches(work)[0]).kept
    assert memory.activations == pytest.approx(in_flight * alone, rel=1e-2)


@pytest.mark.parametrize("memory", [0, 1 << 18, 1 << 20, 1 << 40], ids=["cpu", "none", "as asked", "rounded"])
def test_the_cache_that_is_planned_is_the_one_that_generation_makes(tmp_path, monkeypatch, memory):
    """Three prompts of three pages and nine rows: where there is memory for it, room for four times three and 16."""
    made = []

    def cache(*arguments, **_):
        made.append(KeyValueCache(*arguments, static=True))
        return made[-1]

    monkeypatch.setattr(generate, "KeyValueCache", cache)
    monkeypatch.setattr(kept, "memory_of", lambda device: memory)
    monkeypatch.setattr(kept, "SHARE", 0.5)
    config = tiny_config(layers=2)
    config.eos_token_id = 7
    config.save_pretrained(tmp_path)
    with one_rank(str(tmp_path), ModelConfig(), ParallelConfig()) as policy:
        text = Prompt("", "plain", np.full(1200, 20), np.tile(np.arange(1200), (3, 1)))
        work = Work(True, False, 0, 0, 1200, 16, 3, (3,) * 3, 99)
        planned, _, stays = generation_room(policy, work, 3, memory)
        sampling = SamplingConfig(max_new_tokens=16)
        generate.generate(policy, [text] * 3, 3, sampling, ["a", "b", "c"])
        room = made[0].room
        assert planned == made[0].bytes and stays == (policy.kept_generation is not None) == (memory >= 1 << 40)
    assert (room.pages, room.rows) == ((16, 16) if memory == 1 << 40 else (9, 9))


def test_a_drawn_logit_takes_what_the_kernel_is_given(tmp_path):
    """What the head makes on two ranks of a vocabulary that is padded for them; torch's draw makes copies."""
    for tp in (1, 2):
        with shard_on_meta(save(tmp_path), ModelConfig(), ParallelConfig(tp=tp), 0, 0) as policy, torch.no_grad():
            hidden = torch.zeros(64, policy.config.hidden_size, device="meta")
            banned, uniforms = torch.zeros(policy.vocab_size, dtype=torch.bool, device="meta"), hidden[:, 0].double()
            with LiveBytes() as memory:
                ids, _ = draw_tokens(policy.head(hidden).contiguous(), uniforms, 1.0, banned)
        assert len(ids) == 64 and memory.peak <= DRAWN_BYTES * 1.05 * 64 * policy.vocab_size
    for overrides, drawn, memory in (
        (["cluster.gpu=cpu"], SAMPLING_BYTES, 0), (["parallel.kernels=torch"], SAMPLING_BYTES, 80 * GIB),
        (["rl.sampling.top_p=0.9"], SAMPLING_BYTES, 80 * GIB), ([], DRAWN_BYTES, 80 * GIB),
    ):  # fmt: skip
        config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpu_memory_gib=80", *overrides])
        assert device_of(config) == Device(memory, drawn)


def test_recomputation_and_sequence_parallelism_save_memory(tmp_path):
    kept = []
    for settings in (dict(), dict(sequence_parallel=True), dict(sequence_parallel=True, recompute="selective"),
                     dict(sequence_parallel=True, recompute="full")):  # fmt: skip
        with shard_on_meta(save(tmp_path), ModelConfig(), ParallelConfig(tp=2, **settings), 0, 0) as policy:
            kept.append(measure_update(policy, pack([(200, [50] * 4)])).kept)
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 4


def test_the_peak_is_that_of_a_real_step(tmp_path, monkeypatch):
    """On the CPU the same count over the real step; its attention kernel works in other pieces. The package's kernels
    are one operation each, as on a GPU: what they hold inside is the CPU's alone."""
    monkeypatch.setattr(Operation, "__call__", lambda self, *arguments: self._operation(*arguments))
    kwargs, groups = SIZES["deep"]
    folder, batch = save(tmp_path, **kwargs), pack(groups)
    with shard_on_meta(folder, ModelConfig(), ParallelConfig(), 0, 0) as policy:
        planned = measure_update(policy, batch)
    with one_rank(folder, ModelConfig(), ParallelConfig()) as policy:
        drop_gradients(policy)
        with LiveBytes() as memory:
            policy.train()(batch).sum().backward()
    assert planned.peak == pytest.approx(memory.peak, rel=0.02)


def test_bytes_are_counted_while_they_live():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        view, b = a[:10].view(2, 5), torch.ones(500)
        a.add_(1)
        assert memory.live == memory.peak == 6000
        del a, b
        gc.collect()
        assert memory.live == 4000 and memory.peak == 6000
        del view
        assert memory.live == 0


# ---- the command -------------------------------------------------------------------------------


def test_the_command_says_whether_it_fits(capsys):
    command = ["recipe=avatar_7b", "dry_run=true", "parallel.tp=4", "parallel.pp=2", "cluster.gpu_memory_gib=80"]
    assert main([*command, "cluster.gpus=8"]) == 0
    printed = capsys.readouterr().out
    for words in ("pp 1, tp 0-3", "2,268.2", "optimizer", "keys and values", "reference model", "step, s", "fits:"):
        assert words in printed, words
    said = " ".join(printed.split())
    assert "for the whole run, where each prompt shows a clip of 8 s (data.max_frames=16 at data.fps=2; longer" in said
    assert main([*command, "cluster.gpus=32"]) == 2  # the recipe's one prompt a step is too few
    said = " ".join(capsys.readouterr().out.split())
    assert "has to change: stages.visual.prompts_per_step=1 leaves some of 4 data-parallel ranks idle" in said
    more = re.findall(r"stages\.\w+\.prompts_per_step=4", said)
    assert len(more) == 3 and main([*command, "cluster.gpus=32", *more]) == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.tp=8"], "parallel.tp=8 doesn't divide the 28 attention heads"),
        (["parallel.pp=3"], "write parallel.first_stage_layers="),
        (["cluster.gpus=6"], "need a multiple of 4 processes"),
        (["model.path=/nowhere"], "model.path=/nowhere is no folder"),
    ],
)
def test_what_does_not_divide_is_named(overrides, says, capsys):
    assert main(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=24", *overrides]) == 2
    printed = capsys.readouterr()
    assert says in " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize(
    ("gpus", "gib", "start"),
    [(8, 38, []), (4, 48, ["parallel.recompute=none"]), (1, 80, ["parallel=single"])],
)
@pytest.mark.slow
def test_the_remedy_fits(gpus, gib, start):
    cluster = [f"cluster.gpus={gpus}", f"cluster.gpu_memory_gib={gib}", *start]
    (problem,) = [p for p in plan(*cluster).problems if "GiB" in p]
    if gpus == 1:
        assert "no layout of 1 such GPUs fits" in problem and "model.lora.rank=8" in problem
        return
    change = re.search(r"write (.*) \(", problem)[1].split()
    fixed = plan(*cluster, *change)
    assert not [p for p in fixed.problems if "GiB" in p]
    assert max(rank.total for rank in fixed.ranks) <= gib * GIB


@pytest.mark.parametrize(("gpus", "gib", "says"), [
    (2, 30, r"no layout of 2 such GPUs fits \(the best needs"),  # fewer than tp
    (6, 60, r"write parallel\.tp="),  # not a multiple of tp
])  # fmt: skip
@pytest.mark.slow
def test_gpus_that_the_layout_does_not_share_out_get_a_remedy(gpus, gib, says):
    cluster = [f"cluster.gpus={gpus}", f"cluster.gpu_memory_gib={gib}", "parallel.recompute=none"]
    world, memory = plan(*cluster).problems
    assert "need a multiple of 4 processes" in world and re.search(says, memory)


def test_a_remedy_is_no_setting_that_validate_refuses():
    config = load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=6"])
    for layout in _layouts(config):
        for change in _changes(config, layout):
            words = [f"{key}={value}" for key, value in change.items()]
            load_config(["recipe=avatar_7b", "dry_run=true", "cluster.gpus=6", *words])


def test_the_remedy_keeps_the_recipes_prompts():
    (problem,) = [p for p in plan("parallel=single", "cluster.gpus=8").problems if "GiB" in p]
    assert "parallel.tp=4 parallel.pp=2" in problem  # eight GPUs for one prompt


# ---- without torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", PUBLISHED)
def test_parameters_are_counted_from_sizes_alone(shape):
    sizes = read_shape(SHAPES / shape)
    assert text_parameters(sizes) + tower_parameters(sizes) == PUBLISHED[shape]
    assert shape != "qwen3_omni_30b" or text_parameters(sizes) == 30_532_646_912


@pytest.mark.parametrize("key", ["num_position_embeddings", "deepstack_visual_indexes"])
def test_an_encoder_is_counted_as_its_familys_or_not_at_all(tmp_path, key):
    config = json.loads((SHAPES / "qwen3_vl_4b" / "config.json").read_text())
    del config["vision_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("shape", "whole"),
    [*((name, False) for name in PUBLISHED), *((name, True) for name in PUBLISHED if "omni" in name)],
)
@pytest.mark.parametrize("where", ["nowhere", "text_config", "beside"])
def test_whether_the_head_is_the_embedding_is_read_as_the_policy_reads_it(tmp_path, shape, where, whole):
    config = json.loads((SHAPES / shape / "config.json").read_text())
    text = config.setdefault("text_config", dict(config))  # VL's shape has the sizes at its top
    for part in (config, text):
        part.pop("tie_word_embeddings", None)
    {"nowhere": {}, "text_config": text, "beside": config}[where]["tie_word_embeddings"] = True
    if whole:  # as published: the Thinker beside a Talker
        config = {"model_type": config["model_type"].removesuffix("_thinker"), "thinker_config": config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path).text_config.tie_word_embeddings == read_config(tmp_path).tie_word_embeddings
    taken = {"beside"} | ({"text_config"} if shape == "qwen2_5_vl_7b" else set())
    assert read_config(tmp_path).tie_word_embeddings == (where in taken)


@pytest.mark.parametrize(
    ("shape", "key", "value"),
    [*(("qwen3_vl_4b", "head_dim", value) for value in ("absent", None, 0, -1, "128", [128], True)),
     ("qwen2_5_omni_7b", "num_attention_heads", 0), ("qwen2_5_omni_7b", "tie_word_embeddings", "false"),
     ("qwen3_vl_8b", "tie_word_embeddings", 1)],
)  # fmt: skip
def test_what_is_no_size_is_refused(tmp_path, shape, key, value):
    config = json.loads((SHAPES / shape / "config.json").read_text())
    part = config if key == "tie_word_embeddings" else config["text_config"]
    part[key] = value
    if value == "absent":  # 128 of the class, not 2560 / 32
        del part[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key if value != 0 or key == "head_dim" else "ZeroDivision"):
        read_shape(tmp_path)


def test_another_family_is_refused_once_with_its_path(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    with pytest.raises(ValueError) as error:
        read_shape(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: model_type is 'qwen3_5' (Qwen3.5 has linear")
    assert "ValueError" not in str(error.value)


@hypothesis.settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.lists(st.integers(1, 8), min_size=1, max_size=5),
       st.integers(20, 200))  # fmt: skip
def test_counts_are_those_of_the_packed_batches(prompt, completion, completions, budget):
    work = Work(True, False, 0, 0, prompt, completion, 1, tuple(completions), budget)
    batches = [(len(b), len(b.target_ids), seen_pairs(b.segments)) for b in micro_batches(work)]
    assert work.counts() == batches
