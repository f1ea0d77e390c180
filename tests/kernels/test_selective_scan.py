"""`selective_scan_fn` is mamba_ssm's: the same signature and, against its definition written here, the same numbers."""

import itertools

import pytest
import torch
from torch import Tensor

from evmamba.kernels import portable, selective_scan_fn

BATCH, CHANNELS, N = 2, 6, 4
# Largest error relative to the largest value, with inputs of the type that are rounded before both compute.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def definition(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """What mamba_ssm's `selective_scan_ref` computes, token by token: the result and the last state."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(delta))

    def at(part: Tensor, t: int) -> Tensor:  # [batch or 1, channels, N]
        if part.dim() == 2:
            return part[None]
        if part.dim() == 3:
            return part[:, None, :, t]
        return part[..., t].repeat_interleave(CHANNELS // part.shape[1], dim=1)

    h = torch.zeros(len(u), CHANNELS, N, dtype=u.dtype)
    outputs = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * at(B, t)
        outputs.append((h * at(C, t)).sum(-1))
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + u * D[:, None]
    return (y if z is None else y * z * torch.sigmoid(z)), h


def inputs(L: int = 37, B: str = "3", C: str = "3", options: bool = True, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {"constant": (CHANNELS, N), "3": (BATCH, N, L), **{f"{g} groups": (BATCH, g, N, L) for g in (1, 2, 3, 6)}}
    given = {"u": normal(BATCH, CHANNELS, L), "delta": 0.5 * normal(BATCH, CHANNELS, L)}
    given |= {"A": -normal(CHANNELS, N).exp(), "B": normal(*shapes[B]), "C": normal(*shapes[C])}
    if options:
        given |= {"D": normal(CHANNELS), "z": normal(BATCH, CHANNELS, L), "delta_bias": 0.5 * normal(CHANNELS)}
    else:
        given["delta"] = given["delta"].abs()
    return {name: value.to(dtype) for name, value in given.items()}


def check(given: dict, delta_softplus: bool, tolerance: float, device: str = "cpu") -> None:
    """Result, last state and all gradients, those of the last state included, against the definition in float64."""
    ours = {name: value.to(device).requires_grad_() for name, value in given.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    y, last = selective_scan_fn(**ours, delta_softplus=delta_softplus, return_last_state=True)
    expected, expected_last = definition(**exact, delta_softplus=delta_softplus)
    assert y.dtype == given["u"].dtype
    assert last.dtype == (torch.float64 if y.dtype == torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(1)
    dy, d_last = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, last))
    wanted = torch.autograd.grad((expected, expected_last), list(exact.values()), (dy.double(), d_last.double()))
    found = torch.autograd.grad((y, last), list(ours.values()), (dy.to(device), d_last.to(device)))
    pairs = {"y": (y, expected), "last state": (last, expected_last)}
    pairs |= {f"gradient of {name}": pair for name, *pair in zip(given, found, wanted, strict=True)}
    for name, (value, target) in pairs.items():
        assert value.shape == target.shape, name
        error = (value.cpu().double() - target).abs().max().item()
        assert error <= tolerance * target.abs().max().item(), (name, error)


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 101])
def test_any_length_equals_the_definition(L: int):
    check(inputs(L), True, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("B", "C"), list(itertools.product(["constant", "3", "2 groups", "3 groups"], repeat=2)))
def test_every_form_of_b_and_c_equals_the_definition(B: str, C: str):
    check(inputs(19, B, C), True, TOLERANCE[torch.float32])


@pytest.mark.parametrize("groups", [1, 6])
def test_one_group_and_as_many_as_channels(groups: int):
    check(inputs(19, f"{groups} groups", f"{groups} groups"), True, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types_lose_no_more_than_their_rounding(dtype: torch.dtype):
    check(inputs(dtype=dtype), True, TOLERANCE[dtype])


def test_without_options_and_with_positive_decays():
    given = inputs(21, options=False)
    given["A"] = given["A"].abs() * 0.1  # states that grow
    check(given, False, TOLERANCE[torch.float32])


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias"])
def test_each_option_may_be_left_out(left_out: str):
    given = inputs(9)
    del given[left_out]
    check(given, False, TOLERANCE[torch.float32])


def test_inference_equals_training_and_returns_no_state_unless_asked():
    given = inputs()
    with torch.no_grad():
        y = selective_scan_fn(**given, delta_softplus=True)
    assert isinstance(y, Tensor)
    trained = selective_scan_fn(**given | {"u": given["u"].clone().requires_grad_()}, delta_softplus=True)
    assert torch.equal(y, trained)


def test_the_last_state_continues_the_sequence():
    """What a decoder does: the second half starts from the first one's state."""
    given = inputs(20, options=False)
    y = selective_scan_fn(**given)
    first, rest = (
        {k: v if k == "A" else v[..., part] for k, v in given.items()} for part in (slice(12), slice(12, 20))
    )
    _, middle = selective_scan_fn(**first, return_last_state=True)
    steps = torch.cumsum(rest["delta"], -1)  # the state decays through all steps so far
    decayed = middle[..., None] * torch.exp(steps[:, :, None] * given["A"][..., None])  # [batch, channels, N, L]
    carried = torch.einsum("bdnl,bnl->bdl", decayed, rest["C"])
    again = selective_scan_fn(**rest)
    torch.testing.assert_close(again + carried, y[..., 12:], rtol=1e-5, atol=1e-5)


def test_the_definition_can_be_forced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "reference")
    check(inputs(9, "2 groups", "3"), True, TOLERANCE[torch.float32])


@pytest.mark.parametrize("loops", [True, False])
def test_the_operators_of_other_runtimes_compute_the_same(loops: bool):
    given = inputs(13, "2 groups", "3")
    expected = selective_scan_fn(**given, return_last_state=True)
    with torch.no_grad(), portable.portable_scan(loops):
        found = selective_scan_fn(**given, return_last_state=True)
    for value, target in zip(found, expected, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-5, atol=1e-5)


def test_views_are_read_as_they_are():
    given = inputs(18)
    wide = {name: torch.stack([value, value + 1], dim=-1)[..., 0] for name, value in given.items()}
    assert not wide["u"].is_contiguous()
    torch.testing.assert_close(selective_scan_fn(**wide), selective_scan_fn(**given))


def test_torch_takes_the_operators_for_its_own():
    given = inputs(18, "2 groups", "2 groups", options=False)
    arguments = [value.requires_grad_() for value in given.values()]
    torch.library.opcheck(torch.ops.evmamba.selective_scan_train.default, arguments)


def test_autocast_leaves_the_scan_in_float32():
    given = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan_fn(**given)
    assert torch.equal(y, selective_scan_fn(**given))


def test_a_second_derivative_is_refused():
    given = {name: value.requires_grad_() for name, value in inputs(5, options=False).items()}
    (gradient,) = torch.autograd.grad(selective_scan_fn(**given).sum(), given["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("A", torch.zeros(CHANNELS, N, dtype=torch.complex64), "A is complex; only real A"),
        ("A", torch.zeros(CHANNELS + 1, N), r"A must be \[6, N\]"),
        ("B", torch.zeros(BATCH, 4, N, 37), "G a divisor of 6"),
        ("C", torch.zeros(BATCH, N, 36), r"C must be \[2, 4, 37\]"),
        ("delta", torch.zeros(BATCH, CHANNELS, 36), r"delta must be \[2, 6, 37\]"),
        ("z", torch.zeros(1, CHANNELS, 37), "z must be"),
        ("D", torch.zeros(N), r"D must be \[6\]"),
        ("u", torch.zeros(BATCH, CHANNELS), r"u must be \[batch, channels, L\]"),
        ("delta", torch.zeros(BATCH, CHANNELS, 37, dtype=torch.int64), "delta must be float32"),
    ],
)
def test_a_mistake_names_what_is_wrong(name: str, value: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**inputs() | {name: value})
