"""Training images decoded and augmented on the device are those of the loading processes."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.classification import ClassificationData, on_device
from evmamba.tasks.classification.packing import write_shards

KINDS = ("a.jpg", "grey.jpg", "turned.jpg", "cmyk.jpg", "clear.png", "b.jpg")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs in colour, grey, turned by EXIF and CMYK, and a PNG with transparency; 12 to train on."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("one", "two"):
            (root / split / label).mkdir(parents=True)
            for name in KINDS:
                ramp = np.linspace(0, 200, 90)[None, :, None] + np.linspace(0, 40, 70)[:, None, None]
                image = Image.fromarray((ramp + rng.integers(0, 15, (70, 90, 3))).astype(np.uint8))
                exif = Image.Exif()
                if name == "turned.jpg":
                    exif[0x0112] = 6 if label == "one" else 7
                mode = {"grey.jpg": "L", "cmyk.jpg": "CMYK", "clear.png": "RGBA"}.get(name, "RGB")
                image.convert(mode).save(root / split / label / name, exif=exif)
    return root


def data(root: Path, augment_on: str, **options: Any) -> ClassificationData:
    usual = {"image_size": 32, "batch_size": 6, "num_workers": 0, "augment_on": augment_on}
    module = ClassificationData(str(root), **usual | options)
    module.setup("fit")
    return module


def batches(module: ClassificationData, epochs: int = 1) -> list[dict[str, Any]]:
    """As the trainer has them on a CPU."""
    loader = module.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            moved = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
            found.append(module.on_after_batch_transfer(moved, 0))
    return found


def test_crops_flips_and_erased_rectangles_are_the_same_to_the_bit(photographs: Path) -> None:
    options = {"random_erasing": 0.5, "min_scale": 0.3}
    expected, found = (batches(data(photographs, where, **options), epochs=2) for where in ("cpu", "device"))
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["path"] == other["path"]
        assert torch.equal(one["label"], other["label"])
        assert torch.equal(one["image"], other["image"])
    assert not torch.equal(found[0]["image"], found[2]["image"])


@pytest.mark.parametrize("policy", ["rand19-m9-mstd0.5", "rand-m8-n3-mstd1"])
def test_a_policys_draws_are_the_same_and_its_pixels_to_a_step(photographs: Path, policy: str) -> None:
    """A step of the first operation can be more after a second one: such pixels are rare."""
    expected, found = (
        torch.cat([batch["image"] for batch in batches(data(photographs, where, auto_augment=policy), epochs=5)])
        for where in ("cpu", "device")
    )
    plain = torch.cat([batch["image"] for batch in batches(data(photographs, "cpu"), epochs=5)])
    step = 1 / 255 / 0.224  # of 0..255, in the colour that is divided by least
    difference = (found - expected).abs()
    assert (difference > 1.01 * step).float().mean() < 2e-3
    assert ((expected - plain).abs() > 10 * step).float().mean() > 0.1


def test_shards_and_loading_processes_give_the_same(photographs: Path, tmp_path: Path) -> None:
    write_shards(photographs, tmp_path / "shards", shard_bytes=20_000, jobs=1)
    options = {"auto_augment": "rand19-m9-mstd0.5", "random_erasing": 0.5}
    expected = batches(data(photographs, "device", **options))
    found = batches(data(tmp_path / "shards", "device", num_workers=1, **options))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["image"], other["image"])


def test_what_no_decoder_reads_has_the_loading_processes_error(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "torn")
    modules = [data(tmp_path / "torn", where, batch_size=12) for where in ("cpu", "device")]
    torn = tmp_path / "torn" / "train" / "one" / "b.jpg"
    torn.write_bytes(torn.read_bytes()[:700])  # after the check at the start
    messages = []
    for module in modules:
        with pytest.raises(UserError) as caught:
            batches(module)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert str(torn) in messages[0]


def test_whole_images_are_on_the_device_few_at_a_time(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(data(photographs, "device", batch_size=12))
    sizes: list[int] = []
    decode = on_device.decode_jpegs
    monkeypatch.setattr(on_device, "AT_ONCE", 5)
    monkeypatch.setattr(
        on_device, "decode_jpegs", lambda jpegs, device: sizes.append(len(jpegs)) or decode(jpegs, device)
    )
    assert torch.equal(batches(data(photographs, "device", batch_size=12))[0]["image"], expected[0]["image"])
    assert len(sizes) == 3
    assert sum(sizes) == 8  # CMYK and PNG come decoded
    assert max(sizes) <= 5


def test_a_trainer_gets_them(photographs: Path) -> None:
    class Noted(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.batches: list[dict[str, Any]] = []

        def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
            self.batches.append(batch)
            return (self.weight * batch["image"]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seen = []
    for where in ("cpu", "device"):
        module = Noted()
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=data(photographs, where))
        seen.append(module.batches)
    for one, other in zip(*seen, strict=True):
        assert one.keys() == {"image", "label", "path"}
        assert torch.equal(one["image"], other["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color_jitter": 0.4}, "nor color_jitter"),
        ({"auto_augment": "original"}, "no other policy"),
        ({"auto_augment": "rand-m9-t3a"}, "has no operation Desaturate"),
    ],
)
def test_other_policies_are_refused(photographs: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data(photographs, "device", **options)
