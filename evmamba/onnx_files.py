"""ONNX files at work, by onnxruntime on a CPU: a network called like PyTorch's, and static quantization to INT8."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evmamba.errors import UserError
from evmamba.files import replacing, write_errors


class OnnxNetwork(nn.Module):
    """An ONNX file of `evmamba.export.export_onnx` in place of the network that it was written from.

    ``forward``: images [B, C, H, W] on any device -> float32 logits or scores, or a list of maps, on the same device.

    Args:
        path: the file; it runs on as many threads as PyTorch has.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        found = self._session.run(None, {"image": images.detach().float().cpu().numpy()})
        outputs = [torch.from_numpy(array).to(images.device) for array in found]
        return outputs[0] if self._session.get_outputs()[0].name == "output" else outputs


def quantize(source: str | Path, path: str | Path, images: Iterable[Tensor]) -> None:
    """Write an INT8 copy of an ONNX file: weights per channel, activations by the ranges that these images show.

    Convolutions and products with a constant matrix are quantized (QDQ format, by `onnxruntime.quantization`). All else
    stays float32: the scan with its projections, whose rounding its states would add up, attention, norms.

    Args:
        source: float32 file of `evmamba.export.export_onnx`.
        path: the copy.
        images: batches [B, C, H, W] as the network gets them, normalised.

    Raises:
        UserError: no image to calibrate with, or the file cannot be written.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = [image.detach().float().cpu().numpy() for image in images]
    if not batches:
        raise UserError("INT8 needs images to calibrate with, there are none")
    with write_errors(Path(path)), replacing(Path(path)) as partial, tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(partial),
            _Batches(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=_products_without_matrix(prepared),
        )


def _products_without_matrix(path: Path) -> list[str]:
    """Names of the products of which neither side is a constant matrix."""
    import onnx

    graph = onnx.load(path).graph
    matrices = {weight.name for weight in graph.initializer if len(weight.dims) == 2}
    return [node.name for node in graph.node if node.op_type == "MatMul" and matrices.isdisjoint(node.input)]


class _Batches:
    """Batches as onnxruntime's calibration reads them: one at a time, then None."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches: Iterator[Any] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}
