"""The GPU path stays short: what the counts of bench.ops may not exceed."""

import pytest

from bench import ops


@pytest.mark.parametrize("shape", ["3b", "vl3_4b"])
def test_a_decode_step_launches_few_operations(shape):
    """Norms of queries and keys cost no launch: they are part of the rotation."""
    with ops.shard(shape) as policy:
        found = ops.decode_step(policy) | ops.update_layer(policy)
    assert found["decode_layer_ops"] <= 10 and found["decode_outer_ops"] <= 24
    assert found["update_layer_forward"] <= 24 and found["update_layer_backward"] <= 40


def test_the_head_touches_each_logit_once():
    """Forward it is read once, backward read once and written once in half precision, and little else."""
    with ops.shard("3b") as policy:
        found, logits = ops.head_of(policy)["head_bytes"], ops.TOKENS * policy.vocab_size
    assert found["forward"] < 1.1 * 4 * logits and found["backward"] < 1.7 * 6 * logits


def test_a_later_call_of_generate_captures_nothing_again():
    found = ops.second_call()
    assert found["recaptures"] == 0 and found["captures_in_all"] > 0
    assert found["host_reads_a_token"] <= 1.2 and found["host_waits_a_token"] <= 0.1
