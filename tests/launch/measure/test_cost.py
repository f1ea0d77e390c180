"""Cost runs: detectors and segmentors counted as in the paper, training steps, sweeps that end where memory does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evmamba import cost
from evmamba.launch.bench.plan import BenchOptions, plan
from evmamba.launch.measure import cost as measure
from evmamba.launch.measure.cost import count, measure_cost
from evmamba.launch.store.results import Result, read_result
from evmamba.launch.store.spec import CostSpec, Timing
from evmamba.tasks.backbones import build_backbone

QUICK = {"warmup_steps": 0, "timed_steps": 1, "batch_size": 2}


def measured(
    tmp_path: Path, model: str, head: str | None = None, options: dict[str, Any] | None = None, **timing: Any
) -> Result:
    quick = Timing(**QUICK | timing)
    spec = CostSpec(
        model=model, head=head, seed=0, device="cpu", timing=quick, head_options=options or {}, suite="main"
    )
    measure_cost(spec, tmp_path)
    return read_result(tmp_path / "result.json")


def test_counting_from_shapes_is_counting(tmp_path: Path):
    for name in ("efficientvmamba_t", "swin_tiny_patch4_window7_224"):
        model = build_backbone(name, features_only=False, num_classes=10)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert count(model, (96, 64)) == cost.count_macs(model, (3, 96, 64))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_cost_run_measures_what_it_is_asked(tmp_path: Path):
    result = measured(tmp_path, "resnet10t", training_batch=2, max_batch=4, input_sizes=(64, 96))
    assert result.suite == "main"
    assert result.cost["train_batch_size"] == 2
    assert result.cost["train_images_per_s"] == pytest.approx(2e3 / result.cost["train_ms_median"])
    assert result.cost["train_peak_memory_mb"] >= 0
    assert [point["batch_size"] for point in result.sweeps["batch_size"]] == [1, 2, 4]
    assert [point["input_size"] for point in result.sweeps["input_size"]] == [64, 96]
    small, large = result.sweeps["input_size"]
    assert large["macs"] / small["macs"] == pytest.approx((96 / 64) ** 2, rel=0.1)
    assert {"latency_ms_median", "images_per_s", "peak_memory_mb"} <= set(small)
    assert sum(result.details["macs_by_op"].values()) == result.cost["macs"]


def test_the_networks_of_a_table_take_turns_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    together: dict[str, dict] = {"resnet10t": {}, "no_such_network": {}, "mobilenetv3_small_050": {}}
    monkeypatch.setattr(measure, "SIZE", (32, 32))
    quick = Timing(**QUICK | {"timed_steps": 5, "training_batch": 2})
    first = CostSpec(model="resnet10t", seed=0, device="cpu", timing=quick, together=together)
    assert first.leads
    assert [member.needs for member in first.members] == [(), (first.name,), (first.name,)]
    measure_cost(first, tmp_path / first.name)
    found = {spec.model: read_result(tmp_path / spec.name / "result.json") for spec in first.members}
    assert not found.pop("no_such_network").finished
    (turns,) = {tuple(result.provenance["turns"]["runs"]) for result in found.values()}
    assert turns == tuple(member.name for member in first.members)
    for result in found.values():
        rounds = result.details["rounds"]
        assert set(rounds) == {
            "latency_ms_median",
            "latency_ms_p95",
            "images_per_s",
            "train_ms_median",
            "train_ms_p95",
            "train_images_per_s",
        }
        assert all(len(values) == cost.ROUNDS for values in rounds.values())
        assert min(rounds["latency_ms_median"]) <= result.cost["latency_ms_median"] <= max(rounds["latency_ms_median"])
    # Alone, started again by itself, a member measures only itself.
    last = first.members[-1]
    assert not last.leads
    measure_cost(last, tmp_path / last.name)
    assert read_result(tmp_path / last.name / "result.json").provenance["turns"]["runs"] == [last.name]


def test_without_sweeps_there_are_none(tmp_path: Path):
    result = measured(tmp_path, "resnet10t")
    assert result.sweeps == {}
    assert "train_images_per_s" not in result.cost


def test_the_macs_of_the_scan_grow_with_the_pixels():
    """Linear in the pixels, as the paper promises: 47 times as many at 1536 as at 224."""
    model = build_backbone("efficientvmamba_t", features_only=False, num_classes=1000)
    counts = [count(model, (side, side)) for side in (224, 1536)]
    pixels = (1536 / 224) ** 2
    assert counts[1].by_op["scan"] / counts[0].by_op["scan"] == pytest.approx(pixels, rel=1e-6)
    assert counts[1].paper / counts[0].paper == pytest.approx(pixels, rel=0.01)


def test_upernets_width_comes_from_the_papers_recipe_of_an_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evmamba.launch.bench.plan._check_training", lambda *arguments: "fingerprint")
    options = BenchOptions(tmp_path, suite="main", backbones=["efficientvmamba_s", "resnet50"], tasks=["segmentation"])
    widths = [
        spec.head_options["decoder_channels"]
        for spec in plan(options)
        if spec.head == "upernet" and spec.task == "cost"
    ]
    assert widths == [384, 512]


def test_a_prediction_of_upernet_is_what_its_cost_says(tmp_path: Path):
    result = measured(tmp_path, "efficientvmamba_t", "upernet", {"decoder_channels": 256})
    assert result.protocol["input_size"] == [3, 512, 2048]
    assert result.details["macs_with_auxiliary_head"] > result.cost["macs"]
    assert result.protocol["num_classes"] == 150


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, None), ("32-true", None), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_what_is_measured_is_what_the_result_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str | None, dtype: torch.dtype | None
):
    seen = []
    ready = measure.cost.ready_for_inference
    monkeypatch.setattr(
        measure.cost, "ready_for_inference", lambda *a, amp, **k: (seen.append(amp), ready(*a, amp=None, **k))[1]
    )
    spec = CostSpec(model="resnet10t", seed=0, device="cpu", precision=precision, timing=Timing(**QUICK))
    measure_cost(spec, tmp_path)
    assert set(seen) == {dtype}
    assert read_result(tmp_path / "result.json").provenance["precision"] == (precision or "32-true")


def test_energy_is_that_of_the_images_between_two_readings(monkeypatch: pytest.MonkeyPatch):
    readings = iter((100.0, 160.0))
    monkeypatch.setattr(measure, "energy_counter", lambda device: lambda: next(readings))
    monkeypatch.setattr(measure.cost, "timed", lambda step, device: 1.0)
    model = build_backbone("resnet10t", features_only=False, num_classes=10)
    assert measure.ENERGY_SECONDS == 3.0  # hence three steps of four images
    assert measure._energy(model, 4, amp=None, device="cpu") == {"energy_j_per_image": 60.0 / 12}
    monkeypatch.undo()
    assert measure._energy(model, 4, amp=None, device="cpu") == {}
