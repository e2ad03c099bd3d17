"""The images of a request: what is seen, and that nothing in one can do harm."""

import io
import random
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image, features

from diffvl.serve.images import open_images
from diffvl.serve.limits import Limits
from diffvl.serve.messages import ImageSource, conversation_of
from diffvl.serve.refusals import Refusal
from tools.serve_mistakes import bomb, data_url

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", *(["AVIF"] if features.check("avif") else [])]


def seen(*files: bytes, pixels: int = 10_000) -> list[Image.Image]:
    sources = [ImageSource(f"image {number}", data_url(data)) for number, data in enumerate(files)]
    return list(open_images(sources, Limits(pixels=pixels), {}).values())


def written(kind: str, mode: str = "RGB", **more: object) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert(mode).save(out, kind, **more)
    return out.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_refused_or_seen_and_nothing_else(kind: str):
    drawn, ends = random.Random(0), set()
    for _ in range(60):
        data = bytearray(written(kind, "RGB" if kind != "GIF" else "P"))
        for _ in range(drawn.choice([1, 3, 20])):
            data[drawn.randrange(min(len(data), drawn.choice([60, 100_000])))] = drawn.randrange(256)
        try:
            ends.add(seen(bytes(data))[0].mode)
        except Refusal as refusal:
            assert refusal.status == 400 and refusal.param == "image 0" and len(refusal.message) < 300
            ends.add("refused")
    assert "refused" in ends


def test_an_image_is_seen_as_anywhere_else():
    """Turned as its orientation says, on white where it is transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = seen(written("JPEG", exif=exif))[0]
    assert turned.size == (30, 40) and turned.mode == "RGB"
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(out, "PNG")
    assert seen(out.getvalue())[0].getpixel((0, 0)) == (255, 255, 255)


def test_pixels_are_counted_over_a_request_before_they_are_decoded():
    one = written("PNG")
    assert len(seen(one, one, pixels=2400)) == 2
    with pytest.raises(Refusal, match=r"image 1 has 40 x 30 pixels; the images of a request have at most 2399 together"):
        seen(one, one, pixels=2399)
    for sides in ((60_000, 60_000), (20_000, 20_000), (4000, 4000)):
        with pytest.raises(Refusal, match="pixels|cannot be|can be read"):
            seen(bomb(*sides))


def test_base64_may_be_spelled_for_a_url_in_its_own_signs_only():
    """What is unquoted sign by sign takes a hundred times its size in memory."""
    head, _, body = data_url(written("PNG")).partition(",")
    assert {"+", "/", "="} <= set(body)
    for spelled in (body, quote(body, safe=""), body.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d")):
        source = ImageSource("image 0", f"{head},{spelled}")
        assert open_images([source], Limits(), {})["image 0"].size == (40, 30)
    with pytest.raises(Refusal, match="is no base64"):
        open_images([ImageSource("image 0", f"{head},{''.join(f'%{ord(sign):02X}' for sign in body)}")], Limits(), {})


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def texts(*said: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in said]


def layout(*parts: str) -> str:
    """How the parts of a question are laid out: `i` an image, anything else text."""
    content = [IMAGE if part == "i" else texts(part)[0] for part in parts]
    (_, laid), *_ = conversation_of([{"role": "user", "content": content}], Limits()).turns
    return "".join("[i]" if isinstance(part, ImageSource) else part for part in laid)


def test_images_on_either_side_of_a_text_stand_before_it_as_in_training():
    assert layout("What?") == "What?" and layout("i") == "[i]"
    assert layout("i", "What?") == layout("What?", "i") == "[i]\nWhat?"
    assert layout("i", "i", "Which ", "one?") == layout("Which ", "one?", "i", "i") == "[i]\n[i]\nWhich one?"
    (_, said), (_, shown) = conversation_of(
        [
            {"role": "system", "content": [{"type": "text", "text": letter} for letter in "abc"]},
            {"role": "user", "content": [*texts("1", "2"), IMAGE, IMAGE, *texts("3", "4"), IMAGE]},
        ],
        Limits(),
    ).turns
    assert said == ("abc",) and [part if isinstance(part, str) else "i" for part in shown] == ["12", "i", "i", "34", "i"]
    assert layout("First:", "i", "second:", "i") == "First:[i]second:[i]" and layout("i", "or", "i") == "[i]or[i]"


class Unread(str):
    """A text whose letters nobody may ask for one by one."""

    def __iter__(self) -> Any:
        raise AssertionError("it was read letter by letter")


def test_a_text_is_not_read_letter_by_letter_before_its_length_is_known_to_be_right():
    """Of twenty million bytes that takes the event loop seconds, in which nobody else is heard."""
    limits = Limits()
    messages = [{"role": "user", "content": Unread("\u00fc" * (limits.letters + 1))}]
    with pytest.raises(Refusal, match=f"have {limits.letters + 1} letters") as refusal:
        conversation_of(messages, limits)
    assert refusal.value.code == "context_length_exceeded"
    for text, half in (("\u00fc\ud83d", "ud83d"), ("\udc00 is", "udc00"), ("\ud83d" * 5, "ud83d")):
        with pytest.raises(Refusal, match=f"{half}', half of a surrogate pair") as refusal:
            conversation_of([{"role": "user", "content": Unread(text)}], limits)
        assert refusal.value.param == "messages[0].content"
    (_, parts), *_ = conversation_of([{"role": "user", "content": "\U0001f600 \u00fc"}], limits).turns
    assert parts == ("\U0001f600 \u00fc",)
