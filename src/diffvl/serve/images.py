"""The images of a request: data URLs, and addresses on the net where the server allows it -> RGB images as they are seen.

Nothing of this machine is read: an image is in the request, or is fetched by `remote.py` before any is opened. One is refused by
what its header says before it is decoded, so that a small file cannot become gigabytes.
"""

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, UnidentifiedImageError

from diffvl.hub.seen_diffvl import as_seen
from diffvl.serve.errand import Errand
from diffvl.serve.limits import Limits
from diffvl.serve.messages import ImageSource
from diffvl.serve.refusals import short, wrong

# Formats that browsers show: the others bring programs of their own along, or archives.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# What base64 has that a URL may spell otherwise. No other signs: a body that is unquoted whole takes a hundred times its memory.
SPELLED = {code: sign for sign in "+/=" for code in (f"%{ord(sign):02X}", f"%{ord(sign):02x}")}
# What Pillow's readers raise at damaged files.
FAULTS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, MemoryError, RuntimeError, TypeError),
    *(AttributeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)

Fetch = Callable[[str, int, Errand], bytes]


def fetch_images(sources: Sequence[ImageSource], limits: Limits, fetch: Fetch | None, errand: Errand) -> dict[str, bytes]:
    """The bytes of those images that are addresses on the net, by where they stand in the request. Together they may have as many
    as a request that brings its images along.

    Args:
        fetch: gets the bytes of an address, at most so many, on the errand, or raises ValueError; None where that is not allowed.
    Raises:
        Refusal: naming the image that does not come.
    """
    fetched, left = {}, limits.body_bytes
    for source in sources:
        if source.is_on_the_net:
            fetched[source.param] = _fetched(source, left, fetch, errand)
            left -= len(fetched[source.param])
    return fetched


def _fetched(source: ImageSource, most_bytes: int, fetch: Fetch | None, errand: Errand) -> bytes:
    if fetch is None:
        raise wrong(
            source.param,
            f"{source.param} is an address on the net, and this server fetches none: send the image itself as a data URL",
            "image_url_not_allowed",
        )
    try:
        errand.require()
        return fetch(source.url, most_bytes, errand)
    except ValueError as error:
        raise wrong(source.param, f"{source.param} cannot be fetched: {error}", "invalid_image_url") from error


def open_images(sources: Sequence[ImageSource], limits: Limits, fetched: Mapping[str, bytes]) -> dict[str, Image.Image]:
    """The images by where they stand in the request.

    Args:
        fetched: what `fetch_images` gave.
    Raises:
        Refusal: naming the image that is wrong.
    """
    images, pixels = {}, 0
    for source in sources:
        image = _opened(source, limits.pixels - pixels, limits, fetched)
        pixels += image.width * image.height
        images[source.param] = image
    return images


def _opened(source: ImageSource, pixels_left: int, limits: Limits, fetched: Mapping[str, bytes]) -> Image.Image:
    data = fetched[source.param] if source.is_on_the_net else _bytes_of(source)
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > pixels_left:
                raise wrong(
                    source.param,
                    f"{source.param} has {image.width} x {image.height} pixels; the images of a request have at most "
                    f"{limits.pixels} together: make it smaller",
                    "image_too_large",
                )
            return as_seen(image)
    except FAULTS as error:
        raise wrong(
            source.param,
            f"{source.param} is no image that can be read ({_told(error)}); expected JPEG, PNG, WebP or GIF",
            "invalid_image",
        ) from error


def _told(error: BaseException) -> str:
    """What went wrong, without the addresses of objects in this process."""
    return (
        "of no format that is known here"
        if isinstance(error, UnidentifiedImageError)
        else short(str(error) or type(error).__name__)
    )


def _bytes_of(source: ImageSource) -> bytes:
    """What a data URL holds."""
    if source.scheme != "data":
        raise wrong(
            source.param,
            f"{source.param} is {short(source.url)!r}: expected a data URL, data:image/png;base64,...; files of this machine are "
            "not read",
            "invalid_image_url",
        )
    head, comma, body = source.url.partition(",")
    kind = head[len("data:") :].lower()
    if not comma:
        raise wrong(
            source.param, f"{source.param} is a data URL without a comma: expected data:image/png;base64,...", "invalid_image_url"
        )
    if not kind.startswith("image/"):
        raise wrong(
            source.param,
            f"{source.param} is a data URL of the type {short(kind)!r}: expected data:image/...",
            "invalid_image_url",
        )
    if not kind.endswith(";base64"):
        raise wrong(
            source.param, f"{source.param} is a data URL without ;base64: expected data:image/png;base64,...", "invalid_image_url"
        )
    try:
        for spelled, sign in SPELLED.items():
            body = body.replace(spelled, sign)
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong(source.param, f"{source.param} is no base64 ({error})", "invalid_image_url") from error
    if not data:
        raise wrong(source.param, f"{source.param} is empty", "invalid_image_url")
    return data
