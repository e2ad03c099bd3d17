"""Image file -> RGB image as it is seen (see `hub.processing_diffvl`), or a DataError that names the file and the record."""

import warnings

from PIL import Image, UnidentifiedImageError

from diffvl.data.image_paths import IMAGE_MISSING
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import as_seen

UNREADABLE = "image cannot be read"


def open_image(path: str, source: str) -> Image.Image:
    """Decodes the whole image, so that a file cut short is found here.

    Raises:
        DataError: naming `source` (file and line of the record) and the image.
    """
    if "://" in path or path.startswith("data:"):
        raise DataError(f"{source}: {path[:80]} is no file: images are not fetched, give the path of a file", IMAGE_MISSING)
    try:
        with warnings.catch_warnings():
            # A large image is none to be warned of; PIL refuses those that are too large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_seen(image)
    except FileNotFoundError as error:
        raise DataError(f"{source}: image {path} does not exist", IMAGE_MISSING) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: image {path} cannot be read ({error}); replace it or leave it out", UNREADABLE) from error
