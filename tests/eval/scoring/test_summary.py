"""Headline, metrics, breakdowns and counts, computed by hand."""

import json
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from eval.asking.benchmark import Aggregate, Benchmark, Records, Source, load_benchmark
from eval.scoring.predictions import score_line
from eval.scoring.summary import as_json, show, summarise


def made(aggregate=None, items=0):
    records = Records(groups={"task": "task"})
    return Benchmark("made", source=Source(items=items), records=records, aggregate=aggregate or Aggregate())


def line(id, score, *, task="t", k=0, error=None, counted=True, **scores):
    tasks = task if isinstance(task, list) else [task]
    return {"id": id, "k": k, "scores": {"accuracy": score, **scores}, "groups": {"task": tasks}, "error": error,
            "counted": counted}  # fmt: skip


def test_a_plain_headline_is_the_mean_over_items():
    found = summarise(made(), [line("a", 1.0), line("b", 0.0, task="u"), line("c", 1.0, task="u"), line("d", 0.0)])
    assert found["headline"].value == 0.5 and found["headline"].n == 4
    assert {name: e.value for name, e in found["breakdowns"]["task"].items()} == {"t": 0.5, "u": 0.5}
    assert found["headline"].low < 0.5 < found["headline"].high


def test_a_headline_over_a_breakdown_with_values_merged_first():
    aggregate = Aggregate(over="task", merge={"direction": ["direction_easy", "direction_hard"]})
    easy = [line("a", 1.0, task="direction_easy"), line("b", 0.0, task="direction_easy")]
    lines = [*easy, line("c", 1.0, task="direction_hard"), line("d", 0.2, task="count"), line("e", 0.4, task="count")]
    found = summarise(made(aggregate), lines)
    assert found["headline"].value == pytest.approx(((0.5 + 1.0) / 2 + 0.3) / 2)  # 0.525
    assert found["metrics"]["accuracy"].value == pytest.approx(2.6 / 5)
    assert summarise(made(replace(aggregate, merge={})), lines)["headline"].value == pytest.approx((0.5 + 1 + 0.3) / 3)


def test_completions_of_an_item_count_as_their_mean():
    lines = [line("a", 1.0), line("a", 0.0, k=1), line("a", 0.0, k=2), line("b", 1.0, task="u")]
    found = summarise(made(), lines)
    assert found["headline"].value == pytest.approx((1 / 3 + 1) / 2) and found["headline"].n == 2
    assert found["breakdowns"]["task"]["t"].value == pytest.approx(1 / 3)
    assert found["counts"]["items"] == 2


def test_rmse_is_the_root_of_the_mean_square_also_over_completions():
    found = summarise(made(), [line("a", 0.0, mae=3, rmse=3), line("b", 0.0, mae=4, rmse=4)])
    assert found["metrics"]["rmse"].value == pytest.approx(12.5**0.5)
    assert found["metrics"]["mae"].value == 3.5
    twice = [line("a", 0.0, rmse=1), line("a", 0.0, k=1, rmse=7), line("b", 0.0, rmse=0)]
    assert summarise(made(), twice)["metrics"]["rmse"].value == pytest.approx((((1 + 49) / 2 + 0) / 2) ** 0.5)


def test_an_item_of_several_values_counts_in_each():
    found = summarise(made(), [line("a", 1.0, task=["x", "y"]), line("b", 0.0, task=["y"]), line("c", 0.0, task=[])])
    assert {name: e.value for name, e in found["breakdowns"]["task"].items()} == {"x": 1.0, "y": 0.5}
    assert found["headline"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("protocol", ["ours", "released"])
@pytest.mark.parametrize("error", [None, "damaged"])
def test_a_failed_item_has_no_answer_whatever_its_text_says(protocol, error):
    """The released script of this benchmark drops what failed; ours counts it as wrong."""
    asked = {"id": "a", "k": 0, "protocol": protocol, "kind": "number", "gold": "3", "text": "<answer>3</answer>"}
    asked |= {"choices": [], "letters": "", "keep": {}, "error": error}
    scored = score_line(load_benchmark("av_counting"), asked)
    assert scored["answer"] == (None if error else "3")
    assert scored["scores"]["accuracy"] == (0.0 if error else 1.0)
    assert scored["counted"] == (error is None or protocol == "ours")


def test_what_is_left_out_failed_or_not_judged_is_counted():
    failed = [line("b", 0.0, error="damaged"), line("c", 0.0, error="missing", counted=False, task="gone")]
    mute = line("a", 1.0) | {"without_sound": True}
    lines = [mute, *failed, line("d", None), line("d", 1.0, k=1), line("e", None, task="open")]
    found = summarise(made(items=9), lines)
    assert found["counts"] == {"items": 5, "expected": 9, "failed": 2, "left out": 1, "without sound": 1,
                               "not judged": 2}
    assert found["headline"].value == 0.5 and found["headline"].n == 2  # a and b: d is judged in part only
    assert set(found["breakdowns"]["task"]) == {"t"}


@pytest.mark.parametrize("over", ["", "task"])
def test_nothing_to_average_is_no_headline(over):
    found = summarise(made(Aggregate(over=over)), [line("a", None), line("b", 0.0, error="x", counted=False)])
    assert found["headline"] is None and found["metrics"] == {} and found["breakdowns"] == {"task": {}}


ANSWERS = st.lists(st.tuples(st.sampled_from("uvwxy"), st.lists(st.floats(0, 1), min_size=2, max_size=2)), min_size=1)


@given(ANSWERS, st.sampled_from([{}, {"m": ["u", "x"]}, {"m": ["u", "x", "v"], "n": ["w"]}]))
def test_a_headline_is_a_mean_of_means_of_means(answers, merge):
    lines = [line(f"i{n}", score, task=task, k=k) for n, (task, scores) in enumerate(answers)
             for k, score in enumerate(scores)]  # fmt: skip
    of_task = {name: mean([mean(scores) for task, scores in answers if task == name]) for name, _ in answers}
    units = [[name for name in names if name in of_task] for names in merge.values()]
    units += [[name] for name in of_task if not any(name in names for names in merge.values())]
    by_hand = mean([mean([of_task[name] for name in unit]) for unit in units if unit])
    shown = summarise(made(Aggregate(over="task", merge=merge)), lines)["headline"]
    assert shown.value == pytest.approx(by_hand) and shown.n == len(answers)


def test_what_is_shown():
    lines = [line("a", 1.0, mae=2.5, rmse=2.5), line("b", 0.0, mae=0, rmse=0, error="damaged")]
    console = Console(record=True, width=100)
    show(summarise(made(items=7), lines), "a title", console)
    text = console.export_text()
    assert "2 of 7 items (partial), 1 failed, 0 left out, 0 without sound, 0 not judged" in text
    rows = {cells[1].strip(): cells[2].strip() for row in text.splitlines() if len(cells := row.split("│")) > 3}
    assert (rows["headline"], rows["mae"], rows["rmse"], rows["task: t"]) == ("50.0 %", "1.2", "1.8", "50.0 %")


def test_the_owners_words_are_shown_as_they_are(capsys):
    """Nothing in them is read as markup, and nothing of them is lost."""
    lines = [line("a", 1.0, task="[audio] event"), line("b", 0.0, task="[/INST]")]
    show(summarise(made(), lines), "runs/[/x]")
    text = " ".join(capsys.readouterr().out.split())
    assert "task: [audio] event" in text and "task: [/INST]" in text and "runs/[/x]" in text


def test_a_summary_as_json():
    found = as_json(summarise(made(), [line("a", 1.0), line("b", 1.0)]))
    assert json.loads(json.dumps(found)) == found
    assert found["headline"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2, "seeds": 1}
