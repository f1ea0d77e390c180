"""A picture of one classification: the image, and under it what was predicted and what is true."""

from PIL import Image, ImageDraw, ImageFont

from evmamba.tasks.images import read_image

RIGHT, WRONG = (22, 120, 60), (180, 40, 30)


def draw_prediction(path: str, predicted: str, score: float, truth: str, width: int = 320) -> Image.Image:
    """Draw the file's image with a two-line caption, green where the prediction is right and red where it is not.

    Args:
        path: image file.
        predicted: predicted class.
        score: its probability.
        truth: true class.
        width: width of the picture in pixels; its height follows the image's.
    """
    image = read_image(path)
    image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BICUBIC)
    caption = 44
    picture = Image.new("RGB", (width, image.height + caption), "white")
    picture.paste(image)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    colour = RIGHT if predicted == truth else WRONG
    pen.text((6, image.height + 3), f"predicted: {predicted} ({score:.0%})", fill=colour, font=font)
    pen.text((6, image.height + 22), f"truth: {truth}", fill=(60, 60, 60), font=font)
    return picture
