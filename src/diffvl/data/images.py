"""Picture file -> RGB picture, or a DataError that names the file and the record."""

from PIL import Image, UnidentifiedImageError

from diffvl.errors import DataError


def open_picture(path: str, source: str) -> Image.Image:
    """Decodes the whole picture, so that a file cut short is found here.

    Raises:
        DataError: naming `source` (file and line of the record) and the picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{source}: picture {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: picture {path} cannot be read ({error}); replace it or leave it out") from error
