"""One minute: three clips are made, two models answer, and the page holds all that one sees and hears."""

import pytest

from eval import try_it
from eval.scoring.predictions import correct, read_predictions
from tests.eval.test_report import Page


def test_the_clips_are_one_of_each_stage_with_sound(tmp_path):
    from megatron_avatar.data.manifest import load_manifest

    samples = load_manifest(try_it.make_clips(tmp_path, 7))
    assert [sample.stage for sample in samples] == list(try_it.STAGES)
    assert all(sample.media[0].audio_path and sample.split == "eval" for sample in samples)


def test_the_model_is_the_one_asked_for_or_the_demos_or_the_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--model .*: there is no config\.json of a model"):
        try_it.trained_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert try_it.trained_model(tmp_path) == tmp_path
    assert try_it.trained_model(None) == try_it.SHIPPED and (try_it.SHIPPED / "model.safetensors").is_file()
    try_it.OWN.mkdir(parents=True)
    (try_it.OWN / "config.json").write_text("{}")
    assert try_it.trained_model(None) == try_it.OWN


@pytest.mark.slow
def test_a_minute_ends_in_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert try_it.main(["--out", "out"]) == 0
    said = capsys.readouterr().out
    assert said.count("right answer:") == 3 and said.count("trained:") == 4 and "out/report.html" in said
    answers = read_predictions(tmp_path / "out" / "seed_2026" / "trained" / "held_out.ours.jsonl")
    assert sum(map(correct, answers)) >= 2
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert html.count("<audio controls") == 3 and html.count('src="data:image/jpeg') == 24 and "script" not in page.tags
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "prefers-color-scheme: dark" in style and "background: var(--page)" in style, "at night"
    assert "max-width: 40rem" in style and 'name="viewport"' in html, "on a telephone"
    assert try_it.main(["--out", "out", "--model", str(tmp_path)]) == 2


def test_paths_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(try_it, "answer", lambda manifest, out, name, model: out / name)
    monkeypatch.setattr(try_it, "make_clips", lambda out, seed: out / "manifest.jsonl")
    for name in ("[b]<i>", "[m]<u>"):
        (tmp_path / name).mkdir()
    (tmp_path / "[m]<u>" / "config.json").write_text("{}")
    monkeypatch.setattr("eval.scoring.predictions.read_predictions", lambda _: [])
    monkeypatch.setattr("megatron_avatar.data.manifest.load_manifest", lambda _: [])
    assert try_it.main(["--out", "[b]<i>", "--model", "[m]<u>"]) == 0
    assert "[b]<i>/report.html" in capsys.readouterr().out
    html = (tmp_path / "[b]<i>" / "report.html").read_text()
    assert "<code>[m]&lt;u&gt;</code>" in html and "<u>" not in html
