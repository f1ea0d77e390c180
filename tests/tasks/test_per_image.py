"""Kept predictions come back as they were written, and a file that is none of ours is refused in one line."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from evmamba.errors import UserError
from evmamba.tasks.classification.per_image import Right


def right() -> Right:
    return Right.of({"b/2.png": (True, True), "a/ü.png": (False, True), "c/1.png": (True, True)})


def test_written_and_read_it_is_the_same_and_so_are_the_bytes(tmp_path: Path):
    right().write(tmp_path / "one.npz")
    right().write(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    found = Right.read(tmp_path / "one.npz")
    assert found.images == ["a/ü.png", "b/2.png", "c/1.png"]
    assert found.arrays["top1"].tolist() == [False, True, True]


class Touch:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickle_in_the_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "bad.npz", images=np.array([Touch()], dtype=object), top1=np.ones(1, dtype=bool))
    with pytest.raises(UserError, match=r"bad\.npz: no predictions per image"):
        Right.read(tmp_path / "bad.npz")
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(UserError, match=r"plain\.npz: no predictions per image"):
        Right.read(tmp_path / "plain.npz")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top1": np.ones(2, dtype=bool)}, "not one number an image"),
        ({"top1": np.ones(3)}, "float64 is not expected"),
        ({"other": np.ones(3, dtype=bool)}, "other of type bool is not expected"),
        ({"images": np.array([b"a", b"a", b"b"])}, "sorted"),
        ({"images": np.arange(3)}, "names"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_files_name(tmp_path: Path, changes: dict, reason: str):
    arrays = {"images": np.array([b"a", b"b", b"c"]), **right().arrays} | changes
    np.savez(tmp_path / "kept.npz", **arrays)
    with pytest.raises(UserError, match=rf"kept\.npz: .*{reason}"):
        Right.read(tmp_path / "kept.npz")


def test_a_torn_a_missing_and_a_lying_file_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        Right.read(tmp_path / "missing.npz")
    right().write(tmp_path / "torn.npz")
    content = (tmp_path / "torn.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(content[: len(content) // 2])
    header = b"{'descr': '|b1', 'fortran_order': False, 'shape': (99999999999999999,), }\n"
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name in ("torn", "lying"):
        with pytest.raises(UserError, match=rf"{name}\.npz: no predictions per image"):
            Right.read(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(("place", "value"), [("flags", 1), ("method", 97)])
def test_members_that_cannot_be_unpacked_are_refused(tmp_path: Path, place: str, value: int):
    """Encrypted ones, and those of a method that zipfile does not know."""
    path = tmp_path / "kept.npz"
    right().write(path)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + flags + (2 if place == "method" else 0)] = value
            start = content.find(signature, start + 4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"kept\.npz: no predictions per image"):
        Right.read(path)
