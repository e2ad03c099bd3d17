"""How large images are shown: the number of pixels, where a checkpoint's image processor counts them."""

from typing import Any

from PIL import Image

from diffvl.errors import ConfigError

_LARGE = (1024, 1536)  # pixels of an image that every limit below cuts
_LIMITS = (256 * 256, 4 * 256 * 256)
_RATIO = (3.0, 5.5)  # of the pixels within the second limit to those within the first, sides rounded to whole patches


def limit_pixels(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Sets the fewest and the most pixels to which images are resized, in the image processor's own words.

    Raises:
        ConfigError: if it does not count pixels, or the limits do not fit each other.
    """
    if min_pixels is None and max_pixels is None:
        return
    if not _counts_pixels(image_processor):
        words = {name: value for name, value in image_processor.to_dict().items() if "size" in name or "patches" in name}
        told = ", ".join(f"{name}: {value}" for name, value in sorted(words.items()) if value)
        raise ConfigError(
            f"prepare.min_pixels and max_pixels: the image processor of this checkpoint ({type(image_processor).__name__}) does "
            f"not resize images to a number of pixels, but by {told}: leave them out"
        )
    size = image_processor.size
    low = size["shortest_edge"] if min_pixels is None else min_pixels
    high = size["longest_edge"] if max_pixels is None else max_pixels
    if low > high:
        raise ConfigError(
            f"prepare.min_pixels: {low} pixels at least, but {high} at most; the one that is not set is the checkpoint's own"
        )
    image_processor.size = _sized(size, low, high)


def _counts_pixels(image_processor: Any) -> bool:
    """Tells whether the two edges in its size are numbers of pixels of the whole image: those of a large one follow them."""
    size = getattr(image_processor, "size", None)
    if size is None or not all(_edge(size, edge) for edge in ("shortest_edge", "longest_edge")):
        return False
    shown = []
    try:
        for limit in _LIMITS:
            image_processor.size = _sized(size, 1, limit)
            pixels = image_processor(images=[Image.new("RGB", _LARGE)], return_tensors="pt")["pixel_values"]
            shown.append(pixels.numel())
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return False
    finally:
        image_processor.size = size
    return _RATIO[0] <= shown[1] / shown[0] <= _RATIO[1]


def _edge(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)


def _sized(size: Any, low: int, high: int) -> Any:
    """Gives a size of the same kind with these edges."""
    return type(size)(shortest_edge=low, longest_edge=high)
