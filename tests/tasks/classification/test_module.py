"""It learns, its metrics are right, and wrong options are refused."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.classification import ClassificationData, ClassificationModule
from evmamba.tasks.gallery import Gallery
from evmamba.tasks.training.callbacks import BestCheckpoint, WeightEMA
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}
CONSTANT = ScheduleConfig("constant")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours with noise: a few images that a working training step separates at once."""
    root = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = np.array(colour) + rng.normal(0, 40, (40, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.png")
    return root


def data(root: Path, batch_size: int = 8) -> ClassificationData:
    return ClassificationData(str(root), image_size=32, batch_size=batch_size, num_workers=0, min_scale=0.5)


def trainer(folder: Path, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"enable_checkpointing": "callbacks" in options}
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **(quiet | options))


@pytest.mark.parametrize(
    ("backbone", "precision", "accumulate"),
    [("efficientvmamba_t", "32-true", 1), ("efficientvmamba_t", "bf16-mixed", 1), ("resnet10t", "32-true", 2)],
)
def test_it_learns_a_few_images(tmp_path: Path, coloured: Path, backbone: str, precision: str, accumulate: int):
    L.seed_everything(0, verbose=False)
    module = ClassificationModule(
        backbone, 3, label_smoothing=0.0, optimizer=OptimizerConfig(lr=1e-3), schedule=ScheduleConfig("cosine")
    )
    fitting = trainer(
        tmp_path, max_epochs=8, precision=precision, accumulate_grad_batches=accumulate, limit_val_batches=0
    )
    fitting.fit(module, data(coloured, batch_size=8 // accumulate))
    (metrics,) = trainer(tmp_path, precision=precision).test(module, data(coloured), verbose=False)
    assert metrics["test/top1"] >= 0.9
    assert metrics["test/loss"] < 0.6


def test_mixing_smoothing_and_averaging_train_together(tmp_path: Path, coloured: Path):
    L.seed_everything(0, verbose=False)
    module = ClassificationModule(
        "resnet10t", 3, mixup=0.2, cutmix=1.0, optimizer=OptimizerConfig(lr=3e-3), schedule=CONSTANT
    )
    callbacks = [WeightEMA(0.9, warmup=True), BestCheckpoint("val/top1", dirpath=str(tmp_path))]
    trainer(tmp_path, max_epochs=8, check_val_every_n_epoch=4, callbacks=callbacks).fit(module, data(coloured))
    best = torch.load(tmp_path / "best.ckpt")
    fresh = ClassificationModule("resnet10t", 3)
    fresh.load_state_dict(best["state_dict"])
    (metrics,) = trainer(tmp_path).validate(fresh, data(coloured), verbose=False)
    assert metrics["val/top1"] >= 0.9
    assert metrics["val/top1"] == pytest.approx(callbacks[1].best_model_score.item())


class Fixed(torch.nn.Module):
    """A network whose logits are the image's first pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :8]


@pytest.fixture
def fixed() -> ClassificationModule:
    module = ClassificationModule("resnet10t", 8)
    module.network = Fixed()
    return module


def test_metrics_against_hand_counted_ones(fixed: ClassificationModule):
    """Ranks of the true class: 1, 1, 5, 6 of 8, so top-1 is 2/4 and top-5 is 3/4."""
    logits = torch.arange(8, 0, -1).float().expand(4, 8).contiguous()
    labels = torch.tensor([0, 0, 4, 5])
    fixed.evaluation_step({"image": logits.view(4, 1, 1, 8), "label": labels, "path": list("abcd")}, "val")
    found = fixed.evaluation_end("val")
    values, details = found.metrics, found.details
    assert float(values["top1"]) == 0.5
    assert float(values["top5"]) == 0.75
    expected = -(logits.log_softmax(1)[range(4), labels]).mean()
    assert float(values["loss"]) == pytest.approx(float(expected), rel=1e-6)
    assert details["per_class"]["0"] == {"accuracy": 1.0, "images": 2}
    assert details["per_class"]["4"] == {"accuracy": 0.0, "images": 1}
    assert details["per_class"]["7"] == {"accuracy": None, "images": 0}
    assert details["confusion"][5][0] == 1
    assert sum(map(sum, details["confusion"])) == 4


def test_batches_of_unequal_size_weigh_by_image(fixed: ClassificationModule):
    right, wrong = torch.eye(8)[[0, 0, 0]], torch.eye(8)[[1]]
    for rows in (right, wrong):
        labels = torch.zeros(len(rows), dtype=torch.long)
        fixed.evaluation_step({"image": rows.view(-1, 1, 1, 8), "label": labels, "path": ["x"] * len(rows)}, "val")
    assert float(fixed.evaluation_end("val").metrics["top1"]) == 0.75


def test_losses_add_up_without_rounding(fixed: ClassificationModule):
    fixed._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    fixed.setup("validate")
    for loss in (2.0**25, 1.0):
        fixed.mean_loss.update(torch.tensor([loss]))
    assert float(fixed.mean_loss.compute()) == (2**25 + 1) / 2


def test_top5_of_few_classes_is_one():
    module = ClassificationModule("resnet10t", 3)
    module.network = torch.nn.Flatten()
    batch = {"image": torch.eye(3).view(3, 1, 1, 3), "label": torch.tensor([1, 2, 0]), "path": list("abc")}
    module.evaluation_step(batch, "val")
    values = module.evaluation_end("val").metrics
    assert (float(values["top1"]), float(values["top5"])) == (0.0, 1.0)


def test_smoothed_loss_against_its_definition(fixed: ClassificationModule):
    """Label smoothing 0.1 over 8 classes: 0.9 of the target on the label and 0.1 / 8 on every class."""
    logits, labels = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 4, 1])
    loss, _ = fixed.training_loss({"image": logits.view(4, 1, 1, 8), "label": labels})
    target = torch.full((4, 8), 0.1 / 8)
    target[range(4), labels] += 0.9
    assert float(loss) == pytest.approx(float(-(target * logits.log_softmax(1)).sum(1).mean()), rel=1e-6)


def test_test_stage_has_details_and_a_gallery_and_predict_names_classes(tmp_path: Path, coloured: Path):
    module = ClassificationModule("resnet10t", 3)
    module.gallery = Gallery(5)
    trainer(tmp_path).test(module, data(coloured), verbose=False)
    assert [name for name in module.evaluation.pictures if name.isdecimal()] == [f"00{n}" for n in range(5)]
    per_class = module.evaluation.details["per_class"]
    assert {name: entry["images"] for name, entry in per_class.items()} == dict.fromkeys(COLOURS, 4)

    predictions = trainer(tmp_path).predict(module, data(coloured))
    paths = [path for batch in predictions for path in batch["path"]]
    assert paths == [str(path) for path in data(coloured).image_paths()[1]]
    assert {label for batch in predictions for label in batch["label"]} <= set(COLOURS)
    assert all(torch.allclose(batch["probabilities"].sum(1), torch.ones(len(batch["path"]))) for batch in predictions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"backbone": "efficientvmamba_x"}, "unknown backbone 'efficientvmamba_x'"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ClassificationModule(**options)


def test_mixing_odd_batches_is_refused(fixed: ClassificationModule):
    module = ClassificationModule("resnet10t", 3, mixup=0.2)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(batch_size=5))
    with pytest.raises(UserError, match=r"even data\.batch_size, not 5"):
        module.on_fit_start()
