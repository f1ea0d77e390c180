"""What the data module hands out: shapes, normalisation, crops, order, and bad images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evmamba.errors import UserError
from evmamba.tasks.classification import ClassificationData


def shades(root: Path, size: tuple[int, int] = (60, 40), per_class: int = 3) -> Path:
    for split in ("train", "val"):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(per_class):
                Image.new("RGB", size, (shade + k, shade, shade)).save(folder / f"{k}.png")
    return root


def data(root: Path, **options) -> ClassificationData:
    module = ClassificationData(str(root), **({"image_size": 32, "batch_size": 4, "num_workers": 0} | options))
    module.setup("fit")
    return module


def test_batches(tmp_path: Path):
    module = data(shades(tmp_path), auto_augment="rand-m9-mstd0.5", random_erasing=0.25)
    assert (module.num_classes, module.class_names) == (2, ["dark", "light"])
    (batch,) = list(module.train_dataloader())
    assert batch["image"].dtype == torch.uint8  # a loading process hands out a quarter of the bytes
    batch = module.on_after_batch_transfer(batch, 0)
    assert batch.keys() == {"image", "label", "path"}
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert [Path(path).parent.name for path in batch["path"]] == [module.class_names[k] for k in batch["label"]]
    evaluated = [path for batch in module.val_dataloader() for path in batch["path"]]
    assert evaluated == [str(path) for path in module.image_paths()[1]]


@pytest.mark.parametrize("policy", ["rand19-m9-mstd0.5", "original", None])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_the_loader_is_its_samples(tmp_path: Path, policy: str | None, workers: int):
    """Which a loading process makes together, each of its own draws."""
    module = data(shades(tmp_path, per_class=12), auto_augment=policy, random_erasing=0.5, num_workers=workers)
    module.batch_size = 24
    loader = module.train_dataloader()
    (batch,) = loader
    samples = [loader.dataset[key] for key in loader.sampler]
    expected = module.collate(samples)
    assert batch["path"] == expected["path"]
    assert torch.equal(batch["image"], expected["image"])
    assert batch["erased"].places == expected["erased"].places
    assert torch.equal(batch["erased"].noise, expected["erased"].noise)
    assert len(batch["path"]) == 24


def test_evaluation_normalises_with_imagenet_statistics(tmp_path: Path):
    image, label, _ = data(shades(tmp_path)).val_set[3]
    expected = (200 / 255 - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
    assert label == 1
    torch.testing.assert_close(image[:, 16, 16], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "crop_ratio", "short_side"), [(224, 0.875, 256), (64, 0.875, 73), (96, 1.0, 96)])
def test_evaluation_resizes_the_short_side_and_crops_the_centre(
    tmp_path: Path, size: int, crop_ratio: float, short_side: int
):
    """A horizontal ramp twice as wide as high keeps its slope: the crop is the middle size / (2 short_side) of it."""
    ramp = np.broadcast_to(np.linspace(0, 255, 512)[None, :, None], (256, 512, 3)).astype(np.uint8)
    root = shades(tmp_path, per_class=1)
    Image.fromarray(ramp).save(root / "val" / "dark" / "0.png")
    module = data(root, image_size=size, crop_ratio=crop_ratio)
    image = module.val_set[0][0]
    assert image.shape == (3, size, size)
    grey = image[0] * IMAGENET_DEFAULT_STD[0] + IMAGENET_DEFAULT_MEAN[0]
    middle = grey[size // 2]
    assert float(middle.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(middle[-1] - middle[0]) == pytest.approx(size / (2 * short_side), abs=0.01)


def test_training_crops_differ_and_evaluation_does_not(tmp_path: Path):
    rng = np.random.default_rng(0)
    root = shades(tmp_path)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "train" / "dark" / "0.png")
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "val" / "dark" / "0.png")
    module = data(root)
    assert not torch.equal(module.train_set[0][0], module.train_set[0][0])
    assert torch.equal(module.val_set[0][0], module.val_set[0][0])


def test_unreadable_images_stop_or_are_skipped(tmp_path: Path):
    root = shades(tmp_path)
    (root / "train" / "light" / "1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"1 of 6 train images cannot be read: .*light/1\.png.*on_bad_image=skip"):
        data(root)
    with pytest.warns(UserWarning, match=r"1 of 6 train images .*light/1\.png"):
        module = data(root, on_bad_image="skip")
    assert len(module.train_set) == 5
    assert module.train_set.images.labels.tolist() == [0, 0, 0, 1, 1]


def test_all_kinds_of_files_train_together(tmp_path: Path):
    root = shades(tmp_path)
    Image.new("L", (50, 30), 9).save(root / "train" / "dark" / "grey.jpg")
    Image.new("CMYK", (50, 30)).save(root / "train" / "dark" / "cmyk.jpg")
    Image.new("RGBA", (50, 30)).save(root / "train" / "dark" / "alpha.png")
    Image.new("RGB", (1, 1)).save(root / "train" / "dark" / "tiny.png")
    module = data(root, auto_augment="rand-m9-mstd0.5")
    assert {tuple(image.shape) for image, *_ in module.train_set} == {(3, 32, 32)}
    assert {tuple(image.shape) for image, _, _ in module.val_set} == {(3, 32, 32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "image_size"),
        ({"crop_ratio": 1.5}, "crop_ratio"),
        ({"min_scale": 0.0}, r"min_scale must be in \(0, 1\], not 0"),
        ({"flip": 50.0}, r"flip must be in \[0, 1\], not 50"),
        ({"auto_augment": "nonsense-m9"}, "nonsense-m9"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ClassificationData(str(shades(tmp_path)), **options)


def test_real_photographs(real_data: Callable[[str], Path]):
    module = ClassificationData(str(real_data("cls_clothing")), image_size=64, batch_size=8, num_workers=0)
    module.setup("fit")
    facts = module.description()
    assert (facts["name"], facts["train_images"], facts["val_images"]) == ("cls_clothing", 1817, 341)
    assert module.class_names[:3] == ["dress", "hat", "longsleeve"]
    assert next(iter(module.val_dataloader()))["image"].shape == (8, 3, 64, 64)
