"""Which strategies there are, what does not go with them, and what DeepSpeed itself says of the configurations."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch.distributed.checkpoint.metadata import Metadata

from evmamba.errors import UserError
from evmamba.launch.fit import strategies
from evmamba.launch.fit.checkpoint_folders import consolidate, folder_kind
from evmamba.launch.fit.cli import EvmambaCLI, train
from evmamba.launch.fit.strategies import CONFIGS, FSDP2, ZERO_STAGES, ZeRO, build_strategy, check_strategy, spell_out
from evmamba.tasks.training.callbacks import WeightEMA

STAGES = (1, 2, 3)
EMA = Namespace(class_path="evmamba.tasks.training.callbacks.WeightEMA")


def options(strategy: Any, **given: Any) -> Namespace:
    """LightningCLI's options of the Trainer, on GPUs that `gpus` makes believe."""
    defaults = {
        "strategy": strategy,
        "accelerator": "cuda",
        "precision": None,
        "gradient_clip_algorithm": None,
        "gradient_clip_val": None,
        "callbacks": None,
        "sync_batchnorm": False,
        "devices": 2,
        "num_nodes": 1,
    }
    assert given.keys() <= defaults.keys()
    return Namespace(**(defaults | given))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_deepspeed_itself_accepts_the_configuration(stage: int, precision: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install '.[deepspeed]')")
    from deepspeed.runtime.config import DeepSpeedConfig

    strategy = build_strategy(f"deepspeed_stage_{stage}", precision)
    assert isinstance(strategy, ZeRO)
    # What Lightning adds from the Trainer.
    added = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    config = DeepSpeedConfig(strategy.config | added)
    assert config.zero_optimization_stage == stage
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (4, 2)
    assert config.gradient_clipping == 0.5
    assert config.zero_allow_untested_optimizer
    # Parameters stay float32, whatever is computed in.
    assert not config.float16_config.enabled
    assert not config.bfloat16_config.enabled
    assert config.torch_autocast_enabled == (precision == "bf16-mixed")
    if precision == "bf16-mixed":
        assert config.torch_autocast_dtype == torch.bfloat16
        assert config.torch_autocast_lower_precision_safe_modules == []


def test_every_file_is_of_its_stage_and_leaves_the_batch_to_the_trainer():
    for stage in STAGES:
        config = json.loads((CONFIGS / f"stage_{stage}.json").read_text())
        assert config["zero_optimization"]["stage"] == stage
        left_to_lightning = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
        assert not left_to_lightning & config.keys()
    assert len(list(CONFIGS.glob("*.json"))) == len(STAGES)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_boxes_are_not_rounded_to_the_precision_of_the_network(precision: str):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install '.[deepspeed]')")
    box = torch.tensor([1000.25, 3.0, 1333.0, 7.0])
    assert DeepSpeedPrecision("bf16-mixed").convert_input(box).dtype == torch.bfloat16  # why ours is another
    plugin = build_strategy("deepspeed_stage_2", precision).precision_plugin
    assert torch.equal(plugin.convert_input({"boxes": box})["boxes"], box)


def test_other_names_are_left_to_lightning():
    assert build_strategy("ddp", None) == "ddp"
    assert isinstance(build_strategy("fsdp2", None), FSDP2)


def test_the_short_option_is_the_trainers():
    assert spell_out(["fit", "--strategy", "ddp", "--strategy=fsdp2", "--trainer.strategy=x"]) == [
        "fit",
        "--trainer.strategy",
        "ddp",
        "--trainer.strategy=fsdp2",
        "--trainer.strategy=x",
    ]


@pytest.mark.parametrize("name", [*ZERO_STAGES, "fsdp2"])
def test_what_goes_together_is_let_through(gpus: None, name: str):
    check_strategy(options(name))
    check_strategy(options(name, precision="bf16-mixed", gradient_clip_val=1.0, sync_batchnorm=True))
    check_strategy(options(name, gradient_clip_val=1.0, gradient_clip_algorithm="norm"))


@pytest.mark.parametrize("name", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2"])
def test_averaging_goes_with_whole_parameters(gpus: None, name: str):
    check_strategy(options(name, callbacks=[EMA]))


@pytest.mark.parametrize("callback", [EMA, WeightEMA()])
@pytest.mark.parametrize("name", ["deepspeed_stage_3", "fsdp2"])
def test_averaging_is_refused_with_split_parameters(gpus: None, name: str, callback: Any):
    with pytest.raises(UserError, match="use deepspeed_stage_2 or ddp"):
        check_strategy(options(name, callbacks=[callback]))


@pytest.mark.parametrize(
    ("strategy", "given", "alternative"),
    [
        ("deepspeed_stage_2", {"accelerator": "cpu"}, "needs GPUs; on a CPU use --strategy ddp or fsdp2"),
        ("deepspeed_stage_2", {"precision": "16-mixed"}, "use --trainer.precision 32-true or bf16-mixed"),
        ("fsdp2", {"precision": "bf16-true"}, "use --trainer.precision 32-true or bf16-mixed"),
        ("fsdp2", {"gradient_clip_algorithm": "value", "gradient_clip_val": 1.0}, "gradient_clip_algorithm norm"),
        ("deepspeed_stage_1", {"gradient_clip_algorithm": "value", "gradient_clip_val": 1.0}, "--strategy ddp"),
        ("fsdp2", {"accelerator": "cpu", "sync_batchnorm": True}, "sync_batchnorm needs GPUs"),
        ("fsdp", {}, "use --strategy fsdp2"),
        ("deepspeed_stage_3_offload", {}, "use --strategy deepspeed_stage_3"),
        ("deepsped_stage_2", {}, "did you mean.* deepspeed_stage_2"),
    ],
)
def test_what_does_not_is_refused_with_the_alternative(
    gpus: None, strategy: str, given: dict[str, Any], alternative: str
):
    with pytest.raises(UserError, match=alternative):
        check_strategy(options(strategy, **given))


def test_missing_deepspeed_is_told_with_its_extra(gpus: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[deepspeed\]'"):
        check_strategy(options("deepspeed_stage_2"))
    check_strategy(options("fsdp2"))


def test_the_command_refuses_before_it_reads_data(tmp_path: Path):
    arguments = ["fit", "--config=conf/classification/tiny.yaml", "--data.init_args.data_dir=/nowhere"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    with pytest.raises(UserError, match="averaged weights"):
        train([*arguments, "--strategy", "fsdp2", "--trainer.callbacks+=evmamba.tasks.training.callbacks.WeightEMA"])


def deepspeed_folder(folder: Path, processes: int) -> Path:
    """What DeepSpeed leaves, with next to nothing in it."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    torch.save({}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    for rank in range(processes):
        torch.save({}, folder / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def fsdp2_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    torch.save({"global_step": 3}, folder / "meta.pt")
    return folder


def test_a_folder_of_another_strategy_is_told_what_wrote_it(gpus: None, tmp_path: Path):
    zero, fsdp2 = deepspeed_folder(tmp_path / "zero.ckpt", 2), fsdp2_folder(tmp_path / "fsdp2.ckpt")
    check_strategy(options("deepspeed_stage_2"), zero)
    check_strategy(options("fsdp2", devices=8), fsdp2)
    for name, folder, wrote in (
        ("ddp", zero, "deepspeed_stage_N"),
        ("fsdp2", zero, "deepspeed_stage_N"),
        ("auto", fsdp2, "fsdp2"),
    ):
        with pytest.raises(UserError, match=f"--strategy {wrote}.*evmamba consolidate {folder}"):
            check_strategy(options(name), folder)


def test_what_another_strategy_began_is_not_continued_by_itself_either(tmp_path: Path):
    fsdp2_folder(tmp_path / "checkpoints" / "last.ckpt")
    arguments = ["--config=conf/classification/tiny.yaml", f"--trainer.default_root_dir={tmp_path}"]
    cli = EvmambaCLI([*arguments, "--trainer.accelerator=cpu"], run=False)
    with pytest.raises(UserError, match=r"last\.ckpt is a sharded checkpoint of --strategy fsdp2"):
        cli.continuation()


@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), ("1", 1), ([0, 1], 2)])
def test_another_number_of_processes_is_refused_for_zero(gpus: None, tmp_path: Path, devices: Any, nodes: int):
    folder = deepspeed_folder(tmp_path / "last.ckpt", 2)
    with pytest.raises(UserError, match=r"written by 2 processes.*evmamba consolidate"):
        check_strategy(options("deepspeed_stage_2", devices=devices, num_nodes=nodes), folder, fitting=True)
    check_strategy(options("deepspeed_stage_2", devices=devices, num_nodes=nodes), folder)  # to evaluate


def test_zero_continues_from_its_own_folders_only(gpus: None, tmp_path: Path):
    torch.save({}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="not written by DeepSpeed"):
        check_strategy(options("deepspeed_stage_2"), tmp_path / "last.ckpt", fitting=True)


def test_a_torn_folder_is_no_checkpoint(gpus: None, tmp_path: Path):
    folder = deepspeed_folder(tmp_path / "last.ckpt", 2)
    states = folder / "checkpoint" / "mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:100])
    assert folder_kind(folder) is None
    with pytest.raises(UserError, match="not written to its end"):
        check_strategy(options("deepspeed_stage_2"), folder)
    with pytest.raises(UserError, match="no sharded checkpoint, or not a whole one"):
        consolidate(folder)


def test_a_consolidated_file_does_not_continue_a_training(tmp_path: Path):
    file = tmp_path / "last.consolidated.ckpt"
    torch.save({"evmamba_consolidated_from": "last.ckpt"}, file)
    check_strategy(options("auto"), file)
    with pytest.raises(UserError, match=r"no optimizer states.*--model.init_args.checkpoint="):
        check_strategy(options("auto"), file, fitting=True)
