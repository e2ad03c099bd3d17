"""What an image is: RGB, as a viewer shows it. And its size, from its file's first bytes where these say it.

* Turned as its EXIF orientation says.
* Laid on white where it is transparent, by an alpha channel, a palette or a transparent colour.
* Deep greyscale in 8 bits. 16-bit images (`I;16`) are divided by 257. What has no depth of its own (`I`, `F`: 32-bit numbers)
  is taken by its largest value: up to 255 as 8-bit values, up to 65535 as 16-bit ones; floats up to 1 as shares of white.
  Others, negative ones and those that are not finite are refused: nobody knows what is black in them.
* Of an animation, the frame that the image stands at (the first of one just opened).
"""

import struct
from collections.abc import Iterator
from os import PathLike
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageCms

Size = tuple[int, int]  # height and width in pixels

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_BAND = 1 << 20  # pixels
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# Formats whose header has the size and the orientation. PIL itself turns TIFF.
_TOLD_BY_HEADER = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "AVIF", "TIFF")


def as_seen(image: Image.Image) -> Image.Image:
    """The image as the model gets it: a new one of mode RGB, without anything in it that would change it again.

    Raises:
        ValueError: if it has no pixels, or numbers that are no brightness.
        OSError, SyntaxError: from PIL, if its file is damaged.
    """
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width} x {image.height} pixels has nothing to show")
    image.load()  # a few formats turn themselves here
    turn = _TURNS.get(_orientation(image))
    flat = _flattened(image)
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info = {}
    return flat


def images_as_seen(images: Any) -> Any:
    """`as_seen` of every image in what a caller gives: one or a list (of lists); PIL images, paths of files, or arrays.

    Arrays and tensors are given back as they are: they are pixels already.

    Raises:
        ValueError: for a URL, a file that is no image, an array that is not of three colours, and as `as_seen`.
    """
    if isinstance(images, list | tuple):
        return [images_as_seen(image) for image in images]
    if isinstance(images, str | PathLike):
        return _opened(images)
    if isinstance(images, Image.Image):
        return as_seen(images)
    shape = getattr(images, "shape", None)
    if shape is not None and (len(shape) < 3 or 3 not in (shape[-1], shape[-3])):
        raise ValueError(
            f"an array of the shape {tuple(shape)} is no RGB image: expected [height, width, 3] or [3, height, width]; a PIL "
            "image of any mode is taken too"
        )
    return images


def _opened(path: str | PathLike[str]) -> Image.Image:
    if "://" in str(path) or str(path).startswith("data:"):
        raise ValueError(f"{str(path)[:80]!r} is no file: images are not fetched, give a path or a PIL image")
    try:
        with Image.open(path) as image:
            return as_seen(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {str(path)[:80]!r} cannot be read ({error})") from error


def _orientation(image: Image.Image, in_header: bool = False) -> int:
    """What EXIF (or XMP) says; 1, upright, where it says nothing that can be read, as viewers take it."""
    try:
        # The own method of a PNG image would decode it, for what may stand behind its pixels: see `_says_more_behind`.
        exif = Image.Image.getexif(image) if in_header else image.getexif()
        value = exif.get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, KeyError, OverflowError, EOFError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _flattened(image: Image.Image) -> Image.Image:
    """A new image of mode RGB, on white."""
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        turned = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
        assert turned is not None
        return turned
    keyed = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    if not keyed and image.mode not in _WITH_ALPHA:
        return image.convert("RGB")
    seen = Image.new("RGB", image.size)
    for top, bottom in _bands(image):
        box = (0, top, image.width, bottom)
        band = image.crop(box)
        band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        seen.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), box)
    return seen


def _bands(image: Image.Image) -> Iterator[tuple[int, int]]:
    """First and last row of the bands by which a large image is worked on, so that it takes its memory once or twice and not five
    times."""
    rows = max(1, _BAND // max(image.width, 1))
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)


def _from_deep(image: Image.Image) -> Image.Image:
    """A greyscale image of 16-bit or 32-bit numbers, as RGB."""
    is_float = image.mode.startswith("F")
    ends = torch.stack([torch.stack(torch.aminmax(_numbers(image, *rows))) for rows in _bands(image)])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif is_float and high <= 1:
        white = 1.0
    else:
        white = 255.0 if high <= 255 else 65535.0
    if not (low >= 0 and high <= white):  # so that nan fails
        raise ValueError(
            f"values from {low:g} to {high:g} in an image of the mode {image.mode} do not say what is black and what is "
            "white: save it with 8 or 16 bits"
        )
    key, seen = image.info.get("transparency"), Image.new("L", image.size)
    for top, bottom in _bands(image):
        values = _numbers(image, top, bottom)
        grey = (values * (255.0 / white)).round().to(torch.uint8)
        if isinstance(key, int):
            grey[values == key] = 255
        size = image.width, bottom - top
        seen.paste(Image.frombytes("L", size, grey.numpy().tobytes()), (0, top, image.width, bottom))
    return seen.convert("RGB")


def _numbers(image: Image.Image, top: int, bottom: int) -> torch.Tensor:
    """The numbers in some rows of a greyscale image."""
    is_float = image.mode.startswith("F")
    rows = image.crop((0, top, image.width, bottom))
    wide = rows if rows.mode in ("I", "F") else rows.convert("F" if is_float else "I")
    return torch.frombuffer(bytearray(wide.tobytes()), dtype=torch.float32 if is_float else torch.int32).double()


# --- sizes -------------------------------------------------------------------------------------------------------------------


def size_as_seen(image: Image.Image) -> Size:
    """The size of what `as_seen` gives, without decoding the image where its header says it.

    Raises:
        ValueError, OSError, SyntaxError: see `as_seen`, if it has to be decoded.
    """
    if image.format is not None and (image.format not in _TOLD_BY_HEADER or _says_more_behind(image)):
        image = as_seen(image)
    on_its_side = image.format != "TIFF" and _orientation(image, in_header=image.format == "PNG") in _ON_ITS_SIDE
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def size_of(image: Any) -> Size:
    """The size of an image that `images_as_seen` gave: a PIL image, or an array of three colours."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    *_, first, second, third = image.shape
    return (int(first), int(second)) if third == 3 else (int(second), int(third))


def _says_more_behind(image: Image.Image) -> bool:
    """Whether a PNG file has notes behind its pixels, among which may be its orientation."""
    file: BinaryIO | None = getattr(image, "fp", None)
    if image.format != "PNG" or file is None or image.width == image.height:
        return False
    place = file.tell()
    file.seek(8)
    notes, seen_pixels = False, False
    while len(head := file.read(8)) == 8 and not notes:
        length, kind = struct.unpack(">I4s", head)
        seen_pixels = seen_pixels or kind == b"IDAT"
        notes = seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(length + 4, 1)
    file.seek(place)
    return notes
