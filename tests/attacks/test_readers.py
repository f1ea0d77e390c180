"""The standing attack: every reader of strangers' files against a corpus of hostile ones. EVMAMBA_ATTACKS=20 makes
twenty times as many examples of what is drawn."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from evmamba.errors import UserError
from evmamba.launch.cluster import slurm

from . import corpus
from .contract import Watch, hold
from .corpus import Attack
from .readers import READERS, Reader

TIMES = int(os.environ.get("EVMAMBA_ATTACKS", "1"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sound folders of every reader, made when first asked for, and caches away from the user's own."""
    root = tmp_path_factory.mktemp("attacks")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("EVMAMBA_CACHE", str(root / "cache"))
        patch.setenv("MPLCONFIGDIR", str(root / "matplotlib"))
        patch.setattr(slurm, "_ask", lambda command: None)
        yield root


def sound(home: Path, name: str) -> Path:
    folder = home / name.replace(" ", "-").replace(",", "")
    if not folder.exists():
        folder.mkdir()
        READERS[name].build(folder)
    return folder


@contextlib.contextmanager
def copied(home: Path, name: str) -> Iterator[Path]:
    """A folder to damage, with a secret beside it."""
    work = home / "work"
    shutil.copytree(sound(home, name), work / "data set", symlinks=True)
    (work / "secret.png").write_bytes(b"secret")
    try:
        yield work / "data set"
    finally:
        shutil.rmtree(work)


def attack(home: Path, name: str, how: Attack, which: int = 0, made: tuple[Path, ...] = ()) -> object:
    reader: Reader = READERS[name]
    with copied(home, name) as folder, contextlib.chdir(folder):
        targets = reader.targets(folder)
        how(targets[which % len(targets)])
        watch = Watch((folder, home / "cache", home / "matplotlib"), folder.parent / "secret.png")
        return hold(lambda: reader.read(folder), watch, [folder.name], (*made, folder / "ran"))


def test_every_reader_reads_what_is_sound(home: Path):
    for name in READERS:
        found = attack(home, name, lambda path: None)
        assert not isinstance(found, UserError), (name, found)


@pytest.mark.parametrize("name", READERS)
def test_what_stands_where_a_file_should_be(home: Path, name: str):
    for how in corpus.PLACES[: 2 if READERS[name].slow and TIMES == 1 else None]:
        attack(home, name, how)


KINDS: dict[str, list[Attack]] = {
    "json": corpus.JSON,
    "yaml": corpus.YAML,
    "torch": corpus.CHECKPOINTS,
}


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.kind])
def test_files_made_to_break_a_parser(home: Path, name: str):
    for how in KINDS[READERS[name].kind or ""]:
        attack(home, name, how)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.kind == "torch"])
def test_no_pickle_is_run(home: Path, name: str):
    marker = home / "marker"
    for how in corpus.payload(marker):
        assert isinstance(attack(home, name, how, made=(marker,)), UserError)


def examples(reader: Reader, of: int) -> int:
    return TIMES * (of // 6 if reader.slow else of)


def drawn(of: int, test: Callable[[Path, str, st.DataObject], None]) -> Callable[..., None]:
    """A test of every reader with examples that hypothesis draws, always the same unless more are asked for."""

    @pytest.mark.parametrize("name", READERS)
    def run(home: Path, name: str) -> None:
        @settings(
            max_examples=examples(READERS[name], of),
            derandomize=TIMES == 1,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # a failure is named at once: what was drawn tells enough
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def once(data: st.DataObject) -> None:
            test(home, name, data)

        once()

    return run


def _damaged(home: Path, name: str, data: st.DataObject) -> None:
    how = data.draw(
        st.one_of(
            st.floats(0, 1, exclude_max=True).map(corpus.cut),
            st.integers(0, 2**32).map(corpus.flipped),
            st.just(corpus.longer),
        )
    )
    attack(home, name, how, data.draw(st.integers(0, 5)))


test_bytes_that_changed = drawn(6, _damaged)


def _edited(home: Path, name: str, data: st.DataObject) -> None:
    kind = READERS[name].kind
    if kind is None:
        return
    place, value = data.draw(st.integers(0, 500)), data.draw(st.sampled_from(corpus.ODD))
    if data.draw(st.integers(0, 4)):
        how = corpus.edited(kind, lambda tree: corpus.replaced(tree, place, value))
    else:
        how = corpus.edited(kind, lambda tree: corpus.removed(tree, place))
    attack(home, name, how, data.draw(st.integers(0, 5)))


test_values_of_another_kind = drawn(24, _edited)


@pytest.mark.parametrize("how", corpus.SHARDS, ids=range(len(corpus.SHARDS)))
def test_shards(home: Path, how: Attack):
    attack(home, "shards", how)


@pytest.mark.parametrize("name", ["class folders", "coco images", "segmentation images", "masks", "image"])
def test_images(home: Path, name: str):
    for how in corpus.IMAGES:
        attack(home, name, how)


@pytest.mark.parametrize("name", ["class folders", "coco images", "segmentation images", "yolo labels"])
def test_names_of_files(home: Path, name: str):
    for new in corpus.NAMES:

        def rename(path: Path, new: bytes = new) -> None:
            path.rename(path.with_name(os.fsdecode(new)))

        attack(home, name, rename)


def test_names_of_class_folders(home: Path):
    for new in corpus.NAMES[:6]:

        def rename(path: Path, new: bytes = new) -> None:
            for split in ("train", "val"):
                (path.parents[2] / split / "ant").rename(path.parents[2] / split / os.fsdecode(new[:-4]))

        assert not isinstance(attack(home, "class folders", rename), UserError)
