"""The private parts of Lightning and torch that we build on. A failure here names what another version has changed."""

import importlib
import inspect
from functools import reduce

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

SIGNALS = "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector"
# What is used, and where.
PRIVATE = {
    f"{SIGNALS}.register_signal_handlers": "interruption.py",
    f"{SIGNALS}.teardown": "interruption.py",
    "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher.launch": "interruption.py",
    "lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector.resume_start": "agreed_start.py",
    "torch._C._distributed_c10d:_dump_nccl_trace": "progress_watch.py",
    "lightning.pytorch.loops:_FitLoop.done": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop.update_restart_stage": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop.reset": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop.advance": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop.on_advance_end": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._should_accumulate": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._should_check_val_fx": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._is_training_done": "loops.py",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._broadcast_sigterm_tensor": "loops.py",
    "lightning.pytorch.strategies:DeepSpeedStrategy._restore_zero_state": "strategy_internals.py",
    "torch._C._distributed_c10d:Reducer.prepare_for_backward": "distributed.py",
    "torch.utils._pytree:tree_leaves": "evmamba/cost.py",
    "torch.utils._pytree:tree_map": "tasks/detection/detectors.py",
    "torch._subclasses:FakeTensorMode": "launch/measure/cost.py",
    "torch._dynamo.config:recompile_limit": "launch/measure/profiling.py",
    "torch.autograd:_profiler_enabled": "kernels/ops.py",
    "torch.autograd.forward_ad:_current_level": "kernels/ops.py",
    "torch._C:_len_torch_function_stack": "kernels/ops.py",
    "torch._C:_len_torch_dispatch_stack": "kernels/ops.py",
    "torch._C._functorch:peek_interpreter_stack": "kernels/ops.py",
    "torch:Tensor._is_zerotensor": "kernels/ops.py",
}


@pytest.mark.parametrize("place", PRIVATE)
def test_what_we_use_is_still_there(place: str):
    module, _, names = place.partition(":")
    try:
        reduce(getattr, names.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        versions = f"Lightning {L.__version__}, torch {torch.__version__}"
        pytest.fail(f"{versions} changed {place} ({error}), which {PRIVATE[place]} uses")


def test_loops_and_handlers_take_the_arguments_that_we_give():
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as Loop

    for method, parameters in (
        (Loop.advance, ["self", "data_fetcher"]),
        (Loop.on_advance_end, ["self", "data_fetcher"]),
        (Loop._should_check_val_fx, ["self", "data_fetcher"]),
        (Loop._should_accumulate, ["self"]),
        (Loop.reset, ["self"]),
    ):
        assert list(inspect.signature(method).parameters) == parameters, f"Lightning changed {method.__qualname__}"


def test_a_trainer_has_the_parts_that_are_exchanged():
    """`make_resumable` gives them classes of ours, which add no slots and read these attributes."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    loop = trainer.fit_loop.epoch_loop
    assert type(trainer._signal_connector).__name__ == "_SignalConnector"
    assert type(trainer._checkpoint_connector).__name__ == "_CheckpointConnector"
    assert type(trainer.fit_loop).__name__ == "_FitLoop"
    assert type(loop).__name__ == "_TrainingEpochLoop"
    assert loop.val_loop._has_run is False
    state = trainer.fit_loop.state_dict()
    assert set(state["epoch_loop.batch_progress"]) == {"total", "current", "is_last_batch"}
    assert set(state["epoch_loop.batch_progress"]["current"]) == {"ready", "started", "processed", "completed"}


def test_modules_still_keep_their_hooks_by_number():
    """`strategy_internals.py` and `distributed.py` take some of them off for a while."""
    for name in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks"):
        assert getattr(torch.nn.Module(), name) == {}, f"torch changed Module.{name}"


def test_strategies_still_say_how_they_synchronise_batch_norm():
    """`strategy_internals.py` applies it where Lightning leaves it out."""
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    assert strategy._layer_sync is None, "Lightning changed ParallelStrategy._layer_sync"
    assert hasattr(strategy, "_data_parallel_size"), "Lightning changed ModelParallelStrategy._data_parallel_size"
