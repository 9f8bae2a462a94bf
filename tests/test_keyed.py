"""Keyed randomness keeps its numbers: runs, results and resumed runs depend on every bit of them."""

from __future__ import annotations

from megatron_avatar.keyed import keyed_rng


def test_a_key_draws_the_same_numbers_for_ever():
    assert keyed_rng(0, "visual", 3, "revisit").integers(0, 2**62, 2).tolist() == [
        1519468005274399310, 1806245353808757651,
    ]  # fmt: skip


def test_only_the_key_counts():
    first = keyed_rng(1, "a").random(3).tolist()
    keyed_rng("another").random(100)
    assert keyed_rng("1/a").random(5)[:3].tolist() == first != keyed_rng(1, "b").random(3).tolist()
