"""Pictures of any mode as upright, opaque RGB of 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # that are read; Pillow has others, EPS by a program


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture turned upright; transparent parts lie on white, as Qwen's own reader lays them; 16 bits become 8.

    Raises ValueError for pixels that are 32-bit numbers: nothing says which of them is white.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint32)
        clear = picture.info.get("transparency")
        grey = (values * 255 + 32767) // 65535
        return Image.fromarray(np.where(values == clear, 255, grey).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, and nothing says which is white; save it with 8 or 16 bits")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    white = Image.new("RGB", seen.size, "white")
    white.paste(seen, mask=seen.getchannel("A"))
    return white
