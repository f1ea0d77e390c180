"""One run from its spec: whatever happens, a result tells it."""

from pathlib import Path

import pytest

from evmamba.launch import run
from evmamba.launch.recipes import find_recipe
from evmamba.launch.results import read_result
from evmamba.launch.run import RunSpec

QUICK = {"batch_size": 2, "warmup_steps": 0, "timed_steps": 1}


def written(folder: Path, spec: RunSpec) -> str:
    spec.write(folder)
    return str(folder / run.SPEC_FILE)


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

    monkeypatch.setattr(run, "measure_cost", broken)
    assert run.main([written(tmp_path, cost_spec())]) == 1
    result = read_result(tmp_path / "result.json")
    assert result.reason == f"ZeroDivisionError: nothing to divide by (see {tmp_path / 'run.log'})"
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(spec: RunSpec, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_cost", interrupted)
    assert run.main([written(tmp_path, cost_spec())]) == 130
    assert not (tmp_path / "result.json").exists()
