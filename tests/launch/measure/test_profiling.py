"""Profiles: what is measured together, what cannot be measured says why, and every format agrees."""

import contextlib
import gc
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evmamba.cost import inference_step
from evmamba.errors import UserError
from evmamba.launch.measure import profiling
from evmamba.launch.measure.profiling import Case, ProfileOptions, Row, profile

SLEEP = {"slow": 0.02, "fast": 0.005}


class Sleeper(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.scale = nn.Parameter(torch.ones(2**18))  # 1 MiB

    def forward(self, x):
        time.sleep(SLEEP[self.name])
        return self.scale[:1] * x.mean()


@pytest.fixture
def calls(monkeypatch):
    """Networks that sleep; the list of those whose steps were timed."""
    called = []
    timed = profiling.timed

    def recorded(step, device):
        called.append(step)
        return timed(step, device)

    def build(name, **options):
        if name in SLEEP:
            return Sleeper(name)
        if name == "broken":
            return nn.Linear(7, 7)  # images do not fit
        raise UserError(f"unknown backbone '{name}'")

    monkeypatch.setattr(profiling, "build_backbone", build)
    monkeypatch.setattr(profiling, "timed", recorded)
    return called


def test_backbones_take_turns_and_ratios_refer_to_the_first(calls):
    slow, fast = profile(ProfileOptions(["slow", "fast"], [(8, 8)], [2], seconds=0.1))
    assert 20 <= slow.latency_ms < 100
    assert slow.latency_p95_ms >= slow.latency_ms
    assert slow.images_per_s == pytest.approx(2e3 / slow.latency_ms)
    assert slow.ratio == 1
    assert 1.5 < fast.ratio < 6
    assert fast.memory_mb == pytest.approx(1, abs=0.5)
    turns = [step for step, before in zip(calls[1:], calls, strict=False) if step is not before]
    assert len(turns) >= 2 * profiling.ROUNDS  # never one backbone's rounds in one go


def test_training_counts_gradients_and_optimizer_state(calls):
    inference, training = profile(
        ProfileOptions(["fast"], [(8, 8)], [1], phases=["inference", "training"], seconds=0.01)
    )
    # A gradient and two moments of 1 MiB each, and what the optimizer and the backward need for a moment.
    assert 2.9 <= training.memory_mb - inference.memory_mb <= 6.5


def test_what_cannot_run_says_why_and_the_rest_is_measured(calls, monkeypatch):
    options = ProfileOptions(["fast", "broken"], [(8, 8)], [1], modes=["eager", "graph"], seconds=0.01)
    rows = profile(options)
    assert [row.reason is None for row in rows] == [True, False, False, False]
    assert rows[1].reason.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert rows[2].reason == "CUDA graphs need a GPU"


def norms_of(model, image):
    """The network's answer, and how many BatchNorms ran for it."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        logits = model(image)
    return logits, sum(event.count for event in profiler.key_averages() if event.key == "aten::batch_norm")


@pytest.mark.parametrize(("name", "norms"), [("efficientvmamba_t", 22), ("resnet10t", 14), ("vit_tiny_patch16_224", 0)])
def test_fused_networks_have_no_batch_norm_left_and_compute_the_same(name, norms, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "torch")  # the compiled one folds by itself
    stepped, step = [], profiling._step
    monkeypatch.setattr(profiling, "_step", lambda model, *rest: stepped.append(model) or step(model, *rest))
    rows = profile(ProfileOptions([name], [(224, 224)], modes=["eager", "fused"], seconds=0.01))
    assert [row.reason for row in rows] == [None, None]
    (plain, before), (fused, after) = (norms_of(model, torch.ones(1, 3, 224, 224)) for model in stepped)
    assert (before, after) == (norms, 0)
    torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-4)


def test_networks_whose_norms_cannot_be_folded_are_not_called_fused():
    (row,) = profile(ProfileOptions(["mobilenetv3_small_050"], [(64, 64)], modes=["fused"], seconds=0.01))
    assert row.reason == "torch.fx cannot fold 34 of its BatchNorms"


def test_fused_networks_are_not_trained(calls):
    (row,) = profile(ProfileOptions(["fast"], [(8, 8)], modes=["fused"], phases=["training"], seconds=0.01))
    assert row.reason == "folded BatchNorms are not trained"


def test_compiling_that_fails_is_a_reason(calls, monkeypatch):
    def refuse(model, **options):
        raise RuntimeError("no C++ compiler\nlong explanation")

    monkeypatch.setattr(torch, "compile", refuse)
    (row,) = profile(ProfileOptions(["fast"], [(8, 8)], modes=["compiled"], seconds=0.01))
    assert row.reason == "RuntimeError: no C++ compiler"


def test_a_sweep_ends_where_memory_does(calls, monkeypatch):
    memory = {"fast": 10 * 2**20}
    prepare = profiling._prepare

    def prepared(name, case, options):
        runner = prepare(name, case, options)
        runner.memory = memory[name] * case.batch_size
        return runner

    monkeypatch.setattr(profiling, "_prepare", prepared)
    monkeypatch.setattr(profiling, "free_memory", lambda: 50 * 2**20)
    rows = profile(ProfileOptions(["fast"], [(8, 8)], [1], until_memory_ends=True, seconds=0.01))
    assert [(row.case.batch_size, row.reason) for row in rows] == [
        (1, None),
        (2, None),
        (4, None),
        (8, "out of memory: about 80 MB needed, 50 MB free"),
    ]


def test_memory_that_a_gpu_refuses_is_a_reason():
    assert profiling._reason(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")) == "out of memory"


def test_memory_that_ends_in_a_later_round_costs_one_row_only(calls, monkeypatch):
    take_turn = profiling._take_turn

    def turn(runner, *rest):
        if runner.name == "slow" and len(runner.rounds) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        take_turn(runner, *rest)

    monkeypatch.setattr(profiling, "_take_turn", turn)
    slow, fast = profile(ProfileOptions(["slow", "fast"], [(8, 8)], [1], seconds=0.01))
    assert slow.reason == "out of memory"
    assert (fast.reason, fast.ratio) == (None, None)
    assert fast.latency_ms > 0


def test_a_cuda_graph_keeps_the_network_it_reads(monkeypatch):
    replayed = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replayed.append(True)),
        "graph": contextlib.nullcontext,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    model = nn.Linear(3, 3)
    network = weakref.ref(model)
    replay = profiling._captured(inference_step(model, (torch.zeros(1, 3),)))
    del model
    gc.collect()
    assert network() is not None
    replay()
    assert replayed == [True]


def test_energy_is_the_rise_of_the_boards_counter(monkeypatch):
    readings = iter([0, 1000, 4000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    runner = profiling.Runner("fast", Case(8, 8, 2, "inference", "eager", "float32", "contiguous"), int, 0, 0.0, [])
    profiling._take_turn(runner, torch.device("cpu"), 0.0, profiling.energy_counter("cuda"))
    assert runner.joules == 3
    assert profiling._row(runner, runner, with_energy=True).joule_per_image == 1.5
    assert profiling.energy_counter("cpu") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["eagr"]}, "unknown mode 'eagr'.*eager"),
        ({"precisions": ["bf16"]}, "unknown precision 'bf16'"),
        ({"batch_sizes": [0]}, "positive"),
        ({"backbones": []}, "needs a backbone"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ProfileOptions(**options)


def test_rows_are_flat_for_json():
    row = Row("a", Case(8, 6, 2, "inference", "eager", "float32", "contiguous"), latency_ms=1.0)
    assert row.flat() | {"height": 8, "latency_ms": 1.0, "reason": None} == row.flat()
