"""The scan of standard operators equals the definition, and is what a network traces while it is asked for."""

import pytest
import torch

from evmamba.kernels import es2d_scan, portable, reference
from evmamba.kernels.paths import PATTERNS


def parameters(K: int, D: int, N: int, R: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((K, R + 2 * N, D), (K, D, R), (K, D), (K * D, N), (K * D,))
    return tuple(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("loops", [True, False], ids=["loop", "no loop"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (3, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_definition(pattern: str, size: tuple[int, int], loops: bool):
    given = parameters(PATTERNS[pattern].sets, D=8, N=4, R=2)
    x = torch.randn(2, *size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = reference.scan(x, *given, pattern)
    with portable.portable_scan(loops):
        found = portable.scan(x, *given, pattern)
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("L", range(1, 10))
def test_a_prefix_of_any_length_is_the_recurrence(L: int):
    decay, state = torch.rand(2, L, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(L))
    h, wanted = torch.zeros(3, dtype=torch.float64), []
    for t in range(L):
        h = decay[t] * h + state[t]
        wanted.append(h)
    torch.testing.assert_close(portable._prefix(decay, state), torch.stack(wanted), rtol=1e-14, atol=0)


def test_without_loops_large_steps_neither_overflow_nor_vanish():
    given = list(parameters(4, D=8, N=4, R=2))
    given[2] = given[2] + 30.0  # step sizes of 30 and decays of 1e-13 and less
    x = torch.randn(1, 24, 26, 8, generator=torch.Generator().manual_seed(1))
    given = [p.float() for p in given]
    wanted = reference.scan(x, *given, "ss2d")
    with portable.portable_scan(loops=False):
        found = portable.scan(x, *given, "ss2d")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_only_within_its_context_are_scans_standard_operators():
    given = [p.float() for p in parameters(4, D=8, N=4, R=2)]

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return es2d_scan(x, *given)

    def operators() -> set[str]:
        program = torch.export.export(Layer(), (torch.zeros(1, 3, 5, 8),))
        return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}

    with portable.portable_scan(loops=False):
        plain = operators()
    assert all(name.startswith(("aten.", "<built-in")) for name in plain), plain
    with portable.portable_scan():
        inside = operators()
    assert "scan" in inside
    assert not any("evmamba" in name for name in inside)
    assert "evmamba.scan2d.default" in operators()
