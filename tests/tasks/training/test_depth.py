"""Learning rates by layer are timm's, for classifiers and for pyramids of any origin; frozen stages do not move."""

import copy

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from evmamba.errors import UserError
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.classification import ClassificationData, ClassificationModule
from evmamba.tasks.training.depth import classifier_of, freeze_stages, layers_of, lr_factors
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_scheduler

from ..toy import quiet_trainer


@pytest.mark.parametrize("name", ["efficientvmamba_t", "vim_tiny", "resnet10t", "vit_tiny_patch16_224"])
def test_factors_are_those_of_timms_layer_decay(name: str):
    model = build_backbone(name, features_only=False, num_classes=5)
    expected = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.7) for p in g["params"]}
    factors = lr_factors(model, 0.7)
    assert factors == {name: pytest.approx(expected[id(p)]) for name, p in model.named_parameters()}
    assert {factors[name] for name in classifier_of(model)} == {1.0}
    assert min(factors.values()) < 0.7**3


@pytest.mark.parametrize("name", ["efficientvmamba_t", "convnext_atto", "mobilenetv3_small_050", "swin_s3_tiny_224"])
def test_a_parameter_has_the_same_factor_in_a_pyramid(name: str):
    whole = lr_factors(build_backbone(name, features_only=False, num_classes=5), 0.9)
    part = lr_factors(build_backbone(name, features_only=True), 0.9)
    flat = {key.replace(".", "_"): value for key, value in whole.items()}
    own = {key.removeprefix("body.").replace(".", "_"): value for key, value in part.items()}
    shared = [key for key in own if key in flat and "norm" not in key]
    assert len(shared) > len(own) / 2
    ratios = {round(own[key] / flat[key], 6) for key in shared}
    # A network whose last norm goes with its classifier has one layer less without them.
    assert len(ratios) == 1
    assert ratios <= {1.0, round(1 / 0.9, 6), round(1 / 0.9**2, 6)}


def test_groups_keep_their_proportion_through_the_schedule():
    model = build_backbone("efficientvmamba_t", features_only=False, num_classes=5)
    config = OptimizerConfig(lr=0.1, scale_lr_to_batch=8)
    optimizer = build_optimizer(model, config, 16, lr_factors(model, 0.5))
    scheduler = build_scheduler(optimizer, ScheduleConfig(warmup_steps=2, min_lr=0.01), 5, 10, lr_scale=2.0)
    initial = [group["initial_lr"] for group in optimizer.param_groups]
    assert max(initial) == pytest.approx(0.2)
    assert len({round(rate, 12) for rate in initial}) == max(layers_of(model).values()) + 1
    for _ in range(10):
        now = [group["lr"] / first for group, first in zip(optimizer.param_groups, initial, strict=True)]
        assert max(now) == pytest.approx(min(now))
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("name", ["efficientvmamba_t", "resnet10t"])
def test_the_stem_and_so_many_stages_are_frozen(name: str, features_only: bool):
    model = build_backbone(name, features_only=features_only, num_classes=5)
    frozen = freeze_stages(model, 2)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    stages = ("stages.0", "stages.1", "stem") if name == "efficientvmamba_t" else ("conv1", "bn1", "layer1", "layer2")
    for key, _ in model.named_parameters():
        assert (key not in trained) == key.removeprefix("body.").startswith(stages), key
    assert any(isinstance(module, nn.BatchNorm2d | nn.LayerNorm) for module in frozen)


@pytest.mark.parametrize("stages", [-1, 5, 6])
def test_more_stages_than_there_are_is_one_line(stages: int):
    model = build_backbone("resnet10t", features_only=False, num_classes=5)
    with pytest.raises(UserError, match=f"frozen_stages={stages}: the backbone's stages are numbered 1 to 4"):
        freeze_stages(model, stages)


def test_a_network_that_does_not_say_its_layers_is_one_line():
    with pytest.raises(UserError, match="Linear has no group_matcher"):
        layers_of(nn.Linear(2, 2))


def test_what_is_frozen_stays_bit_for_bit_through_a_training(tmp_path):
    """BatchNorm's statistics too, and after a validation in between."""
    config = OptimizerConfig(frozen_stages=1, backbone_lr=1e-4, layer_decay=0.8)
    module = ClassificationModule("resnet10t", 10, optimizer=config, schedule=ScheduleConfig(kind="constant"))
    data = ClassificationData(image_size=32, batch_size=8, num_workers=0)
    before = copy.deepcopy(module.network.state_dict())
    trainer = quiet_trainer(tmp_path, max_steps=4, val_check_interval=2, limit_val_batches=1, limit_train_batches=4)
    trainer.fit(module, datamodule=data)
    after = module.network.state_dict()
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    frozen = {key for key in before if key.startswith(("conv1", "bn1", "layer1"))}
    assert frozen <= same
    assert not {key for key in same - frozen if key.endswith(("weight", "running_mean"))}
    rates = sorted({round(group["lr"], 10) for group in trainer.optimizers[0].param_groups})
    assert rates[-1] == 1e-3
    assert rates[-2] == pytest.approx(0.8 * 1e-4)
