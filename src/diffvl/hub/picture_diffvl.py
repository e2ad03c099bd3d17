"""What a picture is, for training, decoding, the exported processor and the report alike: RGB, as a viewer shows it.

* Turned as its EXIF orientation says.
* Laid on white where it is transparent, by an alpha channel, a palette or a transparent colour.
* Deep greyscale in 8 bits. 16-bit pictures (`I;16`) are divided by 257. What has no depth of its own (`I`, `F`: 32-bit numbers)
  is taken by its largest value: up to 255 as 8-bit values, up to 65535 as 16-bit ones; floats up to 1 as shares of white.
  Others, negative ones and those that are not finite are refused: nobody knows what is black in them.
* Of an animation, the frame that the picture stands at (the first of one just opened).
"""

import struct
from os import PathLike
from typing import Any

import torch
from PIL import Image, ImageCms

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
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def as_seen(picture: Image.Image) -> Image.Image:
    """The picture as the model gets it: a new one of mode RGB, without anything in it that would change it again.

    Raises:
        ValueError: if it has no pixels, or numbers that are no brightness.
        OSError, SyntaxError: from PIL, if its file is damaged.
    """
    if not picture.width or not picture.height:
        raise ValueError(f"a picture of {picture.width} x {picture.height} pixels has nothing to show")
    picture.load()  # a few formats turn themselves here
    turn = _TURNS.get(_orientation(picture))
    flat = _flattened(picture)
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info = {}
    return flat


def all_seen(images: Any) -> Any:
    """`as_seen` of every picture in what a caller gives: one or a list (of lists); pictures, paths of files, or arrays.

    Arrays and tensors are given back as they are: they are pixels already.

    Raises:
        ValueError: for a URL, a file that is no picture, an array that is not of three colours, and as `as_seen`.
    """
    if isinstance(images, list | tuple):
        return [all_seen(image) for image in images]
    if isinstance(images, str | PathLike):
        return _opened(images)
    if isinstance(images, Image.Image):
        return as_seen(images)
    shape = getattr(images, "shape", None)
    if shape is not None and (len(shape) < 3 or 3 not in (shape[-1], shape[-3])):
        raise ValueError(
            f"an array of the shape {tuple(shape)} is no RGB picture: expected [height, width, 3] or [3, height, width]; a PIL "
            "picture of any mode is taken too"
        )
    return images


def _opened(path: str | PathLike[str]) -> Image.Image:
    if "://" in str(path) or str(path).startswith("data:"):
        raise ValueError(f"{str(path)[:80]!r} is no file: pictures are not fetched, give a path or a PIL picture")
    try:
        with Image.open(path) as picture:
            return as_seen(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {str(path)[:80]!r} cannot be read ({error})") from error


def _orientation(picture: Image.Image) -> int:
    """What EXIF (or XMP) says; 1, upright, where it says nothing that can be read, as viewers take it."""
    try:
        value = picture.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, KeyError, OverflowError, EOFError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _flattened(picture: Image.Image) -> Image.Image:
    """A new picture of mode RGB, on white."""
    if picture.mode.startswith(("I", "F")):
        return _from_deep(picture)
    if picture.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        turned = ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
        assert turned is not None
        return turned
    keyed = "transparency" in picture.info and picture.mode in ("1", "L", "P", "RGB")
    if not keyed and picture.mode not in _WITH_ALPHA:
        return picture.convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _from_deep(picture: Image.Image) -> Image.Image:
    """A greyscale picture of 16-bit or 32-bit numbers, as RGB."""
    is_float = picture.mode.startswith("F")
    wide = picture if picture.mode in ("I", "F") else picture.convert("F" if is_float else "I")
    values = torch.frombuffer(bytearray(wide.tobytes()), dtype=torch.float32 if is_float else torch.int32).double()
    low, high = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16"):
        white = 65535.0
    elif is_float and high <= 1:
        white = 1.0
    else:
        white = 255.0 if high <= 255 else 65535.0
    if not (low >= 0 and high <= white):  # so that nan fails
        raise ValueError(
            f"values from {low:g} to {high:g} in a picture of the mode {picture.mode} do not say what is black and what is "
            "white: save it with 8 or 16 bits"
        )
    grey = (values * (255.0 / white)).round().to(torch.uint8)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.frombytes("L", picture.size, grey.numpy().tobytes()).convert("RGB")
