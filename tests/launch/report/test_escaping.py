"""Names of strangers stay text in every format of the report."""

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.launch.report.build import print_table, report_from
from evmamba.launch.report.formats import to_csv, to_latex, to_markdown
from evmamba.launch.report.page import to_html
from evmamba.launch.report.table import Table
from evmamba.launch.store.results import write_result

from ..handmade import DATA, made_result

NAMES = [
    "<script>document.title='ran'</script>",
    "=HYPERLINK(1)",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\x1b[31mred\x1b]0;title\x07",
    "\\input{/etc/passwd}",
    "\\write18{touch ran}",
    "[/red][bold]x",
    "a|b`c*d",
    "$\\frac{1}{$",
    "_hidden",
    "\" onmouseover='alert(1)'",
    "\u202eleft",
]


def hostile(folder: Path) -> Table:
    """Results with such names wherever a name may stand."""
    for n, name in enumerate(NAMES):
        data = {"name": name, "root": name, "fingerprint": name, **DATA["classification"]}
        result = made_result("classification", name, run=f"{n}-{name}", data=data)
        result.details["per_class"] = {name: {"score": 0.5, "images": 3}, "other": {"score": 0.4, "images": 2}}
        result.details["confusion"] = [[1, 2], [3, 4]]
        result.training = {"steps": 3, "curve": [[1, 2.0], [2, 1.0]]}
        result.provenance |= {"device": name, "precision": name}
        write_result(result, folder / f"{n}")
        failed = made_result("detection", name, run=f"f{n}-{name}", status="failed", reason=name)
        write_result(failed, folder / f"f{n}")
    return report_from([folder])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return hostile(tmp_path_factory.mktemp("results"))


def test_a_terminal_gets_no_command(table: Table):
    out = io.StringIO()
    print_table(table, Console(file=out, width=300, force_terminal=False))
    said = out.getvalue()
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "\\x1b[31mred" in said
    assert "[/red][bold]x" in said


def test_a_spreadsheet_gets_no_formula(table: Table):
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    for row in rows:
        for cell in row:
            assert cell[:1] not in ("=", "@", "\t")
            assert cell[:1] not in ("+", "-") or float(cell) is not None
    assert {"'=HYPERLINK(1)", "'+1+1", "'-1+1", "'@SUM(1)"} <= {row[0] for row in rows}


def test_markdown_and_html_get_no_tag(table: Table):
    markdown, page = to_markdown(table), to_html(table)
    assert "<script>document" not in markdown
    assert page.count("<script") == 1  # the page's own
    assert "a\\|b\\`c\\*d" in markdown


def test_latex_gets_no_command(table: Table):
    text = to_latex(table)
    body = text[text.index("\\begin{tabular}") :]
    assert "\\input" not in body
    assert "\\write18" not in body
    assert r"\textbackslash{}input\{/etc/passwd\}" in body
    assert r"\$\textbackslash{}frac\{1\}\{\$" in body
    assert all(line.startswith(("\\", "}")) or line[:1] not in "[*" for line in body.splitlines())


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_takes_the_table(table: Table, tmp_path: Path):
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    (tmp_path / "table.tex").write_text(head + to_latex(table) + r"\end{document}")
    subprocess.run(["pdflatex", "-halt-on-error", "table.tex"], cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / "ran").exists()
