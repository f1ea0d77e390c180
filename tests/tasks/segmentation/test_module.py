import json
import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing

from evmamba.errors import UserError
from evmamba.tasks.gallery import Gallery
from evmamba.tasks.segmentation import SegmentationData, SegmentationModule
from evmamba.tasks.segmentation.inference import InferenceConfig
from evmamba.tasks.segmentation.module import pixel_cross_entropy
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig


def small_module(num_classes: int = 3, **options) -> SegmentationModule:
    defaults = {"backbone": "resnet10t", "decoder_channels": 16, "aux_channels": 16}
    defaults |= {"optimizer": OptimizerConfig(lr=3e-3), "schedule": ScheduleConfig("constant")}
    return SegmentationModule(num_classes=num_classes, **defaults | options)


def trainer(folder: Path, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", use_distributed_sampler=False, default_root_dir=folder, **quiet, **options)


def batch(num_images: int = 2, side: int = 64) -> dict:
    label = torch.randint(0, 3, (num_images, side, side), dtype=torch.uint8)
    return {"image": torch.randn(num_images, 3, side, side), "label": label, "path": ["a.jpg"] * num_images}


def test_training_test_and_predict_on_the_scenes(scenes: Path, tmp_path: Path):
    L.seed_everything(0)
    data = SegmentationData(str(scenes), crop_size=48, batch_size=6, num_workers=0, scale=(0.8, 1.2))
    module = small_module(multi_scale=True)
    run = trainer(tmp_path, max_epochs=25, limit_val_batches=0)
    run.fit(module, data)
    module.gallery = Gallery(3)
    metrics = run.test(module, data, verbose=False)[0]
    assert set(metrics) == {"test/mIoU", "test/pixel_acc", "test/mean_acc", "test/mIoU_ms"}
    assert metrics["test/mIoU"] > 2 * module.evaluation.details["commonest_class"]["mIoU"]

    details = json.loads(json.dumps(module.evaluation.details))
    assert list(details["per_class"]) == ["red", "green", "blue"]
    confusion = np.array(details["confusion"])
    iou = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
    assert metrics["test/mIoU"] == pytest.approx(iou.mean(), abs=1e-6)
    labels = [np.asarray(Image.open(path)) for path in (scenes / "annotations" / "validation").iterdir()]
    assert confusion.sum(1).tolist() == [sum(int((x == k).sum()) for x in labels) for k in (1, 2, 3)]
    assert list(module.evaluation.pictures) == ["000", "001", "002", "worst_000", "worst_001", "worst_002"]

    results = [item for step in run.predict(module, data) for item in step]
    assert [Path(item["path"]).name for item in results] == [f"scene{k}.jpg" for k in range(5)]
    assert results[0]["label"].shape == (40, 54)
    assert set(np.unique(results[0]["label"])) <= {1, 2, 3}  # numbered as the annotation files are


def test_a_crop_without_any_label_gives_no_nan():
    module = small_module()
    empty = batch()
    empty["label"][:] = 255
    loss, _ = module.training_loss(empty)
    assert loss.item() == 0
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_loss_is_the_mean_over_all_pixels_ignored_ones_included_and_both_heads():
    scores = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])  # two classes, one row of two pixels
    label = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert pixel_cross_entropy(scores, label).item() == pytest.approx(math.log(1 + math.exp(-2)) / 2)
    module = small_module(aux_weight=0.4)
    loss, parts = module.training_loss(batch())
    assert loss.item() == pytest.approx(parts["decoder_loss"].item() + 0.4 * parts["auxiliary_loss"].item())


def test_a_batch_of_one_is_explained():
    with pytest.raises(UserError, match=r"data\.batch_size to 2"):
        small_module().training_loss(batch(1))


def test_predictions_are_compared_at_the_labels_own_size():
    module = small_module(inference=InferenceConfig(short_side=32)).eval()
    one = batch(1)
    one["label"] = torch.randint(0, 3, (1, 47, 61), dtype=torch.uint8)
    with torch.inference_mode():
        module.evaluation_step(one, "val")
    assert module._metric("val").confusion.sum() == 47 * 61


def _evaluate_share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = small_module()
    labels = torch.tensor([[0, 0, 1], [2, 1, 255]])
    module._metric("test").update(torch.tensor([0, 1, 1]), labels[rank])
    Path(folder, f"{rank}.json").write_text(json.dumps(module.evaluation_end("test").details))
    torch.distributed.destroy_process_group()


def test_details_cover_the_images_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(_evaluate_share, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        details = json.loads((tmp_path / f"{rank}.json").read_text())
        assert details["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
        assert [entry["pixel_share"] for entry in details["per_class"].values()] == [0.4, 0.4, 0.2]
        assert details["commonest_class"] == {"name": "0", "mIoU": round(0.4 / 3, 6), "pixel_acc": 0.4}


def test_bfloat16_training_step_is_finite():
    module = small_module(backbone="efficientvmamba_t")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module.training_loss(batch())
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_options_out_of_range_are_refused():
    for options in ({"num_classes": 1}, {"decoder_channels": 0}, {"aux_channels": -1}, {"backbone": "resnet10tt"}):
        with pytest.raises(UserError):
            small_module(**options)


def test_real_photographs_of_many_classes(real_data: Callable[[str], Path], tmp_path: Path):
    data = SegmentationData(str(real_data("seg_coco")), crop_size=64, batch_size=8, num_workers=0)
    module = small_module(data.num_classes, inference=InferenceConfig(short_side=64))
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0, limit_test_batches=4)
    run.fit(module, data)
    metrics = run.test(module, data, verbose=False)[0]
    assert 0 <= metrics["test/mIoU"] < 0.2
    assert len(module.evaluation.details["per_class"]) == 133
