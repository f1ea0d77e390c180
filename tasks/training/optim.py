"""AdamW with weight-decay groups, and learning-rate schedules that are plain functions of the optimizer step."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from evmamba.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its parameter groups.

    Attributes:
        lr: learning rate at the end of the warm-up.
        weight_decay: decoupled weight decay.
        betas: AdamW's moment decays.
        eps: AdamW's epsilon.
        no_decay: what is exempt from weight decay. "none": nothing; "norm_bias": parameters of fewer than two axes
            (norms and biases), which is what the published EfficientVMamba networks used (their A_logs and stacked
            projection biases have two axes and do decay); "norm_bias_ssm": also what the network lists in
            ``no_weight_decay()``, Mamba's own advice for A and D, and position embeddings elsewhere; "norm":
            what has "norm" in its name, as Swin's configurations in mmdetection and mmsegmentation (biases decay, and
            so do BatchNorms of heads, which are named otherwise here and there).
        scale_lr_to_batch: if set, `lr` is meant for this global batch size and is scaled linearly to the one in use.
        backbone_lr: `lr` of the backbone without its classifier, where that is another; it warms up and decays alike.
        layer_decay: factor of the learning rate from each layer of the backbone to the one below (see `lr_factors`);
            1 gives all the same.
        frozen_stages: the stem and so many stages of the backbone are not trained, their BatchNorms keep the statistics
            that they have; 0 is the stem alone, None trains all.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    no_decay: Literal["none", "norm", "norm_bias", "norm_bias_ssm"] = "norm_bias"
    scale_lr_to_batch: int | None = None
    backbone_lr: float | None = None
    layer_decay: float = 1.0
    frozen_stages: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay must be in (0, 1], not {self.layer_decay}")
        if self.backbone_lr is not None and self.backbone_lr <= 0:
            raise UserError(
                f"optimizer.backbone_lr must be positive, not {self.backbone_lr}; frozen_stages trains no backbone"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then one decay. Learning rates are absolute and are scaled together with the optimizer's.

    Attributes:
        kind: "cosine" and "poly" go from lr to min_lr between the warm-up's end and the last step, "step" multiplies by
            gamma at every milestone, "constant" stays at lr.
        warmup_steps: optimizer steps of warm-up; give this or warmup_epochs.
        warmup_epochs: epochs of warm-up, fractions allowed.
        warmup_by_epoch: during the warm-up the rate grows at the start of every epoch only, as in the published logs.
        warmup_lr: learning rate of the very first step.
        min_lr: learning rate at the end of cosine and poly.
        power: exponent of poly.
        milestones: epochs (counted from 0 at the start) after which "step" multiplies by gamma.
        gamma: factor of "step".
    """

    kind: Literal["cosine", "poly", "step", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_by_epoch: bool = False
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    power: float = 1.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1


# Shared defaults of the task modules (frozen, so one object can serve them all).
DEFAULT_OPTIMIZER = OptimizerConfig()
DEFAULT_SCHEDULE = ScheduleConfig()


def exempt_names(module: nn.Module) -> set[str]:
    """Full names of the parameters that any submodule lists in its ``no_weight_decay()`` (timm's convention)."""
    names: set[str] = set()
    for prefix, child in module.named_modules():
        listed = getattr(child, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, factors: Mapping[str, float] = MappingProxyType({})
) -> list[dict]:
    """Split the trainable parameters into decayed and exempt groups, each in the module's order.

    Args:
        module: whose parameters to train.
        config: see :class:`OptimizerConfig`.
        factors: of the learning rate, by the parameters' names; 1 for those that are not there.

    Returns:
        AdamW parameter groups, ``lr_factor`` in each: those of one factor are a decayed one and an exempt one. Factors
        fall; a group without parameters is left out.
    """
    exempt = exempt_names(module) if config.no_decay == "norm_bias_ssm" else set()
    short = config.no_decay.startswith("norm_bias")
    decayed: dict[float, list[nn.Parameter]] = {}
    spared: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        named = config.no_decay == "norm" and "norm" in name
        is_spared = named or (short and (parameter.ndim < 2 or name in exempt))
        (spared if is_spared else decayed).setdefault(factors.get(name, 1.0), []).append(parameter)
    groups = [
        {"params": parameters.get(factor), "weight_decay": decay, "lr_factor": factor}
        for factor in sorted({*decayed, *spared}, reverse=True)
        for parameters, decay in ((decayed, config.weight_decay), (spared, 0.0))
    ]
    return [group for group in groups if group["params"]]


def scaled_lr(config: OptimizerConfig, global_batch: int) -> float:
    """Return the peak learning rate for this global batch size (processes x batch x accumulation)."""
    return config.lr if config.scale_lr_to_batch is None else config.lr * global_batch / config.scale_lr_to_batch


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    global_batch: int | None = None,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    """Build AdamW over the module's trainable parameters.

    Args:
        module: whose parameters to train.
        config: see :class:`OptimizerConfig`.
        global_batch: images per optimizer step, needed only with ``scale_lr_to_batch``.
        factors: see :func:`parameter_groups`.

    Raises:
        UserError: ``scale_lr_to_batch`` without a known global batch, or nothing to train.
    """
    if config.scale_lr_to_batch is not None and global_batch is None:
        raise UserError("optimizer.scale_lr_to_batch needs a data module with a batch size; set optimizer.lr instead")
    groups = parameter_groups(module, config, factors)
    if not groups:
        raise UserError("the model has no trainable parameter")
    lr = scaled_lr(config, global_batch or 1)
    for group in groups:
        group["lr"] = lr * group.pop("lr_factor")
    return AdamW(groups, lr=lr, betas=config.betas, eps=config.eps)


def warmup_length(config: ScheduleConfig, steps_per_epoch: float) -> int:
    """Return the warm-up in optimizer steps.

    Raises:
        UserError: both warmup_steps and warmup_epochs are given.
    """
    if config.warmup_steps and config.warmup_epochs:
        raise UserError("schedule.warmup_steps and schedule.warmup_epochs exclude each other; give one of them")
    return config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)


def lr_at(step: int, config: ScheduleConfig, lr: float, steps_per_epoch: float, total_steps: float) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: optimizer steps already taken (0 for the first).
        config: see :class:`ScheduleConfig`.
        lr: peak learning rate.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps of the whole training; only cosine and poly look at it.
    """
    warmup = warmup_length(config, steps_per_epoch)
    if step < warmup:
        grown = int(step / steps_per_epoch) * steps_per_epoch if config.warmup_by_epoch else step
        return config.warmup_lr + (lr - config.warmup_lr) * grown / warmup
    if config.kind == "constant":
        return lr
    if config.kind == "step":
        return lr * config.gamma ** bisect_right(sorted(config.milestones), step / steps_per_epoch)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    remaining = (1 - progress) ** config.power if config.kind == "poly" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (lr - config.min_lr) * remaining


def build_scheduler(
    optimizer: Optimizer,
    config: ScheduleConfig,
    steps_per_epoch: float,
    total_steps: float,
    lr_scale: float = 1.0,
) -> LambdaLR:
    """Build the scheduler, to be stepped after every optimizer step (Lightning: ``interval="step"``).

    Args:
        optimizer: its default ``lr`` is the peak; groups with another keep their proportion to it.
        config: see :class:`ScheduleConfig`.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps of the whole training; ``inf`` is fine for "step" and "constant".
        lr_scale: factor for warmup_lr and min_lr, the one that the peak was scaled with.

    Raises:
        UserError: cosine or poly without a known length, or milestones missing for "step".
    """
    if config.kind in ("cosine", "poly") and math.isinf(total_steps):
        raise UserError(f"schedule.kind={config.kind} needs an end: set trainer.max_epochs or trainer.max_steps")
    if config.kind == "step" and not config.milestones:
        raise UserError("schedule.kind=step needs schedule.milestones, e.g. [8, 11]")
    lr = optimizer.defaults["lr"] / lr_scale

    def factor(step: int) -> float:
        return lr_at(step, config, lr, steps_per_epoch, total_steps) / lr

    factor(0)  # contradictory options fail here, before training
    return LambdaLR(optimizer, factor)
