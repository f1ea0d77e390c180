import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.segmentation import SegmentationData, label_index
from evmamba.tasks.segmentation.augment import MEAN, STD


def data(root: Path, **options) -> SegmentationData:
    return SegmentationData(str(root), **{"crop_size": 48, "batch_size": 2, "num_workers": 0} | options)


def prepared(root: Path, **options) -> SegmentationData:
    module = data(root, **options)
    module.setup("fit")
    return module


def test_batches(scenes: Path):
    module = prepared(scenes)
    assert (module.num_classes, module.class_names) == (3, ["red", "green", "blue"])
    assert module.description()["train_images"] == 6
    assert module.description()["val_images"] == 5
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 3, 48, 48)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].shape == (2, 48, 48)
    assert set(batch["label"].unique().tolist()) <= {0, 1, 2, 255}
    sizes = [tuple(batch["image"].shape) for batch in module.val_dataloader()]
    assert sizes == [(1, 3, 5 * (8 + k), 54) for k in range(5)]  # each at its own size


def test_labels_follow_their_pixels_through_the_augmentation(scenes: Path):
    """Images show class 0 red, 1 green, 2 blue, so after scale, crop and flip they must still agree."""
    module = prepared(scenes, photometric_distortion=False)
    torch.manual_seed(0)
    for index in range(6):
        image, label, _ = module.train_set[index]
        colour = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).argmax(0)
        counted = label != 255
        assert counted.any()
        assert (colour == label)[counted].float().mean() > 0.9  # borders between blocks are blurred


def test_small_images_are_padded_with_ignored_pixels(scenes: Path):
    module = prepared(scenes, crop_size=160, scale=(1.0, 1.0), flip=0.0, photometric_distortion=False)
    image, label, _ = module.train_set[0]  # 40 x 54 pixels
    assert (label[40:] == 255).all()
    assert (label[:, 54:] == 255).all()
    assert (image[:, 40:] == 0).all()
    np.testing.assert_array_equal(label[4:40, :54].numpy(), module.label_map.to_index(_label(scenes, 0))[4:])


def test_short_side_option_sets_the_training_scale(scenes: Path):
    module = prepared(scenes, crop_size=160, short_side=80, scale=(1.0, 1.0), flip=0.0)
    _, label, _ = module.train_set[0]  # 40 x 54 -> 80 x 108
    rows, columns = (label != 255).any(1).nonzero().max(), (label != 255).any(0).nonzero().max()
    assert (rows + 1, columns + 1) == (80, 108)


def test_distortion_keeps_the_label(scenes: Path):
    plain = prepared(scenes, photometric_distortion=False).train_set
    distorted = prepared(scenes).train_set
    torch.manual_seed(1)
    expected = plain[0]
    changed = 0
    for seed in range(4):
        torch.manual_seed(1)
        plain_label = plain[0][1]
        torch.manual_seed(1)
        image, label, _ = distorted[0]
        assert torch.equal(label, plain_label)
        changed += not torch.equal(image, expected[0])
        torch.manual_seed(seed)
    assert changed


def test_class_count_without_names_is_the_highest_label(scenes: Path):
    (scenes / "classes.txt").unlink()
    assert data(scenes).num_classes == 3
    assert data(scenes, num_classes=7).num_classes == 7
    assert data(scenes, reduce_zero_label=False).num_classes == 4


def test_masks_in_black_and_white_need_a_class_count(scenes: Path):
    (scenes / "classes.txt").unlink()
    for path in scenes.glob("annotations/*/*.png"):
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(path)) > 1)).save(path)
    with pytest.raises(UserError, match=r"labels \(0, 255\) are not numbered from 1 on"):
        data(scenes)


def test_ade20k_names_come_from_its_own_list(scenes: Path):
    (scenes / "classes.txt").unlink()
    rows = [
        "Idx\tRatio\tTrain\tVal\tName",
        "1\t0.1\t9\t9\twall",
        "2\t0.1\t9\t9\tbuilding, edifice",
        "3\t0.1\t9\t9\tsky",
    ]
    (scenes / "objectInfo150.txt").write_text("\n".join(rows))
    assert data(scenes).class_names == ["wall", "building", "sky"]


def test_a_turned_photograph_fits_labels_of_either_orientation(scenes: Path):
    path = scenes / "images" / "validation" / "scene0.jpg"  # 54 x 40
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(path, exif=exif)
    assert prepared(scenes).val_set[0][0].shape == (3, 40, 54)  # labels were drawn on the stored pixels
    _label_file(scenes, 0).unlink()
    Image.new("L", (40, 54), 1).save(_label_file(scenes, 0))
    assert prepared(scenes).val_set[0][0].shape == (3, 54, 40)


def test_the_scan_is_remembered_until_a_file_changes(scenes: Path, monkeypatch: pytest.MonkeyPatch):
    prepared(scenes)
    monkeypatch.setattr(label_index, "look_at_pair", lambda pair: pytest.fail(f"{pair} is read again"))
    prepared(scenes)
    monkeypatch.undo()
    Image.new("L", (54, 40), 99).save(_label_file(scenes, 0))
    with pytest.raises(UserError, match="label 99"):
        prepared(scenes)


def test_description_changes_with_the_labels(scenes: Path):
    before = data(scenes).description()
    label = np.array(Image.open(_label_file(scenes, 0)))
    Image.fromarray(label % 3 + 1).save(_label_file(scenes, 0))
    assert data(scenes).description()["fingerprint"] != before["fingerprint"]


def _label_file(root: Path, k: int) -> Path:
    return root / "annotations" / "validation" / f"scene{k}.png"


def _label(root: Path, k: int) -> np.ndarray:
    return np.asarray(Image.open(root / "annotations" / "training" / f"scene{k}.png"))


def _remove_annotations(root: Path) -> None:
    shutil.rmtree(root / "annotations")


def _empty_training(root: Path) -> None:
    for path in root.glob("*/training/*"):
        path.unlink()


def _remove_label(root: Path) -> None:
    _label_file(root, 2).unlink()


def _remove_image(root: Path) -> None:
    (root / "images" / "training" / "scene1.jpg").unlink()


def _two_images_of_one_name(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "images" / "training" / "scene1.png")


def _other_size(root: Path) -> None:
    Image.new("L", (20, 21), 1).save(_label_file(root, 3))


def _out_of_range(root: Path) -> None:
    Image.new("L", (54, 45), 4).save(_label_file(root, 1))


def _all_ignored(root: Path) -> None:
    for k in range(5):
        Image.new("L", (54, 5 * (8 + k)), 0).save(_label_file(root, k))


def _colour_mask(root: Path) -> None:
    Image.new("RGB", (54, 45)).save(_label_file(root, 1))


def _truncated_image(root: Path) -> None:
    path = root / "images" / "training" / "scene4.jpg"
    path.write_bytes(path.read_bytes()[:300])


def _empty_names(root: Path) -> None:
    (root / "classes.txt").write_text("\n\n")


def _gap_in_names(root: Path) -> None:
    (root / "classes.txt").write_text("red\n\nblue\n")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, r"data folder not found: .*scenes"),
        (_remove_annotations, r"folder not found: .*annotations.training"),
        (_empty_training, r"no images in .*images.training"),
        (_remove_label, r"image without label of the same name in .*: .*scene2\.jpg;"),
        (_remove_image, r"label without image of the same name in .*: .*scene1\.png;"),
        (_two_images_of_one_name, r"scene1\.jpg and scene1\.png have the same name"),
        (_other_size, r"scene3\.png is 20x21 but its image is 54x55"),
        (_out_of_range, r"label 4 in .*scene1\.png is out of range: 3 classes are labels 1\.\.3, 0 is ignored"),
        (_all_ignored, r"not one pixel of the 5 label files has a class \(1\.\.3\)"),
        (_colour_mask, r"scene1\.png has mode RGB"),
        (_truncated_image, r"scene4\.jpg"),
        (_empty_names, r"classes\.txt is empty"),
        (_gap_in_names, r"classes\.txt has an empty line 2"),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(scenes: Path, spoil: Callable[[Path], None], says: str):
    spoil(scenes)
    with pytest.raises(UserError, match=says) as error:
        prepared(scenes)
    assert "\n" not in str(error.value)


def test_contradicting_class_count_is_refused(scenes: Path):
    with pytest.raises(UserError, match=r"data.num_classes=150, but .* names 3 classes"):
        data(scenes, num_classes=150)


def test_unreadable_files_can_be_skipped_with_a_count(scenes: Path):
    _truncated_image(scenes)
    _label_file(scenes, 0).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of ") as warned:
        module = prepared(scenes, on_bad_image="skip")
    assert len(warned) == 2
    assert (len(module.train_set), len(module.val_set)) == (5, 4)


def test_real_photographs(real_data: Callable[[str], Path]):
    module = prepared(real_data("seg_camvid"))
    assert (module.num_classes, len(module.train_set), len(module.val_set)) == (11, 367, 101)
    image, label, _ = module.val_set[0]
    assert image.shape == (3, 360, 480)
    assert label.shape == (360, 480)


def test_real_photographs_of_many_classes_and_sizes(real_data: Callable[[str], Path]):
    module = prepared(real_data("seg_coco"), crop_size=96)
    assert module.num_classes == 133
    for k in range(len(module.val_set)):
        image, label, _ = module.val_set[k]
        assert image.shape[1:] == label.shape
    grey = next(k for k, pair in enumerate(module.train_set.pairs) if "000000000086" in pair.image.name)
    assert module.train_set[grey][0].shape == (3, 96, 96)
