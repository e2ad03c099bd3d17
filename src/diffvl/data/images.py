"""Picture file -> RGB picture as it is seen (see `hub.processing_diffvl`), or a DataError that names the file and the record."""

import warnings

from PIL import Image, UnidentifiedImageError

from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import as_seen

UNREADABLE = "picture cannot be read"
MISSING = "picture missing"


def open_picture(path: str, source: str) -> Image.Image:
    """Decodes the whole picture, so that a file cut short is found here.

    Raises:
        DataError: naming `source` (file and line of the record) and the picture.
    """
    if "://" in path or path.startswith("data:"):
        raise DataError(f"{source}: {path[:80]} is no file: pictures are not fetched, give the path of a file", MISSING)
    try:
        with warnings.catch_warnings():
            # A large picture is none to be warned of; PIL refuses those that are too large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return as_seen(picture)
    except FileNotFoundError as error:
        raise DataError(f"{source}: picture {path} does not exist", MISSING) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: picture {path} cannot be read ({error}); replace it or leave it out", UNREADABLE) from error
