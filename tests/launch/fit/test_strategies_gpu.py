"""ZeRO and FSDP2 on real GPUs, by the command itself: what a CPU cannot tell (NCCL, bf16, synchronised BatchNorm)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evmamba.launch.fit.checkpoint_folders import consolidate, folder_kind

from ..tiny import TASKS, loopback, write_images, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"])
def test_two_gpus_train_continue_and_test_in_bf16(tmp_path: Path, strategy: str, task: str):
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (pip install '.[deepspeed]')")
    write_images(task, tmp_path / "data")
    more = {"accelerator": "cuda", "devices": 2, "precision": "bf16-mixed", "sync_batchnorm": True, "logger": False}
    recipe = write_recipe(task, tmp_path / "data", tmp_path / "recipe.yaml", gradient_clip_val=1.0, **more)
    run = tmp_path / "run"
    options = [f"--config={recipe}", f"--strategy={strategy}", f"--trainer.default_root_dir={run}"]
    options.append("--model.init_args.backbone=efficientvmamba_t")
    last = run / "checkpoints" / "last.ckpt"
    for command in (["fit"], ["fit", "--trainer.max_steps=4"], ["test", f"--ckpt_path={last}"]):
        program = [sys.executable, "-m", "evmamba.launch.train", *command[:1], *options, *command[1:]]
        done = subprocess.run(program, env=loopback(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    assert folder_kind(last) is not None
    checkpoint = torch.load(consolidate(last), weights_only=True)
    assert checkpoint["global_step"] == 4
    weights = checkpoint["state_dict"].values()
    assert all(value.dtype == torch.float32 for value in weights if value.is_floating_point())
    assert all(bool(torch.isfinite(value).all()) for value in weights)
