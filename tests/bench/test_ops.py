"""The GPU path stays short: what the counts of bench.ops may not exceed."""

import numpy as np
import pytest

from bench import ops
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.records import Prompt

# Operations of a layer's passes over a packed micro-batch: forward, backward.
UPDATE_OPS = {"one prompt": (17, 33), "two prompts": (22, 39)}
# Of Qwen3-Omni, whose experts are found, sorted and, of completions, compared with generation's.
MIXTURE_OPS = {"one prompt": (39, 53), "two prompts": (42, 59)}
# Bytes that those beside products and attention touch, a token and a number of the layer's widest row (the
# feed-forward's). Qwen3's heads are wider than its stream, and have norms. Each further prompt's queries and keys are
# cut out, and their gradients put together.
UPDATE_BYTES = {
    "3b": {"one prompt": (14.5, 23), "two prompts": (15, 25)},
    "7b": {"one prompt": (14.5, 23), "two prompts": (15, 25)},
    "vl3_4b": {"one prompt": (17.5, 30), "two prompts": (20, 36)},
    "omni3": {"one prompt": (48, 90), "two prompts": (51, 98)},  # rows go to eight experts and come back
}


@pytest.mark.parametrize("shape", ops.SHAPES)
def test_the_gpu_path_launches_few_operations(shape):
    with ops.shard(shape) as policy:
        found = ops.decode_step(policy) | ops.update_layer(policy) | ops.head_of(policy)
        logits, wide = ops.TOKENS * policy.vocab_size, ops.TOKENS * policy.config.ffn_hidden_size
        weights = 2 * policy.vocab_size * policy.config.hidden_size
    mixture = shape == "omni3"
    assert found["leaving_row_ops"] == 1
    assert found["decode_layer_ops"] <= (25 if mixture else 10) and found["decode_outer_ops"] <= (25 if mixture else 24)
    for packed, (forward, backward) in (MIXTURE_OPS if mixture else UPDATE_OPS).items():
        counted = found["update_layer_ops"][packed]
        assert counted["forward"] <= forward and counted["backward"] <= backward, (packed, counted)
    for packed, (forward, backward) in UPDATE_BYTES[shape].items():
        touched = found["update_layer_bytes"][packed]
        assert touched["forward"] < forward * wide and touched["backward"] < backward * wide, (packed, touched)
    # Forward each logit is read once, backward read once and written once in half precision, and little else.
    head = found["head_bytes"]
    assert head["forward"] < 1.1 * 4 * logits and head["backward"] < 1.1 * 6 * logits + 4 * weights, head


@pytest.mark.parametrize("packed", ops.PACKED)
def test_the_counted_micro_batches_are_packed_as_groups_are(packed):
    """`pack_groups` on as many prompts and tokens."""
    prompts = ops.PACKED[packed]
    prefix = ops.TOKENS // prompts // 2
    lengths = [prefix // ops.COMPLETIONS] * ops.COMPLETIONS
    prompt = Prompt("", "plain", np.zeros(prefix + 1, np.int64), np.zeros((3, prefix + 1), np.int64))
    batch = pack_groups([prompt] * prompts, [[np.zeros(n, np.int64) for n in lengths]] * prompts)
    assert batch.segments.tolist() == ops.segments_of(prompts).tolist() and len(batch) == ops.TOKENS


def test_a_later_call_of_generate_captures_nothing_again():
    found = ops.second_call()
    assert found["recaptures"] == 0 and sum(found["captures"]) > 0
    assert found["captures"][-1] == found["plain_steps"][-1] == 0 < found["plain_steps"][0]
    assert found["host_reads_a_token"] <= 1.2 and 0 < found["host_waits_a_token"] <= 0.1
