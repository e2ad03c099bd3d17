"""The keys of a record and of its turns: which are used, which are told, and which are refused because other trainers act on
them and this one would not: a video, a tool, a rejected answer left out in silence is a wrong result.

A key is compared without its case and its punctuation, so that `Image`, `image-path` and `toolCalls` are found too. A value
that says nothing (null, an empty string, list or object, nan) is as good as no key: tables saved as JSON have such ones.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from os.path import basename
from pathlib import Path
from typing import Any

from diffvl.errors import DataError, first_few

USED = frozenset({"id", "image", "images", "video", "videos", "conversations", "messages", "system"})
# Says where a record is from and changes nothing in any trainer: not even told.
_METADATA = frozenset(
    (
        *("id", "idx", "index", "uid", "uuid", "recordid", "sampleid", "questionid", "taskid", "modelid", "version"),
        *("source", "datasource", "dataset", "datasetname", "subset", "split", "origin", "author", "license", "meta", "metadata"),
        *("model", "modelname", "task", "tasktype", "taskname", "subtask", "category", "domain", "topic", "tag", "tags"),
        *("lang", "language", "created", "date", "timestamp", "info", "notes", "comment"),
    )
)
_TURN_METADATA = frozenset(("id", "idx", "index", "uuid", "turn", "timestamp", "date", "model", "modelname", "lang", "language"))

_TOOLS = "calls of tools are not supported: leave such records out, or write the calls as text and remove the key"
_PREFERENCE = "this trains on one answer, not on preferences: keep the better one in the turns and remove the key"
_TEMPLATE = "nothing but the turns is given to the chat template: remove the key"
_MARK = "mark single turns instead, with `train: false`, or remove the key"
_ANSWERS_ONLY = "only answers are trained on: remove the key"
_SOUND = "sounds are not supported: leave such records out"
_VIDEO = "videos stand under the key `video` (a path, or a list of the paths of frames): rename it or remove it"

# advice -> keys that are refused with it, wherever they stand
_ANYWHERE = {
    _TOOLS: ("tools", "functions", "functioncall", "toolcall", "toolcalls", "toolchoice", "observation"),
    _PREFERENCE: ("chosen", "rejected", "rejectedresponse", "rejectedmessages", "rejectedimages", "ktotag"),
    _TEMPLATE: ("chattemplatekwargs", "documents"),
    "every image gets the size that the checkpoint was prepared for: remove the key": (
        *("minpixels", "maxpixels", "resizedheight", "resizedwidth", "mmprocessorkwargs", "imageskwargs"),
    ),
    "the key is named `system`: rename it": ("systemprompt", "systemmessage", "systeminstruction", "sys"),
    "write it into the answer's text, or remove the key": ("reasoning", "reasoningcontent", "thinking"),
    "records are text, which the checkpoint's own tokenizer reads": ("inputids", "labelids", "attentionmask"),
}
_IN_TURNS = {
    _TOOLS: ("toolcallid",),
    _TEMPLATE: ("name", "recipient", "channel", "prefix"),
    "write it into the turn's text, or remove the key": ("refusal",),
    "a turn is trained on as a whole or not at all: remove the key": ("trainingdetail", "traindetail"),
}
_REFUSED = {name: advice for advice, names in _ANYWHERE.items() for name in names}
_REFUSED_IN_TURN = {**_REFUSED, **{name: advice for advice, names in _IN_TURNS.items() for name in names}}
# What a trainer is to do with the record as a whole: (the value that asks for nothing, advice).
_SWITCHES: dict[str, tuple[bool, str]] = {
    **dict.fromkeys(("loss", "train", "trainable", "weight", "lossscale", "lossweight", "lossmask"), (True, _MARK)),
    "masked": (False, _MARK),
    **dict.fromkeys(("trainoninput", "trainoninputs", "trainonprompt"), (False, _ANSWERS_ONLY)),
    "dropsystemmessage": (False, "remove the system turn and the key"),
    **dict.fromkeys(("addgenerationprompt", "continuefinalmessage"), (False, _TEMPLATE)),
    "paralleltoolcalls": (True, _TOOLS),
}
# Marks of a turn -> the value that says "trained on".
_MARKS = {
    **dict.fromkeys(("loss", "train", "trainable", "trained", "trainonturn", "weight"), True),
    **dict.fromkeys(("lossscale", "lossweight", "lossmask"), True),
    **dict.fromkeys(("masked", "mask"), False),
}

_IMAGE = re.compile(r"image|img|picture|photo|screenshot|pixelvalues|^(?:frames?|(?:pics?|png|jpe?g)(?:path|file|url|name)?s?)$")
_ABOUT = re.compile(
    r"^(?:num|n|has|is|no|with|max|min|total)(?=image|img|picture|photo)|(?:id|ids|idx|index|width|height|sizes?|shape|captions?|"
    r"desc|descriptions?|source|type|hash|md5|sha\d*|license|num|count|labels?|class|category|tags?|text|quality|score|aspect|"
    r"ratio|format|mode|tokens?|author|title|domain|split|set|resolution|date|prompt|keywords|alt|duration|fps|start|end|"
    r"durationsec)$"
)
_SOUNDS = re.compile(r"video|audio|speech|^sounds?$|^pointclouds?$")
_IMAGE_FILE = re.compile(r"[^\n]+\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|heic|jp2)$", re.IGNORECASE)

_NUM_TOLD = 20  # unused keys of a file

# Forms of other data sets, told where a record has no turns.
_FORMS = (
    (("chosen", "rejected"), "preference pairs, on which this does not train"),
    (("prompt", "completion"), "write the prompt and the completion as two turns"),
    (("instruction", "output"), "write the instruction (with its input) and the output as two turns"),
    (("query", "response"), "write the query and the response as two turns"),
    (("question", "answer"), "write the question and the answer as two turns"),
    (("prompt", "response"), "write the prompt and the response as two turns"),
    (("input", "output"), "write the input and the output as two turns"),
    (("text",), "plain text without turns, on which this does not train"),
)
_OTHER_TURNS = ("conversation", "conversations", "message", "messages", "dialog", "dialogue", "turns", "chat", "history")


@dataclass
class UnusedKeys:
    """The keys of a file that were left out, each with the number of records that have it and the place of the first."""

    places: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, keys: Iterable[str], place: str) -> None:
        """Counts the keys of one record, each once."""
        for key in keys:
            count, first = self.places.get(key, (0, place))
            self.places[key] = count + 1, first

    def warning(self, path: Path) -> str:
        """Writes one line about them; empty if there were none."""
        told = [
            f"{key} ({count} {'record, in' if count == 1 else 'records, first in'} {place})"
            for key, (count, place) in self.places.items()
        ]
        return f"{path}: keys that are not used: {', '.join(first_few(told, _NUM_TOLD))}" if told else ""


def is_absent(value: Any) -> bool:
    """Tells whether a value says nothing."""
    return all(map(_is_blank, value)) if isinstance(value, list) else _is_blank(value)


def _is_blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value) or (isinstance(value, float) and value != value)


def check_record_keys(value: dict[str, Any], images: Sequence[str], tell: Callable[[str], object]) -> None:
    """Goes through the keys that a record has beside those that are used; tells the harmless ones.

    Raises:
        DataError: naming the first key that another trainer would act on, or that names an image.
    """
    for key, item in value.items():
        if key in USED:
            continue
        name = _normal(key)
        if name in _METADATA or is_absent(item) or item == "[]":
            continue
        _check_refused(key, name, item, _REFUSED, "")
        if name in _SWITCHES:
            _check_switch(key, item, *_SWITCHES[name])
            continue
        _check_spelling(key, name, item)
        _check_image(key, name, item, images)
        tell(f"`{key}`")


def check_turn_keys(item: dict[str, Any], used: Sequence[str], where: str, tell: Callable[[str], object]) -> None:
    """Goes through the keys of a turn; what marks it as trained on or not is read by `trained_of`."""
    for key, value in item.items():
        if key in used:
            continue
        name = _normal(key)
        if name in _TURN_METADATA or name in _MARKS or is_absent(value):
            continue
        _check_refused(key, name, value, _REFUSED_IN_TURN, where)
        if _names_image(name) and not isinstance(value, bool | int | float):
            raise DataError(f"{where}`{key}`: {_IMAGE_KEY} of the record, not of a turn", "image under another key")
        tell(f"`{key}` of a turn")


def trained_of(item: dict[str, Any], answer: bool, where: str) -> bool:
    """Tells whether a turn is to be trained on, by the marks that it carries.

    Raises:
        DataError: for a mark that asks for something else, or for two that differ.
    """
    marks: dict[str, bool] = {}
    for key, value in item.items():
        trained = _MARKS.get(_normal(key))
        if trained is None or is_absent(value):
            continue
        if isinstance(value, str | list | dict) or value not in (0, 1):
            raise DataError(
                f"{where}`{key}` is {_short(value)}: an answer is trained on or not, other weights are not supported; "
                "expected true or false (1 or 0)",
                "key not supported",
            )
        marks[key] = bool(value) is trained
    if not answer and any(marks.values()):
        key = next(key for key, trained in marks.items() if trained)
        raise DataError(f"{where}`{key}` asks to train on a turn that is no answer; remove the key", "key not supported")
    if len(set(marks.values())) > 1:
        raise DataError(
            f"{where}{' and '.join(f'`{key}`' for key in marks)} contradict each other: keep one", "key not supported"
        )
    return not answer or all(marks.values())


def missing_turns(value: dict[str, Any]) -> str:
    """Tells what a record without turns has instead, as the end of a message; empty if it is nothing known."""
    for names, advice in _FORMS:
        if all(not is_absent(value.get(name)) for name in names):
            return f"; this record has {' and '.join(f'`{name}`' for name in names)}: {advice}"
    for key, item in value.items():
        if not is_absent(item) and (_normal(key) in _OTHER_TURNS or _near(_normal(key)) in _OTHER_TURNS):
            return f"; this record has `{key}`: rename it if that is where the turns are"
    return ""


# --- rules ---------------------------------------------------------------------------------------------------------------

_IMAGE_KEY = "images stand under the key `image` (a path or a list of paths)"


@cache
def _normal(key: str) -> str:
    """Gives a key without case and punctuation."""
    return re.sub(r"[\W_]+", "", key.lower())


@cache
def _near(name: str) -> str:
    """Gives the used key that a name seems to mean, '' if none."""
    return next(iter(difflib.get_close_matches(name, ("image", "images", "system", "conversations", "messages"), 1, 0.79)), "")


@cache
def _names_image(name: str) -> bool:
    return bool(_IMAGE.search(name)) and not _ABOUT.search(name)


def _check_refused(key: str, name: str, item: Any, refused: dict[str, str], where: str) -> None:
    advice = refused.get(name)
    if advice is None and name == "label" and isinstance(item, bool):
        advice = _PREFERENCE
    if advice is None and _SOUNDS.search(name) and not _ABOUT.search(name) and not isinstance(item, bool | int | float):
        advice = _VIDEO if "video" in name else _SOUND
    if advice is None and name == "objects" and isinstance(item, dict) and item.keys() & {"ref", "bbox"}:
        advice = "references to boxes are not filled in: write them into the text and remove the key"
    if advice is not None:
        raise DataError(f"{where}`{key}`: {advice}", "key not supported")


def _check_switch(key: str, item: Any, neutral: bool, advice: str) -> None:
    if isinstance(item, str | list | dict) or item != neutral:
        raise DataError(f"`{key}` is {_short(item)}: {advice}", "key not supported")


def _check_spelling(key: str, name: str, item: Any) -> None:
    meant = _near(name)
    if meant == "system" or (meant in ("conversations", "messages") and isinstance(item, list)):
        raise DataError(f"`{key}` looks like `{meant}`: rename it or remove it", "key not supported")


def _check_image(key: str, name: str, item: Any, images: Sequence[str]) -> None:
    """Raises DataError for a key that names an image, which would not be looked at."""
    named = _names_image(name) or _near(name) in ("image", "images")
    files = [text for text in _texts_in(item) if _IMAGE_FILE.match(text)]
    if images:
        own = {basename(image) for image in images}
        wrong = named and any("://" not in file and basename(file) not in own for file in files)
        advice = "; list all images of the record there"
    else:
        wrong = bool(files) or (named and not isinstance(item, bool | int | float))
        advice = ""
    if wrong:
        raise DataError(f"`{key}` is {_short(item)}: {_IMAGE_KEY}{advice}; rename it or remove it", "image under another key")


def _texts_in(item: Any) -> Iterator[str]:
    """Gives the strings of a value, of its elements, and of objects among these."""
    for one in item if isinstance(item, list) else [item]:
        for text in one.values() if isinstance(one, dict) else [one]:
            if isinstance(text, str):
                yield text


def _short(value: Any) -> str:
    """Gives a value for a message."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list, [{_short(value[0])}, ...]" if value and isinstance(value[0], str) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
