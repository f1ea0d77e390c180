"""What is said below the table: budgets, sizes, and trainings that are not the published ones."""

from evmamba.launch.report.table import build_table

from ..handmade import made_result, origin


def test_the_papers_two_schedules_are_no_unequal_budget():
    data = {"name": "coco", "fingerprint": "x", "num_classes": 80, "val_images": 5000}

    def trained(model: str, epochs: int, images: int):
        training = {"epochs": epochs, "images": images}
        return made_result("detection", model, head="maskrcnn", data=data, training=training)

    results = [trained("resnet50", 12, 1000), trained("resnet50", 36, 3000)]
    assert not any("unequal" in note for note in build_table(results).notes)
    notes = build_table([*results, trained("resnet18", 36, 2000)]).notes
    assert [note for note in notes if "unequal" in note] == [
        "detection · Mask R-CNN · 3x: unequal budgets, 2,000 training images for resnet18; "
        "3,000 training images for resnet50"
    ]


def test_a_shorter_training_than_the_papers_is_told_where_it_stands_above_it():
    imagenet = {"name": "imagenet", "fingerprint": "x", "num_classes": 1000, "val_images": 50000}

    def notes(epochs: int, data: dict) -> list[str]:
        result = made_result("classification", "efficientvmamba_t", data=data, training={"epochs": epochs})
        return [note for note in build_table([result]).notes if "trained for" in note]

    assert notes(8, imagenet) == [
        "classification: trained for 8 epochs, the published networks for 300: EfficientVMamba-T"
    ]
    assert notes(300, imagenet) == []
    assert notes(8, imagenet | {"val_images": 341}) == []


def test_another_size_and_random_weights_are_told_where_they_stand_above_the_papers():
    imagenet = {"name": "imagenet", "fingerprint": "x", "num_classes": 1000, "val_images": 50000}
    coco = {"name": "coco", "fingerprint": "x", "num_classes": 80, "val_images": 5000}

    def notes(task: str, data: dict, options: dict, model: dict, tested_alone: bool = False):
        config = {"data": {"init_args": options}, "model": {"init_args": model}}
        training = {} if tested_alone else {"steps": 5}
        result = made_result(
            task, "efficientvmamba_t", data=data, training=training, provenance=origin() | {"config": config}
        )
        return [note for note in build_table([result]).notes if "trained" in note]

    assert notes("classification", imagenet, {"image_size": 96}, {}) == [
        "classification: trained at 96 pixels, the published networks at 224: EfficientVMamba-T"
    ]
    assert notes("classification", imagenet, {"image_size": 224}, {}) == []
    assert notes("detection", coco, {}, {"min_size": [480, 800]}) == [
        "detection · RetinaNet: trained from random weights, the published networks from ImageNet's: EfficientVMamba-T"
    ]
    assert notes("detection", coco, {}, {"min_size": [480, 800], "checkpoint": "w.pth"}) == []
    # With --ckpt_path nobody knows how the weights came about.
    assert notes("detection", coco, {}, {"min_size": [640]}, tested_alone=True) == []


def test_runs_of_different_code_are_told():
    def notes(*commits: str | None) -> list[str]:
        models = ("resnet18", "efficientvmamba_t", "resnet18")
        results = [
            made_result("classification", model, provenance=origin() | {"git_commit": commit, "seed": seed})
            for seed, (model, commit) in enumerate(zip(models, commits, strict=True))
        ]
        return [note for note in build_table(results).notes if "different code" in note]

    assert notes("0123456789ab", "0123456789ab", "0123456789ab") == []
    assert notes("0123456789ab", "ba9876543210", "ba9876543210") == [
        "classification: runs of different code, ba9876543210 EfficientVMamba-T, resnet18; 0123456789ab resnet18"
    ]
    assert notes("0123456789ab", "0123456789ab", None) == [
        "classification: runs of different code, 0123456789ab EfficientVMamba-T, resnet18; installed package resnet18"
    ]


def test_networks_trained_at_different_sizes_are_told():
    def trained(model: str, side: int):
        config = {"data": {"init_args": {"image_size": side}}, "model": {"init_args": {}}}
        return made_result("classification", model, training={"steps": 5}, provenance=origin() | {"config": config})

    note = "classification: trained at different sizes, at 64 pixels resnet18; at 96 pixels resnet50"
    assert note in build_table([trained("resnet18", 64), trained("resnet50", 96)]).notes
    assert not any("size" in n for n in build_table([trained("resnet18", 64), trained("resnet50", 64)]).notes)


def test_what_an_epochs_last_step_leaves_out_is_no_other_budget():
    def notes(*images: int):
        models = ("resnet18", "resnet50")
        runs = [made_result("classification", m, training={"images": n}) for m, n in zip(models, images, strict=True)]
        return [note for note in build_table(runs).notes if "unequal" in note]

    assert notes(384_000_000, 384_307_200) == []
    assert len(notes(384_000_000, 390_000_000)) == 1


def test_images_are_called_after_the_split_that_they_are_of():
    data = {"name": "coco", "fingerprint": "x", "num_classes": 80, "val_images": 5000}
    caption = build_table([made_result("detection", "resnet18", data=data)]).caption
    assert caption.startswith("coco (detection 5000 validation images)")
    caption = build_table(
        [made_result("detection", "resnet18", data=data | {"split": "test", "test_images": 7})]
    ).caption
    assert caption.startswith("coco (detection 7 test images)")
