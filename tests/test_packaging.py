"""The built wheel holds every floor under one name and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ["evmamba", "kernels", "tasks", "launch", "conf", "pyproject.toml", "README.md", "LICENSE"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        origin = REPOSITORY / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_puts_one_name_into_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"evmamba"}


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = set()
    for floor, prefix in [("evmamba", ""), *((name, f"{name}/") for name in ("kernels", "tasks", "launch", "conf"))]:
        for path in (REPOSITORY / floor).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"evmamba/{prefix}{path.relative_to(REPOSITORY / floor).as_posix()}")
    assert expected <= packed, f"left out of the wheel: {sorted(expected - packed)}"


def test_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    run(*install, str(wheel), cwd=elsewhere)
    script = (
        "import evmamba, evmamba.kernels, evmamba.conf, torch\n"
        "print(evmamba.__file__, evmamba.kernels.__file__, evmamba.conf.__file__)\n"
        "model = evmamba.create_model('efficientvmamba_t', num_classes=10).eval()\n"
        "print(tuple(model(torch.zeros(1, 3, 64, 64)).shape))\n"
    )
    output = run(sys.executable, "-c", script, cwd=elsewhere, PYTHONPATH=str(site))
    paths, shape = output.strip().splitlines()
    assert all(Path(path).is_relative_to(site) for path in paths.split())
    assert shape == "(1, 10)"
    config = "conf/classification/tiny.yaml"
    command = [sys.executable, "-m", "evmamba.launch.cli", "fit", "--config", config, "--print_config"]
    assert "ClassificationModule" in run(*command, cwd=elsewhere, PYTHONPATH=str(site))
