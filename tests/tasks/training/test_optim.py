"""Weight-decay groups, and schedules against numbers computed by hand."""

import math

import pytest
import torch
from torch import nn

from evmamba.errors import UserError
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_scheduler,
    lr_at,
    parameter_groups,
    scaled_lr,
)


def names_by_decay(model: nn.Module, no_decay: str) -> tuple[set[str], set[str]]:
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.04, no_decay=no_decay))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in groups:
        found[group["weight_decay"] > 0] |= {name_of[id(parameter)] for parameter in group["params"]}
    return found[True], found[False]


def ends(names: set[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return build_backbone("efficientvmamba_t", features_only=False, num_classes=3)


def test_published_groups_decay_everything_with_two_axes(tiny: nn.Module):
    decayed, spared = names_by_decay(tiny, "norm_bias")
    by_name = dict(tiny.named_parameters())
    assert decayed | spared == set(by_name)
    assert all(by_name[name].ndim >= 2 for name in decayed)
    assert all(by_name[name].ndim < 2 for name in spared)
    assert {"A_logs", "x_proj_weight", "dt_projs_weight", "dt_projs_bias"} <= ends(decayed)
    assert "Ds" in ends(spared)


def test_mamba_advice_spares_the_state_space_parameters(tiny: nn.Module):
    decayed, spared = names_by_decay(tiny, "norm_bias_ssm")
    assert {"A_logs", "Ds"} <= ends(spared)
    assert not {"A_logs", "Ds"} & ends(decayed)
    assert {"x_proj_weight", "dt_projs_weight"} <= ends(decayed)


def test_norms_by_name_leave_biases_in_the_decay(tiny: nn.Module):
    decayed, spared = names_by_decay(tiny, "norm")
    assert all("norm" in name for name in spared)
    assert not any("norm" in name for name in decayed)
    assert any(name.endswith("fc.bias") for name in decayed)
    assert any(name.endswith("norm.bias") for name in spared)


def test_none_spares_nothing(tiny: nn.Module):
    decayed, spared = names_by_decay(tiny, "none")
    assert len(decayed) == len(list(tiny.parameters()))
    assert not spared


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    decayed, spared = names_by_decay(model, "norm_bias")
    assert (decayed, spared) == ({"1.weight"}, {"1.bias"})
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), OptimizerConfig())


def test_learning_rate_scales_linearly_with_the_batch():
    config = OptimizerConfig(lr=2e-3, scale_lr_to_batch=2048)
    assert scaled_lr(config, 1024) == pytest.approx(1e-3)
    assert scaled_lr(OptimizerConfig(lr=2e-3), 1024) == 2e-3
    with pytest.raises(UserError, match="scale_lr_to_batch"):
        build_optimizer(nn.Linear(2, 2), config)


# Hand-computed: lr 1, 10 steps an epoch, 110 steps in all, 10 of them warm-up, so 100 steps of decay.
COSINE = ScheduleConfig("cosine", warmup_epochs=1, warmup_lr=0.1, min_lr=0.2)
POLY = ScheduleConfig("poly", warmup_steps=10, power=1.0)
STEP = ScheduleConfig("step", warmup_steps=5, warmup_lr=0.001, milestones=(8, 11), gamma=0.1)


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        (COSINE, 0, 0.1),
        (COSINE, 5, 0.55),  # halfway from 0.1 to 1
        (COSINE, 10, 1.0),
        (COSINE, 35, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (COSINE, 60, 0.6),  # half
        (COSINE, 110, 0.2),
        (COSINE, 500, 0.2),
        (POLY, 0, 0.0),
        (POLY, 9, 0.9),
        (POLY, 10, 1.0),
        (POLY, 35, 0.75),
        (POLY, 110, 0.0),
        (ScheduleConfig("poly", power=2.0), 55, 0.25),
        (STEP, 0, 0.001),
        (STEP, 5, 1.0),
        (STEP, 79, 1.0),
        (STEP, 80, 0.1),
        (STEP, 109, 0.1),
        (STEP, 110, 0.01),
        (ScheduleConfig("constant"), 77, 1.0),
    ],
)
def test_schedule_values(config: ScheduleConfig, step: int, expected: float):
    assert lr_at(step, config, lr=1.0, steps_per_epoch=10, total_steps=110) == pytest.approx(expected, abs=1e-12)


def test_imagenet_recipe_at_2048():
    """300 epochs of 625 steps, 20 of warm-up from 1e-7, cosine from 2e-3 to 1e-6."""
    config = ScheduleConfig("cosine", warmup_epochs=20, warmup_lr=1e-7, min_lr=1e-6)
    at = [lr_at(epoch * 625, config, 2e-3, 625, 300 * 625) for epoch in (0, 10, 20, 160, 300)]
    assert at == pytest.approx([1e-7, 0.00100005, 2e-3, 0.0010005, 1e-6], rel=1e-9)


def test_scheduler_sets_every_group_after_every_optimizer_step():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerConfig(lr=2.0))
    scheduler = build_scheduler(optimizer, ScheduleConfig("poly", warmup_steps=2), steps_per_epoch=3, total_steps=6)
    seen = []
    for _ in range(6):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[value, value] for value in (0.0, 1.0, 2.0, 1.5, 1.0, 0.5)]


def test_scaling_the_batch_scales_the_whole_schedule():
    config = OptimizerConfig(lr=2e-3, scale_lr_to_batch=2048)
    optimizer = build_optimizer(nn.Linear(2, 2), config, global_batch=1024)
    build_scheduler(optimizer, ScheduleConfig(warmup_steps=4, warmup_lr=1e-4), 10, 100, lr_scale=0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)


def test_contradictory_schedules_are_refused():
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1.0)
    with pytest.raises(UserError, match="max_epochs"):
        build_scheduler(optimizer, ScheduleConfig("cosine"), 10, math.inf)
    with pytest.raises(UserError, match="milestones"):
        build_scheduler(optimizer, ScheduleConfig("step"), 10, 100)
    with pytest.raises(UserError, match="exclude each other"):
        build_scheduler(optimizer, ScheduleConfig(warmup_steps=1, warmup_epochs=1), 10, 100)


def test_warm_up_by_the_epoch_grows_at_the_start_of_each():
    config = ScheduleConfig("cosine", warmup_epochs=2, warmup_by_epoch=True, warmup_lr=0.1)
    rates = [lr_at(step, config, 1.0, 4, 100) for step in range(9)]
    assert rates[:8] == pytest.approx([0.1] * 4 + [0.55] * 4)
    assert rates[8] == 1.0
