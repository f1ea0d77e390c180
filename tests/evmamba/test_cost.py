"""Counts equal the paper's table; measuring leaves the model as it was."""

import contextlib
import copy
import json
import time

import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.models.detection import retinanet_resnet50_fpn

from evmamba import EfficientVMamba, create_model, fuse
from evmamba.cost import ROUNDS, count_macs, count_parameters, measure_inference, measure_training, take_turns
from evmamba.kernels import selective_scan_fn
from evmamba.kernels.dry_run import dry_run

# Our kinds of operation by the original's.
KINDS = {
    "conv_patch": "conv_patch",
    "conv_dw": "conv_depthwise",
    "conv_1x1": "conv_1x1",
    "linear": "linear",
    "x_proj": "x_proj",
    "dt_proj": "dt_proj",
    "scan": "scan",
    "layer_norm(5/elem)": "layer_norm",
    "batch_norm(2/elem)": "batch_norm",
    "avgpool(1/elem)": "avg_pool",
}
TINY = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 5}


@pytest.mark.parametrize(
    ("variant", "paper"), [("t", 806_436_096), ("s", 1_342_574_592), ("b", 3_996_672_000)], ids=lambda v: str(v)
)
def test_counts_equal_the_paper_by_kind_of_operation(golden_folder, variant, paper):
    expected = json.loads((golden_folder / "macs_exact.json").read_text())[variant]
    macs = count_macs(create_model(f"efficientvmamba_{variant}"))
    assert macs.by_op == {KINDS[kind]: count for kind, count in expected["by_op"].items()}
    assert macs.paper == expected["total"] == paper
    assert macs.plain == expected["total_without_norm_pool_scan"]


def test_padding_tokens_of_odd_maps_count():
    model = EfficientVMamba(dims=(16,), depths=(1,), layout="E", num_classes=0)
    odd, even = count_macs(model, (3, 36, 44)), count_macs(model, (3, 40, 48))  # maps 9x11 and 10x12
    assert odd.by_op["scan"] == even.by_op["scan"] == 10 * 12 * (9 * 32 * 16 + 32)
    assert odd.by_op["conv_depthwise"] < even.by_op["conv_depthwise"]


def test_the_scan_of_others_networks_counts_as_a_scan():
    class Sequence(nn.Module):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return selective_scan_fn(u, u.abs(), -torch.ones(3, 4), torch.ones(1, 4, 10), torch.ones(1, 4, 10))

    assert count_macs(Sequence(), inputs=(torch.ones(1, 3, 10),)).by_op == {"scan": 9 * 3 * 10 * 4}


@pytest.mark.parametrize(
    ("name", "plain"),
    [  # G multiply-accumulates of the models' own papers and of timm's results table
        ("resnet50", 4.09),
        ("vit_tiny_patch16_224", 1.26),
        ("swin_tiny_patch4_window7_224", 4.49),
        ("mobilenetv3_large_100", 0.22),
    ],
)
def test_timm_models_count_as_published(name, plain):
    assert count_macs(timm.create_model(name)).plain / 1e9 == pytest.approx(plain, rel=0.02)


def test_whole_detector_counts_more_than_its_backbone():
    detector = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2, min_size=128, max_size=128)
    macs = count_macs(detector, inputs=([torch.rand(3, 128, 128)],))
    backbone = count_macs(detector.backbone, (3, 128, 128))
    assert macs.by_op["conv"] > 2 * backbone.by_op["conv"]


def test_pyramid_counts_its_norms_and_no_classifier():
    pyramid = count_macs(create_model("efficientvmamba_t", features_only=True)).by_op
    classifier = count_macs(create_model("efficientvmamba_t")).by_op
    norms = 5 * sum(dim * (56 // 2**i) ** 2 for i, dim in enumerate((48, 96, 192, 384)))
    assert pyramid["layer_norm"] - norms == classifier["layer_norm"] - 5 * 384 * 49
    assert classifier["linear"] - pyramid["linear"] == 384_000


def test_training_mode_does_not_change_the_count():
    model = EfficientVMamba(**TINY)
    counted = count_macs(model, (3, 64, 64))
    assert count_macs(copy.deepcopy(model).train(), (3, 64, 64)) == counted


@pytest.mark.parametrize("fused", [False, True])
def test_fused_operators_of_a_gpu_count_as_the_modules_they_hold(fused):
    pytest.importorskip("triton")
    model = EfficientVMamba(**TINY).eval()
    model = fuse(model) if fused else model
    expected = count_macs(model, (3, 64, 64))
    with FakeTensorMode(allow_non_fake_inputs=True), dry_run(lambda kernel, tensors: None):
        counted = count_macs(model, inputs=(torch.empty(1, 3, 64, 64),))
    # Their 1x1 convolutions are linear layers.
    expected.by_op["linear"] += expected.by_op.pop("conv_1x1")
    assert counted == expected


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 16


def state_of(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return tensors, gradients, [module.training for module in model.modules()]


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: count_macs(model, (3, 40, 40)),
        lambda model: measure_inference(model, (3, 40, 40), 2, warmup=1, steps=3),
        lambda model: measure_training(model, (3, 40, 40), 2, warmup=1, steps=3),
        lambda model: measure_training(model, (3, 40, 40), 2, warmup=1, steps=3, amp=torch.bfloat16),
    ],
    ids=["macs", "inference", "training", "training-bf16"],
)
def test_measuring_leaves_the_model_as_it_was(measure):
    model = EfficientVMamba(**TINY, drop_path_rate=0.5).train()
    model.stages[0].eval()
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    model.stem.conv.weight.grad = None
    (tensors, gradients, modes), random_state = state_of(model), torch.get_rng_state()
    measure(model)
    now_tensors, now_gradients, now_modes = state_of(model)
    assert all(torch.equal(tensors[name], value) for name, value in now_tensors.items())
    for before, after in zip(gradients, now_gradients, strict=True):
        assert before is after is None or torch.equal(before, after)
    assert now_modes == modes
    assert torch.equal(torch.get_rng_state(), random_state)


class Sleeper(nn.Module):
    """Takes 10 ms a call and 64 MiB at most."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        time.sleep(0.01)
        block = torch.ones(2**24)
        return self.scale * (x.mean() + block[-1])


def test_timing_and_memory_of_a_known_load():
    model = Sleeper()
    timing = measure_inference(model, (3, 8, 8), 4, warmup=2, steps=20)
    assert len(model.modes) == 22
    assert set(model.modes) == {(False, False)}
    assert 10 <= timing["latency_ms_median"] < 1000
    assert timing["latency_ms_p95"] >= timing["latency_ms_median"]
    assert timing["images_per_s"] == pytest.approx(4e3 / timing["latency_ms_median"])
    assert 60 <= timing["peak_memory_mb"] < 160
    assert "resident memory" in timing["peak_memory_kind"]


def test_models_warm_up_again_where_others_had_their_turn_between() -> None:
    def steps_of(models: int) -> list[int]:
        counts = [0] * models

        def ready(k: int) -> contextlib.AbstractContextManager:
            def step() -> None:
                counts[k] += 1

            return contextlib.nullcontext(step)

        take_turns([lambda k=k: ready(k) for k in range(models)], 1, warmup=2, steps=7, device="cpu")
        return counts

    assert steps_of(1) == [1 + 2 + 7]
    assert steps_of(2) == [1 + 2 + 7 + ROUNDS] * 2


def test_training_step_has_gradients():
    model = Sleeper()
    measure_training(model, (3, 8, 8), 4, warmup=0, steps=2)
    assert set(model.modes) == {(True, True)}


def test_pyramids_can_be_measured_in_training():
    model = create_model("efficientvmamba_t", features_only=True)
    assert measure_training(model, (3, 32, 32), 2, warmup=0, steps=1)["images_per_s"] > 0
