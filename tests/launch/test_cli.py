"""The `evmamba` command as people type it: what it prints, where, and with which exit status."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning  # noqa: F401  (its log handler keeps the stderr of the first import, which must not be a test's)
import pytest

from evmamba.launch import cli
from evmamba.launch.commands import report
from evmamba.launch.store.results import read_result

pytestmark = pytest.mark.usefixtures("elsewhere")

TINY = "conf/classification/tiny.yaml"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("benhc", "unknown command 'benhc'; did you mean bench?"),
        ("--vers", "did you mean --version"),
        ("models efficientvmamba_x", "unknown backbone 'efficientvmamba_x'; did you mean efficientvmamba_"),
        ("data embeded", "embedded"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_what_would_be_right(complaint: Callable[..., str], arguments: str, expected: str):
    assert expected in complaint(*arguments.split())


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(report, "main", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["report", "x"])


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupted)
    assert cli.main(["report", "x"]) == 130
    assert capsys.readouterr().err == "evmamba: interrupted\n"


def test_help_and_version_are_there(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["fit", "--help"]) == cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert "bench" in printed
    assert "conf/segmentation/ tiny" in printed


def test_no_help_waits_for_torch():
    program = (
        "import contextlib, io, sys\n"
        "from evmamba.launch.cli import COMMANDS, main\n"
        "from evmamba.launch.commands.training import TRAINING\n"
        "for arguments in [['--help'], ['--version'], *([command, '--help'] for command in (*COMMANDS, *TRAINING))]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        main(arguments)\n"
        "    assert said.getvalue().strip(), arguments\n"
        "    heavy = {'torch', 'timm', 'lightning', 'matplotlib'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_test_writes_a_result_and_report_reads_it(capsys: pytest.CaptureFixture[str]):
    options = ["--data.init_args.image_size=32", "--data.init_args.num_workers=0", "--trainer.limit_test_batches=1"]
    assert cli.main(["test", "--config", TINY, *options, "--seed_everything=7"]) == 0
    result = read_result(Path("runs/classification-tiny/result.json"))
    assert (result.task, result.model, result.head) == ("classification", "efficientvmamba_t", "linear")
    assert result.data
    assert result.data["name"] == "embedded"
    assert 0 <= result.metrics["top1"] <= result.metrics["top5"] <= 1
    assert result.protocol["weights"] == "untrained"
    assert result.protocol["image_size"] == 32
    assert result.provenance["seed"] == 7
    assert result.provenance["config"]["data"]["init_args"]["image_size"] == 32
    assert result.gallery
    assert all((result.folder / name).is_file() for name in result.gallery)

    assert cli.main(["report", "runs"]) == 0
    assert "EfficientVMamba-T" in capsys.readouterr().out
    assert "data:image/jpeg" in Path("runs/report.html").read_text()


def test_a_full_disk_is_one_line_and_other_errors_of_the_system_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cli, "_dispatch", lambda arguments: fail(errno.ENOSPC))
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err == "evmamba: No space left on device\n"
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["models"])


def test_a_reader_that_has_gone_away_hears_nothing_and_sees_no_error():
    """As of ``evmamba --version | true``: what is printed waits in a buffer until the end."""
    command = [
        sys.executable,
        "-c",
        "import sys; sys.stdin.read(); from evmamba.launch.cli import main; sys.exit(main())",
    ]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--version"], **pipes, text=True, env=buffered) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate("")
    assert (said, process.returncode) == ("", 0)


@pytest.mark.parametrize(("before", "status"), [(BrokenPipeError, 0), (ValueError, 1)])
def test_a_table_whose_reader_has_gone_away_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, before: type[Exception], status: int
):
    def leave(arguments: list[str]) -> int:
        try:
            raise before
        except before:
            raise SystemExit(1)  # noqa: B904 - as rich does

    monkeypatch.setattr(cli, "_dispatch", leave)
    try:
        found = cli.main(["status"])
    except SystemExit as leaving:
        found = leaving.code
    assert found == status
