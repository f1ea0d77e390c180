"""A training or an evaluation from its spec: what it starts from, what it is tested with, and what it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from evmamba.errors import UserError
from evmamba.launch.fit.cli import EvmambaCLI, settings_of
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.fit.settings import changed
from evmamba.launch.fit.training import cli_arguments, evaluate, fit_and_test
from evmamba.launch.fit.weights import save_weights
from evmamba.launch.report.table import build_table
from evmamba.launch.store.results import read_result
from evmamba.launch.store.spec import EvaluationSpec, Resources, Start, TrainingSpec

from ..handmade import made_spec


def training(task: str, model: str = "resnet18", **changes: Any) -> TrainingSpec:
    size = {"classification": ("image_size", 32), "segmentation": ("crop_size", 64)}[task]
    options = [
        ("model.init_args.backbone", model),
        ("trainer.max_steps", 2),
        ("trainer.limit_test_batches", 2),
        (f"data.init_args.{size[0]}", size[1]),
    ]
    settings = settings_of(find_recipe(f"conf/{task}/tiny.yaml"), options)
    return made_spec(task, model, settings=settings, **changes)


def evaluation(of: TrainingSpec) -> EvaluationSpec:
    settings = changed(of.settings, "model.init_args.multi_scale", True)
    return EvaluationSpec(
        task=of.task, model=of.model, head=of.head, seed=0, device="cpu", settings=settings, start=Start.of(of)
    )


@pytest.mark.parametrize("model", ["efficientvmamba_t", "resnet18"])
def test_detection_and_segmentation_start_from_the_backbone_that_classification_left(tmp_path: Path, model: str):
    first = training("classification", model)
    classifier = EvmambaCLI(cli_arguments(first, tmp_path / first.name), run=False).model
    save_weights(classifier, tmp_path / first.name)
    then = training("segmentation", model).after(first)
    segmentor = EvmambaCLI(cli_arguments(then, tmp_path / then.name), run=False).model
    wanted = classifier.network.state_dict()
    names = {"efficientvmamba_t": "stages.0.blocks.0.global_branch.in_proj.weight", "resnet18": "layer1.0.conv1.weight"}
    found = [value for name, value in segmentor.state_dict().items() if name.endswith(names[model])]
    assert len(found) == 1
    assert torch.equal(found[0], wanted[names[model]])


def test_what_a_training_ends_with_is_evaluated_by_a_run_of_its_own(tmp_path: Path):
    fit = training("segmentation", test=False)
    both, test = structs.replace(fit, test=True), evaluation(fit)
    for spec, run in ((fit, fit_and_test), (test, evaluate), (both, fit_and_test)):
        (tmp_path / spec.name).mkdir()
        run(spec, tmp_path / spec.name)
    assert list((tmp_path / both.name / "tensorboard").glob("events.*"))
    trained, tested, whole = (read_result(tmp_path / spec.name / "result.json") for spec in (fit, test, both))
    assert trained.metrics == {}
    assert trained.protocol["stage"] == "fit"
    assert tested.metrics["mIoU"] == whole.metrics["mIoU"]
    assert "mIoU_ms" in tested.metrics
    assert tested.protocol["weights"] == f"last epoch of {fit.name}"
    assert tested.training["steps"] == 2
    for part in ("model", "data"):  # what it was told is what its spec says
        assert whole.provenance["settings"][part] == both.settings[part]
    # The table shows the evaluation, and does not count the training as an older run of the same.
    table = build_table([trained, tested])
    assert [note for note in table.notes if "older" in note] == []
    assert table.rows[0].cells[0][0].runs == [test.name]


def test_an_evaluation_without_its_training_says_what_is_missing(tmp_path: Path):
    fit = training("segmentation", test=False)
    with pytest.raises(UserError, match=r"no weights.safetensors in .*: its training has not finished"):
        evaluate(evaluation(fit), tmp_path / "evaluation")


def test_resources_reach_the_trainer_and_the_data_where_the_settings_leave_them_open():
    resources = Resources(nodes=8, devices=8, strategy="deepspeed_stage_1", batch_size=2)
    spec = structs.replace(training("segmentation"), resources=resources)
    found = cli_arguments(spec, Path())
    for option in (
        "--trainer.num_nodes=8",
        "--trainer.devices=8",
        "--trainer.strategy=deepspeed_stage_1",
        "--data.init_args.batch_size=2",
    ):
        assert option in found
    told = structs.replace(spec, settings=changed(spec.settings, "trainer.strategy", "ddp"))
    assert not any(argument.startswith("--trainer.strategy") for argument in cli_arguments(told, Path()))
