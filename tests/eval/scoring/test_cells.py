"""From prediction lines to headlines, breakdowns and comparisons, by hand."""

import numpy as np
import pytest

from eval.scoring.cells import cell, compare, headline, scored

ACCURACY = {"metric": "accuracy", "over": None, "merge": {}}


def line(item, value=1.0, k=0, metric="accuracy", **groups):
    groups = {name: [v] if isinstance(v, str) else v for name, v in groups.items()}
    return {"id": item, "k": k, "scores": {metric: value}, "groups": groups}


def run(*lines):
    return scored(lines)


def test_the_mean_over_items():
    assert headline(run(line("a"), line("b", 0.0), line("c", 0.5)), ACCURACY) == 0.5


def test_sampled_completions_of_an_item_are_one_item():
    found = cell({0: run(line("a", 1.0), line("a", 0.0, k=1), line("b", 1.0), line("b", 1.0, k=1))}, ACCURACY)
    assert (found.value, found.n) == (0.75, 2)


def test_the_mean_over_groups_with_some_merged_first():
    lines = [
        line("a", 1.0, task="easy"), line("b", 0.0, task="easy"), line("c", 1.0, task="hard"),
        line("d", 0.0, task="count"), line("e", 0.6, task="count"), line("f", 0.0, task="count"),
    ]  # fmt: skip
    # easy 1/2, hard 1, count 0.2: plain mean of three; or direction 3/4 and count
    assert headline(run(*lines), {**ACCURACY, "over": "task"}) == pytest.approx((0.5 + 1 + 0.2) / 3)
    merged = {"metric": "accuracy", "over": "task", "merge": {"direction": ["easy", "hard", "none such"]}}
    assert headline(run(*lines), merged) == pytest.approx((0.75 + 0.2) / 2)
    # one value of the breakdown is a mean over its items, whatever the headline is
    assert cell({0: run(*lines)}, merged, ("task", "count")).value == pytest.approx(0.2)


def test_an_item_may_have_several_values_of_a_breakdown_but_not_of_the_headlines():
    both = run(line("a", 1.0, ability=["ER", "TG"]), line("b", 0.0, ability=["TG"]))
    assert cell({0: both}, ACCURACY, ("ability", "ER")).value == 1.0
    assert cell({0: both}, ACCURACY, ("ability", "TG")).value == 0.5
    assert cell({0: both}, ACCURACY, ("ability", "Sum")) is None
    with pytest.raises(ValueError, match="a has the values .*exactly one"):
        headline(both, {**ACCURACY, "over": "ability"})


def test_the_root_of_the_mean_square():
    errors = run(line("a", 3.0, metric="rmse"), line("b", 4.0, metric="rmse"))
    found = cell({0: errors}, {"metric": "rmse", "over": None})
    assert found.value == pytest.approx(np.sqrt(12.5)) and 3.0 <= found.low <= found.high <= 4.0


def test_what_a_protocol_leaves_out_and_what_waits_for_a_judge_is_no_zero():
    part = scored([line("a"), line("b", None), {**line("c", 0.0), "counted": False}])
    assert part.left_out == 1 and part.ids == ["a", "b"]
    found = cell({0: part}, ACCURACY)
    assert (found.value, found.n) == (1.0, 1)
    assert cell({0: run(line("b", None))}, ACCURACY) is None
    assert cell({0: run()}, ACCURACY) is None


def test_seeds_and_items_are_matched_by_name():
    first = {0: run(line("a", 1.0), line("b", 1.0)), 1: run(line("b", 0.0), line("a", 1.0)), 3: run(line("a", 0.0))}
    second = {0: run(line("b", 0.0), line("a", 1.0)), 1: run(line("a", 0.0)), 2: run(line("a", 0.0))}
    found = compare(first, second, ACCURACY)
    # seed 0: a 0, b 1; seed 1: a 1; the others have no partner
    assert found.value == pytest.approx((0.5 + 1) / 2) and (found.n, found.seeds) == (3, 2)
    assert compare({0: first[0]}, {1: second[1]}, ACCURACY) is None
    assert cell(first, ACCURACY).value == pytest.approx((1.0 + 0.5 + 0.0) / 3)


def test_scores_that_are_missing_are_named():
    with pytest.raises(ValueError, match="no score 'oboa', only .*accuracy"):
        headline(run(line("a")), {"metric": "oboa"})
    with pytest.raises(ValueError, match="b has the scores .*'f1'"):
        run(line("a"), line("b", metric="f1"))
