"""A file of prompts -> `Question`s, for `diffvl generate --batch`. A line looks like

    {"prompt": "What is it?", "image": "a.png", "id": "a"}

`image` is a path, `images` a list of them; both may be absent. Paths are relative to the file's folder. `id` is a string or a
whole number, by default the number of the line. Another key is an error: misspelt, it would be an image not looked at.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvl.data.images import require_path
from diffvl.data.jsonfile import check_path, read_objects
from diffvl.data.keys import is_absent
from diffvl.data.videos import Video, located, named_videos
from diffvl.errors import DataError, first_few

KEYS = ("prompt", "image", "images", "video", "videos", "id")
NUM_SHOWN = 5  # problems told in one error


@dataclass(frozen=True)
class Question:
    """`images` are paths, `videos` those of files, folders or frames; `source` is where it stands in its file, e.g.
    "ask.jsonl:12"."""

    id: str | int
    prompt: str
    images: tuple[str, ...]
    source: str
    videos: tuple[Video, ...] = ()


def read_questions(path: Path) -> list[Question]:
    """Reads all questions of a file.

    Raises:
        DataError: naming file and line of the first problems, and the number of the others.
    """
    check_path(path)
    questions: list[Question] = []
    problems: list[DataError] = []
    for line, value in read_objects(path):
        if isinstance(value, DataError):
            problems.append(value)
            continue
        try:
            questions.append(_question(value, path, line))
        except DataError as error:
            problems.append(DataError(f"{path}:{line}: {error}"))
    if not questions and not problems:
        problems.append(DataError(f'{path}: no prompts in it; expected lines like {{"prompt": "What is it?", "image": "a.png"}}'))
    if problems:
        raise summary(problems)
    return questions


def summary(problems: Sequence[DataError]) -> DataError:
    """Joins several problems into one; at least one."""
    if len(problems) == 1:
        return problems[0]
    lines = first_few([str(problem) for problem in problems], NUM_SHOWN)
    return DataError(f"{len(problems)} problems, nothing was answered\n  " + "\n  ".join(lines))


def _question(value: Any, path: Path, line: int) -> Question:
    """Raises DataError without the place, which the caller knows."""
    if not isinstance(value, dict):
        raise DataError(f"expected an object with `prompt`, got {type(value).__name__}")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}: expected {', '.join(KEYS)}")
    prompt = value.get("prompt")
    if not isinstance(prompt, str):
        raise DataError("`prompt` must be a text" + ("" if "prompt" in value else "; it is missing"))
    name = value.get("id") if value.get("id") is not None else line
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"`id` must be a string or a whole number, got {type(name).__name__}")
    images = tuple(os.path.join(path.parent, image) for image in _images(value))
    for image in images:
        if not os.path.isfile(image):
            raise DataError(f"image {image} does not exist (relative paths start at the file's folder)")
    videos = tuple(located(video, str(path.parent)) for video in named_videos(value))
    for place in (place for video in videos for place in ([video] if isinstance(video, str) else video)):
        if not os.path.exists(place):
            raise DataError(f"video {place} does not exist (relative paths start at the file's folder)")
    return Question(name, prompt, images, f"{path}:{line}", videos)


def _images(value: dict[str, Any]) -> list[str]:
    given = map(value.get, ("image", "images"))
    image, images = (item if isinstance(item, list) or not is_absent(item) else None for item in given)
    if image is not None and images is not None:
        raise DataError("both `image` and `images`: keep one of them")
    if image is not None and not isinstance(image, str):
        raise DataError("`image` must be a path; a list of paths is named `images`")
    if images is not None and not isinstance(images, list):
        raise DataError("`images` must be a list of paths")
    paths = [image] if image is not None else images or []
    if not all(isinstance(path, str) and path for path in paths):
        raise DataError("an image must be named by its path")
    for path in paths:
        require_path(path)
    return paths
