"""What a data check found is printed as it is."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from evmamba.tasks.findings import Findings, print_findings


def test_names_with_brackets_are_printed_as_they_are():
    findings = Findings(Path("[data]"), "classification", layout="class folders")
    findings.error("1 image of val cannot be read", ["cannot read image [red]x[bold].png"])
    stream = StringIO()
    print_findings(findings, Console(file=stream, width=300))
    assert "cannot read image [red]x[bold].png" in stream.getvalue()
    assert "in [data]" in stream.getvalue()
    assert "not ready: 1 error" in stream.getvalue()
