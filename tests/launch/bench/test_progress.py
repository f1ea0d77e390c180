"""Progress: every run leaves its line, in a terminal and in a log, and a file that is not there yet does no harm."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.launch.bench.progress import LINE_SECONDS, RunProgress, headline
from evmamba.launch.store.progress import write_progress

from ..handmade import made_result, made_spec

SPEC = made_spec("detection", "efficientvmamba_t")
NAME = "EfficientVMamba-T, detection \N{MIDDLE DOT} RetinaNet"


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=140, _environ={"TERM": "xterm"})


@pytest.mark.parametrize("terminal", [True, False])
def test_every_run_leaves_one_line_with_its_result(tmp_path: Path, terminal: bool):
    out = console(terminal)
    failed = made_result("detection", "efficientvmamba_t", status="failed", reason="no space")
    with RunProgress(out, 3) as progress:
        progress.skip(SPEC)
        for result in (made_result("detection", "efficientvmamba_t"), failed):
            progress.start(SPEC)
            progress.update(SPEC, tmp_path)  # nothing there yet
            write_progress(tmp_path, "training", 3, 10, 0.5)
            progress.update(SPEC, tmp_path)
            write_progress(tmp_path, "testing", 1, 4)
            progress.update(SPEC, tmp_path)
            progress.finish(SPEC, result)
    text = out.file.getvalue()
    assert f"[1/3] {NAME}: finished before" in text
    assert f"[2/3] {NAME}: AP 25.1 (0 s)" in text
    assert f"[3/3] {NAME}: failed: no space (0 s)" in text


def test_the_bars_show_phase_count_and_loss(tmp_path: Path):
    out = console(terminal=True)
    with RunProgress(out, 1) as progress:
        progress.start(SPEC)
        write_progress(tmp_path, "training", 3, 10, 0.5)
        progress.update(SPEC, tmp_path)
        progress._bars.refresh()
    assert "3/10" in out.file.getvalue()
    assert "training, loss 0.500" in out.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_runs_side_by_side_are_shown_beside_each_other(tmp_path: Path, terminal: bool):
    out = console(terminal)
    other = made_spec("segmentation", "efficientvmamba_t", seed=2)
    with RunProgress(out, 2) as progress:
        progress.start(SPEC)
        progress.start(other)
        for k, spec in enumerate((SPEC, other)):
            write_progress(tmp_path / spec.task, "training", 3 + k, 10, 0.5)
            progress.update(spec, tmp_path / spec.task)
        if progress._bars:
            progress._bars.refresh()
            assert "3/10" in out.file.getvalue()
            assert "4/10" in out.file.getvalue()
        progress.finish(SPEC, made_result("detection", "efficientvmamba_t"))
        progress.update(other, tmp_path / other.task)
        progress.finish(other, made_result("segmentation", "efficientvmamba_t"))
    assert "[2/2] EfficientVMamba-T, segmentation \N{MIDDLE DOT} UPerNet, seed 2: " in out.file.getvalue()


def test_a_log_gets_a_line_now_and_then_not_one_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("evmamba.launch.bench.progress.time.monotonic", lambda: now[0])
    out = console(terminal=False)
    with RunProgress(out, 1) as progress:
        progress.start(SPEC)
        for step in range(100):
            now[0] += 1.9 * LINE_SECONDS / 100
            write_progress(tmp_path, "training", step, 100, 0.25)
            progress.update(SPEC, tmp_path)
    lines = [line for line in out.file.getvalue().splitlines() if "training" in line]
    assert len(lines) == 1
    assert lines[0] == f"[0/1] {NAME}: training 52/100, loss 0.250"


def test_a_cost_run_is_summed_up_by_its_latency():
    assert headline(made_result("cost", "resnet18")) == "latency (ms) 23.5"
