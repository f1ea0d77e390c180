"""The Triton backend's tuning: each device's own file is loaded, and one that is wrong is refused."""

import json

import pytest
import torch

from evmamba.kernels import tuning
from evmamba.kernels.tuning import Tuning, load, tuning_file, tuning_of


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch, tmp_path):
    monkeypatch.delenv("EVMAMBA_TUNING", raising=False)
    monkeypatch.setattr(tuning, "TUNED", tmp_path / "tuned")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA Test {device.index}")
    tuning._tuning_of.cache_clear()
    yield
    tuning._tuning_of.cache_clear()


def write(path, **values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"tuning": values}))
    return path


def test_each_device_has_its_own_file():
    write(tuning_file("NVIDIA Test 1"), few_programs=500, backward_registers=None)
    assert tuning_of(torch.device("cuda", 1)) == Tuning(few_programs=500, backward_registers=None)
    assert tuning_of(torch.device("cuda", 0)) == Tuning()
    assert tuning_of(torch.device("cpu")) == Tuning()


def test_a_named_file_comes_first(monkeypatch, tmp_path):
    write(tuning_file("NVIDIA Test 0"), few_programs=500)
    monkeypatch.setenv("EVMAMBA_TUNING", str(write(tmp_path / "mine.json", few_programs=7)))
    assert tuning_of(torch.device("cuda", 0)) == Tuning(few_programs=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tuning": {"few_program": 3}}', "wrong few_program; known are few_programs"),
        ('{"tuning": {"few_programs": "3"}}', "wrong few_programs"),
        ('{"rows": []}', "is no tuning file: KeyError"),
        ('{"tuning": [1]}', "is no tuning file: AttributeError"),
        ("{", "is no tuning file: JSONDecodeError"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EVMAMBA_TUNING", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json is no tuning file: FileNotFoundError"):
        tuning_of(torch.device("cpu"))


def test_the_backend_takes_the_devices_tuning(monkeypatch, tmp_path):
    triton_es2d = pytest.importorskip("evmamba.kernels.triton_es2d")
    seen = []

    def prepare(*inputs):
        seen.append(inputs[-1])
        raise InterruptedError

    monkeypatch.setattr(triton_es2d, "_prepare", prepare)
    monkeypatch.setenv("EVMAMBA_TUNING", str(write(tmp_path / "mine.json", shortest_segment=16)))
    x = torch.zeros(1, 2, 2, 4)
    inputs = (x, torch.zeros(4, 5, 4), torch.zeros(4, 4, 1), torch.zeros(4, 4), torch.zeros(16, 2), torch.zeros(16))
    with pytest.raises(InterruptedError):
        triton_es2d.forward(*inputs, "es2d", save=False)
    with pytest.raises(InterruptedError):
        triton_es2d.backward(x, *inputs, x, "es2d")
    with pytest.raises(InterruptedError):
        triton_es2d.forward(*inputs, "es2d", save=False, tuning=Tuning(few_programs=3))
    assert seen == [Tuning(shortest_segment=16)] * 2 + [Tuning(few_programs=3)]
