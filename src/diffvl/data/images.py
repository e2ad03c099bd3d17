"""The images that a record names -> paths of files that are there -> RGB images as they are seen (see `hub.seen_diffvl`).

An image is a file: what else a data set can put into its place (a URL, the bytes as text) is told as what it is. Which of many
paths are files is asked of their folders: one listing instead of a question per file, which a network disk answers a thousand
times a second and no more.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from diffvl.data.content import kind_of, text_of
from diffvl.data.keys import is_absent
from diffvl.errors import DataError
from diffvl.hub.seen_diffvl import Size, as_seen, size_as_seen

T = TypeVar("T")
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


def require_path(image: str, what: str = "an image") -> None:
    """Raises DataError for what cannot be a path; `what` it is meant to be."""
    scheme = _SCHEME.match(image)
    if scheme:
        advice = "write the path alone" if scheme[1].lower() == "file" else "fetch it and give the path of its file"
        raise DataError(f"{what} is a file, not a URL: {_shown(image)}; {advice}", "image is no file")
    if image.startswith("data:") or len(image) > _LONGEST:
        raise DataError(
            f"{what} is a file, not its bytes as text: {_shown(image)}; write it into a file and give its path",
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


_ALONE = 8  # files of a folder that are asked for one by one before it is listed: it may hold millions that nobody asks for


class ExistingFiles:
    """`path in files`: whether it is a file (or a link to one), as of when its folder was looked at."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}  # paths that were asked for one by one
        self._asked: dict[str, int] = {}
        self._listed: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        listed = self._listed.get(folder)
        if listed is not None and name in listed:
            return True
        if path not in self._known:
            # Also what a listing does not have: the disk may know it under another spelling.
            self._known[path] = os.path.isfile(path)
            self._asked[folder] = self._asked.get(folder, 0) + 1
            if self._asked[folder] == _ALONE:
                self._listed[folder] = _files_in(folder)
        return self._known[path]


def _files_in(folder: str) -> set[str]:
    with suppress(OSError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}
    return set()


UNREADABLE = "image cannot be read"


def open_image(path: str, source: str) -> Image.Image:
    """Decodes the whole image, so that a file cut short is found here.

    Raises:
        DataError: naming `source` (file and line of the record) and the image.
    """
    return _look(path, source, as_seen)


def image_size(path: str, source: str) -> Size:
    """Gives the height and width of what `open_image` gives, from the first bytes of the file where these say it.

    Raises:
        DataError: as `open_image`, if they cannot be read.
    """
    return _look(path, source, size_as_seen)


def _look(path: str, source: str, look: Callable[[Image.Image], T]) -> T:
    if "://" in path or path.startswith("data:"):
        raise DataError(f"{source}: {path[:80]} is no file: images are not fetched, give the path of a file", IMAGE_MISSING)
    try:
        with warnings.catch_warnings():
            # A large image is none to be warned of; PIL refuses those that are too large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return look(image)
    except FileNotFoundError as error:
        raise DataError(f"{source}: image {path} does not exist", IMAGE_MISSING) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: image {path} cannot be read ({error}); replace it or leave it out", UNREADABLE) from error
