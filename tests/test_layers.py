"""The floors of the house: imports go down only (launch -> tasks -> evmamba -> kernels)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "evmamba.kernels": ROOT / "kernels",
    "evmamba": ROOT / "evmamba",
    "evmamba.tasks": ROOT / "tasks",
    "evmamba.launch": ROOT / "launch",
    "evmamba.conf": ROOT / "conf",
}
MAY_IMPORT = {
    "evmamba.kernels": set(),
    "evmamba": {"evmamba.kernels"},
    "evmamba.tasks": {"evmamba", "evmamba.kernels"},
    "evmamba.launch": {"evmamba", "evmamba.kernels", "evmamba.tasks", "evmamba.conf"},
    "evmamba.conf": set(),
}
KERNELS_MAY_USE = {"torch", "triton", "numpy"} | sys.stdlib_module_names
# The benchmark is a command: it draws its plot where matplotlib is installed and does without elsewhere.
BENCHMARK_MAY_USE = KERNELS_MAY_USE | {"matplotlib", "mamba_ssm"}

FILES = [(floor, path) for floor, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py")) if path.is_file()]


def imported(path: Path, package: str) -> set[str]:
    """Modules that a file imports anywhere, also inside functions and by relative import."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from evmamba import tasks` imports the module evmamba.tasks
            modules |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FOLDERS else base for alias in node.names}
    return modules


def floor_of(module: str) -> str | None:
    if module.split(".")[0] != "evmamba":
        return None
    above = ".".join(module.split(".")[:2])
    return above if above in FOLDERS else "evmamba"


@pytest.mark.parametrize(("floor", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_imports_go_down_only(floor, path):
    package = ".".join([floor, *path.relative_to(FOLDERS[floor]).parts[:-1]])
    modules = imported(path, package)
    floors = {found for module in modules if (found := floor_of(module))}
    assert floors <= MAY_IMPORT[floor] | {floor}
    if floor == "evmamba.kernels":
        outside = {module.split(".")[0] for module in modules if floor_of(module) is None}
        assert outside <= (BENCHMARK_MAY_USE if path.name in ("bench.py", "original.py") else KERNELS_MAY_USE)


def test_every_floor_is_seen():
    assert {floor for floor, _ in FILES} == set(FOLDERS)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from evmamba import tasks, create_model", {"evmamba.tasks", "evmamba"}),
        ("from . import model", {"evmamba.tasks"}),
        ("from .. import launch", {"evmamba.launch"}),
        ("from ..launch.cli import main", {"evmamba.launch.cli"}),
        ("def f():\n    import evmamba.launch.cli", {"evmamba.launch.cli"}),
    ],
)
def test_the_reader_of_imports_sees(tmp_path, line, found):
    (tmp_path / "file.py").write_text(line)
    assert imported(tmp_path / "file.py", "evmamba.tasks") == found
