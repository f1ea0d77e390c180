"""Pictures of classifications."""

from PIL import Image

from evmamba.tasks.classification.gallery import RIGHT, WRONG, draw_prediction


def test_picture_is_green_where_right_and_red_where_wrong():
    def colours(truth: str) -> set:
        picture = draw_prediction(Image.new("RGB", (40, 40), "navy"), "red", 0.9, truth)
        return {colour for _, colour in picture.getcolors(1 << 20)}

    assert RIGHT in colours("red")
    assert RIGHT not in colours("blue")
    assert WRONG in colours("blue")


def test_the_caption_stands_under_the_whole_image_of_any_shape():
    image = Image.new("RGB", (40, 90), "navy")
    picture = draw_prediction(image, "red", 0.9, None)
    assert picture.size == (320, 720 + 25)
    assert picture.getpixel((160, 719)) == image.getpixel((0, 0))
    assert draw_prediction(Image.new("RGB", (2000, 1)), "red", 0.9, "red").size == (320, 1 + 44)
