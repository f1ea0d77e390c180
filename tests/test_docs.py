"""What README and docs tell people to paste runs as pasted, and names what exists."""

import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import evmamba
from evmamba.launch.cli import COMMANDS, main
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What the snippets of a page find where they are pasted: lines of Python that put it there.
PREPARED = {
    "README.md": """
from pathlib import Path
import evmamba, torch
Path("the/original").mkdir(parents=True)
torch.save(evmamba.create_model("efficientvmamba_t").state_dict(), "the/original/checkpoint.pth")
""",
    "weights.md": f"""
import atexit, sys
from pathlib import Path
import evmamba, pytest, torch
from huggingface_hub import constants
sys.path.append({str(ROOT / "tests" / "evmamba")!r})
import hub_server
network = evmamba.create_model("efficientvmamba_t")
Path("the").mkdir()
torch.save(network.state_dict(), "the/weights.pth")
server = hub_server.serving()
hub = server.__enter__()
atexit.register(server.__exit__, None, None, None)
hub_server.point_at(hub.endpoint, pytest.MonkeyPatch())
constants.HF_HUB_CACHE = "cache"
content = Path("the/weights.pth").read_bytes()
hub.add("TerryPei/EfficientVMamba-Tiny", "main", "efficient_vmamba_tiny.ckpt", content)
hub.add("user/name", "main", "weights.ckpt", content)
""",
    "finetune.md": f"""
import atexit, sys
from pathlib import Path
import evmamba, pytest
import numpy as np
from PIL import Image
from huggingface_hub import constants
sys.path.append({str(ROOT / "tests" / "evmamba")!r})
import hub_server
evmamba.save_checkpoint(evmamba.create_model("efficientvmamba_t"), "weights.ckpt")
for k, split in enumerate(["train", "train", "train", "val"] * 2):
    path = Path("photos", split, ["ant", "bee"][k % 2 if split == "train" else k // 4], f"{{k}}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)
server = hub_server.serving()
hub = server.__enter__()
atexit.register(server.__exit__, None, None, None)
hub_server.point_at(hub.endpoint, pytest.MonkeyPatch())
# The training is a process of its own.
import os
os.environ |= {{"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(Path("cache").absolute())}}
constants.HF_HUB_CACHE = os.environ["HF_HUB_CACHE"]
hub.add("TerryPei/EfficientVMamba-Tiny", "main", "efficient_vmamba_tiny.ckpt", Path("weights.ckpt").read_bytes())
""",
    "use.md": """
import subprocess, sys
import evmamba, torch
run = [sys.executable, "-m", "evmamba.launch.cli"]
subprocess.run([*run, "export", "resnet18", "-o", "model.onnx"], check=True)
subprocess.run([*run, "push", "efficientvmamba_t", "./user/name"], check=True)
images = torch.rand(2, 3, 64, 96).numpy()
""",
}
WITH_ACTIONS = ("cluster", "data")  # evmamba data check ...
ELSEWHERE = {"extending.md"}  # its examples are whole files: tests/test_extending.py


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        if page.name in ELSEWHERE:
            continue
        for block in (*blocks(page, ""), *blocks(page, "bash")):
            joined = re.sub(r"\\\n\s*", " ", block)
            for line in joined.splitlines():
                if line.startswith("evmamba "):
                    yield page.name, line.split("#")[0].strip()


SNIPPETS = [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_of_python_run_as_pasted(page, tmp_path):
    script = "\n".join([PREPARED.get(page.name, ""), *blocks(page, "python")])
    (tmp_path / "pasted.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    script = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "tour.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "tour.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    assert (tmp_path / "tour" / "report.html").is_file()


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_commands_and_their_options_exist(page, line, capsys):
    command, *arguments = line.split()[1:]
    known = {*COMMANDS, "fit", "validate", "test", "predict", "COMMAND"}
    assert command in known, f"{page}: {line}"
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")} - {"--help"}
    if command not in COMMANDS or not options:
        return
    with pytest.raises(SystemExit):
        main([command, *arguments[: command in WITH_ACTIONS], "--help"])
    help_text = capsys.readouterr().out
    assert all(option in help_text for option in options), f"{page}: {line}"


def training_lines() -> Iterator[tuple[str, str]]:
    return (
        (page, line) for page, line in command_lines() if re.match(r"evmamba (fit|validate|test) +--config conf/", line)
    )


@pytest.mark.parametrize(("page", "line"), sorted(set(training_lines())))
def test_options_of_trainings_are_options_of_their_recipes(page, line):
    _, recipe, *options = line.replace("--config ", "--config=").split()[1:]
    joined = re.sub(r"(--\S+?)[ =](?=\S)", r"\1=", " ".join(options))
    told = [tuple(option.removeprefix("--").split("=", 1)) for option in joined.split() if option.startswith("--")]
    own = [(name, value) for name, value in told if name.split(".")[0] in ("model", "data", "trainer")]
    assert settings_of(find_recipe(recipe.removeprefix("--config=")), own)["model"], f"{page}: {line}"


def test_the_reference_has_every_public_name_as_plain_text():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2]: name for name in re.findall(r"^::: (\S+)", page, flags=re.MULTILINE)}
    assert set(evmamba.__all__) <= set(shown)
    for place in shown.values():
        text = inspect.getdoc(pkgutil.resolve_name(place))
        assert text and not re.search(r":[a-z]+:`", text), f"{place}: the site shows roles of Sphinx as they are"


def test_links_of_the_readme_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
