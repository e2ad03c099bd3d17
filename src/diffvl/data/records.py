r"""Data file -> `Record`: the first arrow of training. Everything that can be known without a tokenizer or a decoded image
is checked here, up front, so that a run does not stop hours later at one bad line.

Two file kinds: `.json` holds one list of objects, `.jsonl` one object per line. An object looks like LLaVA's

    {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}

or like a chat request: `"messages": [{"role": "user", "content": ...}, ...]`, where content may be a list of parts. `image` is
a path, a list of paths, or absent; `images` means the same. Paths are relative to the data file's folder or to
`data.image_folder`. `system` is the text of a system turn. A turn marked with `train: false` (or `loss: false`, `weight: 0`) is
context and not trained on. Keys that other trainers act on are refused, others are told once a file (see `keys`).

`<image>` in a user's text marks where an image stands, in the order of the record's images; `\<image>` is that text itself.
LLaVA's habit is kept: a record with images and no marker at all gets one marker per image, each followed by a newline, before
the first user text.

Invariant: a `Record` has as many markers as images, all in user turns; its turns are user, assistant, user, assistant ...
after an optional system turn; no answer is empty, at least one is trained on; every image file existed when the file was read.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffvl.data.columns import ColumnNames
from diffvl.data.content import (
    IMAGE_MARKER,
    VIDEO_MARKER,
    Content,
    as_video_markers,
    count_markers,
    count_video_markers,
    kind_of,
    mistaken_marker,
    other_media,
    plain,
    read_content,
    text_of,
    with_markers,
)
from diffvl.data.image_folder import ImageFolder
from diffvl.data.images import named_images
from diffvl.data.jsonfile import check_path
from diffvl.data.keys import UnusedKeys, check_record_keys, check_turn_keys, is_absent, missing_turns, trained_of
from diffvl.data.problems import Problem
from diffvl.data.reading import json_rows
from diffvl.data.rows import Part, Row
from diffvl.data.videos import Video, named_videos
from diffvl.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")
Role = Literal["system", "user", "assistant"]
Unpaired = Literal["error", "drop"]

# key of the turns -> (key of the speaker, key of the text, speaker -> role)
FORMS: dict[str, tuple[str, str, dict[str, Role]]] = {
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant", "system": "system"}),
    "messages": ("role", "content", {"user": "user", "assistant": "assistant", "system": "system"}),
}
_SPEAKERS: dict[Role, str] = {"system": "system", "user": "user (human)", "assistant": "assistant (gpt)"}
_TOOL_ROLES = ("function_call", "function", "observation", "tool", "tool_call", "tool_response", "ipython")
_ORDER = "turn order"
_DROP = "data.unpaired_turns=drop leaves such turns out"


@dataclass(frozen=True)
class Turn:
    r"""text: of a user, with markers where images and videos stand and `\<image>` for that text itself; of the others, as a model
    reads it. trained: False for an answer that is context only."""

    role: Role
    text: str
    trained: bool = True


@dataclass(frozen=True)
class Record:
    """One conversation. `images` are absolute paths, and `videos` too: of a file or a folder, or of frames; `source` is where it
    stands in its file, e.g. "train.json:12"."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: str
    videos: tuple[Video, ...] = ()


def iterate_records(path: Path, image_folder: str | Path | None = None, unpaired_turns: Unpaired = "error") -> Iterator[Record]:
    """Reads the file's records in order, read as they are asked for. Raises DataError at the first problem."""
    for item in parse_file(path, image_folder, unpaired_turns):
        if isinstance(item, Problem):
            raise item.error()
        yield item


# --- file -> records -----------------------------------------------------------------------------------------------------


def parse_file(
    path: Path, image_folder: str | Path | None = None, unpaired_turns: Unpaired = "error"
) -> Iterator[Record | Problem]:
    """Reads every record of the file, or in its place what is wrong with it. At the end it logs which keys were not used.

    Args:
        image_folder: where relative paths of images start; default: the data file's folder.
        unpaired_turns: what is done with an answer before the first question, and with a question after the last answer.
    Raises:
        DataError: for a file that is none of records, or has none.
    """
    check_path(path)
    reader = RecordReader(ImageFolder(None if image_folder is None else str(image_folder), str(path.parent)), unpaired_turns)
    rows = json_rows(str(path), path.name, ColumnNames(None), False, Part())
    yield from parse_rows(((row, None) for _, row in rows), path, reader)


def parse_rows(rows: Iterable[tuple[Row, str | None]], path: Path, reader: "RecordReader") -> Iterator[Record | Problem]:
    """Gives of every row its record, or in its place what is wrong with it. At the end it logs which keys were not used.

    Args:
        rows: each with the file that it stands in, where the data set has several. path: of the data set.
    Raises:
        DataError: there are no rows.
    """
    number = 0
    for number, (row, within) in enumerate(rows, 1):
        yield reader.record_or_problem(row, path, number, within)
    if not number:
        raise DataError(f"{path}: no records in it; expected at least one object with `conversations`", "no records")
    reader.tell_unused(path)


# --- object -> Record ----------------------------------------------------------------------------------------------------


class RecordReader:
    """What the records of one data set share: where their images lie, and the keys left out."""

    def __init__(self, images: ImageFolder, unpaired_turns: Unpaired) -> None:
        self.images, self.unpaired_turns = images, unpaired_turns
        self.unused = UnusedKeys()

    def record_or_problem(self, row: Row, path: Path, number: int, within: str | None = None) -> Record | Problem:
        """Gives a row's record, or what is wrong with it; `number` is that of the row in its data set."""
        value = row.value
        try:
            if isinstance(value, DataError):
                raise value
            return self.record(value, row.source)
        except DataError as error:
            name = value.get("id") if isinstance(value, dict) else None
            message = str(error).removeprefix(f"{path}:{row.place}: ")
            told = str(name) if isinstance(name, int | str) else None
            return Problem(error.kind, path, row.place, number, told, message, error.ends, within)

    def tell_unused(self, path: Path) -> None:
        warning = self.unused.warning(path)
        if warning:
            log.warning("%s", warning)

    def record(self, value: Any, source: str) -> Record:
        """Raises DataError without the place, which the caller knows."""
        if not isinstance(value, dict):
            raise DataError(f"expected an object with `conversations`, got {kind_of(value)}", "no object")
        name = value.get("id")
        if is_absent(name):
            name = source
        elif isinstance(name, bool) or not isinstance(name, int | str):
            raise DataError(f"`id` must be a string or a whole number, got {kind_of(name)}", "id")
        form = _form_of(value)
        images = named_images(value)
        unused: dict[str, None] = {}
        check_record_keys(value, images, unused.setdefault)
        turns, contents = _parse_turns(value[form], form, unused.setdefault)
        self.unused.add(unused, source)
        images, videos = _all_images(images, contents), _all_videos(named_videos(value), contents)
        turns = _place_markers(turns, len(images), len(videos))
        left_out = 0
        if self.unpaired_turns == "drop":
            turns, images, videos, left_out = _paired(turns, images, videos)
        _check_order(turns, left_out)
        turns = _with_system(value.get("system"), turns)
        if not any(turn.trained for turn in turns if turn.role == "assistant"):
            raise DataError(
                "no answer to train on: all are marked as not to be trained on; remove the record", "nothing to train on"
            )
        paths = tuple(self.images.find(image) for image in images)
        clips = tuple(self.images.find_video(video) for video in videos)
        return Record(text_of(str(name), "`id`"), paths, turns, source, clips)


def _form_of(value: dict[str, Any]) -> str:
    """Gives the key under which a record has its turns."""
    forms = [form for form in FORMS if value.get(form) is not None]
    if not forms:
        raise DataError(
            "no `conversations` (nor `messages`): expected a list of turns, {from: human or gpt, value: text}"
            + missing_turns(value),
            "no turns",
        )
    if len(forms) > 1:
        raise DataError("both `conversations` and `messages`: keep one of them", "no turns")
    return forms[0]


def _parse_turns(items: Any, form: str, tell: Callable[[str], object]) -> tuple[tuple[Turn, ...], list[Content]]:
    """Gives the turns as they stand there, and what their contents carry beside text."""
    if not isinstance(items, list) or not items:
        raise DataError(f"`{form}` must be a list of turns with at least one in it, got {kind_of(items)}", "no turns")
    turns: list[Turn] = []
    contents: list[Content] = []
    for number, item in enumerate(items, 1):
        turn, content = _parse_turn(item, form, f"turn {number}", tell)
        turns.append(turn)
        contents.append(content)
    return tuple(turns), contents


def _parse_turn(item: Any, form: str, where: str, tell: Callable[[str], object]) -> tuple[Turn, Content]:
    speaker_key, text_key, roles = FORMS[form]
    if not isinstance(item, dict) or speaker_key not in item:
        raise DataError(f"{where}: expected an object with `{speaker_key}` and `{text_key}`{_has(item)}", "turn")
    speaker = item[speaker_key]
    if not isinstance(speaker, str) or speaker not in roles:
        raise DataError(f"{where}: unknown role {speaker!r}; expected one of {', '.join(roles)}{_about_role(speaker)}", "role")
    role = roles[speaker]
    check_turn_keys(item, (speaker_key, text_key), f"{where}: ", tell)
    if text_key not in item:
        raise DataError(f"{where}: expected an object with `{speaker_key}` and `{text_key}`{_has(item)}", "turn")
    trained = trained_of(item, role == "assistant", f"{where}: ")
    content = read_content(item[text_key], f"{where}: `{text_key}`")
    text = content.text if role == "user" else _own_text(content.text, where, role)
    return Turn(role, text, trained), content


def _has(item: Any) -> str:
    return f", got {', '.join(f'`{key}`' for key in item) or 'an empty object'}" if isinstance(item, dict) else ""


def _about_role(speaker: Any) -> str:
    if speaker in _TOOL_ROLES:
        return "; calls of tools are not supported: leave such records out, or write them as text of these roles"
    return "; write it as system" if speaker == "developer" else ""


def _own_text(text: str, where: str, role: Role) -> str:
    """Gives the text of a turn in which no image can stand, as a model reads it."""
    if count_markers(text):
        raise DataError(
            f"{where}: {IMAGE_MARKER} in a turn of {_SPEAKERS[role]}; images stand in user turns only. "
            f"If the text itself is meant, write \\{IMAGE_MARKER} (in JSON: \\\\{IMAGE_MARKER})",
            "image markers",
        )
    return plain(text)


def _all_images(named: list[str], contents: list[Content]) -> list[str]:
    """Gives the record's images, whether it names them itself or their parts do."""
    carried = [path for content in contents for path in content.paths]
    return _all_of(named, carried, any(content.placeholders for content in contents), "image")


def _all_videos(named: list[Video], contents: list[Content]) -> list[Video]:
    """The same of its videos."""
    carried = [one for content in contents for video in content.videos for one in named_videos({"video": video})]
    return _all_of(named, carried, any(content.video_placeholders for content in contents), "video")


def _all_of(named: list[T], carried: list[T], has_bare: bool, kind: str) -> list[T]:
    """Gives what a record names or its parts carry. has_bare: some parts carry none."""
    if not carried:
        return named
    if named and named != carried:
        raise DataError(f"paths both in `{kind}` and in parts of turns: keep one of them", kind)
    if not named and has_bare:
        raise DataError(f"some parts of type {kind} have a path and some have none: give all of them one", kind)
    return carried


def _place_markers(turns: tuple[Turn, ...], num_images: int, num_videos: int = 0) -> tuple[Turn, ...]:
    """Checks the markers of images and videos; adds them where the record has some and not one marker."""
    if num_videos:
        return _place_both(turns, num_images, num_videos)
    asked = [(number, turn.text) for number, turn in enumerate(turns) if turn.role == "user"]
    num_markers = sum(count_markers(text) for _, text in asked)
    if num_markers == num_images and num_images:
        return turns
    for number, text in asked:
        _refuse_mistaken(number + 1, text, num_images, num_markers)
    if num_markers == num_images:
        return turns
    if num_markers:
        more = "more" if num_markers > num_images else "fewer"
        counts = f"{num_markers} in the text, {num_images} in the record"
        advice = "" if num_images else f". The images' key is `image`, and \\{IMAGE_MARKER} is that text itself"
        raise DataError(f"{more} {IMAGE_MARKER} than images: {counts}; each image needs one marker{advice}", "image markers")
    if not asked:
        return turns  # and no question: the order is refused
    first = asked[0][0]
    marked = replace(turns[first], text=with_markers(turns[first].text, num_images))
    return (*turns[:first], marked, *turns[first + 1 :])


def _place_both(turns: tuple[Turn, ...], num_images: int, num_videos: int) -> tuple[Turn, ...]:
    """The same of a record with videos."""

    def counted(turns: tuple[Turn, ...]) -> tuple[int, int]:
        texts = [turn.text for turn in turns if turn.role == "user"]
        return sum(map(count_markers, texts)), sum(map(count_video_markers, texts))

    images, videos = counted(turns)
    if not num_images and not videos and images == num_videos:  # LLaVA-Video writes the marker of images
        turns = tuple(replace(turn, text=as_video_markers(turn.text)) if turn.role == "user" else turn for turn in turns)
        images, videos = counted(turns)
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if not images and not videos and first is not None:
        marked = replace(turns[first], text=with_markers(turns[first].text, num_images, num_videos))
        turns, images, videos = (*turns[:first], marked, *turns[first + 1 :]), num_images, num_videos
    if first is not None and (images, videos) != (num_images, num_videos):
        raise DataError(
            f"{images} {IMAGE_MARKER} and {videos} {VIDEO_MARKER} in the text, but {num_images} images and {num_videos} videos "
            "in the record; each needs one marker",
            "image markers",
        )
    return turns


def _refuse_mistaken(number: int, text: str, num_images: int, num_markers: int) -> None:
    """Raises DataError for a text that holds what only looks like a marker: read as text, its image would stand elsewhere."""
    found = mistaken_marker(text, images=num_images > 0)
    if found is not None:
        meant = f"the marker of an image is {IMAGE_MARKER}, one for each in the order of `image`"
        advice = f"; for the text itself write \\{found}" if not num_images else ""
        raise DataError(f"turn {number}: {found} looks like an image, but {meant}{advice}", "image markers")
    media = other_media(text)
    if media is not None and not num_markers:
        advice = "a video stands under the key `video`" if media.lower() == VIDEO_MARKER else "sounds are not supported"
        raise DataError(f"turn {number}: {media} stands there alone: {advice}", "key not supported")


def _with_system(system: Any, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Puts the turns after the system turn that a record's key `system` is."""
    if is_absent(system):
        return turns
    if turns[0].role == "system":
        raise DataError("both `system` and a system turn: keep one of them", _ORDER)
    return Turn("system", _own_text(text_of(system, "`system`"), "`system`", "system")), *turns


def _paired(
    turns: tuple[Turn, ...], images: list[str], videos: list[Video]
) -> tuple[tuple[Turn, ...], list[str], list[Video], int]:
    """Turns, images and videos without the answers before the first question and the questions after the last answer; and how
    many were left out at the start."""
    kept = list(turns)
    start = 1 if kept[0].role == "system" else 0
    while len(kept) > start and kept[start].role == "assistant":
        del kept[start]
    left_out = len(turns) - len(kept)
    while len(kept) > start and kept[-1].role == "user":
        del kept[-1]
    if len(kept) == start:
        raise DataError("no question with an answer in it; remove the record", _ORDER)
    num_images = sum(count_markers(turn.text) for turn in kept if turn.role == "user")
    num_videos = sum(count_video_markers(turn.text) for turn in kept if turn.role == "user")
    return tuple(kept), images[:num_images], videos[:num_videos], left_out


def _check_order(turns: tuple[Turn, ...], left_out: int) -> None:
    """Raises DataError for turns out of order. `left_out`: turns at the start that are not among `turns`, for the numbers in
    messages."""
    spoken = turns[1:] if turns[0].role == "system" else turns
    first = len(turns) - len(spoken) + left_out + 1
    if not spoken or spoken[0].role != "user":
        got = f"is from {_SPEAKERS[spoken[0].role]}" if spoken else "is missing"
        advice = f"; {_DROP}" if spoken and spoken[0].role == "assistant" else ""
        message = f"turn {first} {got}: after an optional system turn the first must be from user (human){advice}"
        raise DataError(message, _ORDER)
    for number, turn in enumerate(spoken):
        expected: Role = "assistant" if number % 2 else "user"
        if turn.role != expected:
            where, got, want = f"turn {first + number}", _SPEAKERS[turn.role], _SPEAKERS[expected]
            advice = "; join the two into one turn" if turn.role == spoken[number - 1].role else ""
            raise DataError(f"{where} is from {got}, expected {want}: user and assistant must alternate{advice}", _ORDER)
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {first + number}: empty answer; fill it or remove the record", "empty answer")
    if spoken[-1].role != "assistant":
        got, want = _SPEAKERS[spoken[-1].role], _SPEAKERS["assistant"]
        raise DataError(f"turn {len(turns)}, the last, is from {got}, expected an answer from {want}; {_DROP}", _ORDER)
