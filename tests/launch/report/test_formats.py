"""The formats: the same cells in each, and nothing in them that breaks the format."""

import csv
import io
import json
import re

from rich.console import Console

from evmamba.launch.report.build import print_table
from evmamba.launch.report.formats import to_csv, to_json, to_latex, to_markdown
from evmamba.launch.report.table import DASH, Table, build_table

from ..handmade import made_result


def cells_of(table: Table) -> list[list[str]]:
    return [[cell.text for part in row.cells for cell in part] for row in table.rows]


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_table(table, console)
    return console.file.getvalue()


def test_every_format_shows_the_same_cells(table: Table, page: str):
    expected = cells_of(table)
    with_differences = [[cell.full_text for part in row.cells for cell in part] for row in table.rows]
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    assert [row[2:] for row in rows[1:] if row[1] != "difference"] == expected
    assert [row[1] for row in rows[1:]] == ["measured", "published", "difference", "measured", "published"]

    markdown = [line for line in to_markdown(table).splitlines() if line.startswith("|")][2:]
    plain = [[text.strip().strip("*") for text in line.strip("|").split("|")][1:] for line in markdown]
    assert plain == with_differences

    document = to_json(table)
    assert [[cell["text"] for part in row["cells"] for cell in part] for row in document["rows"]] == expected

    body = re.search(r"<tbody.*?</table>", page, re.DOTALL)
    assert body
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in body[0].split("</tr>")[:-1]]
    assert [[re.sub(r"<[^>]*>", "", text) for text in line] for line in lines] == with_differences

    latex = [line.removesuffix(r" \\") for line in to_latex(table).splitlines() if line.endswith(r"\\")][2:]
    bare = [re.sub(r"\\text(?:bf|it)\{(.*?)\}(?= &|$)", r"\1", line).replace("--", DASH) for line in latex]
    assert [[text.strip() for text in line.split(" & ")][1:] for line in bare] == with_differences

    terminal = printed(table, 400).splitlines()
    at = next(i for i, line in enumerate(terminal) if line.startswith("EfficientVMamba-T"))
    assert [" ".join(terminal[at + i].split()[1:]) for i in range(4)] == [
        " ".join(text for text in row if text) for row in with_differences
    ]


def test_what_a_format_takes_for_itself_is_escaped():
    failed = made_result("classification", "a_b&c|d", status="failed", reason="50% | {x}", metrics={})
    table = build_table([failed])
    assert r"a\_b\&c|d &" in to_latex(table)
    row = next(line for line in to_markdown(table).splitlines() if line.startswith("| a_b"))
    cells = row.replace(r"\|", "").split("|")
    assert len(cells) == 2 + len(cells_of(table)[0]) + 1
    assert "50% | {x}" in json.dumps(to_json(table)["notes"])
    assert next(csv.reader(io.StringIO(to_csv(table).partition("\n")[2])))[0] == "a_b&c|d"


def test_ablations_go_along_in_json_and_markdown():
    names = ["efficientvmamba_t", "efficientvmamba_t-ss2d"]
    table = build_table([made_result("classification", name) for name in names])
    assert "**Ablations**" in to_markdown(table)
    assert "EfficientVMamba-T · SS2D" in to_markdown(table)
    ablations = to_json(table)["ablations"]
    assert [row["model"] for row in ablations["rows"] if row["kind"] == "measured"] == names
