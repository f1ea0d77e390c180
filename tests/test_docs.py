"""What README and docs tell people to paste runs as pasted, and names what exists."""

import functools
import inspect
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import lightning  # noqa: F401  (its log handler keeps the stderr of the first import, which must not be a test's)
import pytest
from PIL import Image

import evmamba
from evmamba.launch.cli import COMMANDS, main
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe

from .launch.tiny import write_images

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "benchmarks" / "README.md"]
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


class Pasted(NamedTuple):
    """A command of the docs that is run as it stands, in a folder where its names are files.

    Attributes:
        line: as the docs have it.
        shorter: options put behind it, so that it takes a second or two.
        names: what is put in for a name of the line that cannot be a file here.
        says: part of what it prints or logs, a regular expression.
        leaves: files that are there afterwards.
    """

    line: str
    shorter: str = ""
    names: Mapping[str, str] = MappingProxyType({})
    says: str = ""
    leaves: tuple[str, ...] = ()


TINY = "--model.init_args.backbone resnet10t --data.init_args.image_size 32 --data.init_args.num_workers 0"
RECIPE = "conf/classification/small.yaml"
# One after the other in one folder: what one leaves, the next ones find.
SESSION = (
    Pasted("evmamba data check DIR", says=r"ready: nothing found \(17 images"),
    Pasted("evmamba data shard DIR SHARDS", "--jobs 1", leaves=("SHARDS/classes.txt", "SHARDS/train/train-000000.tar")),
    Pasted(
        f"evmamba fit --config {RECIPE} --data.init_args.data_dir DIR",
        f"{TINY} --data.init_args.batch_size 4 --trainer.max_epochs 1 --trainer.check_val_every_n_epoch 1",
        says="trained: best.ckpt and last.ckpt in runs/classification-small/checkpoints",
        leaves=("runs/classification-small/checkpoints/best.ckpt", "runs/classification-small/metrics.csv"),
    ),
    Pasted(
        "evmamba test --config conf/classification/imagenet_efficientvmamba_t.yaml --data.init_args.data_dir DIR"
        " --ckpt_path FILE",
        TINY,
        {"FILE": "best.ckpt"},
        leaves=("runs/classification-imagenet_efficientvmamba_t/result.json",),
    ),
    Pasted("evmamba report DIR ...", "--output .", {"DIR ...": "runs"}, "resnet10t", ("report.html",)),
    Pasted("evmamba predict photos --checkpoint best.ckpt", leaves=("predictions/predictions.json",)),
    Pasted(
        "evmamba predict PHOTOS photo.jpg --checkpoint runs/.../checkpoints/best.ckpt --output predictions",
        names={"runs/...": "runs/classification-small", "PHOTOS": "photos"},
        says="3 images",
        leaves=("predictions/pictures/photo.jpg",),
    ),
    Pasted(
        "evmamba explain photo.jpg --checkpoint best.ckpt --output explained",
        names={"--checkpoint best.ckpt": "--backbone efficientvmamba_t"},
        leaves=tuple(f"explained/{name}.png" for name in ("scan", "steps", "receptive_field", "activation")),
    ),
    Pasted(
        "evmamba push best.ckpt user/name",
        names={"best.ckpt": "efficientvmamba_t", "user/name": "./pushed"},
        leaves=("pushed/README.md",),
    ),
    Pasted(
        "evmamba pull user/name -o weights.safetensors",
        names={"user/name": "./pushed"},
        leaves=("weights.safetensors",),
    ),
    Pasted(
        "evmamba profile --backbones efficientvmamba_t,resnet18",
        "--resolutions 32 --seconds 0.01",
        says="resnet18",
        leaves=("profile/profile.json",),
    ),
    Pasted(
        "evmamba profile --input conf/classification/tiny.yaml --rate 8000",
        "--data-dir DIR --seconds 0.1",
        says="cores",
    ),
)
# Every other command of the docs, by what it begins with, and why it is not run here.
NOT_RUN = {
    "evmamba bench": "minutes of training: tests/launch/bench/test_local.py has shortened ones",
    "evmamba fit": "hours of training: their options are checked below",
    "evmamba test": "a checkpoint of a long training: their options are checked below",
    "evmamba submit": "SLURM, or ten seconds of counting: tests/launch/commands/test_submit.py",
    "evmamba cluster": "SLURM: tests/launch/cluster",
    "evmamba status": "runs of a benchmark: tests/launch/commands/test_status.py",
    "evmamba report": "the same as in README, other names",
    "evmamba explain": "the same as in use.md without --output",
    "evmamba export": "ten seconds of tracing: tests/launch/commands/test_export.py, and the snippet of use.md",
    "evmamba traffic": "ten seconds of counting: tests/launch/commands/test_traffic.py",
    "evmamba profile": "minutes of timing",
    "evmamba consolidate": "a training of several processes: tests/launch/commands/test_consolidate.py",
    "evmamba verify": "published weights and ImageNet: tests/launch/commands/test_verify.py",
}


def blocks(page: Path, *languages: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language in languages]


def command_lines() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        if page.name in ELSEWHERE:
            continue
        for block in blocks(page, "", "bash"):
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


@pytest.fixture
def pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for a small data set and three photographs."""
    write_images("classification", tmp_path / "DIR")
    (tmp_path / "photos").mkdir()
    for k, name in enumerate(["photos/a.jpg", "photos/b.jpg", "photo.jpg"]):
        Image.new("RGB", (60, 40 + 8 * k), "teal").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_commands_run_as_pasted(pasted, capsys, caplog):
    for command in SESSION:
        line = functools.reduce(lambda text, name: text.replace(*name), command.names.items(), command.line)
        status = main(shlex.split(f"{line} {command.shorter}")[1:])
        printed = capsys.readouterr()
        assert status == 0, f"{line}\n{printed.out[-2000:]}\n{printed.err[-2000:]}"
        assert re.search(command.says, printed.out + caplog.text), f"{line}\n{printed}"
        assert all((pasted / file).is_file() for file in command.leaves), line
        best = pasted / "runs" / "classification-small" / "checkpoints" / "best.ckpt"
        if best.is_file() and not (pasted / "best.ckpt").exists():
            shutil.copy(best, pasted / "best.ckpt")


def test_every_command_is_run_or_has_a_reason():
    lines = {re.sub(r"\s+", " ", line) for _, line in command_lines()}
    run = {command.line for command in SESSION}
    assert run <= lines
    begun = {" ".join(line.split()[:2]) for line in lines - run}
    assert begun == set(NOT_RUN)


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
        assert text, place
        assert not re.search(r":[a-z]+:`", text), f"{place}: the site shows roles of Sphinx as they are"


def test_links_of_the_readme_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
