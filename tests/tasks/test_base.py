"""Steps, schedules, NaN handling and loaders that all tasks share."""

import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks import base
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
        def evaluation_end(self, stage: str) -> dict:
            return {"third": torch.tensor(1 / 3, dtype=torch.float64)}

    module = Third()
    (logged,) = quiet_trainer(tmp_path).test(module, ToyData(tmp_path, [1.0]), verbose=False)
    assert logged["test/third"] != 1 / 3
    assert module.exact_metrics == {"third": 1 / 3}


def test_batches_marked_ignore_do_not_count(tmp_path: Path):
    module = ToyModule()
    for step in (module.validation_step, module.test_step):
        step({"path": ["file0"], "ignore": True}, 0)
        assert module.counted == []
        step({"path": ["file0"]}, 0)
        assert module.counted.pop() == "file0"


def test_a_short_last_batch_is_dropped_unless_it_is_all_there_is(tmp_path: Path):
    def sizes(n: int) -> list[int]:
        data = ToyData(tmp_path, [1.0] * n, batch_size=4)
        data.setup("fit")
        return [len(batch["path"]) for batch in data.train_dataloader()]

    assert sizes(10) == [4, 4]
    assert sizes(3) == [3]


def test_description_changes_with_the_files(tmp_path: Path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    data = ToyData(tmp_path, [])
    first = data.description()
    assert (first["name"], first["train_images"], first["num_classes"]) == (tmp_path.name, 2, 2)
    assert data.description() == first
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert data.description()["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize("limit", [base.MAX_HASHED_BYTES, 0], ids=["contents", "times"])
def test_fingerprint_changes_with_labels_of_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(base, "MAX_HASHED_BYTES", limit)
    label = tmp_path / "label.txt"
    label.write_text("cat")
    first = base.fingerprint(tmp_path, [], ["a"], [label])
    assert base.fingerprint(tmp_path, [], ["a"], [label]) == first
    label.write_text("dog")
    os.utime(label, ns=(1, 1))
    assert base.fingerprint(tmp_path, [], ["a"], [label]) != first


def test_fingerprint_of_files_outside_the_root(tmp_path: Path):
    (tmp_path / "root").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    one, other = (base.fingerprint(tmp_path / "root", [tmp_path / name], []) for name in ("a.png", "b.png"))
    assert one != other


def test_unreadable_images_stop_or_are_left_out(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    data = ToyData(tmp_path, [])
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"1 of 2 train images cannot be read: .*b\.png"):
        data.readable(files, "train")
    data.on_bad_image = "skip"
    with pytest.warns(UserWarning, match=r"1 of 2 train images .*b\.png"):
        assert data.readable(files, "train") == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("options", "message"), [({"batch_size": 0}, "batch_size"), ({"num_workers": -1}, "num_workers")]
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ToyData(tmp_path, [1.0], **options)


def test_missing_data_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"data folder not found: .*nowhere"):
        ToyData(tmp_path / "nowhere", [1.0])


def test_gallery_pictures_are_few_and_spread_over_the_test_set(tmp_path: Path):
    class Painter(ToyModule):
        def evaluation_step(self, batch: dict, stage: str) -> None:
            for image, _ in enumerate(batch["path"]):
                if self.wants_picture():
                    self.add_picture(Image.new("RGB", (8, 8)))
                    drawn.append(image)

    drawn: list[int] = []
    module = Painter()
    data = ToyData(tmp_path, [1.0] * 9, batch_size=9)
    quiet_trainer(tmp_path).test(module, data, verbose=False)
    assert not drawn  # no output_dir, no files
    module.output_dir, module.gallery_size = tmp_path / "out", 3
    for _ in range(2):  # a second test starts a new gallery
        drawn.clear()
        quiet_trainer(tmp_path).test(module, data, verbose=False)
        assert drawn == [0, 3, 6]
        names = sorted(path.name for path in (tmp_path / "out" / "gallery").iterdir())
        assert names == ["000.jpg", "001.jpg", "002.jpg"]


def test_the_worst_cases_are_drawn_worst_first_and_right_ones_are_none(tmp_path: Path):
    class Judge(ToyModule):
        def evaluation_step(self, batch: dict, stage: str) -> None:
            for index, badness in enumerate((0.2, 0.0, 0.9, math.nan, 0.5, 0.9, 0.3, 0.1)):
                self.offer_worst(badness, lambda index=index: Image.new("L", (8, 8), 10 * index))

    module = Judge()
    data = ToyData(tmp_path, [1.0], batch_size=1)
    quiet_trainer(tmp_path).test(module, data, verbose=False)  # no output_dir, no files
    module.output_dir = tmp_path / "out"
    for _ in range(2):  # a second test starts anew
        quiet_trainer(tmp_path).test(module, data, verbose=False)
        pictures = sorted((tmp_path / "out" / "gallery").iterdir())
        assert [path.name for path in pictures] == [f"worst_00{n}.jpg" for n in range(4)]
        found = [round(Image.open(path).convert("L").getpixel((4, 4)) / 10) for path in pictures]
        assert found == [2, 5, 4, 6]  # of equally bad ones the first comes first
