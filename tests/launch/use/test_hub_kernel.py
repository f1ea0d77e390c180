"""The kernel repository for the hub: loaded from a folder as the `kernels` library does it, without this package."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evmamba
from evmamba.kernels import selective_scan_fn
from evmamba.launch.use.hub_kernel import MODULE, build

# What kernels 0.17 does with a folder: the package is named by the metadata's id.
LOADER = """
import importlib.util, json, sys
from pathlib import Path
variant = Path(sys.argv[1])
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / sys.argv[2] / "__init__.py")
scan = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scan)
"""
LIBRARY = """
import sys
from pathlib import Path
from kernels import get_local_kernel
scan = get_local_kernel(Path(sys.argv[1]).parents[1])
"""
USE = """
import torch
torch.manual_seed(0)
u, delta, B = torch.randn(1, 4, 20), torch.rand(1, 4, 20), torch.randn(1, 2, 20)
y = scan.selective_scan_fn(u.requires_grad_(), delta, -torch.ones(4, 2), B, B)
y.sum().backward()
x, zeros = torch.randn(1, 4, 6, 8), [torch.zeros(shape) for shape in ((4, 5, 8), (4, 8, 1), (4, 8), (32, 2), (32,))]
assert scan.es2d_scan(x, *zeros).shape == x.shape
assert "evmamba" not in sys.modules and not hasattr(torch.ops.evmamba, "selective_scan")
torch.save((y.detach(), u.grad), sys.argv[3])
"""


@pytest.mark.parametrize("loader", [LOADER, LIBRARY], ids=["as the library", "by the library"])
def test_the_repository_is_loaded_in_a_process_without_this_package(loader: str, tmp_path: Path):
    if loader == LIBRARY and not list(importlib.metadata.distributions(name="kernels")):
        pytest.skip("the kernels library is not installed")
    variant = build(tmp_path)
    code = loader + USE
    command = [sys.executable, "-c", code, str(variant), MODULE, str(tmp_path / "result.pt")]
    environment = {**os.environ, "EVMAMBA_BACKEND": "torch", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=120)

    torch.manual_seed(0)
    u, delta, B = torch.randn(1, 4, 20), torch.rand(1, 4, 20), torch.randn(1, 2, 20)
    y = selective_scan_fn(u.requires_grad_(), delta, -torch.ones(4, 2), B, B)
    y.sum().backward()
    found, gradient = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(found, y.detach())
    torch.testing.assert_close(gradient, u.grad)


def test_the_repository_stands_beside_the_package_with_operators_of_its_own(tmp_path: Path):
    variant = build(tmp_path)
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / MODULE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
        assert hasattr(getattr(torch.ops, f"evmamba_{name}"), "scan2d")
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]


def test_a_build_is_not_written_over(tmp_path: Path):
    build(tmp_path)
    with pytest.raises(evmamba.UserError, match="exists; remove it first"):
        build(tmp_path)
