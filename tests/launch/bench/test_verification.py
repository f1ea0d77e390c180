"""Published numbers are confirmed or not, of weights, of checkpoints and of other people's result files."""

import json
import os
import pydoc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import evmamba
from evmamba.launch import cli
from evmamba.launch.fit.checkpoint_metadata import KEY, load_trained_network
from evmamba.launch.report.paper import paper, published
from evmamba.launch.store.results import Result, config_hash, file_hash, write_result
from evmamba.tasks import TASKS
from evmamba.tasks.per_image import PER_IMAGE_FILE
from evmamba.tasks.segmentation.per_image import Overlaps

from ...evmamba import hub_server
from ..handmade import made_result, origin
from ..tiny import DATA, MODELS, write_images

CLASSES, TRAIN, VAL = ("dress", "shoes"), 20, 12


def photographs(root: Path) -> Path:
    """Two classes of real photographs; of noise where there are none."""
    source = Path(os.environ.get("EVMAMBA_DATA", Path(__file__).parents[4] / "shared" / "data")) / "cls_clothing"
    if not source.is_dir():
        write_images("classification", root)
        return root
    for split, count in (("train", TRAIN), ("val", VAL)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for path in sorted((source / split / name).iterdir())[:count]:
                shutil.copy(path, root / split / name)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A tiny network, trained here, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = photographs(folder / "data")
    result = evmamba.train(
        data,
        backbone="resnet10t",
        pretrained=False,
        epochs=2,
        batch_size=8,
        output=folder / "out",
        device="cpu",
        options={"data.init_args.image_size": 64, "data.init_args.num_workers": 0},
    )
    return result, data


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Iterator[Callable[..., tuple[int, str]]]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        status = cli.main(["verify", *map(str, arguments), "--device=cpu", "--jobs=0"])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    return run


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def by_timm(weights: Path, data: Path) -> float:
    """Top-1 as timm evaluates, with nothing of this package."""
    model = timm.create_model("resnet10t", num_classes=2)
    model.load_state_dict(load_file(weights))
    transform = create_transform(**resolve_data_config({}, model=model, use_test_size=True), is_training=False)
    right = []
    for label, folder in enumerate(sorted((data / "val").iterdir())):
        for path in sorted(folder.iterdir()):
            with torch.no_grad():
                logits = model.eval()(transform(Image.open(path).convert("RGB"))[None])
            right.append(int(logits.argmax()) == label)
    return float(np.mean(right))


def test_published_weights_are_evaluated_as_their_publisher_does(trained, verify, tmp_path, monkeypatch):
    result, data = trained
    weights = result.folder / "backbone.safetensors"
    expected = percent(by_timm(weights, data))
    cfg = timm.get_pretrained_cfg("resnet10t")
    with hub_server.serving() as hub:
        hub_server.point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        hub.add(cfg.hf_hub_id, "main", "model.safetensors", weights.read_bytes())
        status, said = verify("resnet10t", "--classification", data, "--published", expected, "--tolerance", 0)
    assert (status, said.endswith("agrees")) == (0, True), said
    certificate = json.loads(Path("verified/resnet10t/certificate.json").read_text())
    assert certificate["agrees"]
    assert certificate["weights"]["commit"] == hub_server.COMMIT
    assert len(certificate["weights"]["sha256"]) == 64
    assert certificate["data"]["fingerprint"] == result.data["fingerprint"]
    assert certificate["protocol"].startswith("224 x 224, center crop of 0.95, bicubic")
    assert certificate["command"].startswith("evmamba verify resnet10t --classification")
    (number,) = certificate["numbers"]
    assert number["low"] < float(expected) < number["high"]


def test_a_checkpoint_agrees_with_its_own_number_and_not_with_another(trained, verify):
    result, data = trained
    checkpoint = result.folder / "checkpoints" / "best.ckpt"
    assert load_trained_network(checkpoint).epochs == 2
    own = percent(result.metrics["top1"])
    status, said = verify("--checkpoint", checkpoint, "--classification", data, "--published", own)
    assert (status, "yes (95% interval" in said) == (0, True), said
    other = 1.0 if result.metrics["top1"] > 0.5 else 99.0
    status, said = verify("--checkpoint", checkpoint, "--classification", data, "--published", f"top1={other}")
    assert (status, said.endswith("DOES NOT AGREE")) == (1, True), said


def test_a_result_file_is_checked_by_its_hashes_and_computed_again(trained, verify, tmp_path):
    result, data = trained
    status, said = verify("--result", result.folder / "result.json", "--classification", data)
    assert (status, "recomputed top1, top5" in said) == (0, True), said
    copy = tmp_path / "copy"

    def tampered(change: Callable[[dict], None]) -> str:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(result.folder, copy, ignore=shutil.ignore_patterns("*.ckpt", "*.safetensors"))
        document = json.loads((copy / "result.json").read_text())
        change(document)
        (copy / "result.json").write_text(json.dumps(document))
        status, said = verify("--result", copy / "result.json", "--classification", data)
        assert status == 1, said
        return said

    assert "fault: top1 is 0.990000, computed again from the images" in tampered(
        lambda d: d["metrics"].update(top1=0.99)
    )
    assert "the configuration is not the one" in tampered(lambda d: d["provenance"]["config"].update(seed_everything=7))
    assert "the result is of other data" in tampered(lambda d: d["data"].update(fingerprint="0" * 16))
    assert "per_image.npz is not the file that the run wrote" in tampered(
        lambda d: (copy / "per_image.npz").write_bytes(b"other")
    )
    assert "per_image.npz is named and missing" in tampered(lambda d: (copy / "per_image.npz").unlink())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("resnet10t", "give the folder of one task's data"),
        ("--classification {data}", "say what to verify"),
        ("resnet10t --classification {data} --weights {weights}", "no published number of resnet10t"),
        ("efficientvmamba_t --classification {data} --weights {weights}", "names and shapes|does not fit|fits"),
        ("resnet10t --detection {data} --published AP=1", "backbone weights alone do no detection"),
        ("resnet10t --classification {data} --published top2=1 --weights {weights}", "unknown metric 'top2'"),
        ("resnet10t --classification {data} --published top1=x --weights {weights}", "write METRIC=NUMBER"),
        ("--result {data}", "cannot be read"),
        ("--checkpoint {weights} --classification {data} --published 1", "does not say which network it is of"),
    ],
)
def test_what_cannot_be_verified_is_one_line(trained, verify, arguments: str, complaint: str):
    result, data = trained
    line = arguments.format(data=data, weights=result.folder / "backbone.safetensors").split()
    status, said = verify(*line)
    assert status == 2, said
    assert any(part in said for part in complaint.split("|")), said


def test_the_papers_numbers_are_of_the_papers_data(trained, verify, tmp_path):
    _, data = trained
    evmamba.save_checkpoint(evmamba.create_model("efficientvmamba_t", num_classes=2), tmp_path / "w.safetensors")
    status, said = verify("efficientvmamba_t", "--classification", data, "--weights", tmp_path / "w.safetensors")
    assert status == 2
    assert "the paper's numbers are of ImageNet-1K (1000 classes, 50000 validation images)" in said


def test_weights_of_other_classes_are_refused(trained, verify, tmp_path):
    _, data = trained
    torch.save(timm.create_model("resnet10t", num_classes=1000).state_dict(), tmp_path / "w.pth")
    status, said = verify("resnet10t", "--classification", data, "--weights", "w.pth", "--published", "50")
    assert status == 2
    assert "no classifier for the data's 2 classes" in said


def described(task: str) -> tuple[dict, dict]:
    """A tiny network's weights, and what its checkpoint says of it."""
    torch.manual_seed(0)
    description = {
        "task": task,
        "model": {"class_path": TASKS[task].module, "init_args": MODELS[task]},
        "data": {"init_args": DATA[task]},
        "class_names": ["ant", "bee"],
    }
    return pydoc.locate(TASKS[task].module)(num_classes=2, **MODELS[task]).state_dict(), description


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_checkpoints_of_whole_networks_are_tested_and_their_results_computed_again(verify, tmp_path, task: str):
    write_images(task, tmp_path / "data")
    weights, description = described(task)
    torch.save({"state_dict": weights, KEY: description}, "best.ckpt")
    status, said = verify("--checkpoint", "best.ckpt", f"--{task}", "data", "--published", 50, "--tolerance", 100)
    assert (status, "as it was trained" in said) == (0, True), said
    result = json.loads(Path("verified/best/result.json").read_text())
    assert result["protocol"].get("rules") == {"detection": "torchvision"}.get(task)  # of when there was no choice
    assert json.loads(Path("verified/best/certificate.json").read_text())["data"]["split"] == "val"
    status, said = verify("--result", "verified/best/result.json", f"--{task}", "data")
    assert (status, said.endswith("agrees")) == (0, True), said
    assert TASKS[task].metrics[0].key in said
    assert (TASKS[task].rescore is None) == ("from what was kept of every image" in said)
    first = TASKS[task].metrics[0].key
    result["metrics"][first] = 0.5
    Path("verified/best/result.json").write_text(json.dumps(result))
    status, said = verify("--result", "verified/best/result.json")
    assert (status, f"fault: {first} is 0.500000" in said) == (1, True), said
    description["class_names"] = ["ant", "wasp"]
    torch.save({"state_dict": weights, KEY: description}, "other.ckpt")
    status, said = verify("--checkpoint", "other.ckpt", f"--{task}", "data", "--published", 50)
    assert (status, "has other classes than other.ckpt was trained for (bee, wasp)" in said) == (2, True), said


def test_what_is_tested_has_the_options_of_the_command(verify, tmp_path):
    write_images("segmentation", tmp_path / "data")
    weights, description = described("segmentation")
    torch.save({"state_dict": weights, KEY: description}, "best.ckpt")
    line = ["--checkpoint", "best.ckpt", "--segmentation", "data", "--published", "mIoU_ms=50", "--tolerance", 100]
    status, said = verify(*line)
    assert (status, "mIoU_ms was not measured" in said) == (2, True), said
    status, said = verify(*line, "--set", "model.init_args.multi_scale=true")
    assert (status, "mIoU ms" in said) == (0, True), said
    assert "as it was trained, but model.init_args.multi_scale=true" in said
    status, said = verify(*line, "--set", "model.init_args.decoder_channels=16")
    assert (status, "best.ckpt: " in said) == (2, True), said


def papers(task: str, model: str, head: str, **changes) -> Result:
    """A result on data like the paper's, with the paper's numbers and nothing kept."""
    numbers = published(model, task, head, changes.pop("schedule", None)).numbers
    metrics = {key: number / 100 for key, number in numbers.items() if key not in ("parameters", "macs")}
    reference = paper()["data"][task]
    data = {"name": "coco", "fingerprint": "f00d", **{key: reference[key] for key in ("num_classes", "val_images")}}
    return made_result(task, model, head=head, metrics=metrics, data=data, **changes)


def test_the_papers_numbers_are_those_after_as_many_epochs(verify, tmp_path):
    three = {"head": "maskrcnn", "model": "efficientvmamba_t", "schedule": "3x"}
    write_result(papers("detection", **three, training={"epochs": 36}), tmp_path)
    _, said = verify("--result", "result.json")
    assert ("yes (rounding alone)" in said, "NO (" in said) == (True, False), said
    write_result(papers("detection", **three, training={"epochs": 12}), tmp_path)
    _, said = verify("--result", "result.json")
    assert "NO (rounding alone)" in said, said
    write_result(papers("detection", **three), tmp_path)
    status, said = verify("--result", "result.json")
    assert status == 2
    assert "Mask R-CNN after 12 or 36 epochs, and this one does not say" in said
    assert "--published AP=NUMBER" in said


def test_results_of_networks_that_the_paper_only_quotes_are_still_checked(verify, tmp_path):
    write_result(papers("detection", "resnet50", "retinanet"), tmp_path)
    status, said = verify("--result", "result.json")
    assert (status, "recomputed nothing fault: " in said) == (1, True), said


def test_numbers_of_which_nothing_was_kept_are_a_fault(verify, tmp_path):
    Overlaps(["a.png", "b.png"], {}).write(tmp_path / PER_IMAGE_FILE)
    details = {"sha256": {PER_IMAGE_FILE: file_hash(tmp_path / PER_IMAGE_FILE)}}
    provenance = origin() | {"config_hash": config_hash(origin()["config"])}
    write_result(made_result("segmentation", "resnet18", details=details, provenance=provenance), tmp_path)
    status, said = verify("--result", "result.json")
    assert (status, "fault: mIoU: nothing was kept to compute it again" in said) == (1, True), said


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"init_args": {"augment_by": "magic"}}, "unexpected keyword argument 'augment_by'"),
        ({"init_args": {"batch_size": "many"}}, "its options of the data are none of this evmamba"),
        ({"init_args": ["a list"]}, "got `array` - at `$.data.init_args`"),
    ],
)
def test_strange_options_in_a_result_are_one_line(verify, tmp_path, data, complaint: str):
    write_images("segmentation", tmp_path / "data")
    provenance = origin() | {"config": {"data": data}}
    write_result(made_result("segmentation", "resnet18", provenance=provenance), tmp_path)
    status, said = verify("--result", "result.json", "--segmentation", "data")
    assert (status, "result.json: " in said, complaint in said) == (2, True, True), said
