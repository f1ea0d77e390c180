"""The scan of standard operators equals the definition, and is what a network traces while it is asked for."""

import pytest
import torch

from evmamba.kernels import es2d_scan, portable, reference
from evmamba.kernels.paths import PATTERNS


def parameters(K: int, D: int, N: int, R: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((K, R + 2 * N, D), (K, D, R), (K, D), (K * D, N), (K * D,))
    return tuple(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (3, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_definition(pattern: str, size: tuple[int, int]):
    given = parameters(PATTERNS[pattern].sets, D=8, N=4, R=2)
    x = torch.randn(2, *size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = reference.scan(x, *given, pattern)
    assert (portable.scan(x, *given, pattern) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_only_within_its_context_are_scans_standard_operators():
    given = [p.float() for p in parameters(4, D=8, N=4, R=2)]

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return es2d_scan(x, *given)

    def operators() -> set[str]:
        program = torch.export.export(Layer(), (torch.zeros(1, 3, 5, 8),))
        return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}

    with portable.portable_scan():
        inside = operators()
    assert "scan" in inside
    assert not any("evmamba" in name for name in inside)
    assert "evmamba.scan2d.default" in operators()
