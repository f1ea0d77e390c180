"""A picture of one classification: the image, and under it what was predicted and what is true."""

from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG, UNKNOWN = (22, 120, 60), (180, 40, 30), (30, 30, 30)


def draw_prediction(
    image: Image.Image, predicted: str, score: float, truth: str | None, width: int = 320
) -> Image.Image:
    """Draw an image with a caption, green where the prediction is right and red where it is not.

    Args:
        image: RGB.
        predicted: predicted class.
        score: its probability.
        truth: true class; None where it is not known.
        width: width of the picture in pixels; its height follows the image's.
    """
    image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BICUBIC)
    caption = 44 if truth is not None else 25
    picture = Image.new("RGB", (width, image.height + caption), "white")
    picture.paste(image)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    colour = UNKNOWN if truth is None else RIGHT if predicted == truth else WRONG
    pen.text((6, image.height + 3), f"predicted: {predicted} ({score:.0%})", fill=colour, font=font)
    if truth is not None:
        pen.text((6, image.height + 22), f"truth: {truth}", fill=(60, 60, 60), font=font)
    return picture
