"""One rule for what an image is, whatever its file or mode: in training, decoding, the exported processor and the report."""

import base64
import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageCms
from shared_fixtures import Loaded

from diffvl.data.images import open_image
from diffvl.data.records import Record, Turn
from diffvl.data.samples import sample_of
from diffvl.decode.answer import ask
from diffvl.errors import DataError
from diffvl.hub import seen_diffvl
from diffvl.hub.seen_diffvl import as_seen, images_as_seen
from diffvl.report.visuals import _image

CASES = Path(__file__).parents[1] / "data" / "cases" / "pictures"
RED, BLUE, BLACK, WHITE = (255, 0, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def near(one: Any, other: Any, by: int = 6) -> bool:
    """Pixels of the same colour, as far as lossy formats keep it."""
    return all(abs(a - b) <= by for a, b in zip(one, other, strict=True))


def upright() -> Image.Image:
    """As the turned files of `cases/`: white, a red corner at the top left, a blue one at the bottom right."""
    image = Image.new("RGB", (60, 40), "white")
    image.paste(RED, (0, 0, 20, 20))
    image.paste(BLUE, (50, 30, 60, 40))
    return image


def saved(image: Image.Image, form: str, **options: Any) -> Image.Image:
    image.save(buffer := io.BytesIO(), form, **options)
    return Image.open(buffer)


# --- files ---------------------------------------------------------------------------------------------------------------

TURNED = sorted(path.name for path in CASES.glob("exif*"))
CLEAR = ["rgba_black_on_transparent.png", "p_trns.png", "gif_trns.gif", "rgba.webp"]


@pytest.mark.parametrize("name", TURNED)
def test_images_are_turned_as_a_viewer_turns_them(name: str) -> None:
    seen = open_image(str(CASES / name), "x.json:1")
    assert (seen.mode, seen.size) == ("RGB", (60, 40))
    assert near(seen.getpixel((4, 4)), RED)
    assert near(seen.getpixel((55, 35)), BLUE)
    assert near(seen.getpixel((55, 4)), WHITE) and near(seen.getpixel((4, 35)), WHITE)


@pytest.mark.parametrize("name", CLEAR)
def test_transparent_images_are_laid_on_white(name: str) -> None:
    seen = open_image(str(CASES / name), "x.json:1")
    assert seen.mode == "RGB" and near(seen.getpixel((0, 0)), WHITE)
    extrema: Any = seen.getextrema()
    low, high = extrema[0]
    assert low < 16 and high > 239  # what is drawn is still there


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_every_orientation(form: str, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {"exif": exif}
    with saved(upright().transpose(Image.Transpose(undo[orientation])), form, **options) as stored:
        seen = as_seen(stored)
    assert seen.tobytes() == upright().tobytes()
    assert as_seen(seen).tobytes() == seen.tobytes() and not seen.getexif()


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "MPO", "AVIF"])
def test_orientation_in_other_formats(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"save_all": True, "append_images": [upright()]} if form == "MPO" else {}
    with saved(upright().transpose(Image.Transpose.ROTATE_90), form, exif=exif, **options) as stored:
        seen = as_seen(stored)
    assert seen.size == (60, 40) and near(seen.getpixel((4, 4)), RED) and near(seen.getpixel((55, 4)), WHITE)


@pytest.mark.parametrize("value", [0, 9, 1])
def test_orientations_that_say_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    with saved(upright(), "PNG", exif=exif) as stored:
        assert as_seen(stored).tobytes() == upright().tobytes()


def test_exif_that_cannot_be_read_says_nothing() -> None:
    image = upright()
    for broken in (b"Exif\0\0no such thing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"):
        image.info["exif"] = broken
        assert as_seen(image).tobytes() == upright().tobytes()


# --- modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha(mode: str) -> None:
    assert as_seen(Image.new(mode, (2, 2))).getpixel((0, 0)) == WHITE
    if mode in ("RGBA", "LA"):
        half = Image.new(mode, (1, 1), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
        assert near(as_seen(half).getpixel((0, 0)), (127, 127, 127), 1)


@pytest.mark.parametrize(
    ("mode", "pixel", "key", "seen"),
    [
        ("RGB", RED, RED, WHITE),
        ("RGB", RED, (0, 0, 1), RED),
        ("L", 7, 7, WHITE),
        ("1", 0, 0, WHITE),
        ("P", 3, 3, WHITE),
        ("P", 3, bytes([255, 255, 255, 0]), WHITE),
        ("I;16", 0, 0, WHITE),
    ],
)
def test_transparent_colours(mode: str, pixel: Any, key: Any, seen: tuple[int, int, int]) -> None:
    image = Image.new(mode, (2, 2), pixel)
    image.info["transparency"] = key
    assert as_seen(image).getpixel((1, 1)) == seen
    assert image.info["transparency"] == key and image.mode == mode  # the caller's own is left alone


def deep(mode: str, *values: float) -> Image.Image:
    """One line of pixels."""
    code = {"I": "i", "F": "f", "I;16": "<H", "I;16B": ">H"}[mode]
    ends, letter = (code[0], code[1]) if len(code) == 2 else ("=", code)
    return Image.frombytes(mode, (len(values), 1), struct.pack(f"{ends}{len(values)}{letter}", *values))


@pytest.mark.parametrize(
    ("mode", "values", "seen"),
    [
        ("I;16", (0, 257, 128 * 257, 65535), (0, 1, 128, 255)),
        ("I;16", (0, 100, 255), (0, 0, 1)),  # dark, but 16 bits deep
        ("I;16B", (0, 128 * 257, 65535), (0, 128, 255)),
        ("I", (0, 7, 255), (0, 7, 255)),
        ("I", (0, 128 * 257, 65535), (0, 128, 255)),
        ("F", (0.0, 0.5, 1.0), (0, 128, 255)),
        ("F", (0.0, 7.4, 255.0), (0, 7, 255)),
        ("F", (0.0, 128 * 257.0, 65535.0), (0, 128, 255)),
        ("F", (0.0, 0.0), (0, 0)),
    ],
)
def test_deep_greyscale_is_scaled(mode: str, values: tuple[float, ...], seen: tuple[int, ...]) -> None:
    image = as_seen(deep(mode, *values))
    assert [image.getpixel((place, 0)) for place in range(len(values))] == [(grey,) * 3 for grey in seen]


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("I", (-1, 5)),
        ("I", (0, 65536)),
        ("F", (0.0, float("nan"))),
        ("F", (0.0, float("inf"))),
        ("F", (-0.1, 1.0)),
        ("F", (0.0, 1e6)),
    ],
)
def test_numbers_that_are_no_brightness_are_refused(mode: str, values: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not say what is black and what is white: save it with 8 or 16 bits"):
        as_seen(deep(mode, *values))
    deep(mode, *values).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"x\.json:3: image .*a\.tiff cannot be read \(values from "):
        open_image(str(tmp_path / "a.tiff"), "x.json:3")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode: str) -> None:
    black = Image.new("RGB", (3, 2)).convert("RGB" if mode == "RGBX" else mode)
    seen = as_seen(black if mode != "RGBX" else Image.new("RGBX", (3, 2)))
    assert (seen.mode, seen.size) == ("RGB", (3, 2)) and near(seen.getpixel((0, 0)), BLACK)


def test_lab() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(upright(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert lab is not None and near(as_seen(lab).getpixel((4, 4)), RED, 12)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "I;16", "I;16B", "I", "F", "P"])
def test_a_large_image_is_seen_in_bands_as_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, bytes_a_pixel = (7, 9), {"RGBA": 4, "P": 1}.get(mode, 2)
    drawn = random.Random(0).randbytes(7 * 9 * bytes_a_pixel)
    if mode in ("I", "F"):
        drawn = struct.pack(f"=63{mode.lower()}", *(1000 * place for place in range(63)))
    image = Image.frombytes(mode, size, drawn)
    if mode == "P":
        image.putpalette(random.Random(1).randbytes(768))
        image.info["transparency"] = bytes(range(256))
    whole = as_seen(image)
    monkeypatch.setattr(seen_diffvl, "_BAND", 15)
    assert as_seen(image).tobytes() == whole.tobytes() and len(set(whole.tobytes())) > 20


def test_png_files_of_16_bits() -> None:
    """Written by hand: PIL writes none with a transparent colour."""

    def png(kind: int, row: bytes, *chunks: tuple[bytes, bytes]) -> Image.Image:
        width = len(row) // (6 if kind == 2 else 2)
        parts = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, 16, kind, 0, 0, 0)), *chunks]
        parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
        framed = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
        return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(framed)))

    grey = struct.pack(">3H", 0, 128 * 257, 65535)
    assert [as_seen(png(0, grey)).getpixel((place, 0)) for place in range(3)] == [BLACK, (128, 128, 128), WHITE]
    assert as_seen(png(0, grey, (b"tRNS", struct.pack(">H", 0)))).getpixel((0, 0)) == WHITE
    colour = struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)
    keyed = as_seen(png(2, colour, (b"tRNS", struct.pack(">3H", 65535, 0, 0))))
    assert [keyed.getpixel((place, 0)) for place in range(2)] == [WHITE, (0, 0, 255)]


def test_an_animation_shows_its_first_frame() -> None:
    with saved(upright(), "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40), "blue")]) as stored:
        assert near(as_seen(stored).getpixel((4, 4)), RED)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"an image of {size[0]} x {size[1]} pixels has nothing to show"):
        as_seen(Image.new("RGB", size))


# --- damaged files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_files_cut_short(form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright().save(tmp_path / "a", form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    whole = (tmp_path / "a").read_bytes()
    for share in (0.0, 0.1, 0.5):
        (tmp_path / "a").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"x\.json:3: image .*/a cannot be read \(.*\); replace it or leave it out") as caught:
            open_image(str(tmp_path / "a"), "x.json:3")
        assert caught.value.kind == "image cannot be read"


def test_images_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upright().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1300)  # PIL warns from here and refuses from twice as many
    assert open_image(str(tmp_path / "a.png"), "x.json:3").size == (60, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"cannot be read \(Image size \(2400 pixels\) exceeds limit"):
        open_image(str(tmp_path / "a.png"), "x.json:3")


@pytest.mark.parametrize("name", ["https://example.org/a.png", "data:image/png;base64,iVBOR"])
def test_images_are_not_fetched(name: str) -> None:
    with pytest.raises(DataError, match="is no file: images are not fetched, give the path of a file"):
        open_image(name, "--image")
    with pytest.raises(ValueError, match="is no file: images are not fetched"):
        images_as_seen([name])


# --- the four places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exif6.jpg", "exif5.jpg", "rgba_black_on_transparent.png", "p_trns.png"])
def test_one_image_in_all_places(name: str, loaded: Callable[[str], Loaded], tmp_path: Path) -> None:
    """Training, decoding, the exported processor's ways in and the report: the pixels are those of `as_seen`."""
    _, processor = loaded("llama")
    path = CASES / name
    seen = open_image(str(path), "x")
    expected = processor.image_processor(images=[seen], return_tensors="pt")["pixel_values"]

    def chat(**image: Any) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "What?"}]}

    record = Record("r", (str(path),), (Turn("user", "<image>\nWhat?"), Turn("assistant", "This.")), "x.json:1")
    found = [(sample_of(record, 0, processor).pixels or {})["pixel_values"]]
    encode: dict[str, Any] = {"tokenize": True, "add_generation_prompt": True}
    text = processor.apply_chat_template([chat()], add_generation_prompt=True)
    with Image.open(path) as raw:
        ways: list[tuple[Any, dict[str, Any]]] = [
            ([ask("What?", [path])], {}),
            ([chat(image=raw)], {}),
            ([chat(image=str(path))], {}),
            ([chat(path=str(path))], {}),
            ([chat()], {"images": [raw]}),
        ]
        for messages, more in ways:
            found.append(processor.apply_chat_template(messages, **encode, **more)["pixel_values"])
        for images in (raw, [raw], [[raw]], [str(path)], str(path)):
            found.append(processor(images=images, text=[text], return_tensors="pt")["pixel_values"])
    for pixels in found:
        assert pixels is not None and torch.equal(pixels, expected)
    embedded = re.search(r'src="data:image/jpeg;base64,([^"]+)"', _image(str(path)))
    assert embedded is not None
    with Image.open(io.BytesIO(base64.b64decode(embedded[1]))) as shown:
        assert shown.size == seen.size
        for place in ((4, 4), (55, 4), (4, 35), (30, 20)):
            assert near(shown.getpixel(place), seen.getpixel(place), 60)


def test_arrays_and_tensors_are_pixels_already(loaded: Callable[[str], Loaded]) -> None:
    _, processor = loaded("llama")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], add_generation_prompt=True
    )
    array = numpy.asarray(upright())
    expected = processor(images=[upright()], text=[text], return_tensors="pt")["pixel_values"]
    for given in (array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        torch.testing.assert_close(processor(images=[given], text=[text], return_tensors="pt")["pixel_values"], expected)
    for shape in ((40, 60), (40, 60, 4), (1, 40, 60)):
        with pytest.raises(ValueError, match="is no RGB image: expected "):
            processor(images=[numpy.zeros(shape, dtype="uint8")], text=[text], return_tensors="pt")
