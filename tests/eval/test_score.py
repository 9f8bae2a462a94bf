"""Accuracy, intervals and the paired comparison."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.score import rescore, system_scores
from eval.scoring.predictions import correct, majority_scores, read_predictions
from eval.scoring.stats import estimates, paired_difference


def prediction(key, family="what", right=1.0, gold="A", text="<think>t</think><answer>A</answer>", **other):
    return {
        "id": str(key), "k": 0, "benchmark": "held_out", "protocol": "ours", "settings": "s", "kind": "choice",
        "gold": gold, "choices": ["red", "blue"], "letters": "AB", "keep": {}, "text": text, "answer": "A",
        "groups": {"stage": ["visual"], "family": [family]}, "scores": {"accuracy": right}, "format": 1.0,
        "error": None, "counted": True, **other,
    }  # fmt: skip


def system(values, family="what"):
    return [prediction(i, family, float(v)) for i, v in enumerate(values)]


def test_scores_by_family_and_over_all_samples():
    predictions = [prediction(0), prediction(1, right=0.0), prediction(2, "count"), prediction(3, "count")]
    assert system_scores(predictions) == {"overall": 0.75, "what": 0.5, "count": 1.0, "n": 4}


def test_intervals_agree_with_scipy():
    values = np.random.default_rng(1).random(80) < 0.3
    ours = estimates(system(values))["overall"]
    theirs = stats.bootstrap(
        (values.astype(float),), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == values.mean() and ours.n == 80
    assert ours.low == pytest.approx(theirs.low, abs=0.0126) and ours.high == pytest.approx(theirs.high, abs=0.0126)


def test_a_real_difference_is_found_and_no_difference_is_not():
    random = np.random.default_rng(0)
    weak = random.random(300) < 0.4
    strong = weak | (random.random(300) < 0.2)
    found = paired_difference(system(strong), system(weak))
    assert found.value == pytest.approx(strong.mean() - weak.mean()) and found.low > 0 and found.p < 0.01
    same = paired_difference(system(weak), system(weak))
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    mirrored = paired_difference(system(weak), system(strong))
    assert mirrored.value == -found.value and mirrored.p == pytest.approx(found.p, abs=0.01)


def test_the_p_value_agrees_with_a_sign_flip_test():
    random = np.random.default_rng(3)
    a, b = random.random(200) < 0.55, random.random(200) < 0.45
    ours = paired_difference(system(a), system(b)).p
    theirs = stats.permutation_test(
        (a.astype(float), b.astype(float)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=9999, rng=np.random.default_rng(4),
    ).pvalue  # fmt: skip
    assert ours == pytest.approx(theirs, abs=0.02)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_intervals_hold_the_estimate(values):
    found = estimates(system(values))["overall"]
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_different_samples_cannot_be_compared():
    with pytest.raises(ValueError, match="'2'"):
        paired_difference(system([1, 0, 1]), system([1, 0]))
    with pytest.raises(ValueError, match="same samples"):
        paired_difference([], [])


def test_rescoring_reads_the_text_again_and_keeps_failures_wrong(tmp_path):
    path = tmp_path / "held_out.ours.jsonl"
    lines = [prediction(0, right=0.0), prediction(1, gold="B"), prediction(2, right=1.0, error="damaged")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [correct(p) for p in rescore(path)] == [1.0, 0.0, 0.0]
    assert [correct(p) for p in read_predictions(path)] == [1.0, 0.0, 0.0]


def test_the_most_frequent_answer_is_the_floor():
    predictions = [prediction(i, gold="A" if i < 3 else "B") for i in range(4)] + [prediction(9, "count", gold="2")]
    assert majority_scores(predictions) == {"overall": 0.8, "what": 0.75, "count": 1.0}


def test_predictions_are_read_with_the_line_of_a_fault(tmp_path):
    path = tmp_path / "avatar.jsonl"
    lines = [json.dumps(prediction(i)) for i in range(2)]
    path.write_text("\n".join(lines) + "\n")
    assert [p["id"] for p in read_predictions(path)] == ["0", "1"]
    for extra in (lines[0], '{"id": ', "3"):
        path.write_text("\n".join([*lines, extra]) + "\n")
        with pytest.raises(ValueError, match=r"avatar.jsonl, line 3"):
            read_predictions(path)
