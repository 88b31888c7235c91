"""Reading an image file, by Pillow: what transformers and the released trainers read them with.

Another JPEG decoder gives other pixels: it may stretch the colour planes in another way.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# What Pillow's readers raise on damaged files, beside ValueError: not only their own errors.
_FAULTS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)

_ORIENTATION, _ON_ITS_SIDE = 274, (5, 6, 7, 8)  # EXIF


def read_picture(path: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file, upright by its EXIF orientation.

    Transparent pixels are laid over white (as qwen-vl-utils does); other modes are converted; of an
    animation the first picture is taken. OSError, FileNotFoundError among them, says why it cannot
    be read.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) in pixels of an image file, upright, without decoding it; OSError alike."""
    with _opened(path) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
        return (image.height, image.width) if turned else image.size


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Files above 90 megapixels; Pillow refuses those above twice that in any case.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise
    except (*_FAULTS, Image.DecompressionBombError) as error:
        raise OSError(_reason(error)) from error


def _rgb(image: Any) -> np.ndarray:
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
