"""Which pictures of predictions a test draws."""

import math
from pathlib import Path

from PIL import Image

from .toy import ToyData, ToyModule, quiet_trainer


def test_gallery_pictures_are_few_and_spread_over_the_test_set(tmp_path: Path):
    class Painter(ToyModule):
        def evaluation_step(self, batch: dict, stage: str) -> None:
            for image, _ in enumerate(batch["path"]):
                if self.wants_picture():
                    self.add_picture(Image.new("RGB", (8, 8)))
                    drawn.append(image)

    drawn: list[int] = []
    module = Painter()
    data = ToyData(tmp_path, [1.0] * 9, batch_size=9)
    quiet_trainer(tmp_path).test(module, data, verbose=False)
    assert not drawn  # no output_dir, no files
    module.output_dir, module.gallery_size = tmp_path / "out", 3
    for _ in range(2):  # a second test starts a new gallery
        drawn.clear()
        quiet_trainer(tmp_path).test(module, data, verbose=False)
        assert drawn == [0, 3, 6]
        names = sorted(path.name for path in (tmp_path / "out" / "gallery").iterdir())
        assert names == ["000.jpg", "001.jpg", "002.jpg"]


def test_the_worst_cases_are_drawn_worst_first_and_right_ones_are_none(tmp_path: Path):
    class Judge(ToyModule):
        def evaluation_step(self, batch: dict, stage: str) -> None:
            for index, badness in enumerate((0.2, 0.0, 0.9, math.nan, 0.5, 0.9, 0.3, 0.1)):
                self.offer_worst(badness, lambda index=index: Image.new("L", (8, 8), 10 * index))

    module = Judge()
    data = ToyData(tmp_path, [1.0], batch_size=1)
    quiet_trainer(tmp_path).test(module, data, verbose=False)  # no output_dir, no files
    module.output_dir = tmp_path / "out"
    for _ in range(2):  # a second test starts anew
        quiet_trainer(tmp_path).test(module, data, verbose=False)
        pictures = sorted((tmp_path / "out" / "gallery").iterdir())
        assert [path.name for path in pictures] == [f"worst_00{n}.jpg" for n in range(4)]
        found = [round(Image.open(path).convert("L").getpixel((4, 4)) / 10) for path in pictures]
        assert found == [2, 5, 4, 6]  # of equally bad ones the first comes first
