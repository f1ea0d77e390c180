"""Steps, schedules, NaN handling and metrics that all tasks share."""

import math
from pathlib import Path

import pytest
import torch

from evmamba.errors import UserError
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.training.callbacks import BestCheckpoint, LastCheckpoint
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig

from .toy import ToyData, ToyModule, quiet_trainer


def test_schedule_is_stepped_per_optimizer_step_under_accumulation(tmp_path: Path):
    """8 images, batch 1, 2 accumulated: 4 optimizer steps an epoch; one epoch of warm-up, then poly to 0."""
    module = ToyModule(OptimizerConfig(lr=1.0), ScheduleConfig("poly", warmup_epochs=1))
    trainer = quiet_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, enable_checkpointing=False)
    trainer.fit(module, ToyData(tmp_path, [1.0] * 8, batch_size=1))
    expected = [0, 0.25, 0.5, 0.75, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert module.rates[::2] == pytest.approx(expected)
    assert module.rates[1::2] == pytest.approx(expected)


def test_learning_rate_is_scaled_to_the_global_batch(tmp_path: Path):
    module = ToyModule(OptimizerConfig(lr=0.8, scale_lr_to_batch=64))
    trainer = quiet_trainer(tmp_path, max_steps=1, accumulate_grad_batches=4, enable_checkpointing=False)
    trainer.fit(module, ToyData(tmp_path, [1.0] * 8, batch_size=2))
    assert module.rates[0] == pytest.approx(0.8 * 8 / 64)


def test_endless_cosine_is_refused_before_training(tmp_path: Path):
    trainer = quiet_trainer(tmp_path, max_epochs=-1, enable_checkpointing=False)
    with pytest.raises(UserError, match="max_epochs"):
        trainer.fit(ToyModule(schedule=ScheduleConfig("cosine")), ToyData(tmp_path, [1.0] * 4))


def test_nan_loss_stops_with_step_and_files_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    data = ToyData(tmp_path, [1.0] * 8, batch_size=2)
    module = ToyModule()
    checkpoints = [BestCheckpoint("val/weight", dirpath=str(tmp_path)), LastCheckpoint(str(tmp_path))]
    quiet_trainer(tmp_path, max_epochs=1, callbacks=checkpoints).fit(module, data)
    good = {name: (tmp_path / name).read_bytes() for name in ("best.ckpt", "last.ckpt")}

    data.factors = [1.0] * 5 + [math.nan] + [1.0] * 2
    checkpoints = [BestCheckpoint("val/weight", dirpath=str(tmp_path)), LastCheckpoint(str(tmp_path))]
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=checkpoints)
    with pytest.raises(
        UserError, match=r"loss is nan at optimizer step [4-7] \(epoch 1, batch \d; images .*file5"
    ) as error:
        trainer.fit(module, data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert "\n" not in str(error.value)
    assert {name: (tmp_path / name).read_bytes() for name in good} == good
    assert torch.isfinite(torch.load(tmp_path / "last.ckpt")["state_dict"]["weight"]).all()


def test_infinite_weights_never_replace_a_checkpoint(tmp_path: Path):
    """A loss can be finite while its gradient is not: the weights are broken and no step has noticed yet."""

    class Poisoned(ToyModule):
        def on_train_epoch_end(self) -> None:
            self.weight.data.fill_(math.inf)

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[LastCheckpoint(str(tmp_path))])
    with pytest.raises(UserError, match=r"no longer finite at optimizer step 2 \(weight\)"):
        trainer.fit(Poisoned(), ToyData(tmp_path, [1.0] * 4))
    # What was saved before the validation is still there.
    assert torch.load(tmp_path / "last.ckpt")["state_dict"]["weight"].isfinite().all()


def test_evaluation_sees_every_image_once(tmp_path: Path):
    module = ToyModule()
    quiet_trainer(tmp_path).validate(module, ToyData(tmp_path, [1.0] * 5, batch_size=2), verbose=False)
    assert module.counted == [f"file{k}" for k in range(5)]


def test_metrics_are_kept_beyond_the_float32_that_lightning_logs(tmp_path: Path):
    class Third(ToyModule):
        def evaluation_end(self, stage: str) -> Evaluation:
            return Evaluation({"third": torch.tensor(1 / 3, dtype=torch.float64)})

    module = Third()
    (logged,) = quiet_trainer(tmp_path).test(module, ToyData(tmp_path, [1.0]), verbose=False)
    assert logged["test/third"] != 1 / 3
    assert module.evaluation.metrics == {"third": 1 / 3}


def test_batches_marked_ignore_do_not_count(tmp_path: Path):
    module = ToyModule()
    for step in (module.validation_step, module.test_step):
        step({"path": ["file0"], "ignore": True}, 0)
        assert module.counted == []
        step({"path": ["file0"]}, 0)
        assert module.counted.pop() == "file0"


def test_a_checkpoint_of_another_network_is_told_in_one_line(tmp_path: Path):
    class Wider(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.more = torch.nn.Linear(1, 1)

    data = ToyData(tmp_path, [1.0] * 2)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[LastCheckpoint(str(tmp_path))]).fit(ToyModule(), data)
    with pytest.raises(
        UserError, match=r"missing: more.weight, more.bias; 1 of another shape: weight \[1, 1\] \(model: \[2\]\)"
    ) as error:
        quiet_trainer(tmp_path).validate(Wider(), data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert "\n" not in str(error.value)
