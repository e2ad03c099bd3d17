"""What lmms-eval's tasks give -> the chats of `diffvl generate` and of training data."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffvl.decode.answer import user_message
from diffvl.errors import DataError, UsageError
from diffvl.evaluation.benchmark_chats import chat_of_messages, chat_of_text

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (6, 8), "blue")


def shape(chat: list[dict[str, Any]]) -> list[Any]:
    """Roles and parts, an image as its size."""
    return [
        (message["role"], [part["text"] if part["type"] == "text" else part[part["type"]] for part in message["content"]])
        if not isinstance(message["content"], str)
        else (message["role"], message["content"])
        for message in chat
    ]


def seen(chat: list[dict[str, Any]]) -> list[Any]:
    return [(role, [part.size if isinstance(part, Image.Image) else part for part in parts]) for role, parts in shape(chat)]


@pytest.mark.parametrize("images", [[], [RED], [RED, BLUE]])
def test_images_stand_where_generate_puts_them(images: list[Image.Image]):
    """In front, each on a line of its own, through both interfaces."""
    expected = seen([user_message("What is it?", images)])
    assert seen(chat_of_text("What is it?", images, "t")) == expected
    content = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": "What is it?"}]
    assert seen(chat_of_messages([{"role": "user", "content": content}], "t")) == expected


def test_markers_and_messages_say_where_images_stand():
    marked = "This <image> and that <image>?"
    assert seen(chat_of_text(marked, [RED, BLUE], "t")) == seen([user_message(marked, [RED, BLUE])])
    assert seen(chat_of_text(marked, [RED], "t")) == [("user", [(8, 6), f"\n{marked}"])], "markers without images are text"
    content = [{"type": "text", "text": "This "}, {"type": "image", "url": RED}, {"type": "text", "text": " is?"}]
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    expected = [("system", ["Be brief."]), ("user", ["This ", (8, 6), " is?"])]
    assert seen(chat_of_messages(told, "t")) == expected


def test_images_may_be_paths_bytes_and_of_any_mode(tmp_path: Path):
    clear = Image.new("RGBA", (5, 4), (0, 0, 0, 0))
    file = BytesIO()
    clear.save(file, "PNG")
    clear.save(tmp_path / "clear.png")
    for visual in (clear, file.getvalue(), {"bytes": file.getvalue(), "path": None}, str(tmp_path / "clear.png")):
        image = chat_of_text("?", [visual], "t")[0]["content"][0]["image"]
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255), "as in training data: on white"


def test_videos_are_named(tmp_path: Path):
    assert shape(chat_of_text("?", ["a.mp4"], "t")) == [("user", ["a.mp4", "\n?"])]
    content = [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "?"}]
    assert shape(chat_of_messages([{"role": "user", "content": content}], "t")) == [("user", ["a.mp4", "\n?"])]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "audio", "url": "a.wav"}, "shows a part of the type 'audio'"),
        ({"type": "video", "url": "a.mp4", "start_time": 3.0}, "of the type 'video'"),
        ({"type": "image", "url": 5}, "of the type int"),
        ({"type": "image", "url": b"no image"}, "an image cannot be read"),
        ({"type": "image", "url": "absent.png"}, "absent.png does not exist"),
    ],
)
def test_what_cannot_be_shown_names_the_question(part: dict[str, Any], says: str):
    with pytest.raises((UsageError, DataError)) as error:
        chat_of_messages([{"role": "user", "content": [part]}], "task t, document 3")
    assert says in str(error.value) and "task t, document 3" in str(error.value)
