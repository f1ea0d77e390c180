"""`import evmamba` is light, and what it promises to other libraries is there as soon as they are."""

import subprocess
import sys

import pytest


def run(program: str) -> str:
    """What a program prints in a process of its own: this one has imported everything already."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_timm():
    assert run("import sys, evmamba; print({'torch', 'timm', 'lightning'} & sys.modules.keys())") == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "evmamba, timm",
        "timm, evmamba",
        "torch, evmamba, timm.models",
        "evmamba, torch, timm",
        "evmamba.checkpoints, timm",
        "evmamba.model, timm",
        "evmamba.launch.cli, timm",
    ],
)
def test_timm_knows_our_models_whatever_is_imported_first(imports: str):
    program = f"import {imports}; import timm; print(type(timm.create_model('efficientvmamba_t')).__module__)"
    assert run(program) == "evmamba.model"


@pytest.mark.parametrize("imports", ["evmamba, torch", "torch, evmamba"])
def test_torch_knows_the_scan_whatever_is_imported_first(imports: str):
    """``import evmamba; torch.export.load(...)`` needs the operator and nothing else of ours."""
    assert run(f"import {imports}; print(torch.ops.evmamba.scan2d)") == "evmamba.scan2d"


def test_looking_whether_a_library_is_installed_imports_nothing_and_spoils_nothing():
    program = (
        "import importlib.util, sys, evmamba\n"
        "spec = importlib.util.find_spec('timm')\n"
        "print(spec.name, 'timm' in sys.modules, importlib.util.find_spec('no_such_library'))\n"
        "import timm, inspect\n"
        "print(timm.is_model('efficientvmamba_b'), 'create_model' in inspect.getsource(timm))\n"
        "print([type(finder) for finder in sys.meta_path if type(finder).__module__.startswith('evmamba')])"
    )
    assert run(program).splitlines() == ["timm False None", "True True", "[]"]
