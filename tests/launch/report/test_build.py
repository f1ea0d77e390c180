"""The report's formats: the same numbers in each, and a page that needs nothing from outside."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from evmamba.errors import UserError
from evmamba.launch.report.build import print_table, report_from, write_report
from evmamba.launch.report.formats import REPORT_SCHEMA, to_markdown
from evmamba.launch.report.page import to_html
from evmamba.launch.report.table import Table, build_table
from evmamba.launch.store.results import FILE_NAME

from ..handmade import made_result


def cells_of(table: Table) -> list[list[str]]:
    return [[cell.text for part in row.cells for cell in part] for row in table.rows]


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_table(table, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [72, 80, 120, 200])
def test_no_number_is_cut_in_a_narrow_terminal(table: Table, width: int):
    text = printed(table, width)
    assert "…" not in text
    for row in cells_of(table):
        for cell in row:
            assert cell in text


def test_caption_and_notes_stand_in_every_format_for_people(table: Table, page: str):
    for text in (to_markdown(table), page, " ".join(printed(table, 400).split())):
        assert "Some CPU, 2 cores" in text
        assert "torch 2.14.1" in text
        assert "loss is nan at step 3 (a.jpg)" in text


def test_the_page_asks_for_nothing_from_outside(page: str):
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page)
    assert not re.search(r"url\((?!#)|@import|<link|<script[^>]|<iframe|fetch\(|XMLHttp", page)
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count("<svg") == 6  # over multiply-adds and over latency, for three tasks


@pytest.mark.parametrize(("images", "there"), [(50000, True), (120, False)])
def test_the_figure_has_the_papers_points_only_on_the_papers_data(images: int, there: bool):
    data = {"name": "mine", "fingerprint": "x", "num_classes": 1000, "val_images": images}
    results = [made_result("cost", "efficientvmamba_t"), made_result("classification", "efficientvmamba_t", data=data)]
    assert ("published, on ImageNet-1K" in to_html(build_table(results))) == there


def test_pictures_are_scaled_down(table: Table, page: str):
    run = next(result for result in table.results if result.gallery)
    picture = run.folder / run.gallery[0]
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", page)
    assert data
    shown = Image.open(io.BytesIO(base64.b64decode(data[1])))
    assert Image.open(picture).width == 900
    assert shown.size == (450, 300)


def test_what_a_user_wrote_cannot_break_the_page():
    failed = made_result(
        "classification", "resnet18", status="failed", reason="<script>alert(1)</script> | x", metrics={}
    )
    table = build_table([failed])
    assert "<script>alert" not in to_html(table)
    assert to_html(table).count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2  # note and run


def test_a_report_without_cost_or_without_quality_is_still_a_report():
    assert "<svg" not in to_html(build_table([made_result("classification", "resnet18")]))
    assert "<svg" not in to_html(build_table([made_result("cost", "resnet18")]))


def test_the_page_is_the_same_from_run_to_run():
    results = [made_result("cost", "resnet18"), made_result("classification", "resnet18")]
    assert to_html(build_table(results)) == to_html(build_table(results))


def test_all_files_are_written(table: Table, tmp_path: Path):
    written = write_report(table, tmp_path / "new" / "folder")
    assert [path.name for path in written] == [
        "report.md",
        "report.csv",
        "report.tex",
        "report.html",
        "report.json",
    ]
    assert all(path.stat().st_size for path in written)
    assert json.loads(written[-1].read_text())["schema"] == REPORT_SCHEMA


def test_a_broken_result_stops_the_report_and_is_named(result_folder: Path):
    broken = next(result_folder.rglob(FILE_NAME))
    broken.write_text("{")
    with pytest.raises(UserError, match=re.escape(str(broken))):
        report_from([result_folder])


def test_numbers_of_the_paper_have_names_and_units():
    page = to_html(build_table([made_result("cost", "resnet18")]))
    printed = page[page.index('<h2 id="paper">') :]
    for name in ("params (M)", "MACs (G)", "top-1 (%)", "mIoU ms (%)", "box AP", "memory (MiB)", "images per GPU"):
        assert f">{name}</button>" in printed
    assert not any(f">{key}</button>" in printed for key in ("macs", "top1", "mask_AP", "memory mb"))
