"""`evmamba data`: its checks end with a status, its shards are packed, its mistakes are one line."""

import json
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.tasks.embedded import write_classification


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_classification(tmp_path / "folders", train=20, val=10)
    return tmp_path / "folders"


def test_command_prints_writes_and_ends_with_its_status(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "check.json"
    assert cli.main(["data", "check", str(folders), "--jobs", "1", "--json", str(file)]) == 0
    assert "ready: nothing found (30 images in" in capsys.readouterr().out
    next((folders / "val").glob("*/*")).write_bytes(b"")
    assert cli.main(["data", "check", str(folders), "--jobs", "1", "--json", str(file)]) == 1
    assert "not ready: 1 error (30 images in" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["task"], written["ready"], written["problems"][0]["level"]) == ("classification", False, "error")
    assert sum(counts["val"] for counts in written["per_class"].values()) == 10


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("chekc .", "unknown action of evmamba data 'chekc'; did you mean check?"),
        ("check nowhere", "data folder not found: nowhere"),
        ("check . --task detektion", "did you mean detection"),
        ("check . --reduce-zero-label maybe", "maybe is neither true nor false"),
        ("check . --jobs 0", "0 is not a whole number above 0"),
        ("check . --jsn x", "did you mean --json"),
        ("shard . out --shard-size huge", "--shard-size huge is not a size; write it like 300MB"),
        ("shard . out --shard-size 0MB", "--shard-size 0MB is not a size"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: str, expected: str):
    assert cli.main(["data", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_shards_are_packed_and_told(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "shards"
    assert cli.main(["data", "shard", str(folders), str(output), "--shard-size", "50KB", "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    for split in ("train", "val"):
        count = len(list((output / split).glob("*.tar")))
        assert f"{split:6} {count} shard{'s' if count > 1 else ''}, " in told
