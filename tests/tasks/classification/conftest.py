"""The same few images as class folders and as shards."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evmamba.tasks.classification import ClassificationData
from evmamba.tasks.classification.packing import write_shards

IMAGES = {"train": {"ant": 9, "bee": 7, "cat": 5}, "val": {"ant": 4, "bee": 3, "cat": 4}}


SMALL = {"image_size": 32, "batch_size": 4, "num_workers": 0}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in several formats, sizes and ways to name a file."""
    root = tmp_path_factory.mktemp("data") / "folders"
    rng = np.random.default_rng(0)
    for split, classes in IMAGES.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 255, (33 + k, 41, 3), dtype=np.uint8)
                suffix = (".png", ".JPG", ".v2.jpg", ".webp")[k % 4]
                Image.fromarray(pixels).save(root / split / name / f"{k}é{suffix}")
    return root


@pytest.fixture(scope="module")
def packed(folders: Path) -> Path:
    output = folders.with_name("shards")
    written = write_shards(folders, output, shard_bytes=20_000, jobs=2)
    assert len(written["train"]) >= 3
    assert len(written["val"]) >= 2
    return output


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """Shards to damage."""
    return shutil.copytree(packed, tmp_path / "copied")


def data(root: Path, **options) -> ClassificationData:
    module = ClassificationData(str(root), **(SMALL | options))
    module.setup("fit")
    return module
