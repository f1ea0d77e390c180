"""The public scans: autograd, compile, export, FLOPs, autocast, the choice of a backend, and what they refuse."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from evmamba.kernels import chunked, es2d_scan, ops, reference, ss2d_scan

INPUTS = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
SCANS = {"es2d": es2d_scan, "ss2d": ss2d_scan}
ES2D_SIZES = ["8x6", "7x6", "8x5", "7x5", "5x4", "3x2", "1x4", "1x1"]


def require_grad(inputs):
    return [tensor.detach().clone().requires_grad_() for tensor in inputs]


class Scan(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.weights = torch.nn.ParameterList(parameters)

    def forward(self, x):
        return es2d_scan(x * 2, *self.weights) + 1


@pytest.mark.parametrize("size", ES2D_SIZES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=str)
def test_equals_the_original(golden_case, size, dtype, atol):
    case = golden_case("es2d", size, dtype)
    y = F.layer_norm(es2d_scan(*(case[name] for name in INPUTS)), (6,), case["out_norm_weight"], case["out_norm_bias"])
    torch.testing.assert_close(y, case["y"], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("pattern", "size"), [("es2d", "5x4"), ("es2d", "8x6"), ("ss2d", "8x6"), ("ss2d", "5x4"), ("ss2d", "1x3")]
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=str)
def test_gradients_equal_the_original(golden_case, pattern, size, dtype, atol):
    case = golden_case(pattern, size, dtype)
    inputs = [case[name].requires_grad_() for name in INPUTS]

    y = F.layer_norm(SCANS[pattern](*inputs), (6,), case["out_norm_weight"], case["out_norm_bias"])
    gradients = torch.autograd.grad((y * case["loss_weight"]).sum(), inputs)

    torch.testing.assert_close(y, case["y"], rtol=0, atol=atol / 10 if dtype == torch.float32 else atol)
    for name, gradient in zip(INPUTS, gradients, strict=True):
        torch.testing.assert_close(gradient, case[f"grad_{name}"], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pattern", SCANS)
def test_gradcheck(make_inputs, pattern):
    inputs = require_grad(make_inputs(1, 3, 4, 2, 2, 1, torch.float64))
    assert torch.autograd.gradcheck(SCANS[pattern], inputs)


def test_gradients_flow_when_only_some_inputs_need_them(make_inputs, assert_close):
    inputs = make_inputs(1, 4, 5, 4, 2, 1, torch.float64)
    expected = torch.autograd.grad(es2d_scan(*(all_of := require_grad(inputs))).sum(), all_of)
    for i, tensor in enumerate(inputs):
        leaf = tensor.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(es2d_scan(*inputs[:i], leaf, *inputs[i + 1 :]).sum(), leaf)
        assert_close(gradient, expected[i], 1e-14)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("needed", [(0,), (1, 4), (2, 3, 5)], ids=str)
def test_backward_is_asked_for_the_gradients_that_are_needed_only(make_inputs, monkeypatch, needed, compiled):
    asked = []
    backward = chunked.backward

    def note(*arguments):
        asked.append(tuple(arguments[-1]))
        return backward(*arguments)

    monkeypatch.setattr(chunked, "backward", note)
    monkeypatch.setenv("EVMAMBA_BACKEND", "torch")
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(make_inputs(1, 4, 5, 4, 2, 1))]
    scan = torch.compile(es2d_scan, fullgraph=True, backend="aot_eager") if compiled else es2d_scan
    scan(*inputs).sum().backward()
    assert asked == [tuple(i in needed for i in range(6))]
    assert [i for i, t in enumerate(inputs) if t.grad is not None] == list(needed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_scan_in_float32_and_gradients_in_their_types(
    make_inputs, assert_close, gradient_tolerance, dtype
):
    x, *parameters = make_inputs(2, 7, 6, 16, 16, 2)
    inputs = require_grad([x.to(dtype), *parameters])
    with torch.autocast("cpu", dtype=dtype):
        y = es2d_scan(*inputs)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
    exact = require_grad([x.to(dtype).double(), *(p.double() for p in parameters)])
    rounded = [exact[0], *(p.to(dtype).double() for p in exact[1:3]), *exact[3:]]
    expected = torch.autograd.grad(reference.scan(*rounded, "es2d").square().sum(), exact)

    assert y.dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype, *[torch.float32] * 5]
    # The definition's own casts round the gradients of the projections to the half type.
    for gradient, defined in zip(gradients, expected, strict=True):
        assert_close(gradient, defined, gradient_tolerance[dtype])


@pytest.mark.parametrize("step", [2, 4])
def test_empty_batch_gives_an_empty_map_and_zero_gradients(make_inputs, step):
    inputs = require_grad(make_inputs(0, 4, 5, 4, 2, 1))
    y = es2d_scan(*inputs, step=step)
    gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == (0, 4, 5, 4)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(("pattern", "dtype"), [("es2d", torch.float32), ("ss2d", torch.bfloat16)])
def test_operators_keep_the_rules_of_torch_library(make_inputs, monkeypatch, pattern, dtype, backend):
    monkeypatch.setenv("EVMAMBA_BACKEND", backend)
    inputs = make_inputs(2, 5, 4, 4, 2, 1)
    inputs[0] = inputs[0].to(dtype)
    torch.library.opcheck(torch.ops.evmamba.scan2d, (*inputs, pattern))
    torch.library.opcheck(torch.ops.evmamba.scan2d_train, (*require_grad(inputs), pattern))
    y, states = torch.ops.evmamba.scan2d_train(*inputs, pattern)
    for wanted in ([True] * 6, [True, False, False, True, False, False]):
        torch.library.opcheck(torch.ops.evmamba.scan2d_backward, (y, *inputs, states, pattern, wanted))


def test_compiles_to_one_graph_with_gradients(make_inputs):
    x, *parameters = make_inputs(2, 5, 6, 8, 4, 2)
    module = Scan(parameters)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x = torch.randn(2, rows, 6, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(module(x).square().sum(), x)
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductor_compiles_inference_and_training(make_inputs):
    _, *parameters = make_inputs(1, 1, 1, 8, 4, 2)
    module = Scan(parameters)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 5, 6, 8, requires_grad=True)
    wanted = [x, *module.parameters()]
    y, expected = compiled(x), module(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_exports_with_any_batch_height_and_width_as_one_operator(make_inputs):
    x, *parameters = make_inputs(2, 6, 8, 4, 2, 1)
    module = Scan(parameters).requires_grad_(False)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, (x,), dynamic_shapes=({**sizes},), strict=False)

    calls = [str(node.target) for node in exported.graph.nodes if "evmamba" in str(node.target)]
    assert calls == ["evmamba.scan2d.default"]
    for B, H, W in [(2, 6, 8), (5, 7, 3)]:
        other = torch.randn(B, H, W, 4)
        torch.testing.assert_close(exported.module()(other), module(other))


def test_flops_of_t_are_the_ones_published():
    macs = json.loads((Path(__file__).parents[1] / "assets" / "golden" / "macs_exact.json").read_text())["t"]["by_op"]
    with FlopCounterMode(display=False) as counter:
        for D, R, side in [(96, 3, 56), (192, 6, 28)]:
            shapes = [(1, side, side, D), (4, R + 32, D), (4, D, R), (4, D), (4 * D, 16), (4 * D,)]
            for _ in range(2):
                es2d_scan(*(torch.empty(shape, device="meta") for shape in shapes))
    assert macs["scan"] == 130_959_360
    assert counter.get_total_flops() == 2 * (macs["scan"] + macs["x_proj"] + macs["dt_proj"])


def test_flops_count_padding_and_the_backward_twice(make_inputs):
    inputs = require_grad(make_inputs(1, 3, 5, 4, 2, 1))
    with FlopCounterMode(display=False) as forward:
        y = es2d_scan(*inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * sum(ops.scan_macs(1, 4, 6, 4, 2, 1, "es2d"))
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_second_derivative_is_refused(make_inputs):
    inputs = require_grad(make_inputs(1, 2, 2, 2, 2, 1, torch.float64))
    (gradient,) = torch.autograd.grad(es2d_scan(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


def scan_by_groups(x, x_proj, dt_proj, dt_bias, A_logs, Ds, step):
    """ES2D as the docstrings put it into words: one plain scan a group."""
    _, H, W, D = x.shape
    N = A_logs.shape[1]
    x = F.pad(x, (0, 0, 0, -W % step, 0, -H % step))
    y = torch.zeros_like(x)
    for row in range(step):
        for column in range(step):
            k = row % 2 + 2 * (column % 2)
            own = (x_proj[k, None], dt_proj[k, None], dt_bias[k, None])
            own += (A_logs.view(-1, D, N)[k], Ds.view(-1, D)[k])
            group = x[:, row::step, column::step]
            if row % 2:  # column by column
                part = reference.scan(group.transpose(1, 2), *own, "forward").transpose(1, 2)
            else:
                part = reference.scan(group, *own, "forward")
            y[:, row::step, column::step] = part
    return y[:, :H, :W]


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("shape", [(2, 8, 12), (1, 7, 5), (2, 3, 13), (1, 1, 1)], ids=str)
def test_every_even_step_has_its_groups(make_inputs, assert_close, shape, step):
    inputs = require_grad(make_inputs(*shape, 3, 4, 2, torch.float64))
    y, expected = es2d_scan(*inputs, step=step), scan_by_groups(*inputs, step)
    assert_close(y.detach(), expected.detach(), 1e-12)
    weight = torch.randn(y.shape, dtype=torch.float64)
    for gradient, defined in zip(
        *(torch.autograd.grad((out * weight).sum(), inputs) for out in (y, expected)), strict=True
    ):
        assert_close(gradient, defined, 1e-12)


def test_step_1_is_one_scan_of_the_whole_map(make_inputs, assert_close):
    x, x_proj, dt_proj, dt_bias, A_logs, Ds = make_inputs(2, 5, 4, 3, 4, 2, torch.float64)
    parameters = (x_proj[:1], dt_proj[:1], dt_bias[:1], A_logs[:3], Ds[:3])
    expected = reference.scan(x.reshape(2, 1, 20, 3), *parameters, "forward").view(2, 5, 4, 3)
    assert_close(es2d_scan(x, *parameters, step=1), expected, 1e-12)


@pytest.mark.parametrize("step", [0, 3, -2])
def test_other_steps_are_refused(make_inputs, step):
    with pytest.raises(ValueError, match=f"step must be 1 or even, not {step}"):
        es2d_scan(*make_inputs(1, 4, 4, 2, 2, 1), step=step)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (0, lambda t: t[0], r"x must be \[B, H, W, D\]"),
        (0, lambda t: t[:, :0], "at least one row"),
        (0, lambda t: t.long(), "x must be float32.*int64"),
        (0, lambda t: t[..., :3], r"x_proj_weight must be \[4, 5, 3\].*got \[4, 5, 4\]"),
        (1, lambda t: t[:3], r"x_proj_weight must be \[4, 5, 4\]"),
        (2, lambda t: t[0], r"dt_projs_weight must be \[4, D, R\]"),
        (3, lambda t: t[:, :3], r"dt_projs_bias must be \[4, 4\]"),
        (4, lambda t: t[:-1], r"A_logs must be \[16, 2\]"),
        (4, lambda t: t.to("meta"), "A_logs is on meta, x on cpu"),
        (5, lambda t: t[:4], r"Ds must be \[16\]"),
        (5, lambda t: t.int(), "Ds must be float32.*int32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(make_inputs, argument, change, message):
    inputs = make_inputs(1, 4, 4, 4, 2, 1)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=message):
        es2d_scan(*inputs)


@pytest.mark.parametrize("backend", ["", "torch", "numba", "reference"])
def test_backends_that_can_run_here_agree(make_inputs, monkeypatch, backend):
    inputs = require_grad(make_inputs(2, 5, 4, 4, 2, 1, torch.float64))
    expected = reference.scan(*inputs, "es2d")
    monkeypatch.setenv("EVMAMBA_BACKEND", backend)
    y = es2d_scan(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(y.sum(), inputs)
    for gradient, defined in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, defined, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_a_backend_that_cannot_be_had_is_refused(make_inputs, monkeypatch, forced):
    monkeypatch.setenv("EVMAMBA_BACKEND", forced)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = "on cpu" if forced == "triton" else "'cuda', expected one of reference, torch, numba, triton"
    with pytest.raises(ValueError, match=message):
        es2d_scan(*make_inputs(1, 4, 4, 2, 2, 1))


def test_the_backend_follows_device_and_type(monkeypatch):
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    monkeypatch.setattr(ops, "_triton_backend", lambda: chunked)
    assert ops.backend_name("cuda", torch.bfloat16) == "triton"
    assert ops.backend_name("cuda", torch.float64) == "torch"
    assert ops.backend_name("cpu", torch.float32) == "numba"
    assert ops.backend_name("cpu", torch.float64) == "numba"
    assert ops.backend_name("mps", torch.float32) == "torch"


def test_without_triton_a_gpu_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    monkeypatch.setattr(ops, "_triton_backend", lambda: "it cannot be imported (no module)")
    ops._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="evmamba.kernels.ops"):
        assert [ops.backend_name("cuda", torch.float32) for _ in range(3)] == ["torch"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "scan backend for torch.float32 on cuda: torch, because it cannot be imported (no module)"
    ]


@pytest.mark.parametrize(
    ("capability", "compiler", "reason"),
    [
        ((7, 5), "/usr/bin/gcc", "compute capability 8.0, this GPU has 7.5"),
        ((9, 0), None, "needs a C compiler"),
        ((8, 0), "/usr/bin/gcc", None),
    ],
)
def test_a_machine_that_cannot_run_triton_falls_back(monkeypatch, capability, compiler, reason):
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(ops, "_triton_backend", lambda: chunked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(ops.shutil, "which", lambda name: compiler)
    ops._machine_obstacle.cache_clear()
    try:
        assert ops.backend_name("cuda", torch.bfloat16) == ("torch" if reason else "triton")
        monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
        if reason:
            with pytest.raises(ValueError, match=f"cannot be followed: .*{reason}"):
                ops.backend_name("cuda", torch.bfloat16)
    finally:
        ops._machine_obstacle.cache_clear()
