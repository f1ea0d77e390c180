"""Files and folders that appear whole or not at all."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.files import new_folder, remove_unfinished, replacing, unfinished, write_errors, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def break_off(path: Path, error: type[BaseException]) -> None:
    path.write_text("half")
    raise error


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == ".json", "writers that look at the suffix write something else"
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_write_that_breaks_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        break_off(partial, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    synced: list[tuple[bool, str]] = []

    def fsync(descriptor: int) -> None:
        synced.append((path.exists(), str(Path(f"/proc/self/fd/{descriptor}").readlink())))

    monkeypatch.setattr("os.fsync", fsync)
    with replacing(path) as partial:
        partial.write_text("new")
    assert synced == [(False, str(partial)), (True, str(tmp_path))]
    synced.clear()
    write_text(path, "newer", durable=False)
    assert synced == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "ours", "text")
        (tmp_path / "theirs").write_text("text")
        with new_folder(tmp_path / "our_folder"):
            pass
        (tmp_path / "their_folder").mkdir()
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert modes["ours"] == modes["theirs"] == 0o666 & ~umask
    assert modes["our_folder"] == modes["their_folder"] == 0o777 & ~umask


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path):
    path = tmp_path / "a.json"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first" * 1000)
        second.write_text("second")
    assert path.read_text() == "first" * 1000
    assert names(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_found_by_the_next(tmp_path: Path):
    path = tmp_path / "a[1].tar"  # a name that would be a pattern
    program = (
        "import os, signal, sys; from pathlib import Path; from evmamba.files import replacing\n"
        f"with replacing(Path(sys.argv[1])) as partial:\n    os.kill(os.getpid(), {signal.SIGKILL:d})"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -signal.SIGKILL
    left = unfinished(path)
    assert names(tmp_path) == [file.name for file in left]
    assert len(left) == 1
    assert unfinished(tmp_path / "other.tar") == []
    remove_unfinished(tmp_path, keep=path)
    assert names(tmp_path) == [file.name for file in left]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path):
    with new_folder(tmp_path / "set") as partial:
        (partial / "file").write_text("text")
        assert not (tmp_path / "set").exists()
    assert names(tmp_path / "set") == ["file"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as partial:
        break_off(partial / "file", KeyboardInterrupt)
    assert names(tmp_path) == ["set"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^cannot write .*file/a\.txt: (Not a directory|File exists)$"):
        write_text(tmp_path / "file" / "a.txt", "text")
    monkeypatch.setattr("os.fsync", no_space)
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match=r"^cannot write .*a\.txt: No space left on device$"):
        write_text(path, "text")
    with pytest.raises(UserError, match="no reason"), write_errors(path):
        raise OSError("no reason")
    assert names(tmp_path) == ["file"]
