"""What callers give to be looked at -> images and clips, in the order in which a chat shows them."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from .clips_diffvl import Clip, ClipSize, Sampler, open_clip
from .messages_diffvl import Messages, visuals_of
from .seen_diffvl import Size, as_seen, images_as_seen, size_of
from .template_diffvl import Visual

Found = tuple[Visual, tuple[str, Any] | None]


def flat(images: Any) -> list[Any]:
    """One image or a list of them (of lists), as one list."""
    if not isinstance(images, list | tuple):
        return [] if images is None else [images]
    return [one for image in images for one in flat(image)]


def size_of_visual(visual: Any) -> Size | ClipSize:
    """The size of an image or a clip."""
    return visual.size if isinstance(visual, Clip) else size_of(visual)


def clips_of(videos: Any, sampler: Sampler | None) -> list[Clip]:
    """What a caller gives as videos: one or a list of them, each a path, a folder, an array or a list of frames.

    Raises:
        ValueError: if one cannot be read, or the model takes none.
    """
    if _is_nothing(videos):
        return []
    if sampler is None:
        raise ValueError("videos is not taken here: this model takes no videos")
    ones = videos if isinstance(videos, list | tuple) and not _is_frames(videos) else [videos]
    return [_clip(video, sampler) for video in ones]


def _is_nothing(videos: Any) -> bool:
    return videos is None or (isinstance(videos, list | tuple) and not videos)


def _is_frames(videos: Sequence[Any]) -> bool:
    """Whether a list is the frames of one video: images or arrays of one. Paths in a list are videos."""
    return all(isinstance(one, Image.Image) or len(getattr(one, "shape", ())) == 3 for one in videos)


def _clip(video: Any, sampler: Sampler | None) -> Clip:
    if sampler is None:
        raise ValueError("this model takes no videos")
    return open_clip(video, sampler)


def in_order(batch: Sequence[Messages], given: Mapping[Visual, Any], sampler: Sampler | None) -> list[list[Any]]:
    """The images and clips of each of several conversations in the order of their parts: a part's own, or the next of those
    `given` of its kind, a flat list or one list for each conversation.

    Raises:
        ValueError: if parts that carry nothing and what is given differ in number, or something cannot be read.
    """
    if sampler is None and not _is_nothing(given.get(Visual.VIDEO)):
        raise ValueError("videos is not taken here: this model takes no videos")
    parts = [list(visuals_of(messages)) for messages in batch]
    waiting = {visual: _taken(visual, given.get(visual), parts) for visual in Visual}
    return [[_opened(found, waiting[found[0]][number], sampler) for found in own] for number, own in enumerate(parts)]


def _taken(visual: Visual, given: Any, parts: Sequence[Sequence[Found]]) -> list[Iterator[Any]]:
    """For each conversation, what was given for its parts of a kind."""
    ones = [given] if given is not None and not isinstance(given, list | tuple) else list(given or [])
    nested = [one for one in ones if isinstance(one, list | tuple) and not (visual is Visual.VIDEO and _is_frames(one))]
    if nested and (len(nested) < len(ones) or len(nested) != len(parts)):
        raise ValueError(f"{visual.value}s is neither a flat list nor one list for each of the {len(parts)} conversations")
    bare = [sum(kind is visual and source is None for kind, source in own) for own in parts]
    count = [sum(kind is visual for kind, _ in own) for own in parts]
    rest = iter(ones)
    groups: list[list[Any]] = [list(one) for one in nested] if nested else [list(islice(rest, number)) for number in bare]
    held = [len(group) for group in groups] if nested else [len(ones)]
    for own, missing, every in zip(held, bare if nested else [sum(bare)], count if nested else [sum(count)], strict=True):
        if own != missing:
            raise ValueError(
                f"{own} {visual.value}s are given beside the messages, but {missing} of their {every} {visual.value} parts carry "
                "none and wait for one"
            )
    return [iter(group) for group in groups]


def _opened(found: Found, waiting: Iterator[Any], sampler: Sampler | None) -> Any:
    visual, source = found
    key, value = (visual.value, next(waiting)) if source is None else source
    if visual is Visual.VIDEO:
        return _clip(value, sampler)
    return images_as_seen(_image(key, value))


def _image(key: str, source: Any) -> Any:
    """One image, opened if it is named: `source` is what stands under `key` in an image part.

    Raises:
        ValueError: if it cannot be read.
    """
    if not isinstance(source, str | bytes | Path):
        return source
    shown = repr(source if len(source) <= 80 else source[:77]) if isinstance(source, str | bytes) else str(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"the image {shown} is an address on the net; images are not fetched: give a file's path")
    try:
        with Image.open(_file_of(key, source)) as image:
            return as_seen(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {shown} cannot be read ({error})") from error


def _file_of(key: str, source: str | bytes | Path) -> Path | io.BytesIO:
    """What an image can be opened from."""
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(base64.b64decode(source.partition(",")[2]))
    if isinstance(source, str) and key == "base64":
        return io.BytesIO(base64.b64decode(source))
    if isinstance(source, str):
        return Path(unquote(source.removeprefix("file://")) if source.startswith("file://") else source)
    return source if isinstance(source, Path) else io.BytesIO(source)
