"""Linear layers by oneDNN on a CPU: those of PyTorch, when they are taken, and what happens where they are missing."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from evmamba import create_model
from evmamba.kernels import Linear, affine, affine_relu
from evmamba.kernels.linear import _onednn

SHAPE, OUT = (2, 20, 21, 48), 64  # 2.6 million multiply-adds


@pytest.fixture
def products(monkeypatch):
    """What is multiplied by oneDNN: a list that grows."""
    module, made = sys.modules[affine.__module__], []
    monkeypatch.setattr(module, "_may_be_faster", lambda: True)  # it is as right on other processors
    if _onednn() is None:
        pytest.skip("this PyTorch has no product by oneDNN")
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    real = module._multiply
    monkeypatch.setattr(module, "_multiply", lambda *inputs: made.append(1) or real(*inputs))
    return made


@pytest.mark.parametrize(
    ("lanes", "processor", "faster"),
    [("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False),
     ("AVX512", None, False)],
)  # fmt: skip
def test_which_processors_take_it(lanes, processor, faster, monkeypatch, tmp_path):
    module, file = sys.modules[affine.__module__], tmp_path / "cpuinfo"
    if processor is not None:
        file.write_text(f"vendor_id : {processor}")
    monkeypatch.setattr(module, "_CPU_FILE", file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: lanes)
    assert module._may_be_faster.__wrapped__() is faster


def inputs(*, bias: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    drawn = [torch.randn(SHAPE), torch.randn(OUT, SHAPE[-1]), *([torch.randn(OUT)] if bias else [])]
    return [t.requires_grad_() for t in drawn]


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_pytorch(bias, products):
    given = inputs(bias=bias)
    dy = torch.randn(*SHAPE[:-1], OUT)
    got, expected = affine(*given), F.linear(*given)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    gradients = torch.autograd.grad(got, given, dy)
    assert len(products) == 2  # result and gradient of x
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, given, dy), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradients_asked_for_are_computed(wanted, products):
    given = [t.detach().requires_grad_(k == wanted) for k, t in enumerate(inputs())]
    result = affine(*given)
    (gradient,) = torch.autograd.grad(result.sum(), given[wanted])
    assert gradient.shape == given[wanted].shape
    assert len(products) == (2 if wanted == 0 else 1)


@torch.no_grad()
def test_tensors_may_have_any_strides(products):
    numbers = torch.randn(2, 21, 48, 40)
    xs = [numbers.permute(0, 3, 1, 2), torch.randn(SHAPE).chunk(2, -1)[1], torch.randn(SHAPE)[:, ::2], numbers[..., 0]]
    for x in xs:
        C = x.shape[-1]
        for weight in (torch.randn(C, 640).T, torch.randn(1280, 2 * C)[::2, :C]):
            bias = torch.randn(2 * len(weight))[::2]
            expected = F.linear(x, weight, bias)
            torch.testing.assert_close(affine(x, weight, bias), expected, atol=5e-5, rtol=0)
            torch.testing.assert_close(affine_relu(x, weight, bias), expected.relu(), atol=5e-5, rtol=0)
    assert len(products) == 4 * len(xs)


@pytest.mark.parametrize(("rows", "width", "out"), [(840, 48, 64), (49, 3072, 768), (4, 12288, 64)])
@torch.no_grad()
def test_sums_are_the_same_whatever_the_threads(rows, width, out, products):
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(affine(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert len(products) == 3


def derivatives(product, given, dy):
    """What else than a gradient can be asked for: of second order, forward, many at once."""
    first = torch.autograd.grad(product(*given).square().mean(), given, create_graph=True)
    penalty = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given)
    many = torch.autograd.grad(product(*given), given, torch.stack([dy, 2 * dy]), is_grads_batched=True)
    plain = [t.detach() for t in given]
    loss = lambda x: product(x, *plain[1:]).square().mean()  # noqa: E731
    forward = torch.func.jvp(lambda weight: product(plain[0], weight, plain[2]), (plain[1],), (plain[1] + 1,))
    twice = torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(plain[0])
    each = torch.func.vmap(torch.func.grad(loss))(plain[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(plain[0], plain[0] + 1)
        tangent = torch.autograd.forward_ad.unpack_dual(product(dual, *given[1:])).tangent
    return [*penalty, *many, *forward, twice, each, tangent]


def test_every_other_derivative_is_that_of_pytorch_too(products):
    given, dy = inputs(), torch.randn(*SHAPE[:-1], OUT)
    expected = derivatives(F.linear, given, dy)
    for got, wanted in zip(derivatives(affine, given, dy), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
    assert products


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cold", [False, True])
def test_a_traced_network_has_pytorchs_operators_and_leaves_oneDNN_where_it_was(cold, products, tmp_path):
    torch.manual_seed(0)
    model, image = create_model("efficientvmamba_t", num_classes=5).eval(), torch.randn(1, 3, 96, 96)
    _onednn.cache_clear()
    with torch.no_grad():
        if not cold:
            model(image)
        assert bool(products) is not cold
        torch.jit.save(torch.jit.trace(model, image, check_trace=False), tmp_path / "traced.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(image), model(image), atol=5e-6, rtol=0)
    assert products
    assert "mkldnn" not in str(torch.jit.load(tmp_path / "traced.pt").inlined_graph)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@torch.no_grad()
def test_other_layouts_are_pytorchs(products):
    x, weight, bias = (t.detach() for t in inputs())
    rows, pruned = x.flatten(0, -2), weight.to_sparse_csr()
    torch.testing.assert_close(affine(rows, pruned, bias), F.linear(rows, weight, bias), atol=2e-5, rtol=0)
    assert not products


class Named(torch.Tensor):
    """Somebody's own kind of weight."""


def test_what_is_small_or_not_plain_float32_is_left_to_pytorch(products, monkeypatch):
    x, weight, bias = inputs()
    affine(x[:, :2, :2], weight, bias)
    affine(x.double(), weight.double(), bias.double())
    affine(x, weight.detach().as_subclass(Named), bias)
    affine(x[0, 0, 0].repeat(500), torch.randn(64, 500 * 48), bias)  # one dimension
    with torch.autocast("cpu", torch.bfloat16):
        assert affine(x, weight, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        affine(x, weight, bias)
    assert counter.get_total_flops() == 2 * x.numel() * OUT
    with torch.backends.mkldnn.flags(enabled=False):
        affine(x, weight, bias)
    with monkeypatch.context() as patch:
        patch.setenv("EVMAMBA_BACKEND", "torch")
        affine(x, weight, bias)
    graphs = []
    traced = torch.compile(affine, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True)
    for height in (20, 22, 3):  # 3 rows are few
        traced(torch.randn(2, height, 21, 48), weight, bias)
    assert len(graphs) == 1
    assert not products
    affine(x, weight, bias)
    assert products == [1]


@pytest.mark.parametrize(
    "wrong", ["type of the weight", "type of the bias", "width of the weight", "width of the bias"]
)
def test_what_does_not_fit_together_is_refused_in_pytorchs_words(wrong, products):
    x, weight, bias = inputs()
    weight = {"type of the weight": weight.double(), "width of the weight": weight[:, 1:]}.get(wrong, weight)
    bias = {"type of the bias": bias.double(), "width of the bias": bias[1:]}.get(wrong, bias)
    with pytest.raises(RuntimeError) as expected:
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as got:
        affine(x, weight, bias)
    assert str(got.value) == str(expected.value)
    assert not products


@pytest.mark.parametrize("becomes", ["missing", "other arguments", "other results"])
def test_another_pytorch_without_that_operator_multiplies_by_itself(becomes, monkeypatch, products):
    def refuse(*_):
        raise {"missing": AttributeError, "other arguments": RuntimeError}[becomes]

    other = refuse if becomes != "other results" else lambda x, weight, *_: F.linear(x, weight)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", other, raising=False)
    _onednn.cache_clear()
    try:
        assert _onednn() is None
        given = inputs()
        assert torch.equal(affine(*given), F.linear(*given))
        assert not products
    finally:
        _onednn.cache_clear()


def test_the_module_is_pytorchs_in_all_but_the_product(products):
    torch.manual_seed(0)
    layer, seen = Linear(SHAPE[-1], OUT), []
    torch.manual_seed(0)
    plain = torch.nn.Linear(SHAPE[-1], OUT)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer.weight, plain.weight)
    layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(SHAPE)
    torch.testing.assert_close(layer(x), plain(x), atol=2e-5, rtol=0)
    assert len(seen) == len(products) == 1
