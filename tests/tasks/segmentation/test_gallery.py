import numpy as np
from PIL import Image

from evmamba.tasks.segmentation.gallery import draw_comparison, palette


def test_colours_are_fixed_and_differ():
    colours = palette().astype(int)
    assert colours.shape == (255, 3)
    np.testing.assert_array_equal(palette(12), colours[:12])
    for count, least in ((12, 90), (255, 15)):  # RGB distance of the nearest two
        distance = np.linalg.norm(colours[:count, None] - colours[None, :count], axis=-1)
        assert distance[~np.eye(count, dtype=bool)].min() > least


def test_panels_show_image_truth_and_prediction():
    image = Image.new("RGB", (300, 200), (90, 120, 60))
    truth = np.zeros((200, 300), np.uint8)
    prediction = np.ones_like(truth)
    truth[:, 150:] = 255
    picture = np.asarray(draw_comparison(image, truth, prediction, ["sky", "road"], "a.jpg")).astype(int)
    row = picture[picture.shape[0] // 2]
    left = [12 + k * 312 for k in range(3)]
    assert row[left[0] + 75].tolist() == [90, 120, 60]
    nearest = lambda pixel: np.linalg.norm(palette(2).astype(int) - pixel, axis=1).argmin()  # noqa: E731
    assert nearest(row[left[1] + 75]) == 0
    assert nearest(row[left[2] + 75]) == 1
    ignored = row[left[1] + 225]
    assert ignored.max() == ignored.min()  # grey: no class


def test_a_legend_of_many_classes_fits_the_picture():
    label = (np.arange(400 * 300) % 255).astype(np.uint8).reshape(300, 400)
    names = [f"a class with the long name {k}" for k in range(255)]
    picture = draw_comparison(Image.new("RGB", (400, 300)), label, label, names, "many")
    assert picture.width == 3 * 400 + 4 * 12
    assert picture.height < 800
