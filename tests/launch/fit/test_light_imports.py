"""A library that asks for what nothing here needs is told that it is not there, while it is imported."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from evmamba.launch.fit.light_imports import HIDDEN, import_lightly

ASKS = """
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
try:
    found = version("needless_text")
except PackageNotFoundError:
    found = None
try:
    spec = find_spec("needless_text")
except ModuleNotFoundError:
    spec = None
import needed_part
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that looks for two packages in every way, both of which are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "asking_library.py").write_text(ASKS)
    for name in ("needless_text", "needed_part"):
        (tmp_path / f"{name}.py").write_text("")
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("asking_library", "needless_text", "needed_part"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("libraries")
def test_what_is_hidden_is_hidden_from_one_library_while_it_is_imported() -> None:
    finders = list(sys.meta_path)
    import_lightly("asking_library", ["needless_text"])
    import_lightly("asking_library", ["needless_text"])
    assert len(sys.meta_path) == len(finders) + 1
    assert version("needless_text") == "1.0"  # not yet
    library = importlib.import_module("asking_library")
    assert (library.found, library.spec) == (None, None)
    assert "needed_part" in sys.modules
    assert sys.meta_path == finders
    assert version("needless_text") == "1.0"
    assert find_spec("needless_text") is not None


@pytest.mark.usefixtures("libraries")
def test_a_library_that_fails_hides_nothing_for_ever(tmp_path: Path) -> None:
    finders = list(sys.meta_path)
    (tmp_path / "asking_library.py").write_text("import needless_text\n")
    import_lightly("asking_library", ["needless_text"])
    with pytest.raises(ModuleNotFoundError, match="needless_text"):
        importlib.import_module("asking_library")
    assert sys.meta_path == finders
    assert version("needless_text") == "1.0"


def test_torchmetrics_comes_without_them_and_has_what_is_used_here() -> None:
    program = (
        "import sys\n"
        "from evmamba.launch.fit.light_imports import import_lightly\n"
        "import_lightly()\n"
        "from torchmetrics import MeanMetric, MetricCollection\n"
        "from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    loaded = set(done.stdout.split())
    assert "torchmetrics.text" in loaded
    assert loaded.isdisjoint(HIDDEN)
