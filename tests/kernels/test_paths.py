"""A scan order is one record: a new one reaches every backend; what a record may say; the steps of ES2D."""

import pytest
import torch

from evmamba.kernels import chunked, paths, pattern_scan, portable, reference
from evmamba.kernels.paths import PATTERNS, Group, Pattern, es2d_pattern

# No published one: a step that is not 2, two visits of every pixel, all four orders.
FIFTH = Pattern(
    "fifth",
    tuple(
        Group(row, column, down=(row + column + again) % 2 == 1, backwards=(row * column + again) % 2 == 1)
        for again in range(2)
        for row in range(3)
        for column in range(3)
    ),
    step=3,
    sets=18,
)


def walk(pattern, H, W):
    """Pixel of every token, by walking over the map."""
    rows, columns = -(-H // pattern.step), -(-W // pattern.step)
    for group in pattern.groups:
        places = [(row, column) for row in range(rows) for column in range(columns)]
        if group.down:
            places.sort(key=lambda place: place[::-1])
        if group.backwards:
            places.reverse()
        pixels = [(group.row + pattern.step * row, group.column + pattern.step * column) for row, column in places]
        yield [row * W + column if row < H and column < W else -1 for row, column in pixels]


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), FIFTH, es2d_pattern(4), es2d_pattern(6)], ids=repr)
@pytest.mark.parametrize("size", [(1, 1), (6, 9), (7, 4), (2, 5)], ids=str)
def test_paths_walk_over_the_map_as_the_record_says(pattern, size):
    assert pattern.paths(*size).tolist() == list(walk(pattern, *size))
    assert pattern.length(*size) == pattern.paths(*size).shape[1]


def make_inputs(pattern, H, W):
    K, D, N, R = pattern.sets, 4, 3, 2
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, H, W, D), (K, R + 2 * N, D), (K, D, R), (K, D), (K * D, N), (K * D,))
    return [(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("size", [(6, 9), (4, 7)], ids=str)
def test_a_fifth_order_is_one_record(monkeypatch, size):
    monkeypatch.setitem(PATTERNS, FIFTH.name, FIFTH)
    inputs = make_inputs(FIFTH, *size)
    x, *parameters = inputs
    # One plain scan a group, by hand.
    D, N = x.shape[3], parameters[3].shape[1]
    pixels = torch.cat([x.flatten(1, 2), x.new_zeros(2, 1, D)], dim=1)  # -1 is a pixel of zeros
    expected = torch.zeros_like(pixels)
    for k, path in enumerate(walk(FIFTH, *size)):
        own = [p[k : k + 1] for p in parameters[:3]] + [parameters[3].view(-1, D, N)[k], parameters[4].view(-1, D)[k]]
        expected = expected.index_add(1, torch.tensor(path) % pixels.shape[1], line(pixels[:, path], own))
    expected = expected[:, :-1].view_as(x)

    for y in (reference.scan(*inputs, "fifth"), portable.scan(*inputs, "fifth"), pattern_scan(*inputs, "fifth")):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(expected)
    _, states = chunked.forward(*(t.detach() for t in inputs), "fifth", save=True)
    gradients = chunked.backward(dy, *(t.detach() for t in inputs), states, "fifth")
    for got, wanted in zip(gradients, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def line(tokens, parameters):
    return reference.scan(tokens[:, None], *parameters, "forward")[:, 0]


def test_step_sizes_of_groups_that_share_parameters():
    pattern = es2d_pattern(4)
    x, x_proj, dt_proj, bias, *_ = make_inputs(PATTERNS["es2d"], 5, 7)
    steps = reference.step_sizes(x, x_proj, dt_proj, bias, pattern)
    assert steps.shape == (2, 16, 4, 4)
    for k, path in enumerate(pattern.paths(5, 7).tolist()):
        start = pattern.groups[k]
        own = start.row % 2 + 2 * (start.column % 2)
        for t, pixel in enumerate(path):
            token = x[:, pixel // 7, pixel % 7] if pixel >= 0 else torch.zeros_like(x[:, 0, 0])
            delta = torch.nn.functional.softplus(token @ x_proj[own, :2].T @ dt_proj[own].T + bias[own])
            torch.testing.assert_close(steps[:, k, t], delta)


@pytest.mark.parametrize(
    ("groups", "step", "sets"),
    [
        pytest.param((), 1, 1, id="nothing"),
        pytest.param((Group(0, 0), Group(1, 0)), 2, 2, id="every other column missing"),
        pytest.param((Group(0, 0), Group(1, 0), Group(0, 1), Group(1, 1), Group(0, 0)), 2, 5, id="a quarter twice"),
        pytest.param((Group(1, 1),), 1, 1, id="beyond the step"),
        pytest.param((Group(), Group(down=True), Group(backwards=True)), 1, 2, id="sets that do not divide"),
    ],
)
def test_records_that_visit_pixels_unequally_are_refused(groups, step, sets):
    with pytest.raises(ValueError, match="groups"):
        Pattern("wrong", groups, step, sets)


def test_the_published_step_and_step_1_are_entries_of_the_table():
    assert es2d_pattern(2) == PATTERNS["es2d"]
    assert es2d_pattern(1) == PATTERNS["forward"]


@pytest.mark.parametrize("name", ["zigzag", ""])
def test_unknown_patterns_are_named(name):
    for call in (paths.scan_paths, paths.path_length):
        with pytest.raises(ValueError, match=f"'{name}', expected one of es2d, ss2d, forward, reverse"):
            call(2, 2, name)
    with pytest.raises(ValueError, match=f"'{name}'"):
        pattern_scan(*make_inputs(PATTERNS["forward"], 2, 2), name)
