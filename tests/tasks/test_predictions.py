"""Lines of several processes become one file, in the processes' order."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from evmamba.tasks.predictions import PredictionLines


class Numbers(PredictionLines):
    def names(self, module: Any) -> list[str]:
        return ["numbers.csv", "numbers.json"]

    def header(self, name: str) -> str:
        return "number"

    def lines(self, trainer: Any, outputs: Any, batch: Any) -> Mapping[str, Iterable[str]]:
        return {name: map(str, outputs) for name in self.names(None)}


def process(rank: int) -> Any:
    strategy = SimpleNamespace(barrier=lambda name: None)
    return SimpleNamespace(global_rank=rank, world_size=2, is_global_zero=rank == 0, strategy=strategy)


def predicted(folder: Path, numbers: dict[int, list[list[int]]]) -> None:
    writers = {rank: Numbers(folder) for rank in numbers}
    for rank, batches in numbers.items():
        writers[rank].on_predict_start(process(rank), None)  # type: ignore[arg-type]
        for batch in batches:
            writers[rank].on_predict_batch_end(process(rank), None, batch, None, 0)  # type: ignore[arg-type]
    for rank in sorted(numbers, reverse=True):  # the first process joins when the others have closed their parts
        writers[rank].on_predict_end(process(rank), None)  # type: ignore[arg-type]


def test_the_first_process_joins_the_parts_of_all_and_removes_them(tmp_path: Path, capsys):
    predicted(tmp_path, {0: [[1, 2], [3]], 1: [[4]]})
    assert (tmp_path / "numbers.csv").read_text() == "number\n1\n2\n3\n4\n"
    assert json.loads((tmp_path / "numbers.json").read_text()) == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.csv", "numbers.json"]
    assert capsys.readouterr().out == f"predictions: {tmp_path}/numbers.csv, {tmp_path}/numbers.json\n"


def test_without_predictions_the_files_are_still_whole(tmp_path: Path):
    predicted(tmp_path, {0: [], 1: [[]]})
    assert (tmp_path / "numbers.csv").read_text() == "number\n"
    assert json.loads((tmp_path / "numbers.json").read_text()) == []
