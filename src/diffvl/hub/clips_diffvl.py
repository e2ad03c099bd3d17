"""What a video is: the frames of it that are shown, RGB, as a player shows them. And their size and number, from the file's head.

A video is a file, which PyAV decodes, or frames that stand on their own: a folder, or a list of paths, images or arrays. A file
is a path, or what is open for reading bytes. Of a file the frames are sampled that a video processor of transformers names;
frames on their own have been sampled already, at the rate at which it would sample, and all of them are shown unless it takes
fewer.

Shapes: T frames, H height and W width in pixels.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath, scandir
from os.path import isdir
from typing import Any

import torch
from PIL import Image
from transformers.utils.import_utils import is_av_available
from transformers.video_utils import VideoMetadata

from .seen_diffvl import as_seen, images_as_seen, size_as_seen, size_of

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class ClipSize:
    """What the text of a video follows from. indices: which of its `total` frames are shown. fps: frames per second of the
    whole."""

    height: int
    width: int
    indices: tuple[int, ...]
    total: int
    fps: float

    @property
    def metadata(self) -> VideoMetadata:
        """The same in the words of transformers."""
        return VideoMetadata(
            total_num_frames=self.total,
            fps=self.fps,
            duration=self.total / self.fps,
            height=self.height,
            width=self.width,
            frames_indices=list(self.indices),
        )


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are shown, uint8 [T, 3, H, W]."""

    frames: torch.Tensor
    size: ClipSize


@dataclass(frozen=True)
class Sampler:
    """Which frames of a video are shown. of_file: the indices for what is known of a file. fps: the rate at which frames on
    their own were taken. most: of these, at most."""

    of_file: Callable[[VideoMetadata], Sequence[int]]
    fps: float
    most: int | None = None

    def of_frames(self, count: int) -> tuple[int, ...]:
        """Spread evenly over frames on their own."""
        shown = min(count, self.most or count)
        return tuple(int((number + 0.5) * count / shown) for number in range(shown))


class VideoError(ValueError):
    """A video cannot be read, or not be shown."""


def clip_size(video: Any, sampler: Sampler) -> ClipSize:
    """The size of what `open_clip` gives; of a file one frame is decoded, which says how it is turned.

    Raises:
        VideoError: if it cannot be read.
    """
    if isinstance(video, Clip):
        return video.size
    frames = frames_of(video)
    if frames is None:
        with _stream(video) as (container, stream):
            first = next(container.decode(stream), None)
            if first is None:
                raise VideoError(f"the video {_short(video)} has no frame that can be decoded")
            height, width = _turned(first).shape[:2]
            return _sampled(video, _facts(container, stream, height, width), sampler)
    first = frames[0]
    height, width = _frame_size(first)
    indices = sampler.of_frames(len(frames))
    return ClipSize(height, width, indices, len(frames), sampler.fps)


def open_clip(video: Any, sampler: Sampler, size: ClipSize | None = None) -> Clip:
    """Decodes the frames that are shown.

    Args:
        size: what `clip_size` gave for it, if it was asked.

    Raises:
        VideoError: if it cannot be read, ends early, or its frames differ in size.
    """
    if isinstance(video, Clip):
        return video
    frames = frames_of(video)
    size = size or clip_size(video, sampler)
    if frames is None:
        return Clip(_stacked(_decoded(video, size)), size)
    shown = [_frame(frames[index]) for index in size.indices]
    for number, frame in zip(size.indices, shown, strict=True):
        if frame.shape[:2] != (size.height, size.width):
            raise VideoError(
                f"frame {number + 1} of {_short(video)} is {frame.shape[1]}x{frame.shape[0]} pixels, the first {size.width}x"
                f"{size.height}: all frames of a video have one size"
            )
    return Clip(_stacked(shown), size)


def _stacked(frames: Sequence[torch.Tensor]) -> torch.Tensor:
    """[H, W, 3] each -> [T, 3, H, W]."""
    return torch.stack([frame.permute(2, 0, 1) for frame in frames])


# --- frames on their own -----------------------------------------------------------------------------------------------------


def frames_of(video: Any) -> Sequence[Any] | None:
    """The frames of a video that stand on their own: paths, images or arrays; None for a file.

    Raises:
        VideoError: for what is no video.
    """
    if _is_open(video):
        return None
    if isinstance(video, str | PathLike):
        path = fspath(video)
        if "://" in path or path.startswith("data:"):
            raise VideoError(f"{path[:80]!r} is no file: videos are not fetched, give a path")
        return frame_files(path) if isdir(path) else None
    shape = getattr(video, "shape", None)
    if shape is not None and (len(shape) != 4 or 3 not in (shape[1], shape[3])):
        raise VideoError(
            f"an array of the shape {tuple(shape)} is no video: expected [T, height, width, 3] or [T, 3, height, width]"
        )
    if shape is None and not isinstance(video, list | tuple):
        raise VideoError(f"{type(video).__name__} is no video: expected a path, a folder or a list of frames, or an array")
    if not len(video):
        raise VideoError("a video without frames has nothing to show")
    return video


def frame_files(folder: str) -> list[str]:
    """The images in a folder, in the order of the numbers in their names.

    Raises:
        VideoError: if there are none.
    """
    with scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file() and entry.name.lower().endswith(IMAGE_ENDINGS)]
    if not names:
        raise VideoError(f"the folder {_short(folder)} holds no images: expected the frames of a video")
    return [f"{folder}/{name}" for name in sorted(names, key=_by_numbers)]


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """So that frame_10 comes after frame_9."""
    pieces, digits = [""], False
    for sign in name:
        if sign.isdecimal() != digits:
            pieces.append("")
            digits = not digits
        pieces[-1] += sign
    return [(int(piece), piece) if piece.isdecimal() else (-1, piece) for piece in pieces]


def _frame_size(frame: Any) -> tuple[int, int]:
    if not _is_file(frame):
        return size_of(images_as_seen(frame))
    with _reading(f"the frame {_short(frame)}"), Image.open(frame) as image:
        return size_as_seen(image)


def _frame(frame: Any) -> torch.Tensor:
    """One frame as uint8 [H, W, 3]."""
    if _is_file(frame):
        with _reading(f"the frame {_short(frame)}"), Image.open(frame) as image:
            return _values(as_seen(image))
    if isinstance(frame, Image.Image):
        return _values(as_seen(frame))
    values = torch.as_tensor(frame)
    if values.dtype != torch.uint8:
        raise VideoError(f"frames of {values.dtype} do not say what is white: expected uint8, from 0 to 255")
    return values if values.shape[-1] == 3 else values.permute(1, 2, 0)


def _values(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


# --- files -------------------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PyAV's errors are among these
        raise error if isinstance(error, VideoError) else VideoError(f"{what} cannot be read ({error})") from error


def _is_file(one: Any) -> bool:
    return isinstance(one, str | PathLike) or _is_open(one)


def _is_open(one: Any) -> bool:
    """Whether it is a file that is open for reading."""
    return hasattr(one, "read") and hasattr(one, "seek")


@contextmanager
def _stream(path: Any) -> Iterator[tuple[Any, Any]]:
    """A file's container and its first video stream."""
    if not is_av_available():
        raise VideoError(f"the video {_short(path)} needs PyAV to be decoded: pip install av; or give a folder of its frames")
    av = importlib.import_module("av")  # an extra; named so that loading a checkpoint does not ask for it
    if _is_open(path):
        path.seek(0)
    with _reading(f"the video {_short(path)}"), av.open(path if _is_open(path) else fspath(path)) as container:
        if not container.streams.video:
            raise VideoError(f"{_short(path)} has no pictures in it: expected a video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _facts(container: Any, stream: Any, height: int, width: int) -> VideoMetadata:
    """What a video processor asks before it samples. Some containers do not tell the number of frames: packets are counted."""
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    total = stream.frames
    if not total:
        container.seek(0)
        total = sum(1 for packet in container.demux(stream) if packet.size)
    if not total or not fps > 0:
        raise VideoError(f"the video {_short(container.name)} does not say how many frames it has, or how many a second")
    return VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps, height=height, width=width, video_backend="pyav")


def _sampled(path: Any, facts: VideoMetadata, sampler: Sampler) -> ClipSize:
    try:
        indices = tuple(int(index) for index in sampler.of_file(facts))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        told = f"{facts.total_num_frames} frames, {facts.fps:g} a second"
        raise VideoError(f"no frames can be taken of the video {_short(path)} ({told}): {error}") from error
    if not indices:
        raise VideoError(f"the video {_short(path)} is too short: of its {facts.total_num_frames} frames none would be shown")
    assert facts.height is not None and facts.width is not None and facts.fps is not None
    return ClipSize(facts.height, facts.width, indices, facts.total_num_frames, facts.fps)


def _decoded(path: Any, size: ClipSize) -> list[torch.Tensor]:
    """The frames at `size.indices`, uint8 [H, W, 3] each."""
    wanted, found = set(size.indices), {}
    with _stream(path) as (container, stream):
        count = 0
        for frame in container.decode(stream):
            if count in wanted:
                found[count] = _turned(frame)
            count += 1
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise VideoError(
            f"the video {_short(path)} says that it has {size.total} frames, but only {count} can be decoded: encode it anew"
        )
    for number, values in found.items():
        if values.shape[:2] != (size.height, size.width):
            raise VideoError(f"frame {number + 1} of the video {_short(path)} has another size than the first: encode it anew")
    return [found[index] for index in size.indices]


def _turned(frame: Any) -> torch.Tensor:
    """A decoded frame as a player shows it, [H, W, 3]: phones record the rotation beside the pixels."""
    return torch.rot90(torch.from_numpy(frame.to_ndarray(format="rgb24")), round(frame.rotation / 90) % 4, (0, 1))


def _short(path: Any) -> str:
    if _is_open(path):
        path = getattr(path, "name", "an open file")
    if not isinstance(path, str | PathLike):
        return "a list of frames"
    text = fspath(path)
    return repr(text if len(text) <= 80 else f"...{text[-77:]}")
