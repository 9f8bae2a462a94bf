"""The GPU path stays short: what the counts of bench.ops may not exceed."""

import pytest

from bench import ops

# Bytes that a layer's operations beside products and attention touch, a token of the packed group and a number of its
# widest row (the feed-forward's): forward, backward. Qwen3's heads are wider than its stream, and have norms.
ELEMENTWISE = {"3b": (14.5, 23), "7b": (14.5, 23), "vl3_4b": (17.5, 30)}


@pytest.mark.parametrize("shape", ops.SHAPES)
def test_the_gpu_path_launches_few_operations(shape):
    with ops.shard(shape) as policy:
        found = ops.decode_step(policy) | ops.update_layer(policy) | ops.head_of(policy)
        logits, wide = ops.TOKENS * policy.vocab_size, ops.TOKENS * policy.config.ffn_hidden_size
        weights = 2 * policy.vocab_size * policy.config.hidden_size
    assert found["decode_layer_ops"] <= 10 and found["decode_outer_ops"] <= 24
    assert found["update_layer_forward"] <= 17 and found["update_layer_backward"] <= 32
    touched, (forward, backward) = found["elementwise_bytes"], ELEMENTWISE[shape]
    assert touched["forward"] < forward * wide and touched["backward"] < backward * wide, touched
    # Forward each logit is read once, backward read once and written once in half precision, and little else.
    head = found["head_bytes"]
    assert head["forward"] < 1.1 * 4 * logits and head["backward"] < 1.1 * 6 * logits + 4 * weights, head


def test_a_later_call_of_generate_captures_nothing_again():
    found = ops.second_call()
    assert found["recaptures"] == 0 and sum(found["captures"]) > 0
    assert found["captures"][-1] == found["plain_steps"][-1] == 0 < found["plain_steps"][0]
    assert found["host_reads_a_token"] <= 1.2 and 0 < found["host_waits_a_token"] <= 0.1
