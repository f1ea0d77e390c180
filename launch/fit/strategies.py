"""Sharded training by name: ``deepspeed_stage_1``, ``_2``, ``_3`` (ZeRO) and ``fsdp2``, and what goes with them.

Lightning's strategies do the work. Added here: configurations that fit networks of this size (`launch/fit/zero`),
float32 parameters under bf16 autocast as DDP has them, BatchNorm that is synchronised when asked for, evaluation with
nothing collective inside a step, checkpoint folders that appear whole or not at all, and a check of the options before
any data is read.
"""

import contextlib
import importlib.util
import json
import pydoc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn

from evmamba.checkpoints import LIGHTNING_RAW_SLOT
from evmamba.errors import UserError, unknown_name
from evmamba.launch.fit.checkpoint_folders import (
    AVERAGE_SLOT,
    folder_kind,
    is_consolidated,
    processes_of,
    read_whole,
    replaced_folder,
)
from evmamba.launch.store.precision import DEFAULT, PRECISIONS, full_name
from evmamba.tasks.training.distributed import share_buffers, unsharded
from evmamba.tasks.training.strategy_internals import (
    load_split_parameters,
    split_over_all_processes,
    synchronise_batch_norm,
    without_gathering,
)

CONFIGS = Path(__file__).with_name("zero")
# Names as Lightning has them.
ZERO_STAGES = {"deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed": 2, "deepspeed_stage_3": 3}
FSDP2_NAME = "fsdp2"
# Float32 parameters, computing in float32 or bfloat16.
SPLIT_IN = ("32-true", "bf16-mixed")
# What Lightning knows besides, and what to take for it here.
REPLACED = {
    "fsdp": FSDP2_NAME,
    "fsdp_cpu_offload": FSDP2_NAME,
    "deepspeed_stage_2_offload": "deepspeed_stage_2",
    "deepspeed_stage_3_offload": "deepspeed_stage_3",
    "deepspeed_stage_3_offload_nvme": "deepspeed_stage_3",
}


def strategy_names() -> list[str]:
    """Every name that ``--strategy`` takes."""
    return sorted({*StrategyRegistry.available_strategies(), "auto", FSDP2_NAME} - set(REPLACED))


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Replace the short ``--strategy NAME`` by LightningCLI's ``--trainer.strategy NAME``."""
    return [
        f"--trainer.{argument[2:]}" if argument == "--strategy" or argument.startswith("--strategy=") else argument
        for argument in arguments
    ]


def build_strategy(name: Any, precision: Any) -> Any:
    """Turn one of our names into a strategy; whatever else is returned as it is, for Lightning to understand.

    Args:
        name: of ``trainer.strategy``.
        precision: ``trainer.precision``.
    """
    if name in ZERO_STAGES:
        return ZeRO(ZERO_STAGES[name], full_name(precision))
    return FSDP2() if name == FSDP2_NAME else name


class WholeInEvaluation(Strategy):
    """Holds whole parameters on every process while it evaluates.

    Processes may have different numbers of images, and images different numbers of windows; with parameters gathered in
    each forward they would wait for each other forever.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._whole = contextlib.ExitStack()

    def gathered(self) -> contextlib.AbstractContextManager:
        raise NotImplementedError

    def on_validation_start(self) -> None:
        self._whole.enter_context(self.gathered())

    def on_test_start(self) -> None:
        self._whole.enter_context(self.gathered())

    def on_predict_start(self) -> None:
        self._whole.enter_context(self.gathered())

    def on_validation_end(self) -> None:
        self._whole.close()

    def on_test_end(self) -> None:
        self._whole.close()

    def on_predict_end(self) -> None:
        self._whole.close()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._whole.close()  # checkpoints are written by callbacks, whose end of validation comes before the strategy's
        return super().lightning_module_state_dict()


class ZeRO(WholeInEvaluation, DeepSpeedStrategy):
    """DeepSpeed's ZeRO: optimizer states (1), gradients (2) and parameters (3) split among the processes.

    Args:
        stage: 1, 2 or 3.
        precision: one of `SPLIT_IN`.
    """

    on_cpu = False  # DeepSpeed itself trains there, Lightning does not let it; tests do

    def __init__(self, stage: int, precision: str = DEFAULT) -> None:
        config = json.loads((CONFIGS / f"stage_{stage}.json").read_text(encoding="utf-8"))
        if PRECISIONS[precision].mixed:
            # DeepSpeed's own bf16 rounds the parameters too, the scan's decay rates among them. No module is named
            # whose gradients could be added up in bf16.
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": PRECISIONS[precision].dtype,
                "lower_precision_safe_modules": [],
            }
        super().__init__(config=config, precision_plugin=KeptInputs(precision))  # type: ignore[arg-type]

    def connect(self, model: L.LightningModule) -> None:
        super().connect(model)
        # Lightning would build a loader to know it, and in an evaluation there is nothing to train with.
        batch_size = getattr(getattr(model.trainer, "datamodule", None), "batch_size", 1)
        assert isinstance(self.config, dict)
        self.config.setdefault("train_micro_batch_size_per_gpu", batch_size)

    def setup(self, trainer: L.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            assert self.model is not None
            self.model = synchronise_batch_norm(self, self.model)
        super().setup(trainer)
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        if fitting and batches % accumulated:
            # DeepSpeed counts on where Lightning starts again with each epoch; the two would drift apart.
            raise UserError(
                f"DeepSpeed cannot end an epoch of {batches} batches within {accumulated} accumulated ones; set "
                f"--trainer.limit_train_batches={int(batches // accumulated * accumulated)} or use --strategy ddp"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if LIGHTNING_RAW_SLOT in checkpoint:
            # Lightning would leave out "state_dict", the average, and write the raw weights beside the engine's own.
            checkpoint = checkpoint | {AVERAGE_SLOT: checkpoint["state_dict"]}
            del checkpoint[LIGHTNING_RAW_SLOT]
        with replaced_folder(Path(self.broadcast(filepath)), self) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        if module.trainer.state.fn != TrainerFn.FITTING:
            return self._load_to_evaluate(Path(checkpoint_path))
        _check_parts(Path(checkpoint_path), self.world_size)
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if AVERAGE_SLOT in checkpoint:
            checkpoint["state_dict"] = checkpoint.pop(AVERAGE_SLOT)
            checkpoint[LIGHTNING_RAW_SLOT] = module.state_dict()  # which the engine has loaded
        return checkpoint

    def _load_to_evaluate(self, path: Path) -> dict[str, Any]:
        """Load a folder that any number of processes wrote, or a file; DeepSpeed itself takes neither for stage 3."""
        assert self.lightning_module is not None
        checkpoint = read_whole(path)
        if self.zero_stage_3:
            load_split_parameters(self, checkpoint)
            share_buffers(self.lightning_module)  # rank 0 has read them
        else:
            self.lightning_module.load_state_dict(checkpoint["state_dict"])
        return checkpoint

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        if not self.zero_stage_3:
            yield
            return
        import deepspeed

        assert self.lightning_module is not None
        parameters, modules = list(self.lightning_module.parameters()), self.lightning_module.modules()
        with deepspeed.zero.GatheredParameters(parameters), without_gathering(modules):
            yield


class KeptInputs(DeepSpeedPrecision):
    """Leaves the batch as it is: rounding to bf16 moves a box by pixels. Autocast is DeepSpeed's ``torch_autocast``."""

    def convert_input(self, data: Any) -> Any:
        return data


class FSDP2(WholeInEvaluation, ModelParallelStrategy):
    """PyTorch's fully_shard: parameters, gradients and optimizer states split among all processes.

    `TaskModule.configure_model` does the splitting, on the mesh that this makes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        split_over_all_processes(self)
        super().setup_environment()
        assert self.lightning_module is not None
        synchronise_batch_norm(self, self.lightning_module)  # before the parameters are split

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        with replaced_folder(Path(self.broadcast(filepath)), self) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        # What all processes have is written by any of them: BatchNorm's statistics would be a mixture.
        assert self.lightning_module is not None
        share_buffers(self.lightning_module)
        return super().lightning_module_state_dict()

    def gathered(self) -> contextlib.AbstractContextManager:
        assert self.lightning_module is not None
        return unsharded(self.lightning_module)


def whole_parameters(trainer: L.Trainer) -> contextlib.AbstractContextManager:
    """Hold whole parameters on every process, to save or count them after training; all processes enter and leave."""
    strategy = trainer.strategy
    return strategy.gathered() if isinstance(strategy, WholeInEvaluation) else contextlib.nullcontext()


def check_strategy(trainer: Namespace, checkpoint: str | Path | None = None, fitting: bool = False) -> None:
    """Refuse what does not go together, before data is read.

    Args:
        trainer: LightningCLI's ``trainer`` options.
        checkpoint: of ``--ckpt_path``.
        fitting: whether a training is to continue from it.

    Raises:
        UserError: with what to use instead.
    """
    name = trainer.strategy if isinstance(trainer.strategy, str) else None
    if name in REPLACED:
        raise UserError(f"--strategy {name} is not supported; use --strategy {REPLACED[name]}")
    if name is not None and name not in strategy_names():
        raise unknown_name("strategy", name, strategy_names())
    if name in ZERO_STAGES:
        _check_deepspeed(trainer, name)
    if name is not None:
        check_sharding(name, trainer, _on_gpu(trainer))
    if checkpoint is None:
        return
    path = Path(checkpoint)
    if path.is_dir():
        _check_folder(path, name)
    if fitting and is_consolidated(path):
        raise UserError(
            f"{path} was consolidated: it has no optimizer states to go on with (--ckpt_path); continue from the "
            f"folder it was made of, or start from its weights with --model.init_args.checkpoint={path}"
        )
    processes = _processes(trainer)
    if fitting and name in ZERO_STAGES and processes is not None:
        _check_parts(path, processes)


def _check_deepspeed(trainer: Namespace, name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--strategy {name} needs DeepSpeed; in evmamba's folder: pip install '.[deepspeed]'")
    if not ZeRO.on_cpu and not _on_gpu(trainer):
        raise UserError(f"--strategy {name} needs GPUs; on a CPU use --strategy ddp or {FSDP2_NAME}")


def check_sharding(name: str, trainer: Namespace, on_gpu: bool) -> None:
    """Refuse options of a recipe that do not go with a strategy that splits what DDP holds whole.

    Args:
        name: of any strategy.
        trainer: precision, gradient_clip_algorithm, gradient_clip_val, callbacks and sync_batchnorm.
        on_gpu: whether the training will be on GPUs.

    Raises:
        UserError: with what to use instead.
    """
    if name not in ZERO_STAGES and name != FSDP2_NAME:
        return
    if full_name(trainer.precision) not in SPLIT_IN:
        raise UserError(
            f"--strategy {name} keeps parameters in float32 and computes in float32 or bf16: use "
            f"--trainer.precision {' or '.join(SPLIT_IN)}, or --strategy ddp for {trainer.precision}"
        )
    if str(trainer.gradient_clip_algorithm) == "value" and trainer.gradient_clip_val:
        raise UserError(
            f"--strategy {name} clips gradients by their norm only; use --trainer.gradient_clip_algorithm norm, or "
            "--strategy ddp"
        )
    if (ZERO_STAGES.get(name) == 3 or name == FSDP2_NAME) and any(map(_averages, trainer.callbacks or [])):
        raise UserError(
            f"averaged weights (EMA) do not work with the split parameters of --strategy {name}; use deepspeed_stage_2 "
            "or ddp, or leave WeightEMA out of trainer.callbacks"
        )
    if trainer.sync_batchnorm and not on_gpu:
        raise UserError("--trainer.sync_batchnorm needs GPUs: PyTorch has no synchronised BatchNorm on a CPU")


def _check_folder(folder: Path, name: str | None) -> None:
    kind = folder_kind(folder)
    if kind is None:
        raise UserError(f"{folder} is no checkpoint, or was not written to its end (--ckpt_path)")
    if (kind == "deepspeed") != (name in ZERO_STAGES) or (kind == "fsdp2") != (name == FSDP2_NAME):
        wrote = "deepspeed_stage_N" if kind == "deepspeed" else FSDP2_NAME
        raise UserError(
            f"{folder} is a sharded checkpoint of --strategy {wrote} (--ckpt_path); give that, or make one file of it: "
            f"evmamba consolidate {folder}"
        )


def _check_parts(folder: Path, processes: int) -> None:
    """See that DeepSpeed can continue from a folder with so many processes."""
    if folder_kind(folder) != "deepspeed":
        raise UserError(
            f"{folder} was not written by DeepSpeed, which continues from its own folders only (--ckpt_path); use the "
            f"strategy that wrote it, or start from its weights with --model.init_args.checkpoint={folder}"
        )
    if processes != processes_of(folder):
        raise UserError(
            f"{folder} was written by {processes_of(folder)} processes, this training has {processes}: DeepSpeed "
            f"cannot split it anew (--ckpt_path); use as many, or evmamba consolidate {folder} and start from its "
            "weights with --model.init_args.checkpoint"
        )


def _on_gpu(trainer: Namespace) -> bool:
    return trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _processes(trainer: Namespace) -> int | None:
    """Number of processes where the options alone say it."""
    devices = trainer.devices
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * int(trainer.num_nodes) if isinstance(devices, int) and devices > 0 else None


def _averages(callback: Any) -> bool:
    """Whether a callback, or its description in a recipe, averages weights."""
    path = getattr(callback, "class_path", None)
    kind = pydoc.locate(path) if path else type(callback)
    return isinstance(kind, type) and issubclass(kind, WeightAveraging)
