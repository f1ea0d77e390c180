"""Any backbone by name: the same pyramid interface, and errors that help."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

import evmamba
from evmamba.errors import UserError
from evmamba.tasks.backbones import build_backbone

from ..evmamba import hub_server


@pytest.mark.parametrize(
    "name", ["efficientvmamba_t", "resnet10t", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"]
)
def test_pyramid_is_nchw_at_four_strides_for_odd_sizes(name: str):
    body = build_backbone(name, features_only=True).eval()
    with torch.no_grad():
        maps = body(torch.randn(1, 3, 96, 64))
    assert body.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(feature.shape[1:]) for feature in maps]
    assert shapes == [(c, 96 // s, 64 // s) for c, s in zip(body.feature_info.channels(), (4, 8, 16, 32), strict=True)]


def test_some_levels_only():
    body = build_backbone("resnet10t", features_only=True, out_indices=(1, 3))
    assert body.feature_info.reduction() == [8, 32]
    assert len(body(torch.randn(2, 3, 64, 64))) == 2


@pytest.mark.parametrize("name", ["efficientvmamba_t", "resnet10t", "vit_tiny_patch16_224"])
def test_classifier_takes_channels_and_other_sizes(name: str):
    model = build_backbone(name, features_only=False, num_classes=7, in_chans=1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(("typo", "meant"), [("efficientvmamba_tt", "efficientvmamba_t"), ("resnett18", "resnet18")])
def test_typo_offers_the_nearest_name(typo: str, meant: str):
    with pytest.raises(UserError, match=f"unknown backbone '{typo}'.*{meant}"):
        build_backbone(typo, features_only=False)


def test_network_without_four_stages_is_refused():
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224.*strides \[16, 16, 16, 16\]"):
        build_backbone("vit_tiny_patch16_224", features_only=True)


def test_network_with_too_few_maps_is_refused():
    assert build_backbone("efficientvit_m0", features_only=False, num_classes=3)
    with pytest.raises(UserError, match=r"efficientvit_m0.* at strides \[16, 32, 64\] only; .* need \[4, 8, 16, 32\]"):
        build_backbone("efficientvit_m0", features_only=True)


def test_network_without_stochastic_depth_is_refused_only_if_asked():
    assert build_backbone("vgg11", features_only=True, drop_path_rate=0.0)
    with pytest.raises(UserError, match=r"vgg11.*drop_path_rate"):
        build_backbone("vgg11", features_only=True, drop_path_rate=0.1)


@pytest.mark.parametrize("features_only", [True, False])
def test_timm_weights_come_from_the_file(tmp_path: Path, features_only: bool):
    source = build_backbone("resnet10t", features_only=False, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    target = build_backbone(
        "resnet10t", features_only=features_only, num_classes=3, checkpoint=str(tmp_path / "weights.pth")
    )
    name = next(name for name in target.state_dict() if name.endswith("layer4.0.conv1.weight"))
    assert torch.equal(target.state_dict()[name], source.state_dict()["layer4.0.conv1.weight"])


@pytest.mark.parametrize("features_only", [True, False])
@pytest.mark.parametrize("file", ["best.ckpt", "weights.safetensors"])
def test_timm_weights_come_from_a_training_checkpoint(tmp_path: Path, file: str, features_only: bool):
    source = build_backbone("resnet10t", features_only=False, num_classes=5)
    weights = {f"network.{name}": value for name, value in source.state_dict().items()}
    if file == "best.ckpt":
        torch.save({"state_dict": weights, "epoch": 3}, tmp_path / file)
    else:  # as `evmamba consolidate` writes it
        safetensors.torch.save_file(weights, tmp_path / file)
    target = build_backbone("resnet10t", features_only=features_only, num_classes=3, checkpoint=str(tmp_path / file))
    name = next(name for name in target.state_dict() if name.endswith("layer4.0.conv1.weight"))
    assert torch.equal(target.state_dict()[name], source.state_dict()["layer4.0.conv1.weight"])


def test_weights_of_which_nothing_fits_are_refused(tmp_path: Path):
    source = build_backbone("resnet10t", features_only=False, num_classes=5)
    torch.save({f"wrapped.{name}": value for name, value in source.state_dict().items()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"nothing in .*weights\.pth fits backbone 'resnet10t'"):
        build_backbone("resnet10t", features_only=True, checkpoint=str(tmp_path / "weights.pth"))


def test_missing_checkpoint_is_named():
    with pytest.raises(UserError, match=r"no/such/file\.pth"):
        build_backbone("resnet10t", features_only=False, checkpoint="no/such/file.pth")


def test_a_module_of_the_user_brings_its_own_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_networks.py").write_text(
        "from timm.models import register_model, ResNet, build_model_with_cfg\n"
        "from timm.models.resnet import BasicBlock\n"
        "@register_model\n"
        "def own_net(pretrained=False, **options):\n"
        "    sizes = dict(block=BasicBlock, layers=[1, 1, 1, 1])\n"
        "    return build_model_with_cfg(ResNet, 'own_net', pretrained, **sizes, **options)\n"
    )
    monkeypatch.chdir(tmp_path)
    pyramid = build_backbone("own_networks:own_net", features_only=True)
    assert [m.shape[1] for m in pyramid(torch.zeros(1, 3, 64, 64))] == [64, 128, 256, 512]
    with pytest.raises(UserError, match=r"no module 'your_networks'"):
        build_backbone("your_networks:own_net", features_only=True)
    with pytest.raises(UserError, match=r"unknown backbone 'own_nett'.*own_net"):
        build_backbone("own_networks:own_nett", features_only=True)


def test_published_weights_and_any_source_for_our_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = evmamba.create_model("efficientvmamba_t", num_classes=3)
    evmamba.save_checkpoint(network, tmp_path / "w.safetensors", original_names=True)
    content = (tmp_path / "w.safetensors").read_bytes()
    with hub_server.serving() as hub:
        hub_server.point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        hub.add("TerryPei/EfficientVMamba-Tiny", "main", "efficient_vmamba_tiny.ckpt", content)
        url = f"{hub.endpoint}/TerryPei/EfficientVMamba-Tiny/resolve/main/efficient_vmamba_tiny.ckpt"
        for source in ("pretrained", url, "hf-hub:TerryPei/EfficientVMamba-Tiny", str(tmp_path / "w.safetensors")):
            body = build_backbone("efficientvmamba_t", features_only=True, checkpoint=source)
            assert torch.equal(body.get_parameter("stem.conv.weight"), network.stem.conv.weight), source
        with pytest.raises(UserError, match="no published weights are known for efficientvmamba_t-eeee"):
            build_backbone("efficientvmamba_t-eeee", features_only=True, checkpoint="pretrained")


def test_published_weights_and_any_source_for_timms_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = timm.create_model("resnet10t")
    cfg = network.pretrained_cfg
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    with hub_server.serving() as hub:
        hub_server.point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        with pytest.raises(UserError, match=r"cannot fetch the published weights of 'resnet10t': ") as caught:
            build_backbone("resnet10t", features_only=False, num_classes=5, checkpoint="pretrained")
        assert "\n" not in str(caught.value)
        hub.add(cfg["hf_hub_id"], "main", "model.safetensors", content)
        for source in ("pretrained", f"hf-hub:{cfg['hf_hub_id']}"):
            body = build_backbone("resnet10t", features_only=False, num_classes=5, checkpoint=source)
            assert torch.equal(body.get_parameter("conv1.0.weight"), network.get_parameter("conv1.0.weight")), source


def test_a_classifier_of_as_many_classes_is_taken_from_a_file_of_a_timm_network(tmp_path: Path):
    """timm compares with the number of the published weights, 1000."""
    network = timm.create_model("resnet10t", num_classes=4)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    same, other = (
        build_backbone("resnet10t", features_only=False, num_classes=n, checkpoint=str(tmp_path / "w.safetensors"))
        for n in (4, 5)
    )
    assert torch.equal(same.get_parameter("fc.weight"), network.fc.weight)
    assert other.get_parameter("fc.weight").shape[0] == 5
    assert torch.equal(other.get_parameter("conv1.0.weight"), network.conv1[0].weight)
