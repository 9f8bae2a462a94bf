"""The demo's ledger: what is reused, and what must not be."""

import pytest

from eval.demo import Ledger


def test_a_demo_is_continued_but_never_mixed_with_another(tmp_path):
    path, settings = tmp_path / "phases.json", {"seed": 0, "smoke": False}
    first = Ledger(path, settings)
    first.add({"sft": 2.0}, 100.0, done="1-sft")
    again = Ledger(path, settings)
    again.add({"sft": 1.0, "grpo": 4.0}, 50.0)
    assert again.state["done"] == ["1-sft"] and again.state["wall_s"] == {"sft": 3.0, "grpo": 4.0}
    assert again.state["peak_rss_mib"] == 100.0
    for other in ({"seed": 1, "smoke": False}, {"seed": 0, "smoke": True}):
        with pytest.raises(ValueError, match="remove that folder"):
            Ledger(path, other)
