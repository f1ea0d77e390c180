import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evmamba.cost import count_macs
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.segmentation.module import pixel_cross_entropy
from evmamba.tasks.segmentation.upernet import FCNHead, RegionPool, UPerHead, UPerNet

from ..golden import golden_file, per_image

# Names of mmsegmentation's modules in ours.
DECODER = {"bottleneck": "pyramid_pooling.fuse", "fpn_bottleneck": "fuse"}
DECODER |= {f"psp_modules.{k}.1": f"pyramid_pooling.branches.{k}.1" for k in range(4)}
DECODER |= {f"lateral_convs.{k}": f"lateral.{k}" for k in range(3)}
DECODER |= {f"fpn_convs.{k}": f"smooth.{k}" for k in range(3)}
AUXILIARY = {"convs.0": "conv"}


def own_name(key: str, modules: dict[str, str]) -> str:
    """mmsegmentation's name of a parameter or buffer of a head, in ours."""
    if key.startswith("conv_seg."):
        return key.replace("conv_seg", "classifier")
    module, layer, part = key.rsplit(".", 2)
    return f"{modules[module]}.{'0' if layer == 'conv' else '1'}.{part}"


def heads_from(parameters: dict[str, dict[str, Tensor]], classes: int) -> tuple[UPerHead, FCNHead]:
    """Both heads with stored parameters, in float64 and without dropout."""
    decode, auxiliary = parameters["decode"], parameters["aux"]
    widths = [decode[f"lateral_convs.{k}.conv.weight"].shape[1] for k in range(3)]
    widths.append(decode["psp_modules.0.1.conv.weight"].shape[1])
    decoder = UPerHead(widths, classes, decode["conv_seg.weight"].shape[1], dropout=0.0).double()
    decoder.load_state_dict({own_name(key, DECODER): value for key, value in decode.items()})
    head = FCNHead(widths[2], classes, auxiliary["conv_seg.weight"].shape[1], dropout=0.0).double()
    head.load_state_dict({own_name(key, AUXILIARY): value for key, value in auxiliary.items()})
    return decoder, head


def stored_heads(data: dict[str, Tensor]) -> tuple[UPerHead, FCNHead]:
    parameters = {
        head: {key.removeprefix(f"{head}_sd_"): value for key, value in data.items() if key.startswith(f"{head}_sd_")}
        for head in ("decode", "aux")
    }
    return heads_from(parameters, int(data["num_classes"]))


def test_heads_compute_what_mmsegmentation_does_in_evaluation(golden_heads: Callable[[str], dict[str, Tensor]]):
    data = golden_heads("uperhead")
    decoder, auxiliary = stored_heads(data)
    maps = per_image(data, "x")
    torch.testing.assert_close(decoder.eval()(maps), data["eval_logits"], rtol=0, atol=1e-10)
    torch.testing.assert_close(auxiliary.eval()(maps[2]), data["eval_aux_logits"], rtol=0, atol=1e-10)


def test_losses_statistics_and_gradients_of_a_training_step(golden_heads: Callable[[str], dict[str, Tensor]]):
    """Ignored pixels count in the divisor; one image has nothing but such."""
    data = golden_heads("uperhead")
    decoder, auxiliary = stored_heads(data)
    maps = [x.requires_grad_() for x in per_image(data, "x")]
    scores, auxiliary_scores = decoder(maps), auxiliary(maps[2])
    torch.testing.assert_close(scores, data["train_logits"], rtol=0, atol=1e-10)
    torch.testing.assert_close(auxiliary_scores, data["train_aux_logits"], rtol=0, atol=1e-10)
    for name, head, modules in (("decode", decoder, DECODER), ("aux", auxiliary, AUXILIARY)):
        own = head.state_dict()
        prefix = f"train_after_{name}_"
        for key in [key for key in data if key.startswith(prefix)]:
            buffer = own[own_name(key.removeprefix(prefix), modules)]
            torch.testing.assert_close(buffer, data[key], rtol=0, atol=1e-10)

    label = data["label"]
    loss, auxiliary_loss = pixel_cross_entropy(scores, label), 0.4 * pixel_cross_entropy(auxiliary_scores, label)
    torch.testing.assert_close(loss, data["loss_decode"], rtol=1e-10, atol=0)
    torch.testing.assert_close(auxiliary_loss, data["loss_aux"], rtol=1e-10, atol=0)
    for k, alone in enumerate(per_image(data, "alone_loss_decode")):
        own_loss = pixel_cross_entropy(data["train_logits"][k : k + 1], label[k : k + 1])
        torch.testing.assert_close(own_loss, alone, rtol=1e-10, atol=0)

    (loss + auxiliary_loss).backward()
    expected = {f"x_{k}": x.grad for k, x in enumerate(maps)}
    for name, head, modules in (("decode", decoder, DECODER), ("aux", auxiliary, AUXILIARY)):
        own_gradients = {key: parameter.grad for key, parameter in head.named_parameters()}
        for key in [key.removeprefix(f"grad_{name}_") for key in data if key.startswith(f"grad_{name}_")]:
            expected[f"{name}_{key}"] = own_gradients[own_name(key, modules)]
    stored = [key for key in data if key.startswith("grad_")]
    assert {f"grad_{key}" for key in expected} == set(stored)
    for key in stored:
        largest = data[key].abs().max().item()
        torch.testing.assert_close(expected[key.removeprefix("grad_")], data[key], rtol=0, atol=1e-9 * largest)


def test_a_decoder_of_64_channels_filled_by_the_rule(golden_heads: Callable[[str], dict[str, Tensor]]):
    data = golden_heads("uperhead_w64")
    file = Path(__file__).parents[2] / "assets" / "golden" / "fill.py"
    specification = importlib.util.spec_from_file_location("fill", file)
    assert specification is not None
    assert specification.loader is not None
    fill = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fill)
    parameters: dict[str, dict[str, Tensor]] = {"decode": {}, "aux": {}}
    with np.load(golden_file("uperhead_w64.npz")) as arrays:
        for entry in arrays["keys"].tolist():
            key, shape = entry.split(" ", 1)
            value = torch.from_numpy(
                np.asarray(fill.value(key, tuple(int(n) for n in shape.strip("(),").split(",") if n)))
            )
            head, name = key.split(".", 1)
            parameters["decode" if head == "uper" else "aux"][name] = value
    decoder, auxiliary = heads_from(parameters, len(parameters["decode"]["conv_seg.bias"]))
    maps = per_image(data, "x")
    torch.testing.assert_close(decoder.eval()(maps), data["eval_logits"], rtol=0, atol=1e-10)
    torch.testing.assert_close(auxiliary.eval()(maps[2]), data["eval_aux_logits"], rtol=0, atol=1e-10)
    counts = [sum(p.numel() for p in head.parameters()) for head in (decoder, auxiliary)]
    assert counts == data["parameters"].tolist()


def test_heads_begin_as_mmsegmentations_do():
    torch.manual_seed(0)
    net = UPerNet(build_backbone("resnet18", features_only=True), 150, 128, 128)
    assert net.auxiliary is not None
    for layer, deviation in (
        (net.decoder.classifier, 0.01),
        (net.auxiliary.classifier, 0.01),
        (net.decoder.smooth[0][0], (2 / (9 * 128)) ** 0.5),
        (net.decoder.lateral[0][0], (2 / 128) ** 0.5),
    ):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert not net.decoder.classifier.bias.any()


@pytest.mark.parametrize(
    ("variant", "channels", "parameters"),
    [("t", 256, 14_487_488), ("s", 384, 28_783_516), ("b", 512, 65_370_644)],
)
def test_parameters_are_those_of_table_4(variant: str, channels: int, parameters: int):
    """The paper prints 14, 29 and 65 M."""
    net = UPerNet(build_backbone(f"efficientvmamba_{variant}", features_only=True), 150, channels)
    assert sum(p.numel() for p in net.parameters()) == parameters


class WithAuxiliary(nn.Module):
    def __init__(self, net: UPerNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net.forward_with_auxiliary(image)[1]


def test_macs_are_those_of_table_4():
    """The paper prints 230 G for T at 512x2048, auxiliary head included; counted here on a sixteenth of the area."""
    net = UPerNet(build_backbone("efficientvmamba_t", features_only=True), 150, 256).eval()
    assert 16 * count_macs(net, (3, 128, 512)).paper == pytest.approx(229.6e9, rel=2e-3)
    assert 16 * count_macs(WithAuxiliary(net), (3, 128, 512)).paper == pytest.approx(231.5e9, rel=2e-3)


@pytest.mark.parametrize("backbone", ["efficientvmamba_t", "resnet18"])
@pytest.mark.parametrize("size", [(64, 96), (75, 61), (33, 32)])
def test_any_size_gives_scores_at_stride_4(backbone: str, size: tuple[int, int]):
    net = UPerNet(build_backbone(backbone, features_only=True), 5, 16, 16).eval()
    with torch.inference_mode():
        scores, auxiliary = net.forward_with_auxiliary(torch.randn(1, 3, *size))
        assert torch.equal(scores, net(torch.zeros(1, 3, *size)) * 0 + scores)  # same shape, finite
    assert auxiliary is not None
    for out, stride in ((scores, 4), (auxiliary, 16)):
        assert out.shape[:2] == (1, 5)
        assert all(abs(n - side / stride) <= 1 for n, side in zip(out.shape[-2:], size, strict=True))


def test_every_parameter_gets_a_gradient():
    net = UPerNet(build_backbone("resnet18", features_only=True), 5, 16, 16)
    scores, auxiliary = net.forward_with_auxiliary(torch.randn(2, 3, 64, 64))
    assert auxiliary is not None
    (scores.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_auxiliary_head_can_be_left_out():
    net = UPerNet(build_backbone("resnet18", features_only=True), 5, 16, aux_channels=0)
    assert net.forward_with_auxiliary(torch.randn(2, 3, 64, 64))[1] is None
    assert not [name for name, _ in net.named_parameters() if name.startswith("auxiliary")]


@pytest.mark.parametrize("regions", [1, 2, 3, 6])
def test_exported_averages_over_regions_fit_any_size(regions: int):
    pool = RegionPool(regions)
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(pool, (torch.zeros(1, 2, 9, 13),), dynamic_shapes=(dynamic,)).module()
    for size in ((7, 12), (6, 6), (2, 31), (5, 4)):
        x = torch.randn(1, 2, *size, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(program(x), pool(x), rtol=0, atol=1e-6)
