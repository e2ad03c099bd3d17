"""Records as people bring them: every key that another trainer acts on is used or refused by name, nothing is left out in
silence. `cases/` holds the inputs of a field test; what each came to stands here."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from diffvl.data.problems import Problem
from diffvl.data.records import Record, Turn, iterate_records, parse_file
from diffvl.errors import DataError

CASES = Path(__file__).with_name("cases") / "records"
GOOD = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
ASKED = (Turn("user", "Hi"), Turn("assistant", "Yes."))


def parsed(folder: Path, *objects: Any, **reading: Any) -> list[Record | Problem]:
    """One object per line, with `a.png` and `b.png` beside the file."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"only its presence counts here")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
    return list(parse_file(path, **reading))


def one(folder: Path, value: Any, **reading: Any) -> Record | Problem:
    (item,) = parsed(folder, value, **reading)
    return item


def turns_of(item: Record | Problem) -> list[tuple[str, str]]:
    assert isinstance(item, Record), item
    return [(turn.role, turn.text) for turn in item.turns]


def chat(*messages: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"messages": list(messages), **keys}


def user(text: Any = "Hi", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def answer(text: Any = "Yes.", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


# --- the field test ------------------------------------------------------------------------------------------------------

ANSWERED = [("user", "<image>\nWhat is it?"), ("assistant", "A red dot.")]
IMAGE_KEY = "images stand under the key `image` (a path or a list of paths); rename it or remove it"
OUTCOMES: dict[str, list[Any]] = {  # turns, or what the problem says
    "first_gpt": [ANSWERED, "turn 1 is from assistant (gpt): .*; data.unpaired_turns=drop leaves such turns out"],
    "image_empty_string": [ANSWERED, [("user", "What is it?"), ("assistant", "A red dot.")]],
    "image_url": ["an image is a file, not a URL: https://example.org/a.png; fetch it and give the path of its file"],
    "key_img_misspelt": [f"`{key}` is 'a.png': {IMAGE_KEY}" for key in ("img", "image_path", "Image")],
    "key_tools": ["`tools`: calls of tools are not supported: leave such records out, or write the calls as text"],
    "key_top_level_system": [[("system", "Answer in French."), *ANSWERED]],
    "key_video": [ANSWERED, "video not found: .*clip.mp4 (relative paths start at the data file's folder"],
    "marker_numbered": ["turn 1: <image_1> looks like an image, but the marker of an image is <image>, one for each"],
    "marker_svg_answer": [ANSWERED, "turn 2: <image> in a turn of assistant (gpt).* write \\<image> (in JSON: \\\\<image>)"],
    "turn_loss_false": [[("user", "Hi"), ("assistant", "BAD DRAFT"), ("user", "Again"), ("assistant", "Good.")]],
    "turn_train_false": [[("user", "Hi"), ("assistant", "BAD DRAFT"), ("user", "Again"), ("assistant", "Good.")]],
    "turn_tool_calls": ["turn 2: `tool_calls`: calls of tools are not supported"],
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_cases_of_the_field_test(name: str) -> None:
    items = list(parse_file(CASES / name / "data.json"))
    assert len(items) == len(OUTCOMES[name])
    for item, outcome in zip(items, OUTCOMES[name], strict=True):
        if isinstance(outcome, list):
            assert turns_of(item) == outcome
            assert isinstance(item, Record) and all(turn.trained for turn in item.turns) == (not name.startswith("turn_"))
        else:
            assert isinstance(item, Problem)
            place = 0
            for part in outcome.split(".*"):
                place = item.message.index(part, place) + len(part)
            assert item.kind != "other"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "file_dict_of_records/data.json",
            ":1: holds an object whose values are the records (the first is `0`): write them as a",
        ),
        ("file_json_named_jsonl/data.jsonl", ":1: holds one list: name it data.json"),
    ],
)
def test_files_of_the_field_test(name: str, says: str) -> None:
    """One message, not one for every line."""
    with pytest.raises(DataError) as caught:
        list(parse_file(CASES / name))
    assert str(caught.value).startswith(f"{CASES / name}{says}")


def test_the_marked_draft_alone_is_not_trained_on() -> None:
    for name in ("turn_loss_false", "turn_train_false"):
        (record,) = iterate_records(CASES / name / "data.json")
        assert [turn.trained for turn in record.turns] == [True, False, True, True]


# --- keys of a record ----------------------------------------------------------------------------------------------------

REFUSED_KEYS: dict[str, Any] = {
    **{key: "clip.mp4" for key in ("video_path", "Video", "audio", "speech")},
    **{key: ["clip.mp4"] for key in ("audios", "video_files")},
    **{key: [{"name": "f"}] for key in ("tools", "functions", "tool_calls")},
    **{key: {"role": "assistant", "content": "No."} for key in ("chosen", "rejected")},
    **{"function_call": {"name": "f"}, "tools ": "[{}]", "toolChoice": "auto"},
    **{"rejected_response": "No.", "kto_tag": True, "label": False, "rejected_images": ["a.png"]},
    **{"chat_template_kwargs": {"thinking": True}, "documents": [{"text": "x"}], "add_generation_prompt": True},
    **{"train_on_input": True, "train_on_inputs": True, "drop_system_message": True},
    **{"weight": 0.5, "loss": False, "train": False, "loss_scale": 2.0, "masked": True},
    **{"system_prompt": "S", "System": "S", "systm": "S", "min_pixels": 3, "input_ids": [1, 2]},
    **{"objects": {"ref": ["dog"], "bbox": [[0, 0, 1, 1]]}, "reasoning": "Well,"},
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_that_others_act_on_are_refused_by_name(key: str, tmp_path: Path) -> None:
    item = one(tmp_path, {"conversations": GOOD, key: REFUSED_KEYS[key]})
    assert isinstance(item, Problem) and item.message.startswith(f"`{key}`"), item
    assert item.kind == "key not supported"


SAYS_NOTHING: dict[str, Any] = {
    **{"video": None, "videos": [], "audio": "", "tools": "[]", "functions": None, "rejected": {}, "img": float("nan")},
    **{"system": "", "image": "", "images": [""], "train_on_input": False, "weight": 1, "loss": True, "masked": False},
    **{"id": None, "chat_template_kwargs": {}, "image_path": None},
}


@pytest.mark.parametrize("key", SAYS_NOTHING)
def test_values_that_say_nothing_are_no_keys(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = one(tmp_path, {"conversations": GOOD, key: SAYS_NOTHING[key]})
    assert isinstance(item, Record) and (item.images, item.turns) == ((), ASKED)
    assert caplog.text == ""


def test_nan_is_no_image(tmp_path: Path) -> None:
    """What a table with missing values is saved as."""
    item = one(tmp_path, {"conversations": GOOD, "image": float("nan"), "id": float("nan")})
    assert isinstance(item, Record) and item.images == () and item.id == "train.jsonl:1"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, "a.png") for key in ("img", "IMG", "image_path", "Image", "IMAGES", "image_paths", "image_file", "imgae")],
        *[(key, "a.png") for key in ("picture", "photo_path", "pic", "image_name", "screenshot", "image-url")],
        *[(key, ["a.png", "b.png"]) for key in ("imgs", "image_files", "frames")],
        *[("img", "000123"), ("image_bytes", {"bytes": "iVBOR", "path": None}), ("image_url", "https://example.org/x")],
        *[("file", "a.jpg"), ("file_name", "x/a.JPEG"), ("url", "https://example.org/a.webp"), ("media", ["a.png"])],
        *[("pic_path", "a"), ("jpg", "a"), ("media", {"type": "image", "file": "a.png"}), ("files", [{"path": "a.png"}])],
    ],
)
def test_an_image_under_another_key_is_a_mistake(key: str, value: Any, tmp_path: Path) -> None:
    item = one(tmp_path, {"conversations": GOOD, key: value})
    assert isinstance(item, Problem) and item.kind == "image under another key"
    assert item.message.startswith(f"`{key}` is ") and "the key `image`" in item.message and len(item.message) < 250


@pytest.mark.parametrize(
    ("key", "value", "passes"),
    [
        ("image_path", "elsewhere/a.png", True),
        ("image_url", "https://example.org/b.png", True),
        ("image_id", 12, True),
        ("image_width", 640, True),
        ("image_caption", "A dog.png", True),
        ("num_images", 1, True),
        ("image2", "b.png", False),
        ("depth_image", "b.png", False),
    ],
)
def test_another_image_beside_the_record_s_own(key: str, value: Any, passes: bool, tmp_path: Path) -> None:
    item = one(tmp_path, {"image": "a.png", "conversations": GOOD, key: value})
    assert isinstance(item, Record if passes else Problem)


def test_unknown_keys_are_told_once_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"id": "x", "source": "web", "dataset": "d", "model": "m", "task": "vqa", "metadata": {"a": 1}}
    unknown = {"objects": [{"cell": "top left"}], "kind": "counting"}
    marked = [{**GOOD[0], "emotion": "calm"}, {**GOOD[1], "emotion": "glad"}]
    records = [{"conversations": GOOD}, *[{"conversations": GOOD, **known, **unknown}] * 3, {"conversations": marked}]
    assert all(isinstance(item, Record) for item in parsed(tmp_path, *records))
    (entry,) = caplog.records
    assert entry.levelno == logging.WARNING
    assert entry.getMessage() == (
        f"{tmp_path}/train.jsonl: keys that are not used: `objects` (3 records, first in train.jsonl:2), "
        "`kind` (3 records, first in train.jsonl:2), `emotion` of a turn (1 record, in train.jsonl:5)"
    )


def test_many_unknown_keys_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parsed(tmp_path, {"conversations": GOOD, **{f"key{number}": 1 for number in range(50)}})
    assert caplog.records[0].getMessage().endswith("`key19` (1 record, in train.jsonl:1), and 30 more")


def test_values_of_any_depth(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    assert isinstance(one(tmp_path, {"conversations": GOOD, "objects": deep}), Record)
    for key in ("image", "id", "conversations", "video", "weight", "img", "system"):
        assert isinstance(one(tmp_path, {"conversations": GOOD, key: deep}), Problem)


def test_system_beside_the_turns(tmp_path: Path) -> None:
    assert turns_of(one(tmp_path, {"system": "S", "conversations": GOOD})) == [
        ("system", "S"),
        ("user", "Hi"),
        ("assistant", "Yes."),
    ]
    both = one(tmp_path, {"system": "S", "conversations": [{"from": "system", "value": "T"}, *GOOD]})
    assert isinstance(both, Problem) and both.message == "both `system` and a system turn: keep one of them"
    item = one(tmp_path, {"system": ["S"], "conversations": GOOD})
    assert isinstance(item, Problem) and item.message == "`system` must be a string, got a list"
    # Turns are counted as the file has them.
    item = one(tmp_path, {"system": "S", "conversations": [*GOOD, GOOD[1]]})
    assert isinstance(item, Problem) and item.message.startswith("turn 3 is from assistant (gpt), expected user")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            {"prompt": "Hi", "completion": "Yes."},
            "this record has `prompt` and `completion`: write the prompt and the completion",
        ),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, "this record has `chosen` and `rejected`: preference pairs"),
        ({"instruction": "Hi", "input": "", "output": "Yes."}, "this record has `instruction` and `output`: write the"),
        ({"query": "Hi", "response": "Yes."}, "this record has `query` and `response`"),
        ({"text": "Hi"}, "this record has `text`: plain text without turns"),
        ({"conversation": GOOD}, "this record has `conversation`: rename it if that is where the turns are"),
        ({"Messages": GOOD}, "this record has `Messages`: rename it"),
    ],
)
def test_records_of_another_form(value: Any, says: str, tmp_path: Path) -> None:
    item = one(tmp_path, value)
    assert isinstance(item, Problem) and says in item.message
    assert item.kind in ("no turns", "key not supported")


# --- keys of a turn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("tool_calls", [{"id": "x"}]), ("function_call", {"name": "f"}), ("refusal", "No."), ("audio", {"id": "x"})],
        *[("name", "Ann"), ("reasoning_content", "Well,"), ("thinking", "Well,"), ("images", ["a.png"]), ("image", "a.png")],
        *[("videos", ["c.mp4"]), ("weight", 0.5), ("weight", "0"), ("loss_scale", 2), ("loss", "no"), ("train", [1])],
        *[("train_detail", [{"begin_offset": 0}]), ("rejected", "No."), ("prefix", True), ("recipient", "browser")],
    ],
)
def test_keys_of_a_turn_that_others_act_on(key: str, value: Any, tmp_path: Path) -> None:
    item = one(tmp_path, chat(user(), answer(**{key: value})))
    assert isinstance(item, Problem) and item.message.startswith(f"turn 2: `{key}`"), item
    assert item.kind in ("key not supported", "image under another key")


def test_a_turn_without_text_but_with_a_call_says_so(tmp_path: Path) -> None:
    item = one(tmp_path, chat(user(), answer(None, tool_calls=[{"id": "x"}])))
    assert isinstance(item, Problem) and "`tool_calls`" in item.message
    dumped = {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    assert turns_of(one(tmp_path, chat(user(), answer(**dumped)))) == [("user", "Hi"), ("assistant", "Yes.")]


@pytest.mark.parametrize("role", ["function_call", "observation", "tool", "function", "developer"])
def test_roles_that_others_know(role: str, tmp_path: Path) -> None:
    item = one(tmp_path, {"conversations": [*GOOD, {"from": role, "value": "{}"}]})
    assert isinstance(item, Problem) and item.message.startswith(f"turn 3: unknown role '{role}'")
    assert ("write it as system" if role == "developer" else "calls of tools are not supported") in item.message


MARKS: list[dict[str, Any]] = [
    *[{"loss": False}, {"train": False}, {"weight": 0}, {"weight": 0.0}, {"loss_scale": 0}, {"masked": True}, {"mask": 1}],
    *[{"loss_mask": 0}, {"trainable": False}, {"Weight": 0}, {"loss": False, "weight": 0}],
]


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_marks_of_turns_that_are_not_trained_on(mark: dict[str, Any], tmp_path: Path) -> None:
    for turns in (
        chat(user(), answer("Draft.", **mark), user("Again"), answer("Good.")),
        {"conversations": [GOOD[0], {"from": "gpt", "value": "Draft.", **mark}, *GOOD]},
    ):
        item = one(tmp_path, turns)
        assert isinstance(item, Record) and [turn.trained for turn in item.turns] == [True, False, True, True]
    other = {key: type(value)(not value) for key, value in mark.items()}
    item = one(tmp_path, chat(user(), answer(**other)))
    assert isinstance(item, Record) and item.turns == ASKED
    nothing = one(tmp_path, chat(user(**mark), answer(**mark)))
    assert isinstance(nothing, Problem) and nothing.kind == "nothing to train on"
    assert nothing.message.startswith("no answer to train on")


def test_marks_that_cannot_be_followed(tmp_path: Path) -> None:
    item = one(tmp_path, chat(user(train=True), answer()))
    assert isinstance(item, Problem) and item.message.startswith("turn 1: `train` asks to train on a turn that is no answer")
    item = one(tmp_path, chat(user(), answer(train=True, loss=False)))
    assert isinstance(item, Problem) and "`train` and `loss` contradict each other" in item.message
    item = one(tmp_path, chat(user(), answer(weight=0.5)))
    assert isinstance(item, Problem) and "`weight` is 0.5: an answer is trained on or not" in item.message


# --- content as parts ----------------------------------------------------------------------------------------------------

TEXT = {"type": "text", "text": "What?"}
PLACE = {"type": "image"}


@pytest.mark.parametrize(
    ("content", "keys", "text", "images"),
    [
        ([TEXT], {}, "What?", []),
        ([PLACE, TEXT], {"image": "a.png"}, "<image>What?", ["a.png"]),
        ([PLACE, TEXT, PLACE], {"images": ["a.png", "b.png"]}, "<image>What?<image>", ["a.png", "b.png"]),
        ([TEXT], {"image": "a.png"}, "<image>\nWhat?", ["a.png"]),
        ([{"type": "image", "image": "b.png"}, TEXT], {}, "<image>What?", ["b.png"]),
        ([{"type": "image", "path": "b.png"}, TEXT], {"image": ["b.png"]}, "<image>What?", ["b.png"]),
        ([{"type": "image_url", "image_url": {"url": "b.png", "detail": "high"}}], {}, "<image>", ["b.png"]),
        ([{"type": "image_url", "image_url": "b.png"}, TEXT], {}, "<image>What?", ["b.png"]),
        # As a table of parts is saved: every part has all the keys.
        ([{**PLACE, "text": None, "index": 0}, {**TEXT, "index": None}], {"image": "a.png"}, "<image>What?", ["a.png"]),
        ([{"type": "text", "text": "<image>\nWhat?"}], {"image": "a.png"}, "<image>\nWhat?", ["a.png"]),
    ],
)
def test_content_as_parts(content: Any, keys: dict[str, Any], text: str, images: list[str], tmp_path: Path) -> None:
    item = one(tmp_path, chat(user(content), answer([{"type": "text", "text": "Yes."}]), **keys))
    assert turns_of(item) == [("user", text), ("assistant", "Yes.")]
    assert isinstance(item, Record) and item.images == tuple(str(tmp_path / image) for image in images)


@pytest.mark.parametrize(
    ("content", "keys", "says"),
    [
        ([{"type": "video", "video": "c.mp4", "fps": 2}], {}, "turn 1: `content`, part 1: `fps` is not supported"),
        ([TEXT, {"type": "input_audio"}], {}, "part 2 is of type 'input_audio'"),
        ([{"type": "tool_use"}], {}, "part 1 is of type 'tool_use'"),
        (["What?"], {}, "part 1: expected an object with `type`, got a string"),
        ({"parts": ["What?"]}, {}, "`content` must be a string or a list of parts, got an object"),
        ([{"type": "text"}], {}, "part 1: `text` must be a string, got null"),
        ([{"type": "image", "bytes": "iVBOR"}], {}, "part 1: `bytes` is not supported: write the image into a file"),
        ([{"type": "image", "image": "a.png", "max_pixels": 9}], {}, "part 1: `max_pixels` is not supported"),
        ([{"type": "image", "image": "a.png"}, PLACE], {}, "some parts of type image have a path and some have none"),
        ([{"type": "image", "image": "a.png"}], {"image": "b.png"}, "paths both in `image` and in parts of turns"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBOR"}}], {}, "not its bytes as text"),
        ([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], {}, "an image is a file, not a URL"),
        ([PLACE, TEXT], {}, "more <image> than images: 1 in the text, 0 in the record"),
    ],
)
def test_parts_that_are_refused(content: Any, keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    item = one(tmp_path, chat(user(content), answer(), **keys))
    assert isinstance(item, Problem) and says in item.message
    assert item.kind != "other"


# --- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("s3://bucket/a.png", "an image is a file, not a URL: s3://bucket/a.png; fetch it and give the path of its file"),
        ("file:///tmp/a.png", "not a URL: file:///tmp/a.png; write the path alone"),
        ("data:image/png;base64,iVBORw0KGgo=", "an image is a file, not its bytes as text: data:image/png;base64,iVBORw0KGgo="),
        ("iVBOR" * 1000, "not its bytes as text: iVBORiVBOR"),
        ("no.png", "no.png (relative paths start at the data file's folder; set data.image_folder if they start elsewhere)"),
        ("", None),
        ([], None),
        ({"path": "a.png"}, "`image` must be a path or a list of paths, got an object; write the image into a file"),
        (["a.png", None], "`image` must be a path or a list of paths, got null"),
        ("sub", "image is a folder:"),
        ("sub\\c.png", "write its path with / instead of \\"),
    ],
)
def test_what_stands_in_the_place_of_an_image(image: Any, says: str | None, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.png").touch()
    item = one(tmp_path, {"image": image, "conversations": GOOD})
    if says is None:
        assert isinstance(item, Record) and item.images == ()
    else:
        assert isinstance(item, Problem) and says in item.message and len(item.message) < 400


def test_image_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "c.png").touch()
    value = {"image": "c.png", "conversations": GOOD}
    item = one(tmp_path, value, image_folder=tmp_path / "images")
    assert isinstance(item, Record) and item.images == (str(tmp_path / "images" / "c.png"),)
    absolute = {"image": str(tmp_path / "a.png"), "conversations": GOOD}
    item = one(tmp_path, absolute, image_folder=tmp_path / "images")
    assert isinstance(item, Record) and item.images == (str(tmp_path / "a.png"),)
    item = one(tmp_path, {"image": "a.png", "conversations": GOOD}, image_folder=str(tmp_path / "images"))
    assert isinstance(item, Problem) and item.message.endswith("a.png (relative paths start at data.image_folder)")
    with pytest.raises(DataError, match=r"data\.image_folder: .*/none is no folder"):
        one(tmp_path, value, image_folder=tmp_path / "none")


# --- markers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marker",
    [
        *["<image_1>", "<image1>", "<image 1>", "<image-2>", "<img_1>", "<|image|>", "<|image_1|>", "<|image_pad|>"],
        *["<image_placeholder>", "<IMAGE_1>", "<|vision_start|>", "<start_of_image>", "<image_soft_token>", "<IMG_CONTEXT>"],
    ],
)
def test_markers_of_others_are_refused(marker: str, tmp_path: Path) -> None:
    """With images and without: nobody writes these but for an image."""
    for keys in ({"image": "a.png"}, {}):
        item = one(tmp_path, {**keys, "conversations": [{"from": "human", "value": f"{marker}\nWhat?"}, GOOD[1]]})
        assert isinstance(item, Problem) and item.kind == "image markers"
        assert f"turn 1: {marker} looks like an image, but the marker of an image is <image>" in item.message
    escaped = {"conversations": [{"from": "human", "value": f"What is \\{marker}?"}, GOOD[1]]}
    assert isinstance(one(tmp_path, escaped), Record)


@pytest.mark.parametrize(
    "marker", ["<img>", "<Image>", "<IMAGE>", "[image]", "[IMG_1]", "{image}", "<image/>", "<picture>", "<images>"]
)
def test_likely_markers_are_refused_in_records_with_images(marker: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": f"{marker} What?"}, GOOD[1]]
    item = one(tmp_path, {"image": "a.png", "conversations": turns})
    assert isinstance(item, Problem) and f"{marker} looks like an image" in item.message
    assert isinstance(one(tmp_path, {"conversations": turns}), Record)
    placed = [{"from": "human", "value": f"<image>\nWhat does {marker} mean?"}, GOOD[1]]
    assert isinstance(one(tmp_path, {"image": "a.png", "conversations": placed}), Record)


@pytest.mark.parametrize(
    "text", ['Explain <img src="x.png">', "![image](x.png)", "[image](x.png)", "a[image_index]", "an image, 1", "<b>image</b>"]
)
def test_ordinary_text_is_no_marker(text: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "<image_1> and [image] are text in an answer."}]
    assert isinstance(one(tmp_path, {"conversations": turns}), Record)
    assert isinstance(one(tmp_path, {"image": "a.png", "conversations": turns}), Record)


def test_a_video_s_marker(tmp_path: Path) -> None:
    item = one(tmp_path, {"conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, GOOD[1]]})
    assert isinstance(item, Problem) and item.message.startswith("turn 1: <video> stands there alone")
    item = one(tmp_path, {"conversations": [{"from": "human", "value": "What does <video> do in HTML?"}, GOOD[1]]})
    assert isinstance(item, Record)


def test_a_literal_marker(tmp_path: Path) -> None:
    r"""`\<image>` is the text; markers beside it count as before."""
    turns = [{"from": "human", "value": r"<image> What is \<image>?"}, {"from": "gpt", "value": r"SVG has \<image> tags."}]
    item = one(tmp_path, {"image": "a.png", "system": r"Write \<image>.", "conversations": turns})
    assert turns_of(item) == [
        ("system", "Write <image>."),
        ("user", r"<image> What is \<image>?"),
        ("assistant", "SVG has <image> tags."),
    ]
    item = one(tmp_path, {"conversations": [{"from": "human", "value": r"Is \<image> a tag?"}, GOOD[1]]})
    assert isinstance(item, Record) and item.images == ()
    # In a record with an image and no marker, the image goes to the front as ever.
    item = one(tmp_path, {"image": "a.png", "conversations": [{"from": "human", "value": r"Is \<image> there?"}, GOOD[1]]})
    assert turns_of(item)[0] == ("user", "<image>\nIs \\<image> there?")
    item = one(tmp_path, {"conversations": [{"from": "human", "value": "Is <image> a tag?"}, GOOD[1]]})
    assert isinstance(item, Problem) and item.message.endswith("The images' key is `image`, and \\<image> is that text itself")


# --- unpaired turns ------------------------------------------------------------------------------------------------------

HELLO = {"from": "gpt", "value": "Hello, how can I help?"}
MORE = {"from": "human", "value": "And then?"}


@pytest.mark.parametrize(
    ("turns", "advice"),
    [
        ([HELLO, *GOOD], "data.unpaired_turns=drop leaves such turns out"),
        ([*GOOD, MORE], "data.unpaired_turns=drop leaves such turns out"),
        ([GOOD[0], *GOOD], "join the two into one turn"),
        ([*GOOD, HELLO], "join the two into one turn"),
    ],
)
def test_turns_out_of_order_say_what_can_be_done(turns: list[Any], advice: str, tmp_path: Path) -> None:
    item = one(tmp_path, {"conversations": turns})
    assert isinstance(item, Problem) and item.kind == "turn order" and item.message.endswith(advice)


@pytest.mark.parametrize("before", [[], [HELLO], [HELLO, HELLO]])
@pytest.mark.parametrize("after", [[], [MORE], [MORE, MORE]])
def test_unpaired_turns_are_left_out_on_request(before: list[Any], after: list[Any], tmp_path: Path) -> None:
    system = {"from": "system", "value": "S"}
    turns = [system, *before, *GOOD, *after]
    item = one(tmp_path, {"image": "a.png", "conversations": turns}, unpaired_turns="drop")
    assert turns_of(item) == [("system", "S"), ("user", "<image>\nHi"), ("assistant", "Yes.")]
    # Numbers in messages are those of the file.
    item = one(tmp_path, {"conversations": [system, *before, *GOOD, GOOD[1]]}, unpaired_turns="drop")
    assert isinstance(item, Problem) and item.message.startswith(f"turn {4 + len(before)} is from assistant (gpt), expected user")


def test_the_images_of_a_question_left_out_go_with_it(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>Hi"}, GOOD[1], {"from": "human", "value": "And <image>?"}]
    item = one(tmp_path, {"image": ["a.png", "b.png"], "conversations": turns}, unpaired_turns="drop")
    assert isinstance(item, Record) and item.images == (str(tmp_path / "a.png"),)
    item = one(tmp_path, {"conversations": [HELLO, MORE]}, unpaired_turns="drop")
    assert isinstance(item, Problem) and item.message == "no question with an answer in it; remove the record"


# --- places --------------------------------------------------------------------------------------------------------------


def test_a_record_in_a_file_of_one_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"conversations": GOOD}, {"id": "q7", "conversations": GOOD[:1]}, {"conversations": GOOD}]))
    first, problem, last = parse_file(path)
    assert isinstance(first, Record) and isinstance(last, Record) and isinstance(problem, Problem)
    assert (first.source, last.source) == ("train.json:1 (record 1)", "train.json:1 (record 3)")
    assert (problem.line, problem.number, problem.id) == (1, 2, "q7")
    assert str(problem).startswith(f"{path}:1: turn 1, the last, is from user") and str(problem).endswith("(record 2, id 'q7')")
    assert problem.error().kind == problem.kind == "turn order"


def test_every_problem_has_a_kind(tmp_path: Path) -> None:
    bad: list[Any] = [1, {"id": True, "conversations": GOOD}, {}, {"conversations": []}, {"conversations": [1]}]
    bad += [{"conversations": GOOD[1:]}, {"image": 3, "conversations": GOOD}, {"image": "no.png", "conversations": GOOD}]
    bad += [{"conversations": [{"from": "x", "value": ""}]}, {"conversations": [{"from": "gpt", "value": 1}]}]
    items = parsed(tmp_path, *bad)
    assert all(isinstance(item, Problem) and item.kind not in ("other", "") for item in items)
    path = tmp_path / "train.jsonl"
    path.write_text('{"conversations": []}\n{"a": \n', encoding="utf-8")
    items = list(parse_file(path))
    assert [item.kind for item in items if isinstance(item, Problem)] == ["no turns", "malformed JSON"]
