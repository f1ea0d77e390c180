"""Hours before a night of GPUs, against numbers worked out by hand."""

import json
from pathlib import Path

import pytest
from msgspec import structs

from evmamba.errors import UserError
from evmamba.launch.bench.estimate import (
    FORWARD_SHARE,
    TOGETHER,
    Speed,
    backbone_macs,
    estimate,
    limit,
    macs_of,
    read_speed,
)
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.fit.settings import setting
from evmamba.launch.store.results import write_result
from evmamba.launch.store.spec import Resources, TrainingSpec

from ..handmade import made_result, made_spec

TRAIN, VAL = 600, 200  # of the embedded classification data


def training(*options: tuple[str, object], task: str = "classification", **changes: object) -> TrainingSpec:
    settings = settings_of(find_recipe(f"{task}/tiny"), [("model.init_args.backbone", "resnet10t"), *options])
    spec = made_spec(task, "resnet10t", settings=settings, **changes)
    assert isinstance(spec, TrainingSpec)
    return spec


def test_a_training_is_its_images_and_its_validations():
    epochs = [("trainer.max_epochs", 6), ("trainer.max_steps", -1), ("trainer.limit_val_batches", 1.0)]
    spec = training(*epochs, ("trainer.check_val_every_n_epoch", 2), ("data.init_args.batch_size", 50))
    speed = Speed(100 * macs_of(spec), {}, "given")  # a hundred images a second
    assert estimate(spec, speed).seconds == pytest.approx(6 * TRAIN / 100 + 3 * VAL * FORWARD_SHARE / 100)
    four = structs.replace(spec, resources=Resources(nodes=2, devices=2, batch_size=12))
    shared = estimate(four, speed)
    steps = 6 * (TRAIN // 48)
    expected = steps * 48 / (4 * TOGETHER * 100) + steps / (TRAIN // 48) / 2 * VAL * FORWARD_SHARE / 400
    assert shared.seconds == pytest.approx(expected)
    assert shared.gpu_hours == pytest.approx(4 * expected / 3600)
    assert "90% of that alone (assumed)" in shared.basis
    slow = estimate(spec, speed, cores=2, loading=10)  # twenty images a second
    assert slow.seconds == pytest.approx(6 * TRAIN / 20 + 3 * VAL / 20)
    assert "as loading allows" in slow.basis


def test_validations_are_counted_in_batches_and_on_what_is_held_out():
    spec = training(
        ("trainer.max_epochs", -1),
        ("trainer.max_steps", 60),
        ("trainer.limit_val_batches", 1.0),
        ("trainer.check_val_every_n_epoch", None),
        ("trainer.val_check_interval", 30),
        ("trainer.accumulate_grad_batches", 2),
        ("data.init_args.batch_size", 5),
        ("data.init_args.held_out", 0.1),
    )
    speed = Speed(100 * macs_of(spec), {}, "given")
    held = TRAIN // 10
    expected = 60 * 2 * 5 / 100 + (60 * 2 // 30) * held * FORWARD_SHARE / 100
    assert estimate(spec, speed).seconds == pytest.approx(expected)
    by_epochs = [("trainer.max_epochs", 3), ("trainer.max_steps", -1), ("trainer.limit_val_batches", 1.0)]
    spec = training(*by_epochs, ("data.init_args.held_out", 0.5), ("data.init_args.batch_size", 50))
    expected = 3 * TRAIN / 2 / 100 + 3 * TRAIN / 2 * FORWARD_SHARE / 100
    assert estimate(spec, speed).seconds == pytest.approx(expected)


@pytest.mark.parametrize("source", ["0", "-5", "nan", "inf"])
def test_a_speed_that_nothing_has_is_refused(source: str):
    with pytest.raises(UserError, match=r"--speed .*: give a positive number"):
        read_speed(source)


def test_a_training_without_an_end_has_no_estimate():
    assert estimate(training(("trainer.max_steps", -1)), Speed(1e9, {}, "given")) is None


@pytest.mark.parametrize(
    ("task", "side", "factor"), [("classification", 448, 4.0), ("detection", 256, 4.0), ("segmentation", 224, 4.0)]
)
def test_work_grows_with_the_size_of_training(task: str, side: int, factor: float):
    name = {"classification": "image_size", "segmentation": "crop_size"}.get(task)
    option = f"data.init_args.{name}" if name else "model.init_args.min_size"
    value = {"classification": 224, "segmentation": 112, "detection": 128}[task]
    sides = ([128, value], [128, side]) if task == "detection" else (value, side)
    head = {"detection": "retinanet", "segmentation": "upernet"}.get(task, "linear")
    small, large = (macs_of(training((option, one), task=task, head=head)) for one in sides)
    assert large / small == pytest.approx(factor)
    if task == "classification":
        assert small == pytest.approx(backbone_macs("resnet10t"))


def test_speed_is_the_users_figure_a_profile_results_or_a_stated_assumption(tmp_path: Path):
    work = backbone_macs("efficientvmamba_t")
    assert read_speed("900").of("resnet10t") == pytest.approx(900 * work)
    published = read_speed(None)
    assert published.macs_per_s == pytest.approx(2904 / 3 * work)
    assert "A100, training a third (assumed)" in published.basis
    rows = [
        {"backbone": "resnet10t", "phase": phase, "images_per_s": speed, "height": side, "width": side}
        for phase, speed, side in (("inference", 9e3, 224), ("training", 500, 224), ("training", 2400, 112))
    ]
    (tmp_path / "profile.json").write_text(json.dumps({"rows": rows}))
    assert read_speed(str(tmp_path / "profile.json")).of("resnet10t") == pytest.approx(600 * backbone_macs("resnet10t"))
    result = made_result("cost", "resnet18")
    write_result(result, tmp_path / "a")
    with pytest.raises(UserError, match="has no training step of a backbone"):
        read_speed(str(tmp_path / "a"))
    result.cost |= {"train_images_per_s": 70.0}
    write_result(result, tmp_path / "a")
    assert read_speed(str(tmp_path / "a")).of("resnet18") == pytest.approx(70 * result.cost["macs"])
    with pytest.raises(UserError, match="no such file"):
        read_speed("nowhere")


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "00:15:00"), (3600, "01:45:00"), (100 * 3600, "6-06:15:00"), (400, "00:15:00")]
)
def test_the_limit_to_ask_for_has_a_margin(seconds: float, text: str):
    assert limit(seconds) == text


def test_the_recipe_of_imagenet_is_three_hundred_epochs():
    """1.28 million images, 300 times, at 968 images/s: 110 hours of one A100, by the published figure."""
    settings = settings_of(find_recipe("classification/imagenet_efficientvmamba_t"))
    assert setting(settings, "trainer.max_epochs") == 300
    spec = made_spec("classification", "efficientvmamba_t", settings=settings)
    speed = read_speed(None)
    assert 1_281_167 * 300 / (speed.macs_per_s / macs_of(spec)) / 3600 == pytest.approx(110.3, abs=0.1)
