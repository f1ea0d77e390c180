"""What a precision is called, and what is computed in it."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn

from evmamba.errors import UserError
from evmamba.launch.store.precision import MEASURED, PRECISIONS, autocast_to, full_name, in_words


@pytest.mark.parametrize("name", [name for name in PRECISIONS if name != "16-mixed"])  # which needs a GPU
def test_lightning_means_the_same_by_the_name(name: str):
    kind = PRECISIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the short name is the older one
        trainer = L.Trainer(precision=kind.short, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer.precision == name == full_name(kind.short)
    with trainer.precision_plugin.forward_context():
        layer = nn.Linear(1, 1)
        computed = layer(torch.ones(1, 1))
    assert str(computed.dtype) == f"torch.{kind.dtype}"
    assert (computed.dtype != layer.weight.dtype) == kind.mixed


def test_without_a_name_it_is_lightnings_default():
    assert full_name(None) == L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).precision
    assert full_name(32) == "32-true"
    assert full_name("8-true") == "8-true"


def test_people_read_the_type_that_is_computed_in():
    assert [in_words(name) for name in ("32-true", "bf16-mixed", "8-true")] == ["float32", "mixed bfloat16", "8-true"]


def test_networks_with_float32_parameters_are_measured():
    assert MEASURED == {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
    assert [autocast_to(name) for name in (None, *MEASURED.values())] == [None, None, torch.bfloat16, torch.float16]
    with pytest.raises(UserError, match="64-true: a benchmark runs and measures 32-true, bf16-mixed, 16-mixed"):
        autocast_to("64-true")
