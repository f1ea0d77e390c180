"""VMamba-T against the original's values, counts and names."""

import json

import numpy as np
import pytest
import timm
import torch

from evmamba import UserError, create_model, load_checkpoint
from evmamba.checkpoints import original_key_names
from evmamba.cost import count_macs
from evmamba.peers.vmamba import VMamba, VMambaPyramid

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}
TINY = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_equal_the_original(golden, filled, dtype):
    arrays = golden("logits_vmamba_t_224")
    model = filled(create_model("vmamba_tiny")).eval().to(dtype)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["x"]).to(dtype)).double().numpy()
    assert np.abs(logits - arrays["logits_f64"]).max() <= TOLERANCE[dtype]


def test_counts_equal_the_original(golden_folder):
    expected = json.loads((golden_folder / "macs_vmamba_t.json").read_text())
    model = create_model("vmamba_tiny")
    macs = count_macs(model)
    assert macs.paper == expected["exact_total"] == 5_626_902_528
    assert macs.by_op["scan"] == expected["exact_by_op"]["scan"]
    assert sum(p.numel() for p in model.parameters()) == 22_893_448


def test_names_and_shapes_equal_the_original(golden_folder):
    schema = json.loads((golden_folder / "schema_vmamba_t.json").read_text())["state_dict"]
    model = create_model("vmamba_tiny")
    names = original_key_names(model)
    shapes = {names[name]: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {row["key"]: row["shape"] for row in schema}


def test_the_pyramid_reads_a_classifiers_weights(original_weights):
    weights = original_weights(VMamba(**TINY))
    pyramid = VMambaPyramid(**TINY, out_indices=(1, 3))
    loaded = load_checkpoint(pyramid, {"model": weights})
    assert all(name.startswith("head.") for name in loaded.left_out)
    assert all(name.startswith("outnorm") for name in loaded.kept)
    assert [tuple(m.shape) for m in pyramid(torch.randn(1, 3, 72, 40))] == [(1, 16, 9, 5), (1, 32, 3, 2)]
    assert pyramid.feature_info.channels() == [16, 32]


def test_timm_creates_it_and_its_pyramid():
    model = timm.create_model("vmamba_tiny", num_classes=7, drop_path_rate=0.2)
    assert isinstance(model, VMamba)
    assert model.get_classifier().out_features == 7
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    pyramid = timm.create_model("vmamba_tiny", features_only=True)
    assert pyramid.feature_info.channels() == [96, 192, 384, 768]


def test_it_has_no_switches():
    with pytest.raises(UserError, match="vmamba_tiny has no fusion to choose"):
        create_model("vmamba_tiny", fusion=False)
