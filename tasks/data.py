"""What the tasks' data modules share: the loaders, the description of the data and its fingerprint."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from PIL import Image
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset, get_worker_info

from evmamba.errors import UserError
from evmamba.tasks.images import BadImagePolicy, find_unreadable, handle_unreadable, read_image
from evmamba.tasks.module import TaskModule
from evmamba.tasks.training.helpers import end_loaders_at_exit
from evmamba.tasks.training.interruption import outlive_signals
from evmamba.tasks.training.randomness import SeededSamples
from evmamba.tasks.training.samplers import EvaluationSampler, TrainingLoader, TrainingSampler

Split = Literal["train", "val", "test"]
# Those that every data set has.
SPLITS: tuple[Split, ...] = ("train", "val")
# If there is a labelled one, the test stage is on it alone.
TEST: Split = "test"
EMBEDDED = "embedded"
STAGE = "input/"
MAX_HASHED_BYTES = 64 * 2**20
_marked: ContextVar[bool] = ContextVar("marked stages", default=False)


class TaskDataModule(L.LightningDataModule):
    """Folders of images in one of the documented layouts, and loaders that are exact for any number of processes.

    A task's constructor does the cheap checks and sets ``num_classes`` and ``class_names`` (the command line links them
    to the model); its ``setup`` sets ``train_set`` and ``val_set``, map-style data sets of samples for :meth:`collate`,
    and ``test_set`` where the data has a labelled split of that name. The test stage uses that one, or the validation
    split where there is none; with `held_out` all evaluation is on what is held out. Predict uses the validation split.

    Args:
        data_dir: the data set's root, or "embedded" for the drawn one that is made on first use.
        batch_size: training images per process and step.
        eval_batch_size: evaluation images per process and step; None takes batch_size.
        num_workers: loading processes per loader.
        on_bad_image: "stop" with an error before training, or "skip" unreadable images with a counted warning.
        seed: of the training order.
        held_out: this share of the training images is not trained on but evaluated on, in place of the validation
            split: for choosing settings. The same images for every run.

    Raises:
        UserError: missing data folder, or options out of range.
    """

    task: ClassVar[str]
    num_classes: int
    class_names: list[str]
    image_size: int  # where the record says `scalable`
    train_set: Dataset
    val_set: Dataset
    test_set: Dataset | None = None
    has_test = False  # a labelled test split; set in the constructor
    works_on_device = False  # training images are decoded and augmented after they are moved there

    def __init__(
        self,
        data_dir: str,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        on_bad_image: BadImagePolicy,
        seed: int,
        held_out: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= held_out < 1:
            raise UserError(f"data.held_out must be in [0, 1), not {held_out}")
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"data.{name} must be at least {least}, not {value}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.on_bad_image: BadImagePolicy = on_bad_image
        self.seed = seed
        self.held_out = held_out
        self.embedded = data_dir == EMBEDDED
        self.root = self._embedded_root() if self.embedded else Path(data_dir).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data folder not found: {self.root} (data.data_dir)")

    def _embedded_root(self) -> Path:
        from evmamba.tasks.embedded import ensure_embedded  # draws pictures: not needed for real data

        return ensure_embedded(self.task)

    def fit_to(self, module: TaskModule) -> None:
        """Take over what depends on the model (whether there are masks, say), where no option says it; before `setup`.

        A trainer's data module has done so by itself.
        """

    def check_device(self, device: torch.device) -> None:
        """See that the device can do what it is to do with training images (`works_on_device`).

        Raises:
            UserError: it cannot.
        """

    @contextmanager
    def evaluated_at(self, side: int) -> Iterator[None]:
        """Have evaluation images of another size [pixels] meanwhile; for tasks whose record says `scalable`."""
        raise NotImplementedError
        yield

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Turn a list of samples into a batch with at least ``path``, the files' names."""
        raise NotImplementedError

    def read_image(self, path: str) -> Image.Image:
        """An evaluation image by the name that its batch gave it, for pictures of predictions."""
        return read_image(path)

    def image_name(self, path: str) -> str:
        """The name of an image wherever the data set lies: its path below the root, with forward slashes."""
        place, root = Path(path), self.root
        return place.relative_to(root).as_posix() if place.is_relative_to(root) else place.as_posix()

    def held_out_rows(self, names: Sequence[str], groups: Sequence[Any] | None = None) -> tuple[list[int], list[int]]:
        """Split the training images in those that stay and those that are held out, about `held_out` of each group.

        Which these are follows from the names alone, not from their order or anybody's seed.

        Args:
            names: of the training images.
            groups: of each image, its class say; None: all are one group.

        Raises:
            UserError: nothing would be left to train on, or to evaluate on.
        """
        members: dict[Any, list[int]] = {}
        for k, group in enumerate(groups if groups is not None else [None] * len(names)):
            members.setdefault(group, []).append(k)
        place: dict[int, float] = {}
        for rows in members.values():
            rows.sort(key=lambda k: _drawn("order", names[k]))
            # Groups are mixed evenly; one too small to be divided gives an image or none, by chance.
            place |= {k: (rank + _drawn("start", names[k])) / len(rows) for rank, k in enumerate(rows)}
        held = set(sorted(place, key=lambda k: place[k])[: round(self.held_out * len(names))])
        stay = [k for k in range(len(names)) if k not in held]
        if not held or not stay:
            raise UserError(f"data.held_out={self.held_out} of {len(names)} training images holds out {len(held)}")
        return stay, sorted(held)

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        """Return the training and the validation image files (known from the constructor on)."""
        raise NotImplementedError

    def test_paths(self) -> list[Path]:
        """Return the images of the test split, where there is a labelled one."""
        return []

    @property
    def tested_on(self) -> str:
        """The split of the test stage: "val", "test" or "held out"."""
        return "held out" if self.held_out else TEST if self.has_test else "val"

    def label_paths(self) -> list[Path]:
        """Return the files with labels, where images have such."""
        return []

    def description(self) -> dict[str, Any]:
        """Say which data this is: name, root, number of images and classes, and a fingerprint (see `fingerprint`)."""
        train, val = self.image_paths()
        tested = round(self.held_out * len(train)) or len(self.test_paths())
        return {
            "name": EMBEDDED if self.embedded else self.root.resolve().name,
            "root": str(self.root),
            "train_images": len(train),
            "val_images": len(val),
            "num_classes": self.num_classes,
            "split": self.tested_on,
            **({"test_images": tested} if tested else {}),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        train, val = self.image_paths()
        return fingerprint(self.root, [*train, *val, *self.test_paths()], self.class_names, self.label_paths())

    def readable(
        self,
        paths: Sequence[Path],
        where: str,
        find: Callable[[Sequence[Path], BadImagePolicy], dict[Path, str]] = find_unreadable,
    ) -> list[Path]:
        """Return the readable ones of these images, by the policy `on_bad_image`; rank 0 looks, all ranks agree.

        Args:
            paths: the images.
            where: which part of the data, for messages.
            find: looks at them; for images that are not files of their own.

        Raises:
            UserError: see :func:`evmamba.tasks.images.handle_unreadable`.
        """
        bad: dict[Path, str] | None = None
        if self._rank == 0:
            bad = find(paths, self.on_bad_image)
        if self.trainer is not None and self.trainer.world_size > 1:
            bad = self.trainer.strategy.broadcast(bad)
        assert bad is not None
        handle_unreadable(bad, len(paths), self.on_bad_image, where)
        return [path for path in paths if path not in bad]

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def train_dataloader(self) -> DataLoader:
        sampler = self.training_sampler()
        return TrainingLoader(
            SeededSamples(self.train_set, self.seed),
            sampler,
            self._batches_done,
            batch_size=self.batch_size,
            # A last small batch makes BatchNorm's statistics noisy; it is kept only where it is all there is.
            drop_last=len(sampler) >= self.batch_size,
            persistent_workers=self.num_workers > 0,
            **self._loading(self.collate),
        )

    def training_sampler(self) -> TrainingSampler:
        """The order of an epoch, and this process's part of it."""
        return TrainingSampler(len(self.train_set), self._rank, self._world, self.seed)  # type: ignore[arg-type]

    def _batches_done(self) -> int:
        """Batches of the current epoch that are trained already: not 0 where a training is continued."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_set if self.test_set is None else self.test_set)

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_set)

    def _evaluation_loader(self, images: Dataset) -> DataLoader:
        sampler = EvaluationSampler(len(images), self._rank, self._world)  # type: ignore[arg-type]
        collate = _Ignored(self.collate) if sampler.ignored else self.collate
        return DataLoader(images, batch_size=self.eval_batch_size, sampler=sampler, **self._loading(collate))

    def _loading(self, collate: Callable) -> dict[str, Any]:
        """The options of every loader."""
        end_loaders_at_exit()
        return {
            "collate_fn": _Shared(collate),
            "num_workers": self.num_workers,
            "worker_init_fn": outlive_signals,
            "pin_memory": torch.cuda.is_available(),
        }


def stage(name: str) -> AbstractContextManager[object]:
    """Mark a part of the work on a training image for `evmamba profile --input`; stages do not nest.

    Marks cost as much as a small operation: they are made within :func:`marked_stages` alone.
    """
    return record_function(STAGE + name) if _marked.get() else nullcontext()


@contextmanager
def marked_stages() -> Iterator[None]:
    """Have what :func:`stage` names marked for torch's profiler meanwhile."""
    token = _marked.set(True)
    try:
        yield
    finally:
        _marked.reset(token)


class _Shared:
    """A collate function that has its batch in shared memory when it returns, where that is the way to the training.

    torch moves there what is not by a thread of the loading process, which only prints that there is no room: the batch
    never comes, and the training waits for ever.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = self.collate(samples)
        return batch if get_worker_info() is None else apply_to_collection(batch, Tensor, _share)


def _share(tensor: Tensor) -> Tensor:
    return tensor.share_memory_() if tensor.untyped_storage().nbytes() else tensor


class _Ignored:
    """A collate function whose batches say that they do not count (see EvaluationSampler)."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        return self.collate(samples) | {"ignore": True}


def _drawn(what: str, name: str) -> float:
    """A number in [0, 1) that follows from a name."""
    return int.from_bytes(hashlib.sha256(f"{what} {name}".encode()).digest()[:6], "big") / 2**48


def fingerprint(root: Path, paths: Iterable[Path], class_names: Sequence[str], labels: Sequence[Path] = ()) -> str:
    """Return 16 hex digits over the class names, every file's name (relative to root) and size, and the labels.

    Label files can change without changing their size: their contents count up to 64 MiB in all, beyond that their
    times of modification.
    """
    # Names also of files outside root.
    sized = ((Path(os.path.relpath(path, root)).as_posix(), path.stat().st_size) for path in (*paths, *labels))
    digest = files_digest(class_names, sized)
    small = sum(path.stat().st_size for path in labels) <= MAX_HASHED_BYTES
    for path in labels:
        digest.update(hashlib.sha256(path.read_bytes()).digest() if small else str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def files_digest(class_names: Sequence[str], sized: Iterable[tuple[str, int]]) -> "hashlib._Hash":
    """SHA-256 so far over class names and (file name, bytes) pairs: the start of every fingerprint."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for name, size in sized:
        digest.update(os.fsencode(f"\n{name}\0{size}"))
    return digest
