"""The result store: nothing is lost on the way to the disk and back, and a broken file is named."""

import datetime
import json
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.fit.record import Background, TrainingRecord
from evmamba.launch.store import results
from evmamba.launch.store.results import (
    FILE_NAME,
    Result,
    config_hash,
    find_results,
    git_state,
    provenance,
    read_result,
    trained_from_scratch,
    write_json,
    write_result,
)

from ..handmade import made_result


def test_a_result_comes_back_as_it_was_written(tmp_path: Path):
    result = made_result("detection", "efficientvmamba_t", gallery=["gallery/000.jpg"], training={"curve": [[1, 0.5]]})
    path = write_result(result, tmp_path / "run")
    again = read_result(path)
    assert again == result
    assert again.folder == tmp_path / "run"


def test_numbers_that_are_not_finite_become_null_not_broken_json(tmp_path: Path):
    result = made_result("detection", "resnet18", metrics={"AP": float("nan"), "AP50": float("inf"), "AP75": 0.5})
    path = write_result(result, tmp_path)
    assert "NaN" not in path.read_text()
    assert read_result(path).metrics == {"AP": None, "AP50": None, "AP75": 0.5}


def test_a_test_of_other_weights_says_how_their_training_began():
    def result(config: dict | None, **origin):
        return made_result("segmentation", "resnet18", training={"steps": 5}, provenance={"config": config} | origin)

    scratch, warm = ({"model": {"init_args": {"checkpoint": path}}} for path in (None, "w.pth"))
    assert trained_from_scratch(result(scratch)) is True
    assert trained_from_scratch(result(warm)) is False
    assert trained_from_scratch(result(scratch, init_from="classification-resnet18")) is False
    assert trained_from_scratch(result(scratch, init_from="training", from_scratch=True)) is True
    assert trained_from_scratch(result(None)) is None


def test_a_continued_training_knows_its_batch_even_if_no_step_was_left():
    before, after = TrainingRecord(), TrainingRecord()
    before.images = 32
    after.load_state_dict(before.state_dict())
    assert after.images == 32
    after.load_state_dict({"curve": [], "validation": [], "seconds": 1.0})  # of an older version
    assert after.images == 0


def test_a_commit_made_while_a_run_works_is_not_its_own():
    git_state.cache_clear()
    Background("r", {})
    assert git_state.cache_info().currsize == 1


def test_tensors_and_arrays_become_numbers(tmp_path: Path):
    np = pytest.importorskip("numpy")
    result = made_result("segmentation", "resnet18", details={"confusion": np.eye(2, dtype=np.int64)})
    assert read_result(write_result(result, tmp_path)).details == {"confusion": [[1, 0], [0, 1]]}


def test_a_write_that_breaks_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: No space left on device"):
        write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_an_output_below_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*result\.json: "):
        write_result(made_result("cost", "resnet18"), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no valid JSON"),
        ("[1]", "not a result"),
        ('{"task": "cost"}', "no schema version"),
        ('{"schema": 99}', "schema version 99, this evmamba reads version 1"),
        ('{"schema": 1, "task": "cost", "model": "a"}', "field 'run' is missing"),
        ('{"schema": 1, "run": "r", "task": "dance", "model": "a"}', "task is 'dance'"),
        ('{"schema": 1, "run": "r", "task": "cost", "model": "a", "colour": 1}', "unknown field 'colour'"),
        ('{"schema": 1, "run": "r", "task": "cost", "model": "a", "metrics": []}', r"Expected `object`.*metrics"),
        ('{"schema": 1, "run": "r", "task": "cost", "model": "a", "status": "failed"}', "without a reason"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, complaint: str):
    path = tmp_path / FILE_NAME
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as raised:
        read_result(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_results_are_found_once_however_often_their_folders_are_named(tmp_path: Path):
    write_result(made_result("cost", "resnet18"), tmp_path / "a" / "b")
    write_result(made_result("cost", "resnet18"), tmp_path / "c")
    found = find_results([tmp_path, tmp_path / "a", tmp_path / "c" / FILE_NAME])
    assert found == [tmp_path / "a" / "b" / FILE_NAME, tmp_path / "c" / FILE_NAME]


def test_folders_without_results_are_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"no result\.json under"):
        find_results([tmp_path])
    with pytest.raises(UserError, match="no such file or folder"):
        find_results([tmp_path / "missing"])


def test_the_hash_depends_on_content_not_on_order():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_a_failed_result_needs_a_reason():
    with pytest.raises(UserError, match="without a reason"):
        Result("r", "cost", "resnet18", status="failed")


def test_provenance_says_when_how_long_and_with_what():
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=90)
    found = provenance(config={"seed": 3}, seed=3, device="cpu", precision="32-true", start=start)
    assert 90 <= found["duration_s"] < 100
    assert found["config_hash"] == config_hash({"seed": 3})
    assert {"python", "evmamba", "torch"} <= set(found["versions"])
    assert set(found) >= {"git_commit", "git_dirty", "nodes", "processes", "start"}


def test_a_duration_is_right_also_when_the_clock_was_set(monkeypatch: pytest.MonkeyPatch):
    class SetBack(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime(2001, 1, 1, tzinfo=tz)

    start = results.now()
    monkeypatch.setattr(results.datetime, "datetime", SetBack)
    told = results.provenance(config={}, seed=0, device="cpu", precision="32", start=start)
    assert 0 <= told["duration_s"] < 60  # type: ignore[operator]
