"""Linear layers by oneDNN on a CPU: those of PyTorch, when they are taken, and what happens where they are missing."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from evmamba.kernels import Linear, affine, affine_relu
from evmamba.kernels.linear import _onednn

SHAPE, OUT = (2, 20, 21, 48), 64  # 2.6 million multiply-adds


@pytest.fixture
def products(monkeypatch):
    """What is multiplied by oneDNN: a list that grows."""
    if _onednn() is None:
        pytest.skip("PyTorch has no oneDNN for this processor")
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    module, made = sys.modules[affine.__module__], []
    real = module._multiply
    monkeypatch.setattr(module, "_multiply", lambda *inputs: made.append(1) or real(*inputs))
    return made


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


@torch.no_grad()
def test_sums_are_the_same_whatever_the_threads(products):
    x, weight, bias = inputs()
    threads, results = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(affine(x, weight, bias))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert len(products) == 3


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
def test_another_pytorch_without_that_operator_multiplies_by_itself(becomes, monkeypatch):
    def refuse(*_):
        raise {"missing": AttributeError, "other arguments": RuntimeError}[becomes]

    other = refuse if becomes != "other results" else lambda x, weight, *_: F.linear(x, weight)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", other, raising=False)
    _onednn.cache_clear()
    try:
        assert _onednn() is None
        given = inputs()
        assert torch.equal(affine(*given), F.linear(*given))
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
