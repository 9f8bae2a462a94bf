"""The figures and the report, on a made-up run and on runs that lack parts."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from eval.demo import predictions_file
from eval.report import SYSTEMS, clips, facts, main, measurements, print_table, render, table, verdict
from eval.score import system_scores
from eval.scoring.predictions import correct, read_predictions
from megatron_avatar.data.manifest import load_manifest
from tests.eval.made_up import ATTACK, write_lines, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = write_run(tmp_path_factory.mktemp("run"))
    render(root)
    return root


class Page(HTMLParser):
    """Text, tags and attributes of a page; every tag must be closed that has to be."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_nothing_foreign_is_markup(run):
    html = (run / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags and "b" not in page.tags
    assert all(source.startswith(("data:image/jpeg;base64,", "data:audio/wav;base64,", "#")) for source in page.sources)
    text = "".join(page.text)
    for system in SYSTEMS:
        assert text.count(f"{system} says {ATTACK}") == 6  # shown as the system wrote it
    assert "Which shape is <b>red</b>? (0)" in text and "s<9>" in text and "clip.webm: damaged <file>" in text
    assert html.count("<table") == len(re.findall(r'<div class="wide">\s*<table', html)), "what is wide scrolls"
    ids = re.findall(r'\sid="([^"]+)"', html)
    clashing = {i for i in ids if ids.count(i) > 1 and not i.startswith("DejaVu")}
    referenced = set(re.findall(r'url\(#([^)]+)\)', html))
    assert not clashing & referenced


def test_the_table_is_that_of_the_predictions(run):
    text = "".join(Page((run / "report.html").read_text()).text)
    columns, rows = table(measurements(run))
    assert columns == ["overall", "what", "count", "sync", "where"] and [row[0] for row in rows][3] == "AVATAR"
    for system, (_, cells, in_format) in zip(SYSTEMS, rows, strict=True):
        right = [correct(p) for p in read_predictions(predictions_file(run, system))]
        assert cells[0].value == np.mean(right) and cells[0].low < cells[0].value < cells[0].high
        assert f"{100 * cells[0].value:.1f} %{cells[0].low * 100:.1f} – " in text
        assert in_format == float(system != "base")
    markdown = (run / "report.md").read_text()
    assert f"| AVATAR | {100 * rows[3][1][0].value:.1f} % (" in markdown
    answers = [line for line in markdown.splitlines() if line.startswith("|") and " says " in line]
    assert len(answers) == 24  # pipes and backticks of a completion cannot break the table
    assert all(line.count("|") == 4 and line.count("`") == 2 for line in answers)


def test_the_verdict_follows_the_paired_test(run, tmp_path):
    assert "AVATAR is ahead of GRPO" in verdict(measurements(run))
    assert verdict(measurements(run)) in "".join(Page((run / "report.html").read_text()).text)
    avatar, grpo = (read_predictions(predictions_file(run, name)) for name in ("avatar", "grpo"))
    write_lines(predictions_file(tmp_path, "avatar"), grpo)
    write_lines(predictions_file(tmp_path, "grpo"), avatar)
    assert "AVATAR is behind GRPO" in verdict(measurements(tmp_path))
    almost = [*grpo[:-1], {**grpo[-1], "scores": {"accuracy": 1 - correct(grpo[-1])}}]
    write_lines(predictions_file(tmp_path, "grpo"), almost)
    assert "does not tell the two apart" in verdict(measurements(tmp_path))


def test_clips_show_pictures_sound_and_all_systems(run):
    shown = clips(measurements(run))
    samples, answers = load_manifest(run / "data" / "manifest.jsonl"), read_predictions(predictions_file(run, "avatar"))
    right = {p["id"]: correct(p) == 1 for p in answers}
    wanted = [next(s.id for s in samples if s.stage == stage and right[s.id] == good)
              for stage in ("visual", "audio_visual", "localisation") for good in (True, False)]  # fmt: skip
    assert [clip.sample.id for clip in shown] == wanted
    assert shown[0].why == "visual, the first that AVATAR answered right" and shown[1].why.endswith("wrong")
    for clip in shown:
        assert len(clip.frames) == 8 and clip.trouble == [] and "<svg" in clip.sound
        assert [name for name, _ in clip.answers] == ["base", "SFT", "GRPO", "AVATAR"]
    picture = base64.b64decode(shown[0].frames[0].split(",")[1])
    assert picture[:3] == b"\xff\xd8\xff"  # JPEG
    html = (run / "report.html").read_text()
    assert html.count('src="data:image/jpeg') == 48 and html.count('aria-label="waveform"') == 6
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(shown[0].audio.split(",")[1])))
    assert rate == 16000 and len(wave) == 32000 and wave.std() > 0.1 and html.count("<audio controls") == 6


def test_every_table_scrolls_within_the_page_and_nothing_comes_from_elsewhere(run):
    html = (run / "report.html").read_text()
    assert html.count("<table") == html.count('<div class="wide"><table') + html.count('<div class="wide">\n<table')
    assert "default-src 'none'" in html and "media-src data:" in html and "http-equiv=\"refresh\"" not in html
    head = html[html.index("<thead>") : html.index("</thead>")]
    assert head.count("<th>") == 6, "systems side by side, families below one another: it fits whatever their number"


def test_a_damaged_clip_is_named_and_the_report_goes_on(run, tmp_path):
    root = write_run(tmp_path, items=8, steps=3)
    (root / "data" / "clip.webm").write_bytes(b"no video")
    (root / "data" / "clip.flac").unlink()
    for name in ("sft", "grpo", "avatar"):
        (root / name / "metrics.jsonl").unlink()
    render(root)
    text = "".join(Page((root / "report.html").read_text()).text)
    assert "no pictures: " in text and "no sound: " in text and "clip.flac" in text


def test_facts_are_those_of_results_json(run):
    known = dict(facts(measurements(run)))
    assert known["seed"] == "11" and known["completions generated, GRPO"] == "1,920"
    assert known["hinted, of AVATAR's visits"] == "12.5 %" and known["right, of the replayed"] == "50.0 %"
    assert known["without an advantage, of the replayed"] == "25.0 %", "over the steps that replayed"
    assert known["oldest replayed completion"] == "29 steps" and known["largest ratio of a replayed token"] == "3.9"
    assert known["time, GRPO"] == "3 min 20 s" and known["time, evaluations"] == "not measured"
    assert known["peak memory, all processes"] == "3,457 MiB" and known["torch"] == "2.13.0"
    assert "50 % fewer" in (run / "report.md").read_text()


def test_an_empty_run_says_what_was_not_measured(tmp_path):
    render(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    text = "".join(page.text)
    assert "AVATAR against GRPO: not measured." in text and "svg" not in page.tags
    assert text.count("not measured") > 15 and not re.search(r"\d+\.\d %", text)


def test_every_figure_is_drawn_and_written(run):
    expected = {"families", "curves", "solvability", "advantages", "surrogate_position", "tiers", "health"}
    expected |= {"step_time", "sft_loss", "replay"}
    assert {path.stem for path in (run / "figures").glob("*.png")} == expected
    for name in expected:
        pixels = imread(run / "figures" / f"{name}.png")[..., :3]
        assert pixels[0, 0].min() == 1.0 and pixels.std() > 0.05  # on white, and not empty
        assert ElementTree.parse(run / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert f"(figures/{name}.png)" in (run / "report.md").read_text()


def test_the_command_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0 and "report.html" in capsys.readouterr().out
    assert main([str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    predictions_file(tmp_path, "sft").parent.mkdir(parents=True)
    predictions_file(tmp_path, "sft").write_text("broken\n")
    assert main([str(tmp_path)]) == 2 and "held_out.ours.jsonl, line 1" in capsys.readouterr().err


def test_the_table_is_printed(run):
    from rich.console import Console

    scores = {name: system_scores(read_predictions(predictions_file(run, name))) for name in SYSTEMS}
    console = Console(record=True, width=120)
    print_table(json.loads(json.dumps({"systems": scores})), console)
    printed = console.export_text()
    assert "AVATAR" in printed and f"{100 * scores['grpo']['overall']:.1f}" in printed and "160" in printed
