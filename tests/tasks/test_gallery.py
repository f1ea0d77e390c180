"""Which pictures of predictions a test keeps, and that no others are drawn."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from evmamba.tasks.gallery import Gallery

from .toy import ToyData, ToyModule, quiet_trainer


def picture(index: int) -> Image.Image:
    return Image.new("L", (1, 1), index)


def kept(gallery: Gallery) -> dict[str, int]:
    return {name: image.getpixel((0, 0)) for name, image in gallery.pictures().items()}


def drawer(index: int, drawn: list[int]) -> Callable[[], Image.Image]:
    def draw() -> Image.Image:
        drawn.append(index)
        return picture(index)

    return draw


def offered(gallery: Gallery, images: int, badness: Sequence[float]) -> list[int]:
    """Offer images numbered from 0; return those that were drawn."""
    drawn: list[int] = []
    gallery.start(images)
    for index, value in enumerate(badness):
        gallery.offer(drawer(index, drawn), value)
    return drawn


def test_pictures_are_few_and_spread_over_the_test_set():
    gallery = Gallery(3)
    for _ in range(2):  # a second test starts a new gallery
        assert offered(gallery, 9, [0.0] * 9) == [0, 3, 6]
        assert kept(gallery) == {"000": 0, "001": 3, "002": 6}


def test_a_process_that_writes_no_pictures_draws_none():
    assert offered(Gallery(), 0, [1.0] * 9) == []


def test_the_worst_cases_come_worst_first_and_right_ones_are_none():
    gallery = Gallery()
    for _ in range(2):  # a second test starts anew
        offered(gallery, 8, (0.2, 0.0, 0.9, math.nan, 0.5, 0.9, 0.3, 0.1))
        worst = {name: index for name, index in kept(gallery).items() if name.startswith("worst")}
        assert worst == {"worst_000": 2, "worst_001": 5, "worst_002": 4, "worst_003": 6}  # of equals the first first


def test_only_a_test_fills_the_gallery(tmp_path: Path):
    class Painter(ToyModule):
        def evaluation_step(self, batch: dict, stage: str) -> None:
            for _ in batch["path"]:
                self.gallery.offer(lambda: picture(0), 0.5)

    module, data = Painter(), ToyData(tmp_path, [1.0] * 9, batch_size=9)
    quiet_trainer(tmp_path).validate(module, data, verbose=False)
    assert not module.evaluation.pictures
    quiet_trainer(tmp_path).test(module, data, verbose=False)
    assert len(module.evaluation.pictures) == 8 + 4
