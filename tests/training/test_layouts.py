"""Every layout trains alike: losses and gradient norms over 14 float32 steps, also across checkpoints."""

from __future__ import annotations

import json

import pytest

from megatron_avatar.training.optim import FIRST_SCALE
from tests.policy.tiny import tiny_config, tiny_omni3, tiny_omni3_config, tiny_thinker, tiny_vl3, tiny_vl3_config
from tests.ranks import launch
from tests.training import layouts_world
from tests.training.layouts_world import STEPS

TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3  # absolute for losses, relative for gradient norms
SHARED = dict(distributed_optimizer=True)


def leg(steps: int = STEPS, *, model: str = "untied", train_towers: bool = False, dtype: str = "float32",
        overflow: int | None = None, **parallel):  # fmt: skip
    return dict(steps=steps, model=model, train_towers=train_towers, dtype=dtype, overflow=overflow, parallel=parallel)


def tied(steps: int = STEPS, **parallel):
    return leg(steps, model="tied", train_towers=True, **parallel)


def qwen3(steps: int = STEPS, **parallel):
    return leg(steps, model="qwen3", train_towers=True, **parallel)


# Four ranks: what tp and pp leave over is data parallel. The models have 4 layers and 2 key-value heads.
FROZEN = {
    "plain": [leg()],
    "distributed": [leg(**SHARED)],
    "tp2": [leg(tp=2)],
    "pp2 uneven, distributed, selective": [leg(pp=2, first_stage_layers=1, recompute="selective", **SHARED)],
    "pp2 uneven, full": [leg(pp=2, first_stage_layers=3, recompute="full")],
    "tp2 pp2 sequence": [leg(tp=2, pp=2, sequence_parallel=True)],
    "tp4": [leg(tp=4)],
    "tp4 sequence, full, distributed": [leg(tp=4, sequence_parallel=True, recompute="full", **SHARED)],
    "pp4 selective": [leg(pp=4, recompute="selective")],
}
TRAINED = {  # tied embeddings, encoders in training
    "plain": [tied()],
    "pp2 uneven, distributed": [tied(pp=2, first_stage_layers=1, **SHARED)],
    "tp2 pp2 sequence, full, distributed": [tied(tp=2, pp=2, sequence_parallel=True, recompute="full", **SHARED)],
    "resharded": [
        tied(3, tp=2, sequence_parallel=True, **SHARED),
        tied(3, pp=2, first_stage_layers=3, **SHARED),
        tied(3, tp=4),
        tied(3, **SHARED),
        tied(2, tp=2, pp=2),
    ],
}
QWEN3 = {  # encoders in training, whose features go to three layers; 6 layers, three of them on the first of two stages
    "plain": [qwen3()],
    "tp2 pp2 sequence, full, distributed": [qwen3(tp=2, pp=2, sequence_parallel=True, recompute="full", **SHARED)],
    "resharded": [
        qwen3(4, tp=2, sequence_parallel=True, recompute="selective", **SHARED),
        qwen3(4, pp=2, first_stage_layers=4),
        qwen3(6, tp=4),
    ],
}
def omni3(steps: int = STEPS, **parallel):
    return leg(steps, model="omni3", train_towers=True, **parallel)


OMNI3 = {  # the same, with experts that come to lie on other ranks
    "plain": [omni3()],
    "tp2, distributed": [omni3(tp=2, **SHARED)],
    "tp2 pp2 sequence, full, distributed": [omni3(tp=2, pp=2, sequence_parallel=True, recompute="full", **SHARED)],
    "resharded": [
        omni3(4, **SHARED),
        omni3(3, tp=2, sequence_parallel=True, recompute="selective", **SHARED),
        omni3(3, pp=2, first_stage_layers=4, recompute="light"),
        omni3(4, tp=4),
    ],
}
OVERFLOWS = 2  # the step of the second replica's overflow
HALF = {  # float32 main weights, bit for bit; float16 on other layouts, with its loss scale
    name: {
        "whole": [leg(8, dtype=name.split()[0], **more)],
        "continued": [leg(5, dtype=name.split()[0], **more), leg(3, dtype=name.split()[0], **more)],
    }
    for name, more in {
        "bfloat16": dict(tp=2, **SHARED), "float16": dict(tp=2, pp=2),
        "float16 replicas": dict(tp=2, overflow=OVERFLOWS), "float16 shared": dict(tp=2, overflow=OVERFLOWS, **SHARED),
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> dict[str, list[list[float]]]:
    """Loss and gradient norm of every step of every case, all from one launch."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in ("untied", "tied"):
        tiny_thinker(tiny_config(layers=4, tied=name == "tied")).save_pretrained(folder / name)
    tiny_vl3(tiny_vl3_config(layers=6, tied=True)).save_pretrained(folder / "qwen3")
    tiny_omni3(tiny_omni3_config(layers=6)).save_pretrained(folder / "omni3")
    groups = {"frozen": FROZEN, "trained": TRAINED, "qwen3": QWEN3, "omni3": OMNI3, **HALF}
    cases = {f"{group}/{name}": legs for group, cases in groups.items() for name, legs in cases.items()}
    launch(layouts_world.main, 4, folder, cases, timeout=1700)
    return json.loads((folder / "curves.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", ["frozen", "trained", "qwen3", "omni3"])
def test_layouts_give_the_same_losses_and_gradients(curves, group):
    plain = curves[f"{group}/plain"]
    assert len(plain) == STEPS and max(norm for _, norm in plain) > 1 > min(norm for _, norm in plain)  # clipped or not
    assert abs(plain[0][0] - plain[-1][0]) > 0.1, "the losses have to move, or equal ones say little"
    worst = {
        name: [
            max(abs(ours[0] - theirs[0]) for ours, theirs in zip(curve, plain, strict=True)),
            max(abs(ours[1] / theirs[1] - 1) for ours, theirs in zip(curve, plain, strict=True)),
        ]
        for name, curve in curves.items()
        if name.startswith(group)
    }
    print(worst)  # shown by pytest -s
    assert {name: e for name, e in worst.items() if e[0] > TOLERANCE or e[1] > NORM_TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", HALF)
def test_half_precision_continues_bit_for_bit(curves, name):
    assert curves[f"{name}/whole"] == curves[f"{name}/continued"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["float16 replicas", "float16 shared"])
def test_one_replicas_overflow_is_every_ranks(curves, name):
    """All skip it and halve the scale (equal on all ranks, as the legs assert); what follows is float32's loss, a step
    behind."""
    norms, scales = ([step[k] for step in curves[f"{name}/whole"]] for k in (1, 2))
    assert [norm is None for norm in norms] == [step == OVERFLOWS for step in range(8)]
    assert scales == [FIRST_SCALE] * OVERFLOWS + [FIRST_SCALE / 2] * (8 - OVERFLOWS)
    losses, plain = ([step[0] for step in curve] for curve in (curves[f"{name}/whole"], curves["frozen/plain"]))
    assert losses[OVERFLOWS + 1] == losses[OVERFLOWS] != losses[OVERFLOWS - 1]
    assert max(abs(a - b) for a, b in zip(losses[: OVERFLOWS + 1], plain, strict=False)) < 1e-2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_float16_trains_as_float32_does(curves):
    """Through two stages: scaled losses give the first norm of float32 to its rounding, which AdamW then amplifies."""
    half, whole = curves["float16/whole"], curves["frozen/plain"]
    assert abs(half[0][0] - whole[0][0]) < 1e-3 and abs(half[0][1] / whole[0][1] - 1) < 2e-3
    assert max(abs(ours[0] - theirs[0]) for ours, theirs in zip(half[:5], whole, strict=False)) < 1e-2
