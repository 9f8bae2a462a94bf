"""Every benchmark's small records in its owners' form give the scores that were computed by hand."""

import pytest

from eval import fixture
from eval.asking import benchmark
from eval.run import main


def test_every_benchmark_of_others_has_a_fixture():
    assert fixture.names() == [name for name in benchmark.names() if name != "held_out"]


@pytest.mark.parametrize("name", fixture.names())
def test_scores_are_those_computed_by_hand(name, tmp_path):
    assert set(fixture.load_fixture(name)["expected"]) == {"ours", "released"}
    rows = fixture.differences(name, tmp_path)
    assert any(what == "headline" for _, what, _, _ in rows)
    assert [row for row in rows if not fixture._same(*row[2:])] == []


def test_a_wrong_number_is_told(tmp_path, monkeypatch, capsys):
    fake = fixture.load_fixture("av_counting_ref")
    fake["expected"] = {"ours": {"headline": 50, "breakdowns": fake["expected"]["ours"]["breakdowns"]}}
    fake["expected"]["ours"]["breakdowns"]["type"].pop("V")  # a value of a breakdown that the person forgot
    monkeypatch.setattr(fixture, "load_fixture", lambda name: fake)
    rows = fixture.differences("av_counting_ref", tmp_path)
    wrong = {what: (measured, by_hand) for _, what, measured, by_hand in rows if not fixture._same(measured, by_hand)}
    assert wrong == {"headline": (pytest.approx(100 / 3), 50), "breakdowns.type.V": (0.0, None)}


def test_an_unknown_fixture_is_refused(capsys):
    assert main(["--fixture", "nothing"]) == 2 and main(["--fixture"]) == 2
    assert "choose all, or one of av_counting" in capsys.readouterr().err


def test_a_reply_to_no_item_is_refused(tmp_path, monkeypatch):
    fake = fixture.load_fixture("av_counting_ref")
    fake["replies"]["none"] = "B"
    monkeypatch.setattr(fixture, "load_fixture", lambda name: fake)
    with pytest.raises(ValueError, match="replies to \\['none'\\], which are no items"):
        fixture.differences("av_counting_ref", tmp_path)
