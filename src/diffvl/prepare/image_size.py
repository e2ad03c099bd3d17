"""How large images and videos are shown: the number of pixels, where a checkpoint's processor counts them."""

from collections.abc import Callable
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

    def shown() -> int:
        return image_processor(images=[Image.new("RGB", _LARGE)], return_tensors="pt")["pixel_values"].numel()

    limit_by(image_processor, min_pixels, max_pixels, "prepare", shown)


def limit_by(
    processor: Any, min_pixels: int | None, max_pixels: int | None, section: str, shown_pixels: Callable[[], int]
) -> None:
    """Sets the same of any processor.

    Args:
        section: of the recipe, where both are set.
        shown_pixels: counts what the processor makes of something large.
    """
    if min_pixels is None and max_pixels is None:
        return
    if not _counts_pixels(processor, shown_pixels):
        words = {name: value for name, value in processor.to_dict().items() if "size" in name or "patches" in name}
        told = ", ".join(f"{name}: {value}" for name, value in sorted(words.items()) if value)
        kind = "image" if section == "prepare" else "video"
        raise ConfigError(
            f"{section}.min_pixels and max_pixels: the {kind} processor of this checkpoint ({type(processor).__name__}) does "
            f"not resize {kind}s to a number of pixels, but by {told}: leave them out"
        )
    size = processor.size
    low = size["shortest_edge"] if min_pixels is None else min_pixels
    high = size["longest_edge"] if max_pixels is None else max_pixels
    if low > high:
        raise ConfigError(
            f"{section}.min_pixels: {low} pixels at least, but {high} at most; the one that is not set is the checkpoint's own"
        )
    processor.size = _sized(size, low, high)


def _counts_pixels(processor: Any, shown_pixels: Callable[[], int]) -> bool:
    """Tells whether the two edges in its size are numbers of pixels of the whole image: those of a large one follow them."""
    size = getattr(processor, "size", None)
    if size is None or not all(_edge(size, edge) for edge in ("shortest_edge", "longest_edge")):
        return False
    shown = []
    try:
        for limit in _LIMITS:
            processor.size = _sized(size, 1, limit)
            shown.append(shown_pixels())
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return False
    finally:
        processor.size = size
    return _RATIO[0] <= shown[1] / shown[0] <= _RATIO[1]


def _edge(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)


def _sized(size: Any, low: int, high: int) -> Any:
    """Gives a size of the same kind with these edges."""
    return type(size)(shortest_edge=low, longest_edge=high)
