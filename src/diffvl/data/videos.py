"""The videos that a record names -> files, or frames that stand on their own (see `hub.clips_diffvl`).

Under `video` stands a file, a folder of frames, a list of frames or a list of videos; under `videos` a list of videos. A list of
images is the frames of one video.
"""

import os
from typing import Any

from diffvl.data.content import kind_of, text_of
from diffvl.data.images import UNREADABLE, require_path
from diffvl.data.keys import is_absent
from diffvl.data.references import Reference, file_of, shown
from diffvl.errors import DataError
from diffvl.hub.clips_diffvl import IMAGE_ENDINGS, Clip, ClipSize, Sampler, VideoError, clip_size, open_clip

Video = str | tuple[str, ...]  # a file or a folder, or frames; of a zip or a tar their references

VIDEO_MISSING = "video missing"
NO_VIDEOS = "the checkpoint takes no videos"
_KIND = "video"


def named_videos(value: dict[str, Any]) -> list[Video]:
    """Gives what stands under a record's `video` or `videos`, as it is written there.

    Raises:
        DataError: for what names no videos.
    """
    keys = [key for key in ("video", "videos") if not is_absent(value.get(key))]
    if len(keys) > 1:
        raise DataError("both `video` and `videos`: keep one of them", _KIND)
    if not keys:
        return []
    given = value[keys[0]]
    if keys[0] == "video" and isinstance(given, list) and all(_is_image(one) for one in given):
        return [_named(given, "`video`")]
    ones = given if isinstance(given, list) else [given]
    if keys[0] == "videos" and all(_is_image(one) for one in ones):
        raise DataError("`videos` lists images: put the frames of one video under `video`, or into a list of their own", _KIND)
    return [_named(one, f"`{keys[0]}`") for one in ones]


def _is_image(one: Any) -> bool:
    return isinstance(one, str) and one.lower().endswith(IMAGE_ENDINGS)


def _named(one: Any, what: str) -> Video:
    frames = one if isinstance(one, list) else [one]
    for frame in frames:
        if not isinstance(frame, str) or not frame.strip():
            got = "an empty string" if isinstance(frame, str) else kind_of(frame)
            raise DataError(f"{what} must be a path, a list of paths of frames, or a list of these, got {got}", _KIND)
        if not isinstance(frame, Reference):
            require_path(frame, "a video" if frame is one else "a frame")
    if not frames:
        raise DataError(f"{what} has an empty list of frames", _KIND)
    paths = [text_of(frame, what) for frame in frames]
    return tuple(paths) if isinstance(one, list) else paths[0]


def missing_video(path: str, folder_is_set: bool) -> DataError:
    """Tells what is wrong with a path that is neither file nor folder."""
    start = "data.image_folder" if folder_is_set else "the data file's folder; set data.image_folder if they start elsewhere"
    return DataError(f"video not found: {path} (relative paths start at {start})", VIDEO_MISSING)


def located(video: Video, folder: str) -> Video:
    """Gives a video with absolute paths."""
    return os.path.join(folder, video) if isinstance(video, str) else tuple(os.path.join(folder, frame) for frame in video)


def video_size(video: Video, source: str, sampler: Sampler | None) -> ClipSize:
    """Gives the size of what `open_video` gives.

    Raises:
        DataError: naming `source` (file and line of the record) and what is wrong.
    """
    return _look(video, source, sampler, clip_size)


def open_video(video: Video, source: str, sampler: Sampler | None, size: ClipSize | None = None) -> Clip:
    """Decodes the frames that are shown. Raises DataError as `video_size`."""
    return _look(video, source, sampler, lambda one, own: open_clip(one, own, size))


def _look(video: Video, source: str, sampler: Sampler | None, look: Any) -> Any:
    if sampler is None:
        raise DataError(f"{source}: it shows a video, and this checkpoint takes none: leave such records out", NO_VIDEOS)
    name = video if isinstance(video, str) else video[0]
    try:
        return look(file_of(video) if isinstance(video, str) else [file_of(frame) for frame in video], sampler)
    except DataError as error:
        raise DataError(f"{source}: video {shown(name)}: {error}", error.kind) from error
    except FileNotFoundError as error:
        raise DataError(f"{source}: video {shown(name)} does not exist", VIDEO_MISSING) from error
    except VideoError as error:
        raise DataError(f"{source}: {error}", UNREADABLE) from error
