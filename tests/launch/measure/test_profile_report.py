"""A profile for people and programs: what varies is a column, what is shared stands above, what failed says why."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.launch.measure.profile_parts import Share
from evmamba.launch.measure.profile_report import caption, headers, print_profile, to_markdown, write_profile
from evmamba.launch.measure.profiling import Case, Row

ABOUT = {"device": "Some CPU", "threads": 2, "load_before": 0.5, "versions": {"torch": "2.14"}, "command": "evmamba x"}


def case(batch: int, mode: str = "eager") -> Case:
    return Case(224, 224, batch, "inference", mode, "float32", "channels_last")


ROWS = [
    Row("a", case(1), latency_ms=12.345, images_per_s=81.0, ratio=1.0),
    Row("b", case(1), latency_ms=123.45, images_per_s=8.1, ratio=0.1),
    Row("a", case(4), reason="out of memory | really"),
    Row("b", case(4), latency_ms=1.0, images_per_s=4000.0),
]


def test_only_what_varies_and_what_was_measured_is_a_column():
    assert headers(ROWS) == (["batch"], ["ms", "images/s", "x first"])
    assert headers([*ROWS, Row("a", case(1, "graph"), reason="no GPU")])[0] == ["batch", "mode"]
    assert headers(ROWS[2:3]) == ([], ["ms"])  # nothing was measured: the reason still needs a column


def test_what_all_rows_share_stands_above_them():
    text = caption(ROWS, ABOUT)
    assert text.startswith("phase inference; size 224x224; mode eager; precision float32; layout channels last")
    assert text.endswith("Some CPU, 2 threads, load 0.5 before; torch 2.14")


def test_markdown_keeps_its_columns_where_a_reason_has_a_bar():
    lines = to_markdown(ROWS, [Share("a", "operator", "aten::mm", 1.5, 0.25, 3.0)], ABOUT).splitlines()
    assert "| 1 | a | 12.3 | 81 | 1.00 |" in lines
    assert "| 1 | b | 123 | 8.1 | 0.10 |" in lines
    assert r"| 4 | a | out of memory \| really |  |  |" in lines
    assert "| a | `aten::mm` | 1.5 | 25 % |" in lines


def test_a_terminal_names_who_was_not_measured_where():
    console = Console(width=100, file=io.StringIO())
    print_profile(ROWS, [], ABOUT, console)
    assert "out of memory | really: a at batch 4" in console.file.getvalue()
    every = [Row(name, case(8), reason="too slow") for name in "ab"]
    print_profile([*ROWS, *every], [], ABOUT, console)
    assert "too slow: batch 8" in console.file.getvalue()  # all of them: no names


@pytest.mark.parametrize("rows", [ROWS, ROWS[2:3]], ids=["some", "none"])
def test_a_plot_needs_something_that_was_measured(rows: list[Row], tmp_path: Path):
    written = write_profile(rows, [], ABOUT, tmp_path)
    assert ("profile.png" in [path.name for path in written]) == any(row.reason is None for row in rows)
    assert all(path.stat().st_size for path in written)
    document = json.loads((tmp_path / "profile.json").read_text())
    assert [row["reason"] for row in document["rows"]] == [row.reason for row in rows]
    assert "shares" not in document
