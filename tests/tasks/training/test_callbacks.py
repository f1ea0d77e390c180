"""Averaged weights against hand-computed ones; checkpoints that are whole, best and last."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from evmamba.errors import UserError
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.training import callbacks
from evmamba.tasks.training.callbacks import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, WeightEMA
from evmamba.tasks.training.checkpoint_files import RUN_KEY, candidates, newest_whole
from evmamba.tasks.training.lease import claim, release

from ...full_disk import full_disk
from ..toy import ToyData, ToyModule, quiet_trainer


class Recorder(L.Callback):
    """Raw weight after every step, and the weight that validation sees."""

    def __init__(self) -> None:
        self.raw: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.raw.append(pl_module.weight.item())

    def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
        self.validated.append(pl_module.weight.item())


def averages(raw: list[float], decay: float, warmup: bool) -> list[float]:
    """The definition: the first step copies, then e = d e + (1 - d) w."""
    result = [raw[0]]
    for n, weight in enumerate(raw[1:], start=1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        result.append(d * result[-1] + (1 - d) * weight)
    return result


@pytest.mark.parametrize("warmup", [False, True])
def test_validation_and_checkpoint_hold_the_average(tmp_path: Path, warmup: bool):
    recorder, module = Recorder(), ToyModule()
    callbacks = [WeightEMA(decay=0.8, warmup=warmup), recorder, LastCheckpoint(str(tmp_path))]
    quiet_trainer(tmp_path, max_epochs=3, callbacks=callbacks).fit(module, ToyData(tmp_path, [1.0] * 6, batch_size=2))

    expected = averages(recorder.raw, 0.8, warmup)
    assert len(recorder.raw) == 9
    assert recorder.validated[::3] == pytest.approx(expected[2::3])
    assert module.weight.item() == pytest.approx(expected[-1])  # after training the module is the average
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(expected[-1])
    assert checkpoint["current_model_state"]["weight"].item() == pytest.approx(recorder.raw[-1])


def test_training_goes_on_from_raw_and_averaged_weights(tmp_path: Path):
    def run(epochs: int, folder: Path, resume: Path | None = None) -> float:
        module = ToyModule()
        callbacks = [WeightEMA(decay=0.8, warmup=True), LastCheckpoint(str(folder))]
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, ToyData(tmp_path, [1.0, 2.0, 3.0, 4.0]), ckpt_path=resume and str(resume))
        return module.weight.item()

    run(2, tmp_path / "a")
    assert run(4, tmp_path / "a", tmp_path / "a" / "last.ckpt") == run(4, tmp_path / "b")


@pytest.mark.parametrize("max_steps", [2, 5])
def test_the_last_steps_are_saved_without_a_validation_after_them(tmp_path: Path, max_steps: int):
    """Validation every third step: none at all in two steps, and in five the last one is two steps old."""

    def run(steps: int, folder: Path, resume: Path | None = None) -> list[float]:
        recorder, module = Recorder(), ToyModule()
        callbacks = [LastCheckpoint(str(folder)), WeightEMA(decay=0.8), recorder]
        trainer = quiet_trainer(
            tmp_path,
            max_steps=steps,
            max_epochs=-1,
            callbacks=callbacks,
            check_val_every_n_epoch=None,
            val_check_interval=3,
        )
        data = ToyData(tmp_path, [1.0] * 8, batch_size=2)
        trainer.fit(module, data, ckpt_path=resume and str(resume))
        assert trainer.global_step == steps
        return [*recorder.raw, module.weight.item()]

    *raw, final = run(max_steps, tmp_path / "a")
    checkpoint = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == max_steps
    assert checkpoint["current_model_state"]["weight"].item() == raw[-1]
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(averages(raw, 0.8, False)[-1])
    assert checkpoint["state_dict"]["weight"].item() == final != raw[-1]
    resumed = run(8, tmp_path / "a", tmp_path / "a" / "last.ckpt")
    assert resumed == run(8, tmp_path / "b")[max_steps:]


@pytest.mark.parametrize("strategy", [SimpleNamespace(zero_stage_3=True), FSDPStrategy.__new__(FSDPStrategy)])
def test_average_of_partitioned_weights_is_refused(strategy):
    with pytest.raises(UserError, match="EMA"):
        WeightEMA().setup(SimpleNamespace(strategy=strategy), ToyModule(), "fit")


def test_decay_out_of_range_is_refused():
    with pytest.raises(UserError, match="decay"):
        WeightEMA(decay=1.0)


def test_best_keeps_the_best_and_last_the_newest(tmp_path: Path):
    class Worsening(ToyModule):
        def evaluation_end(self, stage: str) -> Evaluation:
            return Evaluation({"score": 1.0 / (1 + self.current_epoch)})

    callbacks = [BestCheckpoint("val/score", dirpath=str(tmp_path)), LastCheckpoint(str(tmp_path))]
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=callbacks)
    trainer.fit(Worsening(), ToyData(tmp_path, [1.0] * 4))
    epochs = {path.name: torch.load(path)["epoch"] for path in tmp_path.glob("*.ckpt")}
    assert epochs == {"best.ckpt": 0, "last.ckpt": 2, "previous.ckpt": 2}
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "best.ckpt")


def test_a_training_that_stops_early_ends_with_its_best_weights_and_is_finished(tmp_path: Path):
    """The weight rises towards 1, the score falls from the third epoch on: patience 2 ends it after the fifth."""

    class Peaking(ToyModule):
        def evaluation_end(self, stage: str) -> Evaluation:
            self.seen = [*getattr(self, "seen", []), self.weight.item()]
            return Evaluation({"score": -abs(self.current_epoch - 2.0)})

    def run() -> Peaking:
        module = Peaking()
        callbacks = [
            BestCheckpoint("val/score", dirpath=str(tmp_path / "checkpoints"), restore=True),
            EarlyStopping("val/score", mode="max", patience=2, check_on_train_epoch_end=False),
            LastCheckpoint(str(tmp_path / "checkpoints")),
        ]
        found = newest_whole(candidates(tmp_path))[0] if candidates(tmp_path) else None
        trainer = quiet_trainer(tmp_path, max_epochs=9, callbacks=callbacks)
        trainer.fit(module, ToyData(tmp_path, [1.0] * 4), ckpt_path=found and str(found.path), weights_only=True)
        return module

    module = run()
    assert len(module.seen) == 5
    assert module.weight.item() == module.seen[2] != module.seen[4]
    (last, _) = newest_whole(candidates(tmp_path))
    assert last is not None
    assert last.ended == {"max_epochs": 9, "max_steps": -1}
    assert run().weight.item() == module.weight.item()  # started again, it has nothing to do but that


@pytest.mark.parametrize("strategy", [SimpleNamespace(zero_stage_3=False), FSDPStrategy.__new__(FSDPStrategy)])
def test_best_weights_in_folders_are_not_restored(strategy):
    with pytest.raises(UserError, match="write folders; use DDP"):
        BestCheckpoint("val/score", restore=True).setup(SimpleNamespace(strategy=strategy), ToyModule(), "fit")


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, target)

    def half(checkpoint, file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 2}, target)
    assert torch.load(target) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_written_in_the_background_is_of_the_moment_at_which_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    go, save = threading.Event(), torch.save

    def late(checkpoint, file) -> None:
        go.wait(10)
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", late)
    writer = AtomicCheckpointIO()
    writer.background = True
    weight, curve = torch.ones(2), [1]
    done: list[str] = []
    writer.save_checkpoint({"state_dict": {"w": weight, "again": weight}, "curve": curve}, tmp_path / "last.ckpt")
    writer.then(lambda: done.append("after"))
    weight.zero_()
    curve.append(2)
    assert not (tmp_path / "last.ckpt").exists()
    assert done == []
    go.set()
    writer.wait()
    found = torch.load(tmp_path / "last.ckpt")
    assert torch.equal(found["state_dict"]["again"], torch.ones(2))
    assert (found["curve"], done) == ([1], ["after"])

    writer.save_checkpoint({}, tmp_path / "last.ckpt" / "below a file.ckpt")
    writer.then(lambda: done.append("in spite of that"))
    with pytest.raises(UserError, match="cannot write"):
        writer.wait()
    assert done == ["after"]


def test_a_checkpoint_waits_for_the_copy_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, written = torch.save, []

    def late(checkpoint, file) -> None:
        time.sleep(0.2)
        save(checkpoint, file)
        written.append(checkpoint["epoch"])

    monkeypatch.setattr(torch, "save", late)
    writer = AtomicCheckpointIO()
    writer.background = True
    writer.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    assert written == []
    writer.save_checkpoint({"epoch": 2}, tmp_path / "last.ckpt")
    assert written == [1]
    writer.wait()
    assert written == [1, 2]


def test_no_process_leaves_a_training_before_its_checkpoints_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others read the best one in `on_fit_end`; the barrier is where they wait for rank 0."""
    save, seen = torch.save, []

    def late(checkpoint, file) -> None:
        time.sleep(0.1)
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", late)
    last = LastCheckpoint(str(tmp_path), asynchronous=True)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[last])

    def barrier(name: str | None = None) -> None:
        if name == "written":
            seen.append(torch.load(tmp_path / "last.ckpt")[RUN_KEY]["ended"] is not None)

    monkeypatch.setattr(trainer.strategy, "barrier", barrier)
    trainer.fit(ToyModule(), ToyData(tmp_path, [1.0] * 4))
    assert seen == [True]


def test_a_job_is_queued_again_from_a_validation_when_its_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    last = LastCheckpoint(asynchronous=True)
    monkeypatch.setattr(callbacks, "requeue_job", lambda: done.append("queued again") or True)
    monkeypatch.setattr(callbacks, "_writer", lambda trainer: SimpleNamespace(wait=lambda: done.append("written")))
    connector = SimpleNamespace(noted=signal.SIGUSR1)
    trainer = SimpleNamespace(_signal_connector=connector, world_size=2, is_global_zero=True)
    last.on_validation_batch_end(trainer, ToyModule())
    assert done == ["written", "queued again"]


def test_a_training_notes_how_long_a_checkpoint_takes_also_in_the_background(tmp_path: Path):
    for asynchronous in (False, True):
        last = LastCheckpoint(str(tmp_path / str(asynchronous)), every_n_train_steps=1, asynchronous=asynchronous)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[last])
        trainer.fit(ToyModule(), ToyData(tmp_path, [1.0] * 4))
        assert last.seconds is not None
        assert last.seconds > 0
        assert torch.load(tmp_path / str(asynchronous) / "last.ckpt")["global_step"] == trainer.global_step


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_checkpoints_are_not_written_in_the_background(strategy: type):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    trainer.strategy._checkpoint_io = AtomicCheckpointIO()
    with pytest.raises(UserError, match=r"use --strategy ddp, or leave out LastCheckpoint\.asynchronous"):
        callbacks._writer(trainer)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*file/last\.ckpt: "):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_it(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.ones(3)}, path)
    with full_disk(100_000), pytest.raises(UserError, match=r"cannot write .*last\.ckpt: File too large"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(1_000_000)}, path)
    assert torch.load(path, weights_only=True)["w"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_checkpoints_that_killed_processes_had_begun_are_removed_by_the_folders_owner_alone(tmp_path: Path):
    begun = [
        tmp_path / name for name in (".best.ckpt.partial-1a2b3c4d.ckpt", "..last.ckpt.partial-17.partial-00000000")
    ]
    for path in begun:
        path.write_text("half")
    (tmp_path / ".last.ckpt.partial-17").mkdir()  # of a sharded strategy
    trainer, last = quiet_trainer(tmp_path, callbacks=[]), LastCheckpoint(str(tmp_path))
    last.setup(trainer, ToyModule(), "fit")
    assert len(list(tmp_path.iterdir())) == 3
    claim(tmp_path / "run")
    LastCheckpoint(str(tmp_path / "run" / "..")).setup(trainer, ToyModule(), "fit")
    assert len(list(tmp_path.glob(".*"))) == 3  # another folder than the one it owns
    release()
    claim(tmp_path)
    try:
        last.setup(trainer, ToyModule(), "fit")
    finally:
        release()
    assert list(tmp_path.glob(".*")) == []
