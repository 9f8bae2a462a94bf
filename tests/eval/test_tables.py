"""Tables from a hand-made folder: cells by hand, refusals, and that a published number never shows as measured."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from eval.paper import FOLDER, paper, published, render, spec
from eval.tables import build_all, main

SWEEPS = Path(__file__).parents[2] / "slurm" / "sweeps"


def put(out, system, benchmark, right, family="omni_7b", seed=0, items=None, groups=None, lines=None, **meta):
    """Predictions of one run: `right` holds the items' scores in order; `lines` and `meta` change what is written."""
    folder = out / "predictions" / family / system / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "benchmark": benchmark, "protocol": "ours", "control": "", "n": 1, "temperature": 0, "system": system,
        "family": family, "seed": seed, "model": f"models/{system}", "settings": "0123456789abcdef", "quirks": [],
        "dataset": {"name": f"owner/{benchmark}", "revision": "r1", "fingerprint": "f1",
                    "items": items or len(right), "expected": items or len(right)},
        "aggregate": {"metric": "accuracy", "over": None, "merge": {}}, **meta,
    }  # fmt: skip
    found = [
        {
            "id": f"q{i}", "k": 0, "benchmark": benchmark, "protocol": meta["protocol"], "settings": meta["settings"],
            "scores": {"accuracy": value}, "groups": {"task_type": [groups[i] if groups else "x"]}, "error": None,
            **(lines or {}).get(i, {}),
        }
        for i, value in enumerate(right)
    ]  # fmt: skip
    path = folder / f"{benchmark}.{meta['protocol']}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    path.with_suffix(".meta.json").write_text(json.dumps(meta))
    return path


def tables(out, **other):
    return {table["name"]: table for table in build_all(out, **other)}


def the_cell(table, setting, column):
    (row,) = (row for row in table["rows"] if row["setting"] == setting)
    return row["cells"][column]


def written(out, *arguments):
    """Name with ending -> text of every file that the command writes."""
    assert main([str(out), *arguments]) == 0
    return {path.name: path.read_text() for path in (out / "tables").iterdir()}


def markdown_tables(text):
    """Every table of a Markdown page as a list of {heading: cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert len({len(row) for row in rows}) == 1
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


class Cells(HTMLParser):
    """Every table of a page as rows of texts; all tags that open must close."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tables, self.loose = [], [], ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        if tag == "meta":
            return
        self.stack.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1] += [""] * int(dict(attributes).get("colspan", 1))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        else:
            self.loose += data


# ---- cells by hand ---------------------------------------------------------------------------------------------


def test_cells_by_hand(tmp_path):
    put(tmp_path, "base", "omnibench", [1.0, 0.0, 0.0, 0.0])
    put(tmp_path, "grpo", "omnibench", [1.0, 1.0, 0.0, 0.0])
    put(tmp_path, "grpo", "omnibench", [1.0, 1.0, 1.0, 0.0], seed=1)
    (tmp_path / "runs/omni_7b/grpo/seed_0").mkdir(parents=True)
    (tmp_path / "runs/omni_7b/grpo/seed_0/done.json").write_text('{"steps": 400}')
    table = tables(tmp_path)["av"]
    base, grpo = the_cell(table, "Qwen2.5-Omni", "OmniBench"), the_cell(table, "+ GRPO", "OmniBench")
    assert (base["measured"], base["paper"], base["n"]) == (25.0, 44.2, 4)
    assert base["difference"] == pytest.approx(25.0 - 44.2) and base["against_baseline"] is None
    assert (grpo["measured"], grpo["n"], grpo["seeds"], grpo["answered"], grpo["expected"]) == (62.5, 8, [0, 1], 8, 8)
    assert grpo["low"] < 62.5 < grpo["high"] and not grpo["partial"]
    # The untrained model's one run stands beside both seeds: (2 - 1) / 4 and (3 - 1) / 4.
    assert grpo["against_baseline"]["value"] == pytest.approx(37.5) and grpo["against_baseline"]["seeds"] == 2
    assert 0 < grpo["against_baseline"]["p"] <= grpo["against_baseline"]["holm"] <= 1
    assert grpo["files"] == [f"omni_7b/grpo/seed_{seed}/omnibench.ours.jsonl" for seed in (0, 1)]
    (row,) = (row for row in table["rows"] if row["setting"] == "+ GRPO")
    assert (row["system"], row["models"], row["updates"]) == ("grpo", ["models/grpo"], [400])
    assert the_cell(table, "+ GRPO", "DailyOmni")["measured"] is None
    text = written(tmp_path)["av.md"]
    assert "400 updates" in text and "models/grpo" in text and "family omni\\_7b, protocol ours, control none" in text


def test_a_trained_baseline_is_compared_on_shared_seeds_alone(tmp_path):
    put(tmp_path, "sft", "mmvu", [0.0, 0.0])
    for seed in (0, 1):
        put(tmp_path, "curriculum_stage_1", "mmvu", [1.0, float(seed)], seed=seed)
    cell = the_cell(tables(tmp_path)["curriculum"], "SFT + stage 1", "MMVU")
    assert cell["measured"] == 75.0 and (cell["against_baseline"]["value"], cell["against_baseline"]["n"]) == (50.0, 2)


def test_a_breakdown_and_a_mean_over_groups(tmp_path):
    tasks = ["Hallucination", "Hallucination", "Audio Change", "x", "x", "x"]
    put(tmp_path, "grpo", "worldsense", [1.0, 0.0, 1.0, 0.0, 0.0, 0.0], groups=tasks)
    over = {"metric": "accuracy", "over": "task_type", "merge": {"both": ["Hallucination", "Audio Change"]}}
    put(tmp_path, "grpo", "vsi_bench", [1.0, 0.0, 1.0, 0.3, 0.3, 0.3], groups=tasks, aggregate=over)
    found = tables(tmp_path)
    assert the_cell(found["table1"], "Baseline GRPO", "Hallucination")["measured"] == 50.0
    assert the_cell(found["table1"], "Baseline GRPO", "Audio Change")["measured"] == 100.0
    assert the_cell(found["table1"], "Baseline GRPO", "Temporal Prediction")["measured"] is None
    assert the_cell(found["table4"], "+ GRPO", "VSI-Bench")["measured"] == pytest.approx(100 * (0.75 + 0.3) / 2)


def test_the_first_of_equal_systems_fills_a_row(tmp_path):
    put(tmp_path, "components_avatar", "omnibench", [1.0, 0.0])
    put(tmp_path, "shaping_parabolic", "omnibench", [1.0, 1.0])
    found = tables(tmp_path)
    assert the_cell(found["av"], "+ AVATAR", "OmniBench")["measured"] == 50.0
    assert the_cell(found["shaping"], "parabolic (TAS)", "OmniBench")["measured"] == 100.0


def test_partial_results_say_so(tmp_path):
    put(tmp_path, "base", "omnibench", [1.0, 0.0], items=1142)
    path = put(tmp_path, "grpo", "omnibench", [1.0, 0.0, None], items=1142)
    path.write_text(path.read_text() + '{"id": "q9", "k": 0, "bench')  # a line that is being written
    table = tables(tmp_path)["av"]
    cell = the_cell(table, "+ GRPO", "OmniBench")
    assert cell["partial"] and (cell["measured"], cell["answered"], cell["expected"]) == (50.0, 2, 1142)
    assert "OmniBench, + GRPO: 1 answers wait for a judge and aren't counted yet." in table["notes"]
    files = written(tmp_path)
    for ending in ("md", "tex", "html"):
        assert "partial 2/1142" in files[f"av.{ending}"]
    (line,) = (r for r in csv.DictReader(files["av.csv"].splitlines()) if r["n"] == "2" and r["system"] == "grpo")
    assert (line["partial"], line["answered"], line["expected"]) == ("True", "2", "1142")


def test_a_changed_data_set_and_what_the_protocol_leaves_out_are_noted(tmp_path):
    data = {"name": "o/mmvu", "revision": "r2", "fingerprint": "f", "items": 2, "expected": 1000}
    put(tmp_path, "base", "mmvu", [1.0, 0.0], dataset=data, quirks=["answers of more than 20 tokens are cut"],
        lines={0: {"without_sound": True}, 1: {"counted": False}})  # fmt: skip
    table = tables(tmp_path)["video"]
    cell = the_cell(table, "Qwen2.5-Omni", "MMVU")
    assert (cell["measured"], cell["n"], cell["answered"], cell["partial"]) == (100.0, 1, 2, True)
    assert "mmvu: the data set has 2 items where 1,000 are expected." in table["notes"]
    assert any("MMVU, Qwen2.5-Omni: 1 answers without the clip's sound" in note for note in table["notes"])
    assert any("1 answers are left out of the denominator" in note for note in table["notes"])
    for ending, text in written(tmp_path).items():
        if ending in ("video.md", "video.tex", "video.html"):
            assert "answers of more than 20 tokens are cut" in text and "revision r2" in text


def test_the_other_protocol_has_tables_of_its_own(tmp_path):
    put(tmp_path, "base", "omnibench", [1.0], protocol="released")
    put(tmp_path, "base", "omnibench", [0.0])
    assert the_cell(tables(tmp_path)["av"], "Qwen2.5-Omni", "OmniBench")["measured"] == 0.0
    files = written(tmp_path, "--protocol", "released", "--family", "omni_7b")
    (table,) = (t for t in json.loads(files["tables-released.json"]) if t["name"] == "av")
    assert the_cell(table, "Qwen2.5-Omni", "OmniBench")["measured"] == 100.0
    assert "protocol released" in files["av-released.md"] and "table3-released.md" not in files


def test_a_tiny_models_tables_show_no_benchmark_and_no_published_value(tmp_path):
    for system, right in (("grpo", [1.0, 0.0, 0.0, 0.0]), ("avatar", [1.0, 1.0, 1.0, 0.0])):
        put(tmp_path, system, "held_out", right, family="tiny",
            lines={i: {"groups": {"stage": [stage]}} for i, stage in
                   enumerate(["visual", "visual", "audio_visual", "localisation"])})  # fmt: skip
    found = tables(tmp_path)
    table = found["small_table1"]
    assert the_cell(table, "AVATAR (Full)", "overall")["measured"] == 75.0
    assert the_cell(table, "AVATAR (Full)", "visual")["measured"] == 100.0
    assert the_cell(table, "AVATAR (Full)", "localisation")["measured"] == 0.0
    assert the_cell(table, "AVATAR (Full)", "overall")["against_baseline"]["value"] == 50.0
    gains = {row["setting"]: row["paper_gain"] for row in table["rows"]}
    assert gains["AVATAR (Full)"] == pytest.approx((51.2 - 35.6 + 57.2 - 53.6 + 37.3 - 32.5) / 3)
    assert gains["Baseline GRPO"] is None
    small = [table for name, table in found.items() if name.startswith("small_")]
    assert {"small_av", "small_equal_effort"} <= {table["name"] for table in small}
    columns = {name for plan in spec()["tables"].values() for name in plan.get("columns", {})}
    for table in small:
        assert not re.search("WorldSense|7B|3B", table["title"])
        assert not columns & {column["name"] for column in table["columns"]}
        assert all(cell["paper"] is None for row in table["rows"] for cell in row["cells"].values())
        assert not any(row["out_of_scope"] for row in table["rows"])
    overview, details = markdown_tables(written(tmp_path)["small_table1.md"])
    assert overview[3]["paper: difference to baseline, mean over its benchmarks"] == "+8.0"
    assert not any("paper" in heading for heading in details[0])


# ---- refusals --------------------------------------------------------------------------------------------------


def refused(out, *words):
    with pytest.raises(ValueError) as found:
        build_all(out)
    for word in words:
        assert word in str(found.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"protocol": "released"}, "protocol 'released'"),
        ({"benchmark": "mmvu"}, "benchmark 'mmvu'"),
        ({"settings": "ffff"}, "settings 'ffff'"),
    ],
)
def test_a_line_of_another_kind_is_refused(tmp_path, change, word):
    put(tmp_path, "base", "omnibench", [1.0, 0.0], lines={1: change})
    refused(tmp_path, "base/seed_0/omnibench.ours.jsonl, line 2", word, "evaluate anew")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"protocol": "released"}, "released"), ({"benchmark": "mmvu"}, "mmvu"), ({"system": "grpo"}, "grpo"),
        ({"seed": 3}, "3"), ({"family": "tiny"}, "tiny"), ({"control": "mute"}, "mute"), ({"n": 8}, "-g8"),
    ],
)  # fmt: skip
def test_a_meta_that_belongs_elsewhere_is_refused(tmp_path, change, word):
    path = put(tmp_path, "base", "omnibench", [1.0])
    meta = path.with_suffix(".meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    refused(tmp_path, "omnibench.ours.meta.json", word)


def test_a_missing_or_damaged_meta_is_refused(tmp_path):
    path = put(tmp_path, "base", "omnibench", [1.0]).with_suffix(".meta.json")
    kept = json.loads(path.read_text())
    del kept["dataset"]["fingerprint"]
    path.write_text(json.dumps(kept))
    refused(tmp_path, "omnibench.ours.meta.json", "fingerprint")
    path.write_text("{")
    refused(tmp_path, "omnibench.ours.meta.json", "damaged")


@pytest.mark.parametrize("other", ["system", "seed"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dataset": {"name": "owner/omnibench", "revision": "r", "fingerprint": "f2", "items": 1, "expected": 1}},
         "dataset.fingerprint 'f1' and 'f2'"),
        ({"temperature": 1.0}, "temperature 0 and 1.0"),
        ({"aggregate": {"metric": "accuracy", "over": "task_type", "merge": {}}}, "aggregate"),
        ({"new_tokens": 20}, "new_tokens None and 20"),
        ({"data": {"max_frames": 8, "workers": 3}}, "data.max_frames None and 8"),
    ],
)  # fmt: skip
def test_what_was_measured_otherwise_stands_in_no_cell_or_column(tmp_path, other, change, word):
    put(tmp_path, "base", "omnibench", [1.0])
    put(tmp_path, "base" if other == "seed" else "grpo", "omnibench", [1.0], seed=int(other == "seed"), **change)
    refused(tmp_path, "base/seed_0/omnibench.ours.jsonl and", word, "can't stand in one column")


def test_other_prompts_and_other_judges_stand_in_no_column(tmp_path):
    def judged(*names):
        return {i: {"judged_by": name} for i, name in enumerate(names)}

    put(tmp_path, "base", "omnibench", [1.0, 0.0], lines=judged("one", "one"), prompts="p")
    put(tmp_path, "grpo", "omnibench", [1.0, None])  # neither says its prompts, nor is judged yet
    put(tmp_path, "avatar", "omnibench", [1.0, 1.0], lines=judged("one", "one"), prompts="p")
    table = tables(tmp_path)["av"]
    assert "omnibench: a language model read or judged replies, one." in "\n".join(render.statement(table))
    put(tmp_path, "avatar", "omnibench", [1.0, 1.0], lines=judged("one", "two"), prompts="p")
    refused(tmp_path, "judges ['one'] and ['one', 'two']")
    put(tmp_path, "avatar", "omnibench", [1.0, 1.0], lines=judged("one", "one"), prompts="q")
    refused(tmp_path, "prompts 'p' and 'q'")


def test_the_number_of_workers_changes_nothing(tmp_path):
    put(tmp_path, "base", "omnibench", [1.0], data={"max_frames": 8, "workers": 1, "manifest": "a"})
    put(tmp_path, "grpo", "omnibench", [1.0], data={"max_frames": 8, "workers": 3, "manifest": "b"})
    assert the_cell(tables(tmp_path)["av"], "+ GRPO", "OmniBench")["measured"] == 100.0


def test_repeated_and_damaged_lines_are_refused(tmp_path):
    put(tmp_path, "base", "omnibench", [1.0, 0.0, 1.0], lines={2: {"id": "q0"}})
    refused(tmp_path, "omnibench.ours.jsonl, line 3", "('q0', 0) is also on line 1")
    path = put(tmp_path, "base", "omnibench", [1.0, 0.0])
    whole = path.read_text()
    path.write_text("{}\n" + whole)
    refused(tmp_path, "omnibench.ours.jsonl, line 1: no prediction")
    path.write_text(whole.replace('"groups"', '"grouped"', 1))
    refused(tmp_path, "omnibench.ours.jsonl: a line lacks", "groups")
    put(tmp_path, "base", "omnibench", [1.0, 0.0], lines={1: {"scores": {"f1": 1.0}}})
    refused(tmp_path, "omnibench.ours.jsonl: q1 has the scores ['f1']")
    put(tmp_path, "base", "omnibench", [1.0], aggregate={"metric": "oboa", "over": None})
    refused(tmp_path, "omnibench.ours.jsonl: no score 'oboa'")
    over = {"metric": "accuracy", "over": "task_type"}
    put(tmp_path, "base", "omnibench", [1.0], aggregate=over, lines={0: {"groups": {"task_type": ["x", "y"]}}})
    refused(tmp_path, "omnibench.ours.jsonl: q0 has the values ['x', 'y'] of 'task_type'")


def test_the_command_says_what_is_wrong_and_writes_nothing(tmp_path, capsys):
    path = put(tmp_path, "base", "omnibench", [1.0])
    meta = path.with_suffix(".meta.json")
    kept = meta.read_text()
    meta.write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "omnibench.ours.meta.json" in capsys.readouterr().err and not (tmp_path / "tables").exists()
    meta.unlink()  # as while it is being answered
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert f"left out: {path}, whose evaluation goes on" in told.err and " 0 cells measured" in told.out
    meta.write_text(kept)
    assert main([str(tmp_path / "nowhere")]) == 2
    path.parent.rename(path.parent.with_name("seed_x"))
    assert main([str(tmp_path)]) == 2
    assert "name the folder seed_0" in capsys.readouterr().err


# ---- never a published number as a measured one ----------------------------------------------------------------


def test_without_measurements_every_measured_cell_says_so_in_all_formats(tmp_path):
    files = written(tmp_path)
    said = {"not measured", "out of scope, not measured"}
    for name, plan in spec()["tables"].items():
        if plan["family"] == "tiny":
            assert f"{name}.md" not in files
            continue
        cells = len(plan["rows"]) * len(plan["columns"])
        overview, details = markdown_tables(files[f"{name}.md"])
        measured = [c for row in overview for heading, c in row.items() if heading.endswith("measured")]
        if not plan.get("paper"):
            measured = [c for row in overview for heading, c in row.items() if heading]
        assert len(measured) == len(details) == cells
        assert {*measured, *(row["measured"] for row in details)} <= said
        rows = list(csv.DictReader(files[f"{name}.csv"].splitlines()))
        assert len(rows) == cells and {row["measured"] for row in rows} <= said
        assert not any(row[key] for row in rows for key in ("low", "high", "difference", "against_baseline_p"))
        _, below = Cells(files[f"{name}.html"]).tables
        place = below[0].index("measured")
        assert len(below) == cells + 1 and {row[place] for row in below[1:]} <= said
        lines = [line.rstrip("\\ ").split(" & ") for line in files[f"{name}.tex"].splitlines() if " & " in line]
        (head,) = (line for line in lines if "answers" in line)
        assert {line[head.index("measured")] for line in lines[lines.index(head) + 1 :]} <= said
        for table in json.loads(files["tables.json"]):
            assert all(c["measured"] is None for row in table["rows"] for c in row["cells"].values())


def test_published_values_stand_in_the_papers_columns_alone(tmp_path, monkeypatch):
    """With every published number changed to a mark, only the paper's columns and what is said of the paper change."""
    put(tmp_path, "base", "omnibench", [1.0, 0.0, 0.0])
    put(tmp_path, "grpo", "omnibench", [1.0, 1.0, 0.0])
    before = tables(tmp_path)
    marked = json.loads(json.dumps(paper()))
    for part in ("supplement", "main"):
        for table in marked[part].values():
            for row in table.get("rows", []):
                row["values"] = {column: 7777.7 for column in row["values"]}
    monkeypatch.setattr("eval.paper.paper", lambda: marked)
    after = tables(tmp_path)
    seen = 0
    for name, table in after.items():
        for row in table["rows"]:
            for column, cell in row["cells"].items():
                old = the_cell(before[name], row["setting"], column)
                changed = {key for key in cell if cell[key] != old[key]}
                assert changed <= {"paper", "difference"}
                assert ("difference" in changed) == (cell["measured"] is not None and cell["paper"] is not None)
                seen += cell["paper"] == 7777.7
    assert seen == sum(
        len(row["values"]) for plan in spec()["tables"].values() for row in published(plan.get("paper"))["rows"]
    )
    for row in markdown_tables(render.markdown(after["av"]))[1]:
        assert row["paper"] == "7777.7" and not {"7777.7"} & {row["measured"], row["95 % interval"]}


# ---- what the specification says -------------------------------------------------------------------------------


def test_every_published_table_is_specified_in_full():
    keys = {f"{part}.{name}" for part in ("supplement", "main") for name, t in paper()[part].items() if "rows" in t}
    plans = {plan["paper"]: plan for plan in spec()["tables"].values() if plan.get("paper")}
    assert plans.keys() == keys and len(keys) == 12
    for key, plan in plans.items():
        assert list(plan["columns"]) == published(key)["columns"]
        assert list(plan["rows"]) == [row["setting"] for row in published(key)["rows"]]
        assert plan["baseline"] == (published(key)["baseline"] or "SFT only")
        for setting, systems in plan["rows"].items():
            assert bool(systems) != setting.startswith("Ola-7B")


def test_systems_and_benchmarks_of_the_specification_exist():
    known = {"base", "sft", "grpo", "avatar", "grpo_wo_sft", "avatar_wo_sft", "grpo_half", "openvlthinker_7b",
             "vlaathinker_7b", "wo_off_policy", "wo_tas", "wo_hints", "grpo_two_updates"}  # fmt: skip
    trained = {
        f"{path.stem}_{member}"
        for path in SWEEPS.glob("*.yaml")
        for member in yaml.safe_load(path.read_text())["members"]
        if path.stem != "model_size"
    }
    used = {s for plan in spec()["tables"].values() for systems in plan["rows"].values() for s in systems}
    assert used <= known | trained
    assert known <= used and trained - used == {"components_wo_off_policy"} - used  # every system is in some table
    benchmarks = {b for plan in spec()["tables"].values() for b in plan.get("columns", {}).values()}
    assert len(benchmarks) == 20
    assert all((FOLDER.parent / "benchmarks" / f"{name}.yaml").is_file() for name in benchmarks | {"held_out"})
    assert spec()["small"]["benchmark"] == "held_out"


def test_every_contradiction_of_the_paper_carries_a_note(tmp_path):
    """Rows of one system whose published values differ between two tables are found anew here, from the numbers."""
    values = {}
    for name, plan in spec()["tables"].items():
        for row in published(plan.get("paper"))["rows"]:
            for column, value in row["values"].items():
                for system in plan["rows"][row["setting"]]:
                    column_of = plan["columns"][column], column if plan.get("breakdown") else ""
                    values.setdefault((plan["family"], system, *column_of), set()).add((name, row["setting"], value))
    differing = {frozenset((t, s) for t, s, _ in found) for found in values.values() if len({v for *_, v in found}) > 1}
    rows = {pair for group in differing for pair in group}
    assert ("table2", "GRPO (w/ SFT)") in rows and ("av", "+ GRPO") in rows
    marked = {(table["name"], row["setting"]) for table in build_all(tmp_path) for row in table["rows"] if row["marks"]}
    assert rows <= marked
    assert {("shaping", "uniform"), ("video", "+ GRPO"), ("table5", "acc + format")} <= marked
    text = written(tmp_path)["table2.md"]
    assert "| GRPO (w/ SFT) (a, b, c) |" in text and "31.3 (AV-Odyssey) in main paper, Audio-visual, 7B: + GRPO" in text


# ---- escapes ---------------------------------------------------------------------------------------------------

NASTY = "50% of a_b & c#d {$x$} ~^\\ <script>alert('1')</script> | `λ` − x"


def nasty(tmp_path):
    put(tmp_path, "base", "omnibench", [1.0], quirks=[NASTY], model=NASTY)
    (table,) = (t for t in build_all(tmp_path) if t["name"] == "av")
    table["title"] = NASTY
    table["rows"][0]["setting"] = table["baseline"] = NASTY
    return table


def test_html_escapes(tmp_path):
    page = Cells(render.page(nasty(tmp_path)))
    assert page.tables[1][1][1] == NASTY and page.loose.count(NASTY) >= 4
    assert "<script" not in render.page(nasty(tmp_path))


def test_latex_escapes_and_is_balanced(tmp_path):
    text = render.latex(nasty(tmp_path))
    assert r"50\% of a\_b \& c\#d \{\$x\$\} \textasciitilde{}\textasciicircum{}\textbackslash{} $<$script$>$" in text
    assert r"\textbar{} `$\lambda$` $-$ x" in text
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}")
    for table in re.findall(r"\\begin{tabular}{(\w+)}(.*?)\\end{tabular}", text, re.DOTALL):
        for line in table[1].splitlines():
            if line.endswith(r"\\"):
                spans = re.findall(r"\\multicolumn{(\d+)}", line)
                width = sum(map(int, spans)) if spans else len(re.findall(r"(?<!\\)&", line)) + 1
                assert width == len(table[0])


def test_markdown_escapes(tmp_path):
    text = render.markdown(nasty(tmp_path))
    assert "<script" not in text.replace("\\<", "") and r"a\_b" in text
    overview, details = markdown_tables(text)  # a foreign | would add a column
    assert len(details) == 36


def test_csv_reads_back(tmp_path):
    rows = list(csv.DictReader(render.comma_separated(nasty(tmp_path)).splitlines()))
    assert rows[0]["setting"] == NASTY and float(rows[0]["measured"]) == 100.0
