"""A record's fields stand once and are seen wherever a constructor's signature is read."""

import inspect
from dataclasses import fields

import pytest

from evmamba import EfficientVMamba, FeaturePyramid, UserError
from evmamba.peers.vim import Vim, VimOptions, VimPyramid
from evmamba.trunk import TrunkOptions


@pytest.mark.parametrize(
    ("kind", "record", "own"),
    [
        (EfficientVMamba, TrunkOptions, {"num_classes", "drop_rate", "global_pool"}),
        (FeaturePyramid, TrunkOptions, {"out_indices"}),
        (Vim, VimOptions, {"num_classes", "drop_rate"}),
        (VimPyramid, VimOptions, {"out_indices"}),
    ],
)
def test_a_signature_shows_every_option_with_its_default(kind, record, own):
    parameters = inspect.signature(kind).parameters
    assert parameters.keys() == own | {field.name for field in fields(record)}
    assert all(parameters[field.name].default == field.default for field in fields(record))
    first = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert first == [name for name, p in inspect.signature(record).parameters.items() if p.kind is not p.KEYWORD_ONLY]


@pytest.mark.parametrize("kind", [EfficientVMamba, FeaturePyramid, Vim, VimPyramid])
def test_an_unknown_option_is_not_swallowed(kind):
    with pytest.raises(TypeError, match="drop_path"):
        kind(drop_path=0.1)


@pytest.mark.parametrize("kind", [EfficientVMamba, FeaturePyramid, Vim, VimPyramid])
@pytest.mark.parametrize(("option", "value"), [("in_chans", 0), ("drop_path_rate", 1.0), ("drop_path_rate", -0.1)])
def test_impossible_options_of_all_networks_are_refused(kind, option, value):
    with pytest.raises(UserError, match=option):
        kind(**{option: value})
