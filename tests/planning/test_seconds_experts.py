"""What a plan says of a mixture's time, against counts by hand and the bytes that its passes touch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bench.ops import Counted
from megatron_avatar.config.load import CONFIG_DIR, load_config
from megatron_avatar.planning import seconds
from megatron_avatar.planning.seconds import PRODUCT_GAP, forward_flops, read_rates, read_weights, step_seconds
from megatron_avatar.planning.work import Work
from megatron_avatar.policy.mixture import _Experts, sort_rows
from megatron_avatar.policy.shape import read_shape

LAYERS, HIDDEN, INNER, EXPERTS, TOP, VOCABULARY = 48, 2048, 768, 128, 8, 152_064
ATTENTION = HIDDEN * (32 + 4 + 4) * 128 + 32 * 128 * HIDDEN  # queries, keys and values, and what comes out of them
EXPERT = 3 * HIDDEN * INNER
WORK = Work(True, False, 0, 0, 1000, 10, 2, (4, 4), 1 << 20)


def shape_of(**text):
    shape = read_shape(CONFIG_DIR / "shapes" / "qwen3_omni_30b")
    vars(shape.text_config).update(text)
    return shape


def config_of(*overrides, recipe="omni3"):
    return load_config([f"recipe={recipe}", "dry_run=true", "cluster.calibration=none", *overrides])


def parts(*overrides, work=WORK, rates=None, shape=None, **kwargs):
    config = config_of(*overrides, **kwargs)
    return step_seconds(config, shape or shape_of(), work, 1, 1, rates or read_rates(config))


def test_a_token_is_computed_by_the_experts_that_it_is_given_to():
    """And by the router, whose products all experts have."""
    flops = forward_flops(shape_of(), 5, 7, 3)
    feed_forward = LAYERS * 5 * 2 * (TOP * EXPERT + HIDDEN * EXPERTS)
    assert flops.feed_forward == feed_forward
    assert flops.layers == feed_forward + LAYERS * (5 * 2 * ATTENTION + 7 * 32 * 128 * 2 * 2)
    assert flops.head == 3 * 2 * HIDDEN * VOCABULARY


@pytest.mark.parametrize(("experts", "top", "rows"), [(4, 2, 1), (4, 2, 2), (4, 2, 3), (5, 3, 2), (3, 1, 4)])
def test_a_decode_step_reads_the_experts_that_any_row_meets(experts, top, rows):
    """Their number, averaged over every way in which so many rows can choose."""
    ways = list(itertools.product(itertools.combinations(range(experts), top), repeat=rows))
    met = sum(len(set(itertools.chain(*way))) for way in ways) / len(ways)
    weights = LAYERS * (ATTENTION + HIDDEN * experts + met * EXPERT) + HIDDEN * VOCABULARY
    assert read_weights(shape_of(num_experts=experts, num_experts_per_tok=top), rows) == pytest.approx(weights)


def test_a_dense_step_reads_each_weight_once():
    shape = read_shape(CONFIG_DIR / "shapes" / "qwen3_vl_4b")
    attention = 2560 * (32 + 8 + 8) * 128 + 32 * 128 * 2560
    assert read_weights(shape, 64) == 36 * (attention + 3 * 2560 * 9728) + 2560 * shape.text_config.vocab_size


def test_decoding_takes_the_time_of_reading_the_experts():
    """8 rows on 16 GPUs, stages of 4 rows: bytes of weights and caches over a rank's share of the bandwidth."""
    rates = replace(read_rates(config_of()), layer_gap=0, graph_gap=0, reduce_gap=0, links=1e30)
    met = EXPERTS * (1 - (1 - TOP / EXPERTS) ** 4)
    weights = LAYERS * (ATTENTION + HIDDEN * EXPERTS + met * EXPERT) + HIDDEN * VOCABULARY
    caches = 2 * 4 * 128 * LAYERS * (1000 + 4 * 5)  # a lane's prompt, and its rows at half of their length
    assert parts(rates=rates)["decode"] == pytest.approx(10 * 2 * (weights + caches) / 8 / rates.bandwidth)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", ["omni3", "omni3_lora"])
def test_rows_move_as_many_bytes_as_the_passes_touch(recipe, ranks):
    """Counted by the dispatcher over the experts' own passes, products apart; shares and orders are a few bytes a row.
    """
    tokens, own = 512, EXPERTS // ranks
    config = config_of(f"parallel.tp={ranks}", "parallel.pp=1", "parallel.sequence_parallel=false",
                       "cluster.gpus=0", recipe=recipe)  # fmt: skip
    rates, like = replace(read_rates(config), bandwidth=1.0), dict(dtype=torch.bfloat16, device="meta")
    x, shares = (torch.empty(tokens, n, **like).requires_grad_() for n in (HIDDEN, TOP))
    weights = [torch.empty(own * rows, columns, **like).requires_grad_(recipe == "omni3")
               for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER))]  # fmt: skip
    chosen, borders = (torch.empty(n, dtype=torch.int64, device="meta") for n in ((tokens, TOP), own))
    with Counted() as forward:
        out = _Experts.apply(x, shares, *weights, sort_rows(chosen, 0, borders, EXPERTS))
    grad = torch.empty_like(out)
    with Counted() as backward:
        out.backward(grad)
    there = seconds.experts_seconds(config, shape_of(), tokens, rates) / LAYERS
    back = seconds.experts_backward_seconds(config, shape_of(), tokens, 0, rates) / LAYERS
    assert there == pytest.approx(forward.bytes, rel=0.02) and back == pytest.approx(backward.bytes, rel=0.02)
    # Added to a buffer: a gradient in bfloat16 is read, a number in float32 read and written.
    added = seconds.experts_backward_seconds(config, shape_of(), tokens, 3, rates) / LAYERS - back
    assert added == pytest.approx(3 * own * EXPERT * 10 * (recipe == "omni3"))
    dense = read_shape(CONFIG_DIR / "shapes" / "qwen3_vl_4b")
    assert seconds.experts_seconds(config, dense, tokens, rates) == 0
    assert seconds.experts_backward_seconds(config, dense, tokens, 3, rates) == 0


@pytest.mark.parametrize(("recompute", "forward"), [("none", 1), ("light", 1), ("selective", 2), ("full", 2)])
def test_rows_move_in_every_pass(recompute, forward):
    """Beside what they compute: in reading, scoring, and an update's passes, those that are computed again too."""
    config = config_of("parallel.pp=1", f"parallel.recompute={recompute}")
    fast = replace(read_rates(config), bandwidth=1e30)
    slow = replace(fast, bandwidth=1e6)
    packed = sum(tokens for tokens, *_ in WORK.counts())
    there = seconds.experts_seconds(config, shape_of(), packed, slow)
    back = seconds.experts_backward_seconds(config, shape_of(), packed, len(WORK.counts()), slow)
    read = seconds.experts_seconds(config, shape_of(), 2 * WORK.prompt, slow)
    usual, slower = (parts("parallel.pp=1", f"parallel.recompute={recompute}", rates=rates) for rates in (fast, slow))
    updates = config.rl.updates_per_rollout
    for part, moved in {"read prompts": read, "reference": there, "update": updates * (forward * there + back)}.items():
        assert slower[part] - usual[part] == pytest.approx(moved, rel=1e-2), part


@pytest.mark.parametrize(("overrides", "captured"), [
    ([], True), (["cluster.gpu=h200"], True), (["cluster.gpu=a100"], False), (["model.dtype=float16"], False),
    (["model.dtype=float32"], False),
])  # fmt: skip
def test_graphs_are_lost_where_torch_goes_through_the_experts(overrides, captured):
    """As `stays_on_device` (policy/mixture.py) says of devices and dtypes. Sixteen experts a rank, two products each.
    """
    config = config_of("parallel.pp=1", *overrides)
    rates = replace(read_rates(config), bandwidth=1e30, train=1e30, forward=1e30, links=1e30, reduce_gap=0)
    found = parts("parallel.pp=1", *overrides, rates=rates)
    host = rates.layer_gap + (0 if captured else 2 * EXPERTS / 8 * PRODUCT_GAP)
    assert found["decode"] == pytest.approx(10 * LAYERS * (rates.graph_gap if captured else host))
    assert found["read prompts"] == pytest.approx(LAYERS * host)
    assert found["reference"] == pytest.approx(LAYERS * host * len(WORK.counts()))
    dense = read_shape(CONFIG_DIR / "shapes" / "qwen3_vl_4b")
    assert not seconds.one_by_one(config, dense, rates) and seconds.layer_gap(config, dense, rates) == rates.layer_gap


def test_the_plan_knows_the_gpus_whose_grouped_products_stay_there(monkeypatch):
    """Compute capabilities of the GPUs that are planned for, asked of the policy."""
    from megatron_avatar.policy.mixture import stays_on_device

    for gpu, capability in {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        for dtype in ("bfloat16", "float16", "float32"):
            config = config_of(f"cluster.gpu={gpu}", f"model.dtype={dtype}")
            assert stays_on_device(getattr(torch, dtype)) != seconds.one_by_one(config, shape_of(), read_rates(config))
