"""The images that a record names -> paths of files that are there.

An image is a file: what else a data set can put into its place (a URL, the bytes as text) is told as what it is.
"""

import os
import re
from typing import Any

from diffvl.data.content import kind_of, text_of
from diffvl.data.keys import is_absent
from diffvl.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_LONGEST = 4096  # characters; a longer text is no path
IMAGE_MISSING = "image missing"


def named_images(value: dict[str, Any]) -> list[str]:
    """Gives the paths under a record's `image` or `images`, as they are written there."""
    keys = [key for key in ("image", "images") if not is_absent(value.get(key))]
    if len(keys) > 1:
        raise DataError("both `image` and `images`: keep one of them", "image")
    if not keys:
        return []
    images = value[keys[0]]
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) or not image.strip():
            got = "an empty string" if isinstance(image, str) else kind_of(image)
            advice = "; write the image into a file and give its path" if isinstance(image, dict) else ""
            raise DataError(f"`{keys[0]}` must be a path or a list of paths, got {got}{advice}", "image")
    return [text_of(image, f"`{keys[0]}`") for image in images]


def require_path(image: str) -> None:
    """Raises DataError for what cannot be a path."""
    scheme = _SCHEME.match(image)
    if scheme:
        advice = "write the path alone" if scheme[1].lower() == "file" else "fetch it and give the path of its file"
        raise DataError(f"an image is a file, not a URL: {_shown(image)}; {advice}", "image is no file")
    if image.startswith("data:") or len(image) > _LONGEST:
        raise DataError(
            f"an image is a file, not its bytes as text: {_shown(image)}; write it into a file and give its path",
            "image is no file",
        )


def missing_image(path: str, image: str, folder_is_set: bool) -> DataError:
    """Tells what is wrong with a path that is no file. `image`: as the record writes it."""
    if os.path.isdir(path):
        return DataError(f"image is a folder: {path}; name an image in it", IMAGE_MISSING)
    slashes = path.replace("\\", "/")
    if "\\" in image and os.path.isfile(slashes):
        return DataError(f"image file not found: {path}; write its path with / instead of \\", IMAGE_MISSING)
    if folder_is_set:
        return DataError(f"image file not found: {path} (relative paths start at data.image_folder)", IMAGE_MISSING)
    advice = "set data.image_folder if they start elsewhere"
    return DataError(f"image file not found: {path} (relative paths start at the data file's folder; {advice})", IMAGE_MISSING)


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
