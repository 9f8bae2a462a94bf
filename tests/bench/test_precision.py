"""The simulated error between generation and training, on a small decoder: its keys, and what has to come out."""

import json
import math

import pytest
import torch

from bench import precision
from bench.timing import RESULTS


@pytest.fixture(scope="module")
def found():
    return precision.measure(precision.TINY, 1)


def test_each_choice_has_a_sure_and_a_random_head(found):
    assert {name for name in found if name not in ("entropy", "default")} == set(precision.CHOICES)
    assert all(found[name].keys() == {"sure", "random"} for name in precision.CHOICES)
    assert 0.5 <= found["entropy"]["sure"] <= 1 < found["entropy"]["random"] and found["default"] in precision.CHOICES
    json.dumps(found)


def test_rounding_less_differs_less_and_the_same_sums_not_at_all(found):
    for kind in ("sure", "random"):
        assert found["bfloat16, no sum differs"][kind] == 1
        assert found["float32"][kind] < 1 + 1e-5 < found[found["default"]][kind]
        assert found["float16, residual float32"][kind] - 1 < (found["bfloat16, residual float32"][kind] - 1) / 3
    assert found["bfloat16, residual float32"]["random"] < found["bfloat16"]["random"]


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_both_attentions_are_attention(tokens):
    query, key, value = torch.randn(3, 2, tokens, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    for ours in (precision.attend_blocks(query, key, value, precision._same, 16),
                 precision.attend_pages(query, key, value, precision._same, 12)):  # fmt: skip
        assert (ours - expected).abs().max() < 1e-5


def test_the_kept_result_holds_what_the_default_promises():
    kept = json.loads((RESULTS / "precision.json").read_text())
    assert kept["default"] == precision.DEFAULT and kept[kept["default"]]["sure"] < 1.004
    assert all(math.isfinite(kept[name][kind]) for name in precision.CHOICES for kind in ("sure", "random"))
