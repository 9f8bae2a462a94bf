"""The draw of one token a row: its distribution, what top_k and top_p leave, and the ends of what numbers can be."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.policy.kernels.draw import find
from megatron_avatar.policy.sampling import draw, stop_token_ids


def draws(sampling, logits, banned=(), count=4000):
    """How often each token comes out of evenly spaced uniform numbers, as shares; and the log-probabilities."""
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[list(banned)] = True
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids, scores, cut = draw(logits.expand(count, -1), uniforms, sampling, mask)
    full = torch.log_softmax(logits / sampling.temperature, -1)
    torch.testing.assert_close(scores, full[ids])  # whatever was banned or truncated
    shares = Counter(ids.tolist())
    # All rows are alike: what was cut off is what no uniform number leads to.
    possible = full.exp()[sorted(shares)].sum() / full.exp()[~mask].sum()
    torch.testing.assert_close(cut, (1 - possible).expand(count), atol=2e-3, rtol=0)
    return torch.tensor([shares[i] / count for i in range(len(logits))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_follows_the_distribution(temperature):
    logits = torch.randn(11, generator=torch.Generator().manual_seed(3)) * 2
    sampling = SamplingConfig(temperature=temperature)
    torch.testing.assert_close(draws(sampling, logits), (logits / temperature).softmax(-1), atol=1 / 4000, rtol=0)
    allowed = logits.clone()
    allowed[[2, 10]] = float("-inf")
    shares = draws(sampling, logits, banned=(2, 10))
    torch.testing.assert_close(shares, (allowed / temperature).softmax(-1), atol=1 / 4000, rtol=0)
    assert shares[2] == shares[10] == 0


@pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (0, 0.6), (5, 0.7), (0, 1e-9), (1, 1.0), (99, 1.0)])
def test_truncation_equals_transformers(top_k, top_p):
    logits = torch.randn(11, generator=torch.Generator().manual_seed(5)) * 2
    wanted = logits[None] / 0.9
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    shares = draws(SamplingConfig(temperature=0.9, top_k=top_k, top_p=top_p), logits)
    torch.testing.assert_close(shares, wanted[0].softmax(-1), atol=1 / 4000, rtol=0)


def test_top_p_is_a_share_of_what_top_k_left():
    """Of eleven tokens nearly alike four are left; half of their mass is two of them, half of all mass would be all."""
    shares = draws(SamplingConfig(top_k=4, top_p=0.5), torch.arange(11) * 0.01)
    torch.testing.assert_close(shares, torch.tensor([0.0] * 9 + [0.5, 0.5]), atol=5e-3, rtol=0)
    shares = draws(SamplingConfig(top_k=4, top_p=0.5), torch.arange(11) * 0.01, banned=(10, 9, 8))
    assert shares.nonzero().flatten().tolist() == [6, 7], "nor of what may not be drawn"


def test_extreme_uniforms_never_draw_a_banned_token():
    mask = torch.tensor([True, False, True, False, True])
    uniforms = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    ids, *_ = draw(torch.zeros(2, 5), uniforms, SamplingConfig(), mask)
    assert ids.tolist() == [1, 3]


def test_sums_that_fall_never_lead_to_a_token_without_mass():
    """A GPU adds up in parallel, so that neighbouring sums may come in the wrong order by a rounding error."""
    mass = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
    cdf = torch.tensor([[0.0, 0.5, 0.5 + 1e-9, 0.5 - 1e-9, 1.0]], dtype=torch.float64)
    uniform = torch.tensor([[0.5 + 5e-10]], dtype=torch.float64)
    assert torch.searchsorted(cdf, uniform, right=True).item() in (2, 3), "the case shows nothing"
    assert mass[0, find(mass, cdf, uniform).item()] > 0


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(top_k=3), SamplingConfig(top_p=0.5)])
def test_logits_that_are_no_numbers_draw_an_id_in_range(sampling):
    logits = torch.zeros(3, 5)
    logits[0] = float("nan")
    logits[1, 2] = float("inf")
    for uniforms in (torch.full((3,), 0.9, dtype=torch.float64), None):
        ids, scores, _ = draw(logits, uniforms, sampling, torch.tensor([False, False, False, False, True]))
        assert ((ids >= 0) & (ids < 5)).all() and scores.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(("config", "ends"), [
    (dict(model_type="qwen2_5_omni_thinker", eos_token_id=5, bos_token_id=3), [5]),
    (dict(model_type="qwen2_5_vl", eos_token_id=5, bos_token_id=3), [5, 3]),
    (dict(model_type="qwen3_vl", eos_token_id=[5, 6], bos_token_id=3), [5, 6, 3]),
    (dict(model_type="qwen3_vl", eos_token_id=5, bos_token_id=None), [5]),
    (dict(model_type="qwen3_vl", eos_token_id=5, bos_token_id=5), [5]),
])  # fmt: skip
def test_the_table_says_what_ends_a_completion(config, ends):
    text = SimpleNamespace(**{key: value for key, value in config.items() if key != "model_type"})
    policy = SimpleNamespace(hf_config=SimpleNamespace(model_type=config["model_type"], text_config=text))
    assert stop_token_ids(policy) == ends
