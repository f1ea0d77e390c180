"""The house: imports go down only, between floors and between the rooms of launch/, and never in a circle.

Imports inside functions count, and modules that are imported by a name written in the file. A package's ``__init__``
counts as imported only by who imports from it.
"""

import ast
import importlib.util
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from evmamba.tasks import TASKS

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
KERNELS_MAY_USE = {"torch", "triton", "numba", "llvmlite", "numpy"} | sys.stdlib_module_names
BELOW_CLUSTER = {"store", "measure", "report", "fit", "use", "bench"}
# The rooms of launch/, and the files that lie there alone.
ROOM_MAY_IMPORT = {
    "store": set(),
    "measure": {"store"},
    "report": {"store"},
    "fit": {"store"},
    "use": {"store", "fit"},
    "bench": {"store", "measure", "report", "fit"},
    "cluster": BELOW_CLUSTER,
    "commands": {*BELOW_CLUSTER, "cluster"},
    "cli": {*BELOW_CLUSTER, "cluster", "commands"},
    "train": {"cli"},
}
FILES_IN_LAUNCH = 6


def module_name(path: Path, floor: str) -> str:
    parts = path.relative_to(FOLDERS[floor]).with_suffix("").parts
    return ".".join([floor, *(parts[:-1] if parts[-1] == "__init__" else parts)])


FILES = [(floor, path) for floor, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py")) if path.is_file()]
MODULES = {module_name(path, floor): path for floor, path in FILES}


def imported(path: Path, package: str) -> set[str]:
    """Modules that a file imports anywhere: also inside functions, by relative import, and by ``import_module``."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from evmamba import tasks` imports the module evmamba.tasks
            modules |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("import_module"):
            modules |= named(node.args[0], package)
    return modules


def named(argument: ast.expr, package: str) -> set[str]:
    """The modules that an argument of ``import_module`` may mean: of an f-string, all that begin like it."""
    if isinstance(argument, ast.Constant):
        return {importlib.util.resolve_name(argument.value, package)}
    if isinstance(argument, ast.JoinedStr) and isinstance(first := argument.values[0], ast.Constant):
        return {module for module in MODULES if module.startswith(first.value)}
    return set()


def floor_of(module: str) -> str | None:
    if module.split(".")[0] != "evmamba":
        return None
    above = ".".join(module.split(".")[:2])
    return above if above in FOLDERS else "evmamba"


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["evmamba", "launch"] and len(parts) > 2 else None


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


IMPORTS = {module: imported(path, package_of(module)) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str):
    floor = floor_of(module)
    assert floor is not None
    floors = {found for name in IMPORTS[module] if (found := floor_of(name))}
    assert floors <= MAY_IMPORT[floor] | {floor}
    if floor == "evmamba.kernels":
        assert {name.split(".")[0] for name in IMPORTS[module] if floor_of(name) is None} <= KERNELS_MAY_USE


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module)])
def test_the_rooms_of_launch_form_a_line(module: str):
    room = room_of(module)
    assert room in ROOM_MAY_IMPORT, f"{room} is no room of launch/"
    rooms = {found for name in IMPORTS[module] if (found := room_of(name))}
    assert rooms <= ROOM_MAY_IMPORT[room] | {room}


def test_no_import_runs_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # its error names the circle


# "linear" is also a kind of operation that is counted.
OTHER_MEANINGS = {("evmamba.cost", "linear")}
NAMES_OF_TASKS = {*TASKS, *(head.key for task in TASKS.values() for head in task.heads)}


def names_of_tasks_in(source: str) -> set[str]:
    """Texts of a file that are the name of a task or of a head."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES_OF_TASKS
    }


@pytest.mark.parametrize("module", [m for m in MODULES if floor_of(m) not in ("evmamba.tasks", "evmamba.conf")])
def test_only_the_tasks_own_floor_names_tasks_and_heads(module: str):
    found = {(module, name) for name in names_of_tasks_in(MODULES[module].read_text())}
    assert found <= OTHER_MEANINGS, "ask the task's record (evmamba.tasks.TASKS) instead"


@pytest.mark.parametrize("line", ['x == "detection"', "{'upernet': 1}", "f(a, head='linear')"])
def test_a_named_task_or_head_is_seen(line: str):
    assert names_of_tasks_in(line)


def test_launch_is_rooms_and_few_files():
    assert len(list((ROOT / "launch").glob("*.py"))) <= FILES_IN_LAUNCH


def test_every_floor_and_room_is_seen():
    assert {floor_of(module) for module in MODULES} == set(FOLDERS)
    assert {room_of(module) for module in MODULES} - {None} >= set(ROOM_MAY_IMPORT)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from evmamba import tasks, create_model", {"evmamba.tasks", "evmamba"}),
        ("from . import module", {"evmamba.tasks.module"}),
        ("from .. import launch", {"evmamba.launch"}),
        ("from ..launch.cli import main", {"evmamba.launch.cli"}),
        ("def f():\n    import evmamba.launch.cli", {"evmamba.launch.cli"}),
        ("from evmamba.launch import cli", {"evmamba.launch.cli"}),
        ("import_module('evmamba.launch.cli')", {"evmamba.launch.cli"}),
        ("import_module('.module', __package__)", {"evmamba.tasks.module"}),
        ("importlib.import_module(f'evmamba.launch.tra{x}')", {"evmamba.launch.train"}),
    ],
)
def test_the_reader_of_imports_sees(tmp_path, line, found):
    (tmp_path / "file.py").write_text(line)
    assert imported(tmp_path / "file.py", "evmamba.tasks") == found
