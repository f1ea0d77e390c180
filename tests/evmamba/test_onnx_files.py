"""ONNX files run like the networks they are of, and their INT8 copies stay near them where they must."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evmamba.errors import UserError
from evmamba.export import export_onnx
from evmamba.onnx_files import OnnxNetwork, quantize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Network(nn.Module):
    """A convolution, a linear layer, and a product with a stack of matrices, as the scan's projections are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.linear = nn.Linear(8, 8)
        self.stack = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(self.conv(x).relu().flatten(2).mT)
        return torch.matmul(torch.stack([tokens, -tokens], 1), self.stack).mean(2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    network = Network().eval()
    export_onnx(network, path)
    return network, path


def images() -> Tensor:
    return torch.randn(8, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def test_a_file_is_called_like_its_network(exported: tuple[Network, Path]):
    network, path = exported
    with torch.no_grad():
        torch.testing.assert_close(OnnxNetwork(path)(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_several_maps_come_as_a_list(tmp_path: Path):
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.conv(x), self.conv(x)[:, :, ::2, ::2]]

    export_onnx(Pyramid(), tmp_path / "pyramid.onnx")
    assert [part.shape for part in OnnxNetwork(tmp_path / "pyramid.onnx")(images())] == [(8, 4, 32, 40), (8, 4, 16, 20)]


def test_int8_is_near_and_leaves_the_scans_products_alone(exported: tuple[Network, Path], tmp_path: Path):
    network, path = exported
    quantize(path, tmp_path / "int8.onnx", images().split(2))
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]
    found, wanted = OnnxNetwork(tmp_path / "int8.onnx")(images()), network(images()).detach()
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert 1e-4 < error < 0.05, "not quantized at all, or beyond use"

    graph = onnx.load(tmp_path / "int8.onnx").graph
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = {node.input[1]: set(node.input) <= dequantized for node in graph.node if node.op_type == "MatMul"}
    assert products.pop("stack") is False
    assert list(products.values()) == [True]  # the linear layer
    (convolution,) = (node for node in graph.node if node.op_type == "Conv")
    assert set(convolution.input) <= dequantized


def test_no_image_to_calibrate_with_is_said(exported: tuple[Network, Path], tmp_path: Path):
    with pytest.raises(UserError, match="there are none"):
        quantize(exported[1], tmp_path / "int8.onnx", [])
    assert not list(tmp_path.iterdir())
