"""Networks leave for other runtimes with dynamic sizes and unchanged outputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evmamba import EfficientVMamba, FeaturePyramid, UserError
from evmamba.export import CHECKED_SIZES, compare_onnx, control_flow, export_onnx, export_program
from evmamba.peers.vim import Vim

SMALL = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}


def small(**options: object) -> EfficientVMamba:
    torch.manual_seed(0)
    return EfficientVMamba(**SMALL, num_classes=5, **options)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return export_program(small())


@pytest.mark.parametrize(("height", "width"), [(224, 224), (36, 95), (64, 40)])
def test_a_program_takes_any_size(
    height: int, width: int, program: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EVMAMBA_BACKEND", "torch")  # a program has PyTorch's operators where the CPU has kernels
    model = small().eval()
    image = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(program.module()(image), model(image))


def test_a_program_of_vim_takes_any_batch_and_size():
    torch.manual_seed(0)
    model = Vim(16, 2, num_classes=5, image_size=64).eval()
    program = export_program(model)
    for shape in ((1, 3, 64, 64), (3, 3, 65, 111)):
        image = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(image), model(image))


class WithFixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.weight.expand(len(x), -1)  # len() is a number, not a symbol


def test_a_network_with_a_fixed_size_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"^WithFixedBatch cannot be exported with dynamic batch.*: Constraints"
    ) as raised:
        export_program(WithFixedBatch())
    assert "\n" not in str(raised.value)


def test_onnx_equals_pytorch_at_even_and_odd_sizes(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    model, file = small().train(), tmp_path / "model.onnx"
    deviations = export_onnx(model, file)
    assert set(deviations) == set(CHECKED_SIZES)
    assert max(deviations.values()) < 1e-5
    assert all(module.training for module in model.modules())
    assert list(tmp_path.iterdir()) == [file]
    assert control_flow(file) == ["Scan"]

    with torch.no_grad():
        model.head.fc.weight.mul_(1.01)
    assert max(compare_onnx(model, file).values()) > 1e-3, "other weights went unnoticed"


def test_onnx_of_a_pyramid_has_an_output_for_each_map(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    export_onnx(FeaturePyramid(**SMALL, scan="ss2d", out_indices=(1, 2)), tmp_path / "pyramid.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "pyramid.onnx"))
    maps = session.run(None, {"image": torch.zeros(1, 3, 70, 50).numpy()})
    assert [output.name for output in session.get_outputs()] == ["output_0", "output_1"]
    assert [part.shape for part in maps] == [(1, 16, 9, 6), (1, 24, 5, 3)]


def test_a_graph_for_one_size_has_no_control_flow(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    (deviation,) = export_onnx(small(), tmp_path / "fixed.onnx", size=(70, 52)).values()
    assert deviation < 1e-5
    assert control_flow(tmp_path / "fixed.onnx") == []


def test_control_flow_in_a_graph_for_one_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("evmamba.export.CONTROL_FLOW", {"Conv"})
    with pytest.raises(UserError, match="still has Conv"):
        export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "model.onnx", size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_a_program_for_one_size_needs_no_operator_of_ours():
    model = small()
    program = export_program(model, size=(48, 64))
    assert not any("evmamba" in str(node.target) for node in program.graph.nodes)
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model.eval()(image), rtol=1e-4, atol=1e-5)


def test_a_graph_that_deviates_is_not_written(tmp_path: Path):
    pytest.importorskip("onnxruntime")

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * torch.rand_like(x)

    with pytest.raises(UserError, match="deviates from PyTorch"):
        export_onnx(Random(), tmp_path / "random.onnx")
    assert not list(tmp_path.iterdir())
