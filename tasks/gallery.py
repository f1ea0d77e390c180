"""Which pictures of predictions a test keeps: a few that are spread over the data, and the worst cases."""

import heapq
from collections.abc import Callable

from PIL import Image

WORST_CASES = 4


class Gallery:
    """Pictures of one process's test; only those that are kept are drawn.

    Args:
        size: at most so many pictures, and `WORST_CASES` more.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.start(0)

    def start(self, images: int) -> None:
        """Begin anew, for a test of so many images; for 0 nothing is drawn."""
        self._expected = images
        self._offered = 0
        self._spread: list[Image.Image] = []
        self._worst: list[tuple[float, int, Image.Image]] = []

    def offer(self, draw: Callable[[], Image.Image], badness: float) -> None:
        """Offer a test image; call it once for every one, in order.

        The pictures are spread over the images: neighbours in a data set are often alike. A worst case is drawn at
        once: few ever are, and a picture is smaller than what it shows. The first of equally bad ones stays.

        Args:
            draw: makes the picture.
            badness: how wrong the prediction is, in the task's own measure; nan and 0 are no case.
        """
        index = self._offered
        self._offered += 1
        if not self._expected:
            return
        if len(self._spread) < self.size and index % max(self._expected // self.size, 1) == 0:
            self._spread.append(draw())
        place = (badness, -index)
        if not badness > 0:
            return
        if len(self._worst) < min(WORST_CASES, self.size):
            heapq.heappush(self._worst, (*place, draw()))
        elif self._worst and place > self._worst[0][:2]:
            heapq.heapreplace(self._worst, (*place, draw()))

    def pictures(self) -> dict[str, Image.Image]:
        """Name -> picture: ``000`` and so on, then ``worst_000`` and so on, the worst first."""
        worst = [picture for _, _, picture in sorted(self._worst, key=lambda case: case[:2], reverse=True)]
        return {f"{n:03d}": picture for n, picture in enumerate(self._spread)} | {
            f"worst_{n:03d}": picture for n, picture in enumerate(worst)
        }
