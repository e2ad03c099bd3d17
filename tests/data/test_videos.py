"""Videos in records: the forms of other data sets, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_videos import frames, write_frames

from diffvl.data.problems import Problem
from diffvl.data.records import Record, parse_file
from diffvl.data.samples import messages_of, shown_by
from diffvl.data.table import open_records

ANSWER = {"from": "gpt", "value": "Yes."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("videos")
    (made / "a.mp4").write_bytes(b"not looked into")
    write_frames(made / "b", frames(3, 8, 8))
    frames(1, 8, 8)[0].save(made / "c.png")
    return made


def read(folder: Path, value: dict[str, Any], **settings: Any) -> Record | Problem:
    path = folder / "data.json"
    path.write_text(json.dumps([value]), encoding="utf-8")
    (item,) = parse_file(path, **settings)
    return item


def asked(text: Any, **keys: Any) -> dict[str, Any]:
    return {**keys, "conversations": [{"from": "human", "value": text}, ANSWER]}


FRAMES = ["b/frame_0.png", "b/frame_2.png"]
FORMS: list[tuple[dict[str, Any], list[Any], list[str]]] = [  # record, videos (relative), kinds of the parts
    (asked("<video>\nWhat?", video="a.mp4"), ["a.mp4"], ["video", "text"]),
    (asked("<image>\nWhat?", video="a.mp4"), ["a.mp4"], ["video", "text"]),  # LLaVA-Video
    (asked("What?", video="b"), ["b"], ["video", "text"]),
    (asked("Look: <video>", video=FRAMES), [FRAMES], ["text", "video"]),
    (asked("<video> or <video>?", videos=["a.mp4", "b"]), ["a.mp4", "b"], ["video", "text", "video", "text"]),
    (asked("<video> or <video>?", video=["a.mp4", "b"]), ["a.mp4", "b"], ["video", "text", "video", "text"]),
    (asked("<video> or <video>?", videos=[FRAMES, "b"]), [FRAMES, "b"], ["video", "text", "video", "text"]),
    (asked("<video> or <image>?", video="b", image="c.png"), ["b"], ["video", "text", "image", "text"]),
    (asked("Both?", video="b", image="c.png"), ["b"], ["image", "text", "video", "text"]),
    (asked(r"<video> Is \<video> a tag, and \<image>?", video="b"), ["b"], ["video", "text"]),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": "b"}, {"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": "Yes."},
            ]
        },
        ["b"],
        ["video", "text"],
    ),
    (
        {
            "video": "b",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "So?"}, {"type": "video"}]},
                {"role": "assistant", "content": "Yes."},
            ],
        },
        ["b"],
        ["text", "video"],
    ),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms(number: int, folder: Path):
    value, videos, kinds = FORMS[number]
    record = read(folder, value)
    assert isinstance(record, Record), record
    absolute = [tuple(str(folder / one) for one in video) if isinstance(video, list) else str(folder / video) for video in videos]
    assert list(record.videos) == absolute
    content = messages_of(record)[0]["content"]
    assert [part["type"] for part in content] == kinds
    assert [visual.value for visual, _ in shown_by(record)] == [kind for kind in kinds if kind != "text"]
    table = open_records(folder / "data.json")
    assert table[0] == record and list(table.with_videos) == [0] and table.images_exist()


def test_the_text_keeps_its_tags(folder: Path):
    record = read(folder, FORMS[9][0])
    assert isinstance(record, Record)
    assert messages_of(record)[0]["content"][1]["text"] == " Is <video> a tag, and <image>?"
    plain = read(folder, asked("Is <video> a tag in HTML?"))
    assert isinstance(plain, Record) and messages_of(plain)[0]["content"] == "Is <video> a tag in HTML?"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (asked("What?", video="none.mp4"), "video not found: .*none.mp4"),
        (asked("What?", video=[*FRAMES, "b/frame_9.png"]), "image file not found: .*frame_9.png"),
        (asked("What?", video="a.mp4", videos=["b"]), "both `video` and `videos`: keep one of them"),
        (asked("What?", videos=FRAMES), "`videos` lists images: put the frames of one video under `video`"),
        (asked("What?", video={"path": "a.mp4"}), "`video` must be a path, a list of paths of frames, .* got an object"),
        (asked("What?", video="https://example.org/a.mp4"), "a video is a file, not a URL"),
        (asked("<video> <video>", video="a.mp4"), "0 <image> and 2 <video> in the text, but 0 images and 1 videos"),
        (asked("<image> <video>", video="a.mp4"), "1 <image> and 1 <video> in the text, but 0 images and 1 videos"),
        (asked("<image>", video="a.mp4", image="c.png"), "1 <image> and 0 <video> in the text, but 1 images and 1 videos"),
        (asked("<video>\nWhat?"), "<video> stands there alone: a video stands under the key `video`"),
        (asked("What?", video_path="a.mp4"), "`video_path`: videos stand under the key `video`"),
        (asked("What?", audio="a.wav"), "`audio`: sounds are not supported"),
        (asked([{"type": "video", "video": "b"}], video="a.mp4"), "paths both in `video` and in parts of turns"),
        (asked([{"type": "video", "video": "b", "fps": 2}]), "`fps` is not supported: prepare.video sets"),
    ],
)
def test_what_is_refused(value: dict[str, Any], says: str, folder: Path):
    item = read(folder, value)
    assert isinstance(item, Problem)
    assert re.search(says, item.message), item.message


def test_the_videos_of_a_question_left_out_go_with_it(folder: Path):
    turns = [{"from": "human", "value": "<video>A?"}, ANSWER, {"from": "human", "value": "<video>B?"}]
    record = read(folder, {"videos": ["a.mp4", "b"], "conversations": turns}, unpaired_turns="drop")
    assert isinstance(record, Record) and record.videos == (str(folder / "a.mp4"),)


def test_a_video_that_is_gone_is_noticed(folder: Path, tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([asked("What?", video="a.mp4")]), encoding="utf-8")
    assert open_records(path).images_exist()
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(Exception, match="video not found"):
        open_records(path)
