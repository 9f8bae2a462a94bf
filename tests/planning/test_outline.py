"""The outline of a run, counted without torch: against the plan, real checkpoints, and limits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_avatar.config import load_config
from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.planning import outline
from megatron_avatar.planning.outline import GIB

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def planned(recipe: str, *overrides: str):
    config = load_config([f"recipe={recipe}", "dry_run=true", *overrides])
    return config, outline.layout(config)


CASES = {  # recipe, overrides
    "avatar_7b": [],
    "avatar_7b_lora": [],
    "sft_3b": ["cluster.gpus=8", "cluster.gpus_per_node=8"],
    "grpo_vl_7b": ["parallel=a100_40g", "cluster.gpu=a100", "cluster.gpu_memory_gib=40"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CASES)
def test_hours_are_the_plans(recipe):
    from megatron_avatar.planning.plan import make_plan

    config, where = planned(recipe, *CASES[recipe])
    hours, plan = outline.stage_hours(config, where), make_plan(config)
    assert hours == pytest.approx({stage.name: stage.hours for stage in plan.stages}, rel=0.01)
    trained = outline.rank_trained(config, outline.shape_of(config))
    assert where.dp == plan.dp and max(rank.trainable for rank in plan.ranks) == pytest.approx(trained, rel=0.02)


def test_it_needs_no_torch():
    script = ("import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
              "from megatron_avatar.config import load_config\n"
              "from megatron_avatar.planning import outline as o\n"
              "c = load_config(['recipe=avatar_7b', 'dry_run=true']); w = o.layout(c)\n"
              "print(o.stage_hours(c, w), o.host_memory(c, w), o.kept_bytes(c, o.shape_of(c)))")  # fmt: skip
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def test_time_limits_have_a_margin_and_an_end():
    assert outline.limit_minutes(0.01, 1440) == 60, "an hour at least"
    assert outline.limit_minutes(1.02, 1440) == 150, "20 minutes to start, twice the hours, in steps of ten"
    assert outline.limit_minutes(40, 1440) == 1440, "the site's longest job; the run goes on in the next"
    assert outline.limit_minutes(0.01, 30) == 30


def test_more_replicas_and_fewer_items_take_less_time():
    config, where = planned("avatar_7b")
    once = outline.evaluation_hours(config, where, 3200)
    assert outline.evaluation_hours(config, where, 1600) == pytest.approx(once / 2)
    assert once < outline.evaluation_hours(config, where, 3200, 8) < 8 * once, "prompts and clips are read once"
    two = outline.of(config, 2, 4)
    assert two.dp == 2 and outline.evaluation_hours(config, two, 3200) == pytest.approx(once / 2)


def test_weights_that_cannot_fit_are_refused_without_a_plan():
    config, where = planned("avatar_7b")
    outline.check_weights_fit(config, outline.shape_of(config), where)
    config, where = planned("avatar_7b", "cluster.gpu=a100", "cluster.gpu_memory_gib=40")
    with pytest.raises(ValueError, match=r"take 43 GiB of a GPU.*cluster.gpu_memory_gib=40: choose another layout"):
        outline.check_weights_fit(config, outline.shape_of(config), where)
    config, where = planned("avatar_7b", "parallel=a100_40g", "cluster.gpu=a100", "cluster.gpu_memory_gib=40")
    outline.check_weights_fit(config, outline.shape_of(config), where)


def test_host_memory_is_the_nodes_share_of_a_checkpoint_and_its_processes():
    config, one = planned("avatar_7b")
    size = outline.checkpoint_bytes(config, outline.shape_of(config))
    memory = outline.host_memory(config, one)
    assert memory.copy == size and memory.processes == 4 * (outline.PROCESS + 4 * outline.WORKER)
    assert memory.least == memory.processes + 4 * outline.PIECE < memory.whole
    config, halves = planned("avatar_7b", "parallel=a100_40g")  # a replica over two nodes
    assert outline.host_memory(config, halves).copy == pytest.approx(size / 2)
    config, many = planned("avatar_7b", "cluster.gpus=16", "cluster.gpus_per_node=8")
    trained = 12 * outline.trained_parameters(config, outline.shape_of(config))
    assert outline.host_memory(config, many).copy == size - trained + trained / 2, "shares of four replicas, two a node"
    config.parallel.distributed_optimizer = False
    assert outline.host_memory(config, many).copy == size, "the first replica's node has all of it"


def free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(outline.shutil, "disk_usage", lambda _: Usage(10**12, 0, size))


def test_a_disk_without_room_for_one_checkpoint_is_refused_and_a_tight_one_is_said(monkeypatch, tmp_path):
    config, _ = planned("avatar_7b", f"output_dir={tmp_path / 'run'}", "checkpoint.milestones=[1]")
    shape = outline.shape_of(config)
    one, weights = outline.checkpoint_bytes(config, shape), outline.weights_bytes(config, shape)
    assert one == pytest.approx(116 * GIB, rel=0.01) and weights == 2 * 8_931_813_888
    free(monkeypatch, 0.9 * one)
    with pytest.raises(ValueError, match="a checkpoint takes about .* make room there"):
        outline.check_space(config)
    most = 3 * one + 4 * weights  # two and one that is written, a milestone, three stages' exports
    free(monkeypatch, 0.99 * most)
    assert f"keeps up to {most / GIB:.0f} GiB" in outline.check_space(config)
    free(monkeypatch, 1.01 * most)
    assert outline.check_space(config) == ""


def test_a_models_own_folder_counts_where_no_shape_is_published(tmp_path):
    shutil.copytree(CONFIG_DIR / "shapes" / "qwen2_5_omni_3b", tmp_path / "model")
    config, _ = planned("avatar_7b")
    config.model.shape, config.model.path = "", str(tmp_path / "model")
    assert outline.weights_bytes(config, outline.shape_of(config)) == 2 * 4_703_464_448
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no configuration of Qwen2.5-Omni"):
        outline.shape_of(config)


@pytest.mark.parametrize(("gpus", "most", "nodes"), [(4, 4, 1), (8, 4, 2), (12, 8, 2), (4, 8, 1), (0, 2, 2)])
def test_processes_spread_evenly_and_no_node_gets_too_many(gpus, most, nodes):
    config, where = planned("avatar_7b", f"cluster.gpus={gpus}", f"cluster.gpus_per_node={most}")
    assert where.per_node <= most and where.gpus == nodes * where.per_node == (gpus or 4)
    with pytest.raises(ValueError, match="9 processes don't spread evenly over 2 nodes of cluster.gpus_per_node=8"):
        planned("avatar_7b", "cluster.gpus=9", "cluster.gpus_per_node=8")
