"""What an evaluation writes is what it says it wrote."""

from pathlib import Path

from PIL import Image

from evmamba.tasks.evaluation import Evaluation


def test_files_and_pictures_lie_in_the_folder_under_their_names(tmp_path: Path):
    evaluation = Evaluation(
        files={"boxes.json": lambda path: path.write_text("[]") and None},
        pictures={"000": Image.new("L", (9, 7)), "worst_000": Image.new("RGBA", (5, 5))},
    )
    assert evaluation.write(tmp_path / "new") == ["gallery/000.jpg", "gallery/worst_000.jpg"]
    assert (tmp_path / "new" / "boxes.json").read_text() == "[]"
    assert Image.open(tmp_path / "new" / "gallery" / "000.jpg").size == (9, 7)


def test_an_evaluation_of_numbers_alone_leaves_no_gallery(tmp_path: Path):
    assert Evaluation({"score": 0.5}).write(tmp_path) == []
    assert not list(tmp_path.iterdir())
