"""Choosing a device by name."""

import pytest
import torch

from evmamba.errors import UserError
from evmamba.launch.store.devices import choose_device


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, chosen: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto") == chosen
    assert choose_device("cpu") == "cpu"


def test_a_gpu_that_is_not_there_is_not_replaced_silently(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device here; use --device cpu"):
        choose_device("cuda")


def test_an_unknown_device_offers_the_nearest():
    with pytest.raises(UserError, match="unknown device 'cud'; did you mean cuda"):
        choose_device("cud")
