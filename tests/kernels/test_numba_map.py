"""The compiled CPU kernels around a scan, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba")

from evmamba.kernels import Norm, numba_around, squeeze_and_excite

from .conftest import MAP_TOLERANCE
from .squeeze_cases import definition, make_inputs

# One pixel, maps narrower than a tile of four pixels, maps with pixels inside, edges of every width modulo four.
SIZES = [(1, 1, 1, 16), (2, 1, 3, 32), (1, 2, 4, 16), (1, 3, 6, 48), (2, 5, 9, 32), (1, 4, 11, 16), (1, 3, 16, 16)]
TOLERANCE = MAP_TOLERANCE[torch.float32]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_depthwise_convolution(size, activation, assert_close, poisoned_memory):
    *_, C = size
    x, weight, bias = normal(*size[:3], 2 * C).chunk(2, dim=-1)[1], normal(C, 1, 3, 3, seed=1), normal(C, seed=2)
    for given in (bias, None):
        exact = (t if t is None else t.double() for t in (weight, given))
        expected = F.conv2d(x.permute(0, 3, 1, 2).double(), *exact, padding=1, groups=C).permute(0, 2, 3, 1)
        expected = expected if activation == "none" else getattr(F, activation)(expected)
        assert_close(numba_around.depthwise_conv(x, weight, given, activation), expected, TOLERANCE)


@pytest.mark.parametrize("size", [*SIZES, (2, 7, 11, 96)], ids=str)
def test_batch_norm_alone_and_behind_a_convolution(size, assert_close, poisoned_memory):
    *_, C = size
    x, weight, bias, mean = normal(*size), normal(C, 1, 3, 3, seed=1), normal(C, seed=2), normal(C, seed=3)
    norm = Norm(mean, normal(C, seed=4).square() + 0.1, normal(C, seed=5), normal(C, seed=6), 1e-3)
    exact = [t.double() for t in norm[:4]]
    for given in (bias, None):
        wide = (t if t is None else t.double() for t in (weight, given))
        convolved = F.conv2d(x.permute(0, 3, 1, 2).double(), *wide, padding=1, groups=C)
        expected = F.gelu(F.batch_norm(convolved, *exact, eps=1e-3)).permute(0, 2, 3, 1)
        assert_close(numba_around.depthwise_conv(x, weight, given, "gelu", norm), expected, TOLERANCE)
    expected = F.batch_norm(x.permute(0, 3, 1, 2).double(), *exact, eps=1e-3).permute(0, 2, 3, 1)
    assert_close(numba_around.batch_norm(x, norm, relu=False), expected, TOLERANCE)
    assert_close(numba_around.batch_norm(x, norm, relu=True), expected.relu(), TOLERANCE)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_far_from_zero_and_of_numbers_that_are_none(activation):
    v = torch.cat([torch.linspace(-40, 40, 20_000), torch.tensor([-1e30, -1e-30, 0.0, 1e-30, 1e30])])
    x = F.pad(v, (0, -len(v) % 16), value=float("nan")).view(-1, 1, 1, 16)
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    out = numba_around.depthwise_conv(x, weight, None, activation).flatten()
    expected = getattr(F, activation)(v.double())
    assert ((out[: len(v)] - expected).abs() <= 3e-7 * v.double().abs().clamp(min=1)).all()
    assert out[len(v) :].isnan().all()


@pytest.mark.parametrize("size", [*SIZES, (1, 7, 11, 96)], ids=str)
def test_layer_norm_with_and_without_gate(size, assert_close, poisoned_memory):
    *_, C = size
    y, weight, bias = 10 + normal(*size), normal(C, seed=1), normal(C, seed=2)
    gate = 5 * normal(*size[:3], 2 * C, seed=3).chunk(2, dim=-1)[1]
    expected = F.layer_norm(y.double(), (C,), weight.double(), bias.double())
    # Rounding of numbers around 10 is left in what is normalised.
    assert_close(numba_around.norm(y, None, weight, bias, 1e-5), expected, 5 * TOLERANCE)
    assert_close(numba_around.norm(y, gate, weight, bias, 1e-5), expected * F.silu(gate.double()), 5 * TOLERANCE)
    constant = numba_around.norm(torch.ones(size), None, weight, bias, 1e-5)
    assert torch.equal(constant, bias.expand(size))


@pytest.mark.parametrize("squeezed", [1, 16, 21])
@pytest.mark.parametrize("size", [*SIZES, (3, 7, 11, 144)], ids=str)
def test_squeeze_excitation(size, squeezed, assert_close, poisoned_memory):
    C = size[-1]
    x, w1, w2 = normal(*size), normal(squeezed, C, 1, 1, seed=1), normal(C, squeezed, 1, 1, seed=2)
    given = w1, normal(squeezed, seed=3), w2, normal(C, seed=4)
    wide, (v1, c1, v2, c2) = x.double(), (t.double() for t in given)
    hidden = F.relu(F.linear(wide.mean((1, 2)), v1.flatten(1), c1))
    expected = wide * F.linear(hidden, v2.flatten(1), c2).sigmoid()[:, None, None]
    assert_close(numba_around.squeeze_and_excite(x, *given), expected, TOLERANCE)
    with torch.no_grad():
        assert_close(squeeze_and_excite(x, *given), expected, TOLERANCE)
    assert_close(squeeze_and_excite(x, *given), expected, TOLERANCE)  # by PyTorch
    hidden = F.relu(F.linear(wide.mean((1, 2)), v1.flatten(1)))
    expected = wide * F.linear(hidden, v2.flatten(1)).sigmoid()[:, None, None]
    with torch.no_grad():
        assert_close(squeeze_and_excite(x, w1, None, w2, None), expected, TOLERANCE)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (3, 7, 11, 144)], ids=str)
def test_squeeze_excitation_of_both_branches(size, drop, assert_close, poisoned_memory):
    inputs = make_inputs(size, torch.float32)
    keep = torch.tensor([0.0, 1.5, 1.0][: size[0]]) if drop else None
    out, mean, gates = numba_around.squeeze_excite_add(*inputs, keep, 1e-5)
    exact = [t.double() for t in inputs]
    assert_close(out, definition(*exact, keep=None if keep is None else keep.double()), TOLERANCE)
    means = torch.stack([F.layer_norm(m, m.shape[-1:]).mean((1, 2)) for m in exact[1:3]], dim=1)
    assert_close(mean, means, TOLERANCE)
    assert gates.shape == mean.shape
