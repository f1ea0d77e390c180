"""No checkpoint runs what it says, and none of ours is refused."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from evmamba.errors import UserError
from evmamba.tasks.training.checkpoint_files import NEEDED, RUN_KEY, read_checkpoint
from evmamba.tasks.training.checkpoint_safety import METADATA_FILE, Torn, check_folder, holds, load_plain


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def content(**more: object) -> dict[str, object]:
    plain = dict.fromkeys(NEEDED, 0) | {"state_dict": {"w": torch.ones(3)}, "global_step": 7}
    return plain | {RUN_KEY: {"ended": None}} | more


def test_plain_values_are_read_and_payloads_refused(tmp_path: Path, marker: Path):
    torch.save(content(), tmp_path / "good.ckpt")
    torch.save(content(callbacks=Payload(marker)), tmp_path / "bad.ckpt")
    assert load_plain(tmp_path / "good.ckpt")["global_step"] == 7
    with pytest.raises(UserError, match=r"bad\.ckpt holds more than tensors"):
        load_plain(tmp_path / "bad.ckpt")
    assert not marker.exists()


def test_a_payload_is_refused_and_not_taken_for_a_torn_file(tmp_path: Path, marker: Path):
    torch.save(content(callbacks=Payload(marker)), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not marker.exists()


@pytest.mark.parametrize("wrong", [{"global_step": "7"}, {"global_step": -1}, {"global_step": True}, {RUN_KEY: "x"}])
def test_entries_of_another_kind_are_no_checkpoint(tmp_path: Path, wrong: dict):
    torch.save(content(**wrong), tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") is None


def distributed(folder: Path, value: object) -> Path:
    """What FSDP2 leaves: an index, tensors and values in one file, the rest in another."""
    dcp.save({"state_dict": {"w": torch.ones(3)}, "value": value}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 7, RUN_KEY: {"ended": None}}, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_within_a_sharded_checkpoint_are_looked_at(tmp_path: Path, marker: Path):
    check_folder(distributed(tmp_path / "good", {"lr": 0.1}))
    with pytest.raises(UserError, match="value"):
        check_folder(distributed(tmp_path / "bad", Payload(marker)))
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_index_of_a_sharded_checkpoint_is_looked_at(tmp_path: Path, marker: Path):
    folder = distributed(tmp_path / "folder", 1)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UserError, match=METADATA_FILE):
        check_folder(folder)
    (folder / METADATA_FILE).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"no whole checkpoint|holds more"):
        check_folder(folder)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path):
    folder = distributed(tmp_path / "folder", 1)
    with (folder / METADATA_FILE).open("rb") as file:
        index = pickle.load(file)
    for where in index.storage_data.values():
        where.relative_path = "../../secret"
    (folder / METADATA_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="points out of its folder"):
        check_folder(folder)


def test_bytes_are_named_in_the_message(marker: Path):
    stream = io.BytesIO()
    torch.save(Payload(marker), stream)
    stream.seek(0)
    with pytest.raises(UserError, match="the second part"):
        load_plain(stream, "the second part")
    assert not marker.exists()


def test_compressed_archives_are_refused_before_they_fill_the_memory(tmp_path: Path):
    """torch unpacks what deflate made a thousand times smaller."""
    torch.save(content(w=torch.zeros(1_000_000)), tmp_path / "whole.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "whole.ckpt") as whole,
        zipfile.ZipFile(tmp_path / "last.ckpt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in whole.namelist():
            small.writestr(entry, whole.read(entry))
    with pytest.raises(Torn, match="it is compressed"):
        load_plain(tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") is None
    assert not holds(tmp_path / "whole.ckpt", b"nowhere")
    assert holds(tmp_path / "whole.ckpt", b"global_step")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_index_that_promises_more_than_its_files_hold_is_torn(tmp_path: Path):
    folder = distributed(tmp_path / "folder", 1)
    with (folder / METADATA_FILE).open("rb") as file:
        index = pickle.load(file)
    index.state_dict_metadata["state_dict.w"].size = torch.Size([2**40])
    (folder / METADATA_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(Torn, match="promises 4398046511104 bytes"):
        check_folder(folder)
