"""`evmamba report`: from any files, to where it is asked for."""

from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.launch.store.results import find_results


def test_it_goes_beside_the_results_unless_told_otherwise(
    result_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = next(iter(find_results([result_folder])))
    for given, options, written in (
        (result_folder, [], result_folder),
        (first, [], first.parent),
        (result_folder, ["--output", str(tmp_path / "new")], tmp_path / "new"),
    ):
        assert cli.main(["report", str(given), *options]) == 0
        printed = capsys.readouterr().out
        assert "EfficientVMamba-T" in printed
        assert str(written / "report.html") in printed
        assert (written / "report.html").is_file()


def test_a_folder_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
