"""What only a GPU can show: the kernels' inline assembly, repeatability, CUDA graphs, torch.compile, opcheck."""

import pytest
import torch

from evmamba.kernels import es2d_scan, ops, reference, selective_scan_1d, ss2d_scan
from evmamba.kernels.gated_norm import fused_norm_gate, norm_gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def make_inputs(B, H, W, D, N=16, R=3, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs = [
        normal(B, H, W, D).to(dtype),
        normal(4, R + 2 * N, D) * D**-0.5,
        normal(4, D, R) * R**-0.5,
        normal(4, D) - 1.5,
        torch.log(torch.arange(1, N + 1.0, device="cuda")).repeat(4 * D, 1) + 0.2 * normal(4 * D, N),
        1 + 0.2 * normal(4 * D),
    ]
    return [t.requires_grad_() for t in inputs]


def gradients(scan, inputs, dy):
    return torch.autograd.grad(scan(*inputs), inputs, dy)


@pytest.mark.parametrize("D", [96, 128, 192])
@pytest.mark.parametrize("size", [(56, 56), (31, 45)], ids=str)
def test_network_shapes_equal_the_definition(size, D):
    inputs = make_inputs(2, *size, D)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(2, *size, D, device="cuda")
    y = es2d_scan(*inputs)
    expected = reference.scan(*exact, "es2d")
    assert (y.double() - expected).norm() / expected.norm() < 1e-5
    for got, wanted in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert (got.double() - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("scan", [es2d_scan, ss2d_scan])
def test_results_repeat_bit_for_bit(scan):
    inputs = make_inputs(4, 28, 28, 192, dtype=torch.bfloat16)
    dy = torch.randn(4, 28, 28, 192, device="cuda")
    first, second = (gradients(scan, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_maps_beyond_32_bit_offsets():
    B = 2**31 // (96 * 64 * 64) + 8
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    x, *parameters = (t.detach() for t in make_inputs(8, 64, 64, 96, dtype=torch.bfloat16))
    many = x.repeat(B // 8 + 1, 1, 1, 1)[:B]
    y = es2d_scan(many, *parameters)
    assert torch.equal(y[-1], y[(B - 1) % 8])
    torch.testing.assert_close(y[-1], es2d_scan(many[-1:], *parameters)[0], rtol=1e-4, atol=1e-5)


def test_cuda_graph_replays_on_new_data():
    inputs = [t.detach() for t in make_inputs(2, 14, 14, 96)]
    es2d_scan(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = es2d_scan(*inputs)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    assert torch.equal(y, es2d_scan(*inputs))


def test_cuda_graph_of_a_training_step_repeats_its_gradients():
    inputs = make_inputs(2, 14, 14, 96, dtype=torch.bfloat16)
    dy = torch.randn(2, 14, 14, 96, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(es2d_scan, inputs, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(es2d_scan, inputs, dy)
    dy.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients(es2d_scan, inputs, dy), strict=True))


def test_gradients_beyond_32_bit_offsets():
    B = 2**31 // (96 * 64 * 64) + 8
    if torch.cuda.mem_get_info()[0] < 110e9:
        pytest.skip("needs 110 GB of free memory")
    x, *parameters = (t.detach() for t in make_inputs(8, 64, 64, 96, dtype=torch.bfloat16))
    many = x.repeat(B // 8 + 1, 1, 1, 1)[:B].requires_grad_()
    y = es2d_scan(many, *parameters)
    (dx,) = torch.autograd.grad(y, many, torch.ones_like(y))
    assert torch.equal(dx[-1], dx[(B - 1) % 8])
    one = many[-1:].detach().requires_grad_()
    (expected,) = torch.autograd.grad(es2d_scan(one, *parameters).sum(), one)
    assert (dx[-1] - expected[0]).float().norm() < 2**-7 * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_scans_in_float32_and_gives_each_gradient_its_own_type(dtype):
    _, *parameters = make_inputs(1, 9, 7, 96)
    projection = torch.randn(192, 48, device="cuda").mul_(48**-0.5).requires_grad_()
    image = torch.randn(2, 9, 7, 48, device="cuda", requires_grad=True)
    weight, bias = (torch.randn(96, device="cuda", requires_grad=True) for _ in range(2))
    inputs = [image, projection, *parameters, weight, bias]

    def layer(image, projection, *rest):
        x, z = torch.nn.functional.linear(image, projection).chunk(2, dim=-1)
        y = es2d_scan(x, *rest[:5])
        return y, norm_gate(y, z, *rest[5:])

    with torch.autocast("cuda", dtype):
        y, out = layer(*inputs)
    dout = torch.randn(out.shape, device="cuda")
    results = torch.autograd.grad(out, inputs, dout.to(dtype))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(layer(*exact)[1], exact, dout.double())
    assert (y.dtype, out.dtype) == (torch.float32, dtype)
    assert all(gradient.dtype == torch.float32 for gradient in results)
    # A dozen roundings to the half type on the way, of image, weights, projections and gradients.
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    for got, wanted in zip(results, expected, strict=True):
        assert (got - wanted).norm() < tolerance * wanted.norm()


def test_strided_maps_and_gates_give_the_same_result():
    inputs = [t.detach() for t in make_inputs(2, 9, 6, 96, dtype=torch.bfloat16)]
    strided = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y = es2d_scan(*inputs)
    assert torch.equal(es2d_scan(strided, *inputs[1:]), y)
    both = torch.randn(2, 9, 6, 192, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 96, device="cuda")
    gate = both.chunk(2, dim=-1)[1]
    assert torch.equal(norm_gate(y, gate, weight, bias), norm_gate(y, gate.contiguous(), weight, bias))


def test_empty_batch_has_zero_gradients():
    inputs = make_inputs(0, 6, 6, 96)
    assert not any(g.any() for g in gradients(es2d_scan, inputs, torch.empty(0, 6, 6, 96, device="cuda")))


def test_torch_compile_has_no_graph_break():
    inputs = make_inputs(2, 7, 9, 96)
    z = torch.randn(2, 7, 9, 96, device="cuda", requires_grad=True)
    weight, bias = (torch.randn(96, device="cuda", requires_grad=True) for _ in range(2))

    def layer(*scan_inputs):
        return norm_gate(es2d_scan(*scan_inputs), z, weight, bias)

    expected, compiled = layer(*inputs), torch.compile(layer, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, expected)
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [*inputs, z, weight, bias], dout)
    for got, want in zip(torch.autograd.grad(compiled, [*inputs, z, weight, bias], dout), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_scans_replay_as_cuda_graphs():
    # Such a graph's memory must hold nothing that outlives a call, not even at the first one of a new size.
    inputs = make_inputs(2, 10, 6, 96)
    compiled = torch.compile(es2d_scan, mode="reduce-overhead", fullgraph=True)
    dy = torch.randn(2, 10, 6, 96, device="cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = [g.clone() for g in gradients(compiled, inputs, dy)]
    for gradient, wanted in zip(got, gradients(es2d_scan, inputs, dy), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_gradients_of_plain_sequences_equal_the_definition():
    x, *parameters = make_inputs(2, 1, 150, 96)
    parameters = [t.detach()[:1] if t.dim() == 3 else t.detach()[: len(t) // 4] for t in parameters]
    inputs = [t.requires_grad_() for t in (x.detach()[:, 0], *(t[0] if i < 3 else t for i, t in enumerate(parameters)))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(2, 150, 96, device="cuda")
    for got, wanted in zip(
        gradients(selective_scan_1d, inputs, dy), gradients(selective_scan_1d, exact, dy.double()), strict=True
    ):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_operators_pass_opcheck():
    inputs = make_inputs(2, 5, 4, 32, N=8)
    torch.library.opcheck(ops.scan2d, (*(t.detach() for t in inputs), "es2d"))
    torch.library.opcheck(ops.scan2d_train, (*inputs, "es2d"))
    y, z = (torch.randn(2, 5, 4, 32, device="cuda", requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(32, device="cuda", requires_grad=True) for _ in range(2))
    torch.library.opcheck(fused_norm_gate, (y, z, weight, bias, 1e-5))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = [t.detach() for t in make_inputs(1, 6, 6, 32)]
    moved = [t.to("cuda:1") for t in inputs]
    assert torch.equal(es2d_scan(*moved).cpu(), es2d_scan(*inputs).cpu())
