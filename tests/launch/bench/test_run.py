"""One run from its spec: whatever happens, a result tells it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evmamba.launch.bench import run
from evmamba.launch.fit.cli import EvmambaCLI
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.fit.training import cli_arguments
from evmamba.launch.fit.weights import save_weights
from evmamba.launch.measure import cost
from evmamba.launch.report.table import build_table
from evmamba.launch.store.results import read_result
from evmamba.launch.store.spec import SPEC_FILE, Resources, RunSpec

QUICK = {"batch_size": 2, "warmup_steps": 0, "timed_steps": 1}


def written(folder: Path, spec: RunSpec) -> str:
    spec.write(folder)
    return str(folder / SPEC_FILE)


def cost_spec(model: str = "efficientvmamba_t") -> RunSpec:
    return RunSpec("cost", model, None, seed=0, device="cpu", precision=None, timing=QUICK)


def test_a_spec_comes_back_with_the_same_hash(tmp_path: Path):
    spec = cost_spec()
    again = RunSpec.read(Path(written(tmp_path, spec)))
    assert again == spec
    assert again.hash == spec.hash


def test_a_cost_run_has_the_models_figures_and_says_how_it_timed(tmp_path: Path):
    assert run.main([written(tmp_path, cost_spec())]) == 0
    result = read_result(tmp_path / "result.json")
    assert result.cost["parameters"] == 6_493_660
    assert result.cost["macs"] == 806_436_096
    assert result.cost["latency_ms_median"] > 0
    assert result.cost["images_per_s"] > 0
    assert result.protocol == {"input_size": [3, 224, 224], "num_classes": 1000, **QUICK}
    assert result.provenance["spec_hash"] == cost_spec().hash


def test_a_users_mistake_is_the_reason_word_for_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec = RunSpec(
        "classification",
        "resnet18",
        "linear",
        seed=0,
        device="cpu",
        precision=None,
        recipe=str(find_recipe("conf/classification/tiny.yaml")),
        arguments=["--data.init_args.data_dir=/nowhere"],
    )
    assert run.main([written(tmp_path, spec)]) == 1
    result = read_result(tmp_path / "result.json")
    assert result.reason == "data folder not found: /nowhere (data.data_dir)"
    assert (result.task, result.model, result.head) == ("classification", "resnet18", "linear")
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_leaves_its_first_line_in_the_result_and_its_traceback_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken(spec: RunSpec, folder: Path) -> None:
        raise ZeroDivisionError("nothing to divide by\nsecond line")

    monkeypatch.setattr(cost, "measure_cost", broken)
    assert run.main([written(tmp_path, cost_spec())]) == 1
    result = read_result(tmp_path / "result.json")
    assert result.reason == f"ZeroDivisionError: nothing to divide by (see {tmp_path / 'run.log'})"
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(spec: RunSpec, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "measure_cost", interrupted)
    assert run.main([written(tmp_path, cost_spec())]) == 130
    assert not (tmp_path / "result.json").exists()


def training(task: str, head: str, **changes) -> RunSpec:
    size = "32" if task == "classification" else "64"
    option = "image_size" if task == "classification" else "crop_size"
    fields = {
        "recipe": str(find_recipe(f"conf/{task}/tiny.yaml")),
        "arguments": ["--trainer.max_steps=2", "--trainer.limit_test_batches=2", f"--data.init_args.{option}={size}"],
    }
    arguments = fields["arguments"] + changes.pop("arguments", [])
    return RunSpec(task, "resnet18", head, 0, "cpu", None, **(fields | {"arguments": arguments} | changes))


@pytest.mark.parametrize("model", ["efficientvmamba_t", "resnet18"])
def test_detection_and_segmentation_start_from_the_backbone_that_classification_left(tmp_path: Path, model: str):

    named = [f"--model.init_args.backbone={model}"]
    first = training("classification", "linear", arguments=named)
    classifier = EvmambaCLI(cli_arguments(first, tmp_path / first.name), run=False).model
    save_weights(classifier, tmp_path / first.name)
    then = training("segmentation", "upernet", arguments=named)
    then.start_after(first)
    segmentor = EvmambaCLI(cli_arguments(then, tmp_path / then.name), run=False).model
    wanted = classifier.network.state_dict()
    names = {"efficientvmamba_t": "stages.0.blocks.0.global_branch.in_proj.weight", "resnet18": "layer1.0.conv1.weight"}
    found = [value for name, value in segmentor.state_dict().items() if name.endswith(names[model])]
    assert len(found) == 1
    assert torch.equal(found[0], wanted[names[model]])


def test_what_a_training_ends_with_is_evaluated_by_a_run_of_its_own(tmp_path: Path):
    fit = training("segmentation", "upernet", stage="fit", arguments=["--model.init_args.backbone=resnet18"])
    test = replace(fit, stage="test", arguments=[*fit.arguments, "--model.init_args.multi_scale=true"])
    test.start_after(fit)
    both = replace(fit, stage="fit_test")
    for spec in (fit, test, both):
        assert run.main([written(tmp_path / spec.name, spec)]) == 0
    assert list((tmp_path / both.name / "tensorboard").glob("events.*"))
    trained, tested, whole = (read_result(tmp_path / spec.name / "result.json") for spec in (fit, test, both))
    assert trained.metrics == {}
    assert trained.protocol["stage"] == "fit"
    assert tested.metrics["mIoU"] == whole.metrics["mIoU"]
    assert "mIoU_ms" in tested.metrics
    assert tested.protocol["weights"] == f"last epoch of {fit.name}"
    assert tested.training["steps"] == 2
    # The table shows the evaluation, and does not count the training as an older run of the same.
    table = build_table([trained, tested])
    assert [note for note in table.notes if "older" in note] == []
    assert table.rows[0].cells[0][0].runs == [test.name]


def test_an_evaluation_without_its_training_says_what_is_missing(tmp_path: Path):
    fit = training("segmentation", "upernet", stage="fit", arguments=["--model.init_args.backbone=resnet18"])
    test = replace(fit, stage="test")
    test.start_after(fit)
    assert run.main([written(tmp_path / test.name, test)]) == 1
    reason = read_result(tmp_path / test.name / "result.json").reason
    assert reason == f"no weights.safetensors in {tmp_path / fit.name}: its training has not finished"


def test_a_hash_follows_what_a_run_starts_from_and_the_global_batch_but_not_the_resources():
    base = training("segmentation", "upernet")
    one, other = training("classification", "linear"), replace(training("classification", "linear"), seed=1)
    after_one, after_other = replace(base), replace(base)
    after_one.start_after(one)
    after_other.start_after(other)
    spread = replace(base, resources=Resources(nodes=8, devices=8, strategy="deepspeed_stage_1", batch_size=2))
    assert spread.hash == base.hash
    hashes = {base.hash, after_one.hash, after_other.hash, replace(base, global_batch=64).hash}
    assert len(hashes) == 4
    assert "--trainer.num_nodes=8" in cli_arguments(spread, Path())
    assert "--data.init_args.batch_size=2" in cli_arguments(spread, Path())


def test_of_several_processes_the_first_that_fails_tells_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    spec = replace(cost_spec(), resources=Resources(devices=2))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr("evmamba.launch.fit.failures.PATIENCE_SECONDS", 0.0)

    def main(rank: int, message: str) -> None:
        def broken(spec: RunSpec, folder: Path) -> None:
            raise RuntimeError(message)

        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setattr(cost, "measure_cost", broken)
        assert run.main([written(tmp_path, spec)]) == 1

    main(1, "an index out of range")
    main(0, "connection closed by peer")
    reason = read_result(tmp_path / "result.json").reason
    assert reason.startswith("RuntimeError: an index out of range (process 1 on ")
    assert "connection closed by peer" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued: another start, another first failure
    main(0, "again")
    assert read_result(tmp_path / "result.json").reason.startswith("RuntimeError: again (process 0 on ")
