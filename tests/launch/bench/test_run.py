"""One run from its spec: whatever happens, a result tells it."""

import dataclasses
import datetime
import errno
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from msgspec import structs

from evmamba.errors import UserError
from evmamba.launch.bench import run
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.measure import cost
from evmamba.launch.store.results import read_result, write_result
from evmamba.launch.store.spec import SPEC_FILE, CostSpec, Resources, Spec, Timing, failed_result
from evmamba.tasks.training import lease
from evmamba.tasks.training.interruption import TrainingStopped
from evmamba.tasks.training.lease import OWNER_FILE, read_owner

from ...full_disk import full_disk
from ..handmade import made_result, made_spec

QUICK = {"batch_size": 2, "warmup_steps": 0, "timed_steps": 1}


def written(folder: Path, spec: Spec) -> str:
    spec.write(folder)
    return str(folder / SPEC_FILE)


def cost_spec(model: str = "efficientvmamba_t") -> CostSpec:
    return CostSpec(model=model, seed=0, device="cpu", timing=Timing(**QUICK))


def test_a_cost_run_has_the_models_figures_and_says_how_it_timed(tmp_path: Path):
    assert run.main([written(tmp_path, cost_spec())]) == 0
    result = read_result(tmp_path / "result.json")
    assert result.cost["parameters"] == 6_493_660
    assert result.cost["macs"] == 806_436_096
    assert result.cost["latency_ms_median"] > 0
    assert result.cost["images_per_s"] > 0
    assert result.protocol == {"input_size": [3, 224, 224], "num_classes": 1000, **QUICK}
    assert result.provenance["spec_hash"] == cost_spec().hash


def test_a_users_mistake_is_the_reason_word_for_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = settings_of(find_recipe("conf/classification/tiny.yaml"), [("data.init_args.data_dir", "/nowhere")])
    spec = made_spec("classification", settings=settings)
    assert run.main([written(tmp_path, spec)]) == 1
    result = read_result(tmp_path / "result.json")
    assert result.reason == "data folder not found: /nowhere (data.data_dir)"
    assert (result.task, result.model, result.head) == ("classification", "resnet18", "linear")
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_leaves_its_first_line_in_the_result_and_its_traceback_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(spec: Spec, folder: Path) -> None:
        raise ZeroDivisionError("nothing to divide by\nsecond line")

    monkeypatch.setattr(cost, "measure_cost", broken)
    assert run.main([written(tmp_path, cost_spec())]) == 1
    result = read_result(tmp_path / "result.json")
    assert result.reason == f"ZeroDivisionError: nothing to divide by (see {tmp_path / 'run.log'})"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cause", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), ZeroDivisionError()], ids=repr
)
def test_a_run_that_the_machine_failed_goes_on_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception
):
    def broken(spec: Spec, folder: Path) -> None:
        raise UserError("cannot write last.ckpt") from cause

    monkeypatch.setattr(cost, "measure_cost", broken)
    assert run.main([written(tmp_path, cost_spec())]) == 1
    told = read_result(tmp_path / "result.json").provenance.get("interrupted", False)
    assert told is not isinstance(cause, ZeroDivisionError)


def test_a_result_that_finds_no_room_is_a_line_and_the_one_before_it_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(spec: Spec, folder: Path) -> None:
        raise UserError("no luck")

    monkeypatch.setattr(cost, "measure_cost", broken)
    path = written(tmp_path, cost_spec())
    (tmp_path / "result.json").write_text("before")
    monkeypatch.setattr(run, "claim", lambda folder: Mock())  # the disk fills up later
    with full_disk(20):
        assert run.main([path]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["failed: no luck", f"failed: cannot write {tmp_path / 'result.json'}: File too large"]
    assert (tmp_path / "result.json").read_text() == "before"


@pytest.mark.parametrize("why", ["no luck", None], ids=["failed", "no result"])
def test_a_run_whose_need_is_not_finished_says_so_and_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str | None
):
    """The next job of a chain starts also when the classification of its detection has failed."""
    needed = made_spec("classification")
    spec = made_spec("detection").after(needed)
    if why is not None:
        failed = failed_result(needed, why, datetime.datetime.now(datetime.UTC))
        (tmp_path / needed.name).mkdir()
        write_result(failed, tmp_path / needed.name)
    begun: list[Spec] = []
    monkeypatch.setattr(run, "run", lambda spec, folder: begun.append(spec))
    folder = tmp_path / spec.name
    assert run.main([written(folder, spec)]) == 1
    result = read_result(folder / "result.json")
    assert result.reason == f"not started: needs {needed.name}, which failed: {why or 'it left no result'}"
    assert result.blocked_by == needed.name
    assert begun == []
    write_result(made_result("classification", "resnet18", run=needed.name), tmp_path / needed.name)
    assert run.main([written(folder, spec)]) == 0
    assert begun == [spec]


def test_an_interrupted_run_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(spec: Spec, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "measure_cost", interrupted)
    assert run.main([written(tmp_path, cost_spec())]) == 130
    assert not (tmp_path / "result.json").exists()


def test_a_signal_that_waited_until_the_end_leaves_no_folder_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = iter([None, TrainingStopped(75)])

    def deliver() -> None:
        if stopped := next(calls):
            raise stopped

    monkeypatch.setattr(run, "deliver_signals", deliver)
    monkeypatch.setattr(run, "run", lambda spec, folder: None)
    with pytest.raises(TrainingStopped):
        run.main([written(tmp_path, cost_spec())])
    assert read_owner(tmp_path).released


def test_of_several_processes_the_first_that_fails_tells_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    spec = structs.replace(cost_spec(), resources=Resources(devices=2))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr("evmamba.launch.fit.failures.PATIENCE_SECONDS", 0.0)

    def main(rank: int, message: str) -> None:
        def broken(spec: Spec, folder: Path) -> None:
            raise RuntimeError(message)

        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setattr(cost, "measure_cost", broken)
        assert run.main([written(tmp_path, spec)]) == 1

    main(1, "an index out of range")
    main(0, "connection closed by peer")
    reason = read_result(tmp_path / "result.json").reason
    assert reason.startswith("RuntimeError: an index out of range (process 1 on ")
    assert "connection closed by peer" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued: another start, another first failure
    main(0, "again")
    assert read_result(tmp_path / "result.json").reason.startswith("RuntimeError: again (process 0 on ")


def test_a_leftover_of_an_earlier_start_neither_replaces_a_result_nor_begins_where_another_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Rank 1 on a node that SLURM took for lost; meanwhile the job was started again, and has finished."""
    path = written(tmp_path, cost_spec())
    monkeypatch.setattr("evmamba.launch.fit.failures.PATIENCE_SECONDS", 0.0)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "0")

    def measured(spec: Spec, folder: Path) -> None:
        result = made_result("cost", spec.model, run=spec.name)
        result.provenance["spec_hash"] = spec.hash
        write_result(result, folder)

    monkeypatch.setattr(cost, "measure_cost", measured)
    assert run.main([path]) == 0

    def broken(spec: Spec, folder: Path) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(cost, "measure_cost", broken)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert run.main([path]) == 1
    assert read_result(tmp_path / "result.json").finished
    (tmp_path / "result.json").unlink()
    assert run.main([path]) == 1
    assert not (tmp_path / "result.json").exists()  # the later start's is still to come

    born = lease._born(os.getppid()) or 0.0
    owner = dataclasses.replace(read_owner(tmp_path), pid=os.getppid(), born=born, start="13.0", released=False)
    (tmp_path / OWNER_FILE).write_text(json.dumps(dataclasses.asdict(owner)))
    monkeypatch.setenv("SLURM_PROCID", "0")
    capsys.readouterr()
    assert run.main([path]) == 1
    assert f"is at work already: process {os.getppid()} on" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_a_file_that_is_no_spec_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / SPEC_FILE).write_text('{"task": "cost"}')
    assert run.main([str(tmp_path / SPEC_FILE)]) == 2
    assert capsys.readouterr().err.startswith(f"failed: {tmp_path / SPEC_FILE}: no spec of this version of evmamba (")
