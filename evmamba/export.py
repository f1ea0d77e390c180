"""Take a network along: ONNX, torch.export, safetensors.

ONNX files hold the scan as ONNX's own `Scan` operator (see `kernels/portable.py`), with dynamic batch, height and
width, or, for one size of image, written out in operators without control flow. A torch.export program keeps our fast
operator and needs `import evmamba`, or is for one size too.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from evmamba.errors import UserError
from evmamba.files import replacing, write_errors
from evmamba.kernels.portable import portable_scan
from evmamba.onnx_files import OnnxNetwork

# Maps of 25 x 33, 13 x 17, 7 x 9 and 4 x 5 tokens: odd in one side at least, so that a branch for even maps cannot be
# frozen into the graph unseen.
TRACED_SIZE = (100, 132)
CHECKED_SIZES = ((1, 224, 224), (2, 96, 64), (3, 65, 111))
TOLERANCE = 1e-4
CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_program(
    model: nn.Module, *, in_chans: int = 3, portable: bool = False, size: tuple[int, int] | None = None
) -> torch.export.ExportedProgram:
    """Return the network as a torch.export program with dynamic batch, height and width, or for one image of `size`.

    Of ours, height and width must be at least 36: the last map of a smaller image is one pixel high or wide, which
    torch.export treats as a case of its own.

    Args:
        model: takes images `[B, in_chans, H, W]`; it is exported in evaluation mode, and left in its own.
        in_chans: channels of the image.
        portable: with the scan as standard operators in place of `evmamba::scan2d`.
        size: height and width of the one image that the program is for; it is portable then, and without loops.

    Raises:
        UserError: the network cannot be traced with such sizes, as some of others' cannot.
    """
    device = next(model.parameters()).device
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC) if size is None else {}
    image = torch.zeros(1 if size else 2, in_chans, *(size or TRACED_SIZE), device=device)
    scan = portable_scan(loops=size is None) if portable or size else contextlib.nullcontext()
    with _evaluating(model), torch.no_grad(), scan:
        try:
            return torch.export.export(model, (image,), dynamic_shapes=(dims,))
        except (RuntimeError, AssertionError) as error:  # torch.export's own, and those of a network's checks of sizes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            sizes = f"for {size[0]}x{size[1]}" if size else "with dynamic batch, height and width"
            raise UserError(f"{type(model).__name__} cannot be exported {sizes}: {reason}") from error


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    in_chans: int = 3,
    size: tuple[int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[tuple[int, int, int], float]:
    """Write a network as ONNX and compare it with PyTorch in onnxruntime.

    Batch, height and width are dynamic, or with `size` the graph is for one image of that size, and has no control flow
    (`Scan`, `Loop`, `If`), which some runtimes lack. The input is `image` `[batch, in_chans, height, width]` float32,
    normalised; the outputs are `output` or, of a pyramid, `output_0`, `output_1`, ...

    Args:
        model: a network in float32 on the CPU.
        path: the file, replaced only by a graph that passed the comparison; its folder must exist.
        in_chans: channels of the image.
        size: height and width, for a graph of one size.
        metadata: put into the file's metadata_props, where runtimes find it.

    Returns:
        The largest deviation from PyTorch, relative to the largest output, for each of `CHECKED_SIZES` (batch, height,
        width), or for the one size.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is missing, the file cannot be written, or the graph's output
            deviates by more than `TOLERANCE`, or a graph of one size has control flow.
    """
    need_onnx()
    path = Path(path)
    with _quiet():
        program = torch.onnx.export(
            export_program(model, in_chans=in_chans, portable=True, size=size), input_names=["image"], dynamo=True
        )
        assert program is not None
        _name_outputs(program)
        program.model.metadata_props.update(metadata or {})
    with write_errors(path), replacing(path) as partial:
        with _quiet():
            program.save(partial)
        if size is not None and (found := control_flow(partial)):
            raise UserError(f"the ONNX graph for one size still has {', '.join(found)}; {path} is not written")
        sizes = CHECKED_SIZES if size is None else ((1, *size),)
        deviations = compare_onnx(model, partial, in_chans=in_chans, sizes=sizes)
        worst = max(deviations, key=lambda size: deviations[size])
        if deviations[worst] > TOLERANCE:
            raise UserError(
                f"the ONNX graph deviates from PyTorch by {deviations[worst]:.1e} of the largest output at "
                f"{worst[1]}x{worst[2]}; {path} is not written"
            )
    return deviations


def need_onnx() -> None:
    """Raise a UserError that names the libraries for ONNX that are missing, if any."""
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        raise UserError(f"exporting to ONNX needs {', '.join(missing)}: pip install 'evmamba[export]'")


def compare_onnx(
    model: nn.Module, path: str | Path, *, in_chans: int = 3, sizes: Sequence[tuple[int, int, int]] = CHECKED_SIZES
) -> dict[tuple[int, int, int], float]:
    """Run an ONNX file in onnxruntime beside the network; see `export_onnx`."""
    exported = OnnxNetwork(path)
    generator = torch.Generator().manual_seed(0)
    deviations = {}
    for batch, height, width in sizes:
        image = torch.randn(batch, in_chans, height, width, generator=generator)
        with _evaluating(model), torch.no_grad():
            wanted, got = (
                [maps] if isinstance(maps, Tensor) else list(maps) for maps in (model(image), exported(image))
            )
        deviations[batch, height, width] = max(
            ((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, wanted, strict=True)
        )
    return deviations


def control_flow(path: str | Path) -> list[str]:
    """Operators of an ONNX file that run other graphs, subgraphs and functions included."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    found: set[str] = set()
    pending = [model.graph.node, *(function.node for function in model.functions)]
    while pending:
        for node in pending.pop():
            found |= {node.op_type} & CONTROL_FLOW
            pending += [attribute.g.node for attribute in node.attribute if attribute.HasField("g")]
    return sorted(found)


def _name_outputs(program: torch.onnx.ONNXProgram) -> None:
    outputs = program.model.graph.outputs
    for i, value in enumerate(outputs):
        value.name = "output" if len(outputs) == 1 else f"output_{i}"


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and deprecations of its own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
