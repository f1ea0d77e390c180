"""`evmamba predict --config` with the embedded data, for tests of what it leaves."""

from pathlib import Path

from evmamba.launch import cli


def predict(task: str, folder: Path, *options: str) -> None:
    """Predict three batches with an untrained network; the files go into `folder`."""
    always = ["--trainer.limit_predict_batches=3", "--data.init_args.num_workers=0"]
    always += [f"--trainer.default_root_dir={folder}", "--model.init_args.backbone=resnet10t"]
    assert cli.main(["predict", "--config", f"conf/{task}/tiny.yaml", *always, *options]) == 0
