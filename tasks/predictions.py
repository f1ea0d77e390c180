"""What `evmamba predict --config` leaves behind: files of predictions, written while it predicts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import Callback

from evmamba.files import replacing, write_errors


class PredictionLines(Callback, ABC):
    """Writes predictions batch by batch, line by line, and says at the end where they are.

    Every process writes lines into a part of its own; at the end the first one joins them, so a folder that all of them
    see is needed.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, TextIO] = {}

    @abstractmethod
    def names(self, module: L.LightningModule) -> list[str]:
        """Return the files' names; one that ends with ``.json`` becomes a list of its lines."""

    @abstractmethod
    def lines(self, trainer: L.Trainer, outputs: Any, batch: Any) -> Mapping[str, Iterable[str]]:
        """Return the lines of a batch, by file; `outputs` is what the module's predict_step returned."""

    def header(self, name: str) -> str:
        """Return the first line of a file that is no list."""
        raise NotImplementedError

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parts = {
            name: self._part(name, trainer.global_rank).open("w", encoding="utf-8") for name in self.names(pl_module)
        }

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for name, lines in self.lines(trainer, outputs, batch).items():
            self._parts[name].writelines(f"{line}\n" for line in lines)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            for name in self._parts:
                self._join(name, trainer.world_size)
            print(f"predictions: {', '.join(str(self.folder / name) for name in self._parts)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for part in self._parts.values():
            part.close()

    def _part(self, name: str, rank: int) -> Path:
        return self.folder / f".{name}.{rank}.part"

    def _join(self, name: str, processes: int) -> None:
        """Put the processes' lines together and remove the parts."""
        as_json = name.endswith(".json")
        path = self.folder / name
        with write_errors(path), replacing(path) as partial, partial.open("w", encoding="utf-8") as out:
            out.write("[" if as_json else f"{self.header(name)}\n")
            between = ""
            for rank in range(processes):
                part = self._part(name, rank)
                with part.open(encoding="utf-8") as lines:
                    for line in lines:
                        out.write(between + line.rstrip("\n") if as_json else line)
                        between = ",\n"
                part.unlink()
            if as_json:
                out.write("]\n")
