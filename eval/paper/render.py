"""A table of eval/tables.py as Markdown, LaTeX (booktabs), CSV and HTML.

Each has an overview in the paper's form and the details: intervals, seeds, answers, tests. What the paper prints and
what was measured never share a column.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from eval.paper import place

Record = dict[str, Any]
MISSING = "not measured"
OUT_OF_SCOPE = "out of scope, not measured"
NONE = "–"
SIGNIFICANT = 0.05
TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
    "−": "$-$", "–": "--", "λ": r"$\lambda$", "’": "'", "\n": " ",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Cells of text. groups: headings over the columns, each with the number of columns below it; blocks: numbers of
    rows that open a new block."""

    caption: str
    groups: list[tuple[str, int]]
    head: list[str]
    rows: list[list[str]]
    blocks: frozenset[int] = frozenset()


def formats(table: Record) -> dict[str, str]:
    """File ending -> text."""
    return {"md": markdown(table), "tex": latex(table), "csv": comma_separated(table), "html": page(table)}


def number(value: float | None, sign: str = "") -> str:
    """One decimal with a true minus; `sign` "+" for differences."""
    return NONE if value is None else f"{value:{sign}.1f}".replace("-", "−")


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def setting(row: Record) -> str:
    return f"{row['setting']} ({', '.join(row['marks'])})" if row["marks"] else row["setting"]


def measured(row: Record, cell: Record) -> str:
    """The measured value, or why there is none."""
    if row["out_of_scope"]:
        return OUT_OF_SCOPE
    return MISSING if cell["measured"] is None else number(cell["measured"])


def answers(cell: Record) -> str:
    """Answers of all expected ones; before them how many belong to the breakdown that the cell shows."""
    if cell["expected"] is None:
        return NONE
    text = f"{cell['answered']}/{cell['expected']}"
    if cell["n"] not in (0, cell["answered"]):
        text = f"{cell['n']} of {text}"
    return f"partial {text}" if cell["partial"] else text


def overview(table: Record) -> Grid:
    """Rows and columns as the paper has them; the paper's values, if there are any, in columns of their own."""
    names = [column["name"] for column in table["columns"]]
    printed = any(cell["paper"] is not None for row in table["rows"] for cell in row["cells"].values())
    rows = []
    for row in table["rows"]:
        texts = [setting(row)]
        for name in names:
            cell = row["cells"][name]
            against = cell["against_baseline"]
            star = " *" if against and against["holm"] < SIGNIFICANT else ""
            partial = f" ({answers(cell)})" if cell["partial"] else ""
            texts += [number(cell["paper"])] * printed + [measured(row, cell) + star + partial]
        if table["small"]:
            texts.append(number(row["paper_gain"], "+"))
        rows.append(texts)
    groups = [("", 1), *((name, 2) for name in names)] if printed else []
    head = ["", *(["paper", "measured"] * len(names) if printed else names)]
    if table["small"]:
        head.append("paper: difference to baseline, mean over its benchmarks")
    return Grid("Overview, %", groups, head, rows)


def details(table: Record) -> Grid:
    """One line a cell, in blocks of a column each."""
    printed = not table["small"] and table["paper"] is not None
    rows, blocks = [], set()
    for column in table["columns"]:
        blocks.add(len(rows))
        for row in table["rows"]:
            cell = row["cells"][column["name"]]
            against = cell["against_baseline"]
            interval = NONE if cell["measured"] is None else f"{number(cell['low'])} to {number(cell['high'])}"
            compared, p, visible = NONE, NONE, NONE
            if against:
                compared = (f"{number(against['value'], '+')} ({number(against['low'], '+')} to "
                            f"{number(against['high'], '+')})")  # fmt: skip
                p, visible = p_value(against["p"]), number(against["visible"])
            elif row["setting"] == table["baseline"]:
                compared = "baseline"
            rows.append([
                column["name"],
                setting(row),
                *([number(cell["paper"])] if printed else []),
                measured(row, cell),
                *([number(cell["difference"], "+")] if printed else []),
                interval,
                " ".join(map(str, cell["seeds"])) or NONE,
                answers(cell),
                compared,
                p,
                visible,
            ])  # fmt: skip
    name = "part" if any(column["breakdown"] for column in table["columns"]) else "benchmark"
    head = [name, "system", *(["paper"] if printed else []), "measured", *(["measured − paper"] if printed else []),
            "95 % interval", "seeds", "answers", "against baseline (95 % interval)", "p", "visible"]  # fmt: skip
    return Grid("Details, %", [], head, rows, frozenset(blocks))


def statement(table: Record) -> list[str]:
    """How the numbers came about, in sentences."""
    printed = f"{place(table['paper'])}; {table['paper_model']}" if table["paper"] else "no such table"
    temperatures = sorted({data["temperature"] for data in table["data"].values()})
    lines = [
        f"In the paper: {printed}. Measured: family {table['family']}, protocol {table['protocol']}, control "
        f"{table['control'] or 'none'}, temperature {', '.join(map(str, temperatures)) or NONE}. "
        f"Baseline row: {table['baseline']}."
    ]
    for row in table["rows"]:
        if row["system"]:
            models, seeds = ", ".join(row["models"]), ", ".join(map(str, row["seeds"]))
            updates = f", {' or '.join(map(str, row['updates']))} updates" if row["updates"] else ""
            lines.append(f"{row['setting']}: system {row['system']}, model {models}, seeds {seeds}{updates}.")
    for benchmark, data in table["data"].items():
        lines.append(f"{benchmark}: {data['name']}, revision {data['revision']}, {data['items']:,} items.")
        if data["judges"]:
            lines.append(f"{benchmark}: a language model read or judged replies, {', '.join(data['judges'])}.")
        if data["quirks"]:
            lines.append(f"{benchmark}, quirks of the protocol: {'; '.join(data['quirks'])}.")
    lines.append(
        "Intervals: Student's t over items and, with several, seeds, both as samples. Against the baseline: seeds and "
        "items of both rows in pairs, p two-sided; one seed speaks of its items alone; the last column is the smallest "
        "difference that such a test shows with 80 % power; "
        f"* marks p < {SIGNIFICANT} after Holm's correction for the table's {table['tests']} tests."
    )
    return [*lines, *table["notes"]]


def markdown(table: Record) -> str:
    parts = [f"# {_md(table['title'])}"]
    for grid in (overview(table), details(table)):
        head = grid.head
        if grid.groups:
            over = [name for name, span in grid.groups for _ in range(span)]
            head = [f"{name}, {below}" if name else below for name, below in zip(over, head, strict=True)]
        lines = [_md_row(head), "|" + "---|" * len(head), *map(_md_row, grid.rows)]
        parts += [f"## {grid.caption}", "\n".join(lines)]
    return "\n\n".join([*parts, "\n".join(f"- {_md(line)}" for line in statement(table))]) + "\n"


def _md_row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_md, cells))} |"


def _md(text: str) -> str:
    """Text of which nothing is read as markup."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return text


def latex(table: Record) -> str:
    """Two tables for a document with \\usepackage{booktabs,graphicx}."""
    parts = []
    for grid in (overview(table), details(table)):
        lines = [r"\begin{table*}", r"\centering\small", rf"\caption{{{tex(table['title'])}. {tex(grid.caption)}}}",
                 r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
                 rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"\toprule"]  # fmt: skip
        if grid.groups:
            lines.append(" & ".join(rf"\multicolumn{{{n}}}{{c}}{{{tex(name)}}}" for name, n in grid.groups) + r" \\")
        lines += [" & ".join(map(tex, grid.head)) + r" \\", r"\midrule"]
        for index, row in enumerate(grid.rows):
            lines += [r"\midrule"] * (index in grid.blocks and index > 0) + [" & ".join(map(tex, row)) + r" \\"]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]))
    notes = "\n".join(rf"\item {tex(line)}" for line in statement(table))
    return "\n\n".join([*parts, f"\\begin{{itemize}}\n{notes}\n\\end{{itemize}}"]) + "\n"


def tex(text: str) -> str:
    return "".join(TEX.get(sign, sign) for sign in text)


def comma_separated(table: Record) -> str:
    """One line a cell with unrounded numbers."""
    file = io.StringIO()
    plain = ("low", "high", "difference", "n", "answered", "expected", "partial")
    compared = ("value", "low", "high", "p", "holm", "visible", "n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "protocol", "column", "benchmark", "breakdown", "setting", "system", "paper", "measured",
                     *plain, "seeds", *(f"against_baseline_{key}" for key in compared),
                     *(["paper_difference_to_baseline_mean"] if table["small"] else [])])  # fmt: skip
    for column in table["columns"]:
        for row in table["rows"]:
            cell = row["cells"][column["name"]]
            against = cell["against_baseline"] or {}
            value = cell["measured"]
            writer.writerow([
                table["name"], table["protocol"], column["name"], column["benchmark"],
                "=".join(column["breakdown"] or []), row["setting"], row["system"], cell["paper"],
                value if value is not None else OUT_OF_SCOPE if row["out_of_scope"] else MISSING,
                *(cell[key] for key in plain), " ".join(map(str, cell["seeds"])), *map(against.get, compared),
                *([row["paper_gain"]] if table["small"] else []),
            ])  # fmt: skip
    return file.getvalue()


def section(table: Record) -> Markup:
    """The table as a part of an HTML page."""
    parts = [Markup('<section id="{}">\n<h2>{}</h2>').format(anchor(table), table["title"])]
    for grid in (overview(table), details(table)):
        head = Markup("")
        if grid.groups:
            names = Markup("").join(
                Markup('<th colspan="{}" scope="colgroup">{}</th>').format(n, name) for name, n in grid.groups
            )
            head = Markup("<tr>{}</tr>\n").format(names)
        head += _html_row(grid.head, "th")
        body = Markup("\n").join(
            _html_row(row, "td", "block" if index in grid.blocks else "")
            for index, row in enumerate(grid.rows)
        )
        whole = '<div class="wide"><table>\n<caption>{}</caption>\n<thead>{}</thead>\n<tbody>{}</tbody>\n</table></div>'
        parts.append(Markup(whole).format(grid.caption, head, body))
    notes = Markup("\n").join(Markup("<li>{}</li>").format(line) for line in statement(table))
    folded = "<details><summary>Intervals, seeds, tests, and how the numbers came about</summary>\n{}\n<ul>\n{}\n</ul>"
    parts[2:] = [Markup(folded + "\n</details>\n</section>").format(parts[2], notes)]
    return Markup("\n").join(parts)


def anchor(table: Record) -> str:
    """What a link to the table's section names."""
    return f"table-{table['name']}"


def _html_row(cells: list[str], tag: str, kind: str = "") -> Markup:
    texts = Markup("").join(Markup("<{0}>{1}</{0}>").format(Markup(tag), cell) for cell in cells)
    return Markup('<tr class="{}">{}</tr>').format(kind, texts) if kind else Markup("<tr>{}</tr>").format(texts)


def page(table: Record) -> str:
    """section() as a page of its own."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem} .wide{overflow-x:auto} caption{text-align:left} "
        "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums} "
        "th,td{padding:.3rem .6rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap} "
        "th:first-child,td:first-child{text-align:left} .block td{border-top:2px solid #666}"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(table["title"])}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{section(table)}\n</body>\n</html>\n"
    )
