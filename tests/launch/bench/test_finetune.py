"""`evmamba.train`: from a folder to the best weights, their test and a report, in one call."""

from collections.abc import Callable
from pathlib import Path

import pytest

import evmamba
from evmamba.errors import UserError
from evmamba.launch.bench import finetune
from evmamba.launch.fit.settings import setting
from evmamba.launch.store.results import Result
from evmamba.launch.store.spec import TrainingSpec
from evmamba.tasks import TASKS

from ..handmade import made_result
from ..tiny import DATA, write_images

SMALL = {f"data.init_args.{name}": value for name, value in DATA["classification"].items()}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingSpec]:
    """What a call would run, without running it."""

    def of(data: Path, **arguments: object) -> TrainingSpec:
        seen: list[TrainingSpec] = []

        def run_here(specs, output, progress) -> tuple[list[Result], bool]:
            seen.extend(specs)
            return [made_result(specs[0].task, specs[0].model)], False

        monkeypatch.setattr(finetune, "run_here", run_here)
        evmamba.train(data, backbone="resnet10t", **arguments)  # type: ignore[arg-type]
        (spec,) = seen
        return spec

    return of


def test_one_call_trains_tests_the_best_weights_and_reports(tmp_path: Path):
    write_images("classification", tmp_path / "data")
    call = {
        "backbone": "resnet10t",
        "pretrained": False,
        "epochs": 2,
        "batch_size": 4,
        "output": tmp_path / "out",
        "device": "cpu",
        "options": SMALL | {"data.init_args.num_workers": 0},
    }
    result = evmamba.train(tmp_path / "data", **call)
    assert result.task == "classification"
    assert result.protocol["weights"] == "EMA of the best epoch by val/top1"
    validated = [metrics["top1"] for _, metrics in result.training["validation"]]
    assert len(validated) == 2
    assert result.metrics["top1"] == pytest.approx(max(validated))
    assert result.folder is not None
    assert {path.name for path in result.folder.glob("checkpoints/*")} >= {"best.ckpt", "last.ckpt"}
    assert (tmp_path / "out" / "report.html").is_file()
    before = (result.folder / "result.json").read_bytes()
    assert evmamba.train(tmp_path / "data", **call).metrics == result.metrics
    assert (result.folder / "result.json").read_bytes() == before


@pytest.mark.parametrize("task", TASKS)
def test_the_layout_tells_the_task_and_its_recipe(tmp_path: Path, planned, task: str):
    write_images(task, tmp_path / "data")
    spec = planned(tmp_path / "data", pretrained=False, output=tmp_path / "out", epochs=3)
    assert spec.task == task
    assert spec.recipe.endswith(f"conf/{task}/finetune.yaml")
    assert setting(spec.settings, "model.init_args.checkpoint") is None
    assert setting(spec.settings, "trainer.max_epochs") == 3
    assert setting(spec.settings, "model.init_args.optimizer.layer_decay") < 1


def test_weights_to_start_from_may_be_a_file_where_the_call_is_made(tmp_path: Path, planned, monkeypatch):
    write_images("classification", tmp_path / "data")
    network = evmamba.create_model("efficientvmamba_t")
    evmamba.save_checkpoint(network, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"w.safetensors fits backbone 'resnet10t'"):
        planned(tmp_path / "data", pretrained="w.safetensors", output=tmp_path / "out")


def test_the_largest_batch_is_looked_for_on_a_gpu_only(tmp_path: Path, planned, monkeypatch):
    write_images("classification", tmp_path / "data")
    arguments = {"pretrained": False, "output": tmp_path / "out", "batch_size": "auto"}
    spec = planned(tmp_path / "data", device="cpu", **arguments)
    assert setting(spec.settings, "data.init_args.batch_size") == 64
    monkeypatch.setattr(finetune, "choose_device", lambda device: "cuda")
    (tmp_path / "finder.py").write_text(
        "import sys; print('searching'); print(8 if '--trainer.devices=1' in sys.argv else 0)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(finetune, "BATCH_FINDER", "finder")  # the real one: tests/launch/fit/test_batch_size.py
    spec = planned(tmp_path / "data", device="cpu", **arguments)
    assert setting(spec.settings, "data.init_args.batch_size") == 8
    (tmp_path / "finder.py").write_text("import sys; sys.exit('not even memory for two')")
    with pytest.raises(UserError, match="no batch size could be found: not even memory for two"):
        planned(tmp_path / "data", device="cpu", **arguments)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"data": "nowhere"}, "data folder not found: nowhere"),
        ({"data": "embedded"}, "say which task the embedded data is for"),
        ({"data": "embedded", "task": "detection", "head": "yolo"}, "unknown detector 'yolo'"),
        ({"data": "embedded", "task": "classification", "preset": "paper2"}, "unknown preset 'paper2'"),
        ({"data": "embedded", "task": "classification", "options": {"trainer.max_epoch": 3}}, "did you mean"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: dict, complaint: str):
    with pytest.raises(UserError, match=complaint) as caught:
        evmamba.train(**({"pretrained": False, "output": tmp_path} | arguments))
    assert "\n" not in str(caught.value)
