"""What the small vision-language model sees of a picture. Needs Pillow alone, so that serving needs no torch."""

from __future__ import annotations

from PIL import Image

IMAGE_SIZE = 224
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def square_view(image: Image.Image) -> Image.Image:
    """What the model sees of a picture: RGB over white, centre square, ``224 x 224``. Patches lie in a 16 x 16 grid."""
    if image.mode in ("P", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side), reducing_gap=None
    )
