"""What feeds a training is measured stage by stage, and told by `evmamba profile --input`."""

import json
import time
from pathlib import Path

import pytest
import torch

from evmamba.launch import cli
from evmamba.launch.measure.input import REST, InputRate, measure_input
from evmamba.tasks.classification import ClassificationData
from evmamba.tasks.data import stage
from evmamba.tasks.training.samplers import TrainingSampler


class Busy:
    """Stands in for a data module: a sample takes 2 ms of this core to decode and 6 ms to augment."""

    batch_size, num_workers, seed, works_on_device = 4, 0, 0, False

    def check_device(self, device: torch.device) -> None:
        pass

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        assert stage == "fit"

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: tuple[int, int]) -> int:
        for name, seconds in (("decode", 0.002), ("augment", 0.006)):
            with stage(name):
                end = time.process_time() + seconds
                while time.process_time() < end:
                    pass
        return key[1]

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self, batch_size=4, sampler=TrainingSampler(8, 0, 1), collate_fn=lambda keys: {"path": keys}
        )


def test_stages_and_rate_of_a_known_load():
    rate = measure_input(Busy(), seconds=0.2)  # type: ignore[arg-type]
    assert rate.per_core == pytest.approx(1 / 0.008, rel=0.15)
    assert rate.shares.keys() == {"decode", "augment", REST}
    assert sum(rate.shares.values()) == pytest.approx(1)
    assert rate.on_device is None
    assert rate.loader <= rate.per_core * 1.1


def test_cores_are_counted_by_the_rate():
    rate = InputRate(per_core=400.0, shares={"decode": 0.25}, loader=700.0, workers=2)
    assert rate.cores_for(8000) == 20
    assert rate.milliseconds("decode") == pytest.approx(0.625)


def test_the_data_module_keeps_its_processes():
    data = ClassificationData(image_size=32, batch_size=8, num_workers=1)
    rate = measure_input(data, seconds=0.05)
    assert (data.num_workers, rate.workers) == (1, 1)
    assert rate.shares.keys() == {"read and decode", "resize", "erase", REST}


def test_what_the_device_does_is_measured_too():
    data = ClassificationData(image_size=32, batch_size=8, num_workers=0, augment_on="device")
    rate = measure_input(data, seconds=0.05)
    assert rate.shares.keys() == {"read", "draw", REST}
    assert rate.on_device is not None
    assert 0 < rate.on_device < 1e6


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "profile"
    arguments = ["--input", "conf/segmentation/tiny.yaml", "--seconds", "0.05", "--rate", "100"]
    assert cli.main(["profile", *arguments, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "images a second and core" in text
    assert "a device that takes 100 images a second needs" in text
    stored = json.loads((output / "input.json").read_text())
    assert stored["per_core"] > 0
    assert "augment" in stored["shares"]
    assert stored["data"]["name"] == "embedded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "10"], "--rate belongs to --input"),
        (["--input", "conf/segmentation/tiny.yaml", "--rate", "0"], "above 0"),
        (["--input", "nonsense.yaml"], "nonsense.yaml"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert cli.main(["profile", *arguments]) != 0
    assert message in capsys.readouterr().err
