"""Our names and the original's translate into each other, one to one."""

import pytest

from evmamba import EfficientVMamba
from evmamba.original_names import from_original, to_original


@pytest.mark.parametrize("layout", ["EEII", "EEEE", "IIEE", "IIII"])
def test_names_translate_both_ways(layout):
    names = EfficientVMamba((8, 16, 24, 32), (2, 1, 2, 1), num_classes=5, layout=layout).original_names()
    assert len(set(names.values())) == len(names)
    assert {from_original(theirs): theirs for theirs in names.values()} == names


def test_names_of_first_versions_become_the_present_ones():
    assert from_original("patch_embed.proj.weight") == from_original("patch_embed.0.weight") == "stem.conv.weight"
    assert from_original("layers.1.blocks.0.ln_1.bias") == "stages.1.blocks.0.norm.bias"
    assert from_original("layers.1.blocks.0.self_attention.Ds") == "stages.1.blocks.0.global_branch.Ds"
    assert from_original("norm.weight") == "head.norm.weight"
    assert from_original("head.bias") == "head.fc.bias"


def test_a_name_that_the_table_lacks_is_not_guessed():
    assert from_original("surprise.weight") == "surprise.weight"
    with pytest.raises(KeyError):
        to_original("surprise.weight", {})
