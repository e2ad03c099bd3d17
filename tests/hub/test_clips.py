"""What a video is: which frames are shown, and that they are what others decode."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_videos import frames, write_frames, write_video
from transformers.video_utils import load_video

from diffvl.hub.clips_diffvl import Clip, ClipSize, Sampler, VideoError, clip_size, open_clip

EVERY_FOURTH = Sampler(lambda facts: range(0, facts.total_num_frames, 4), 2.0)
AT_MOST_3 = Sampler(EVERY_FOURTH.of_file, 2.0, 3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])  # Matroska does not tell the number of frames
def test_a_file(name: str, tmp_path: Path):
    path = write_video(tmp_path / name, frames(18, 64, 48))
    size = clip_size(str(path), EVERY_FOURTH)
    assert size == ClipSize(48, 64, (0, 4, 8, 12, 16), 18, 8.0)
    clip = open_clip(str(path), EVERY_FOURTH, size)
    assert clip.size == size and clip.frames.shape == (5, 3, 48, 64) and clip.frames.dtype == torch.uint8
    if name == "a.mp4":
        file: Any = str(path)
        theirs, _ = load_video(file, backend="pyav", sample_indices_fn=lambda metadata, **_: list(size.indices))
        assert torch.equal(clip.frames, torch.as_tensor(theirs).permute(0, 3, 1, 2))
    assert size.metadata.duration == 18 / 8 and list(size.metadata.frames_indices or ()) == [0, 4, 8, 12, 16]


def test_a_rotated_file(tmp_path: Path):
    """Phones write how a video is turned beside its pixels: here a quarter to the right."""
    path = write_video(tmp_path / "a.mp4", frames(5, 64, 48))
    plain = open_clip(str(path), EVERY_FOURTH)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # of the track's head
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content)
    shown = open_clip(str(path), EVERY_FOURTH)
    assert (shown.size.height, shown.size.width) == (64, 48)
    assert torch.equal(shown.frames, torch.rot90(plain.frames, -1, (2, 3)))


def test_frames_on_their_own(tmp_path: Path):
    """A folder in the order of its numbers, a list of paths, of images, and an array."""
    shown = frames(11, 40, 30)
    folder = write_frames(tmp_path / "clip", shown)
    (folder / "notes.txt").write_text("no frame")
    paths = [str(folder / f"frame_{number}.png") for number in range(11)]
    whole = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).view(30, 40, 3) for one in shown])
    for video in (str(folder), folder, paths, shown, whole, whole.numpy(), whole.permute(0, 3, 1, 2)):
        clip = open_clip(video, EVERY_FOURTH)
        assert torch.equal(clip.frames, whole.permute(0, 3, 1, 2))
        assert clip.size == clip_size(video, EVERY_FOURTH) == ClipSize(30, 40, tuple(range(11)), 11, 2.0)
        assert clip_size(video, AT_MOST_3).indices == (1, 5, 9)
        assert open_clip(clip, AT_MOST_3) is clip


def bad(tmp_path: Path) -> list[tuple[Any, str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    whole = write_video(tmp_path / "whole.mp4", frames(40, 64, 48, 1))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:600])
    mixed = frames(2, 40, 30) + frames(1, 44, 30)
    return [
        ("https://example.org/a.mp4", "is no file: videos are not fetched"),
        (str(tmp_path / "none.mp4"), "none.mp4' cannot be read .*No such file"),
        (str(tmp_path / "text.mp4"), "text.mp4' cannot be read"),
        (str(tmp_path / "cut.mp4"), "cut.mp4' cannot be read"),
        (str(tmp_path / "empty"), "empty' holds no images: expected the frames of a video"),
        (mixed, r"frame 3 of a list of frames is 44x30 pixels, the first 40x30"),
        ([], "a video without frames"),
        (7, "int is no video"),
        (torch.zeros(4, 5), r"an array of the shape \(4, 5\) is no video"),
        (torch.zeros(2, 3, 8, 8), "frames of torch.float32 do not say what is white"),
    ]


@pytest.mark.parametrize("number", range(10))
def test_what_is_no_video(number: int, tmp_path: Path):
    video, says = bad(tmp_path)[number]
    with pytest.raises(VideoError, match=says):
        open_clip(video, EVERY_FOURTH)


def test_a_file_that_ends_early(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", frames(8, 64, 48))
    size = ClipSize(48, 64, (0, 9), 12, 8.0)
    with pytest.raises(VideoError, match="says that it has 12 frames, but only 8 can be decoded"):
        open_clip(str(path), EVERY_FOURTH, size)
    with pytest.raises(VideoError, match=r"no frames can be taken of .* \(8 frames, 8 a second\)"):
        clip_size(str(path), Sampler(lambda facts: range(0, 9, facts.total_num_frames - 8), 2.0))
    with pytest.raises(VideoError, match="too short: of its 8 frames none would be shown"):
        clip_size(str(path), Sampler(lambda facts: [], 2.0))


def test_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffvl.hub.clips_diffvl.is_av_available", lambda: False)
    with pytest.raises(VideoError, match="needs PyAV to be decoded: pip install av; or give a folder of its frames"):
        clip_size(str(tmp_path / "a.mp4"), EVERY_FOURTH)
    assert isinstance(open_clip(frames(2, 8, 8), EVERY_FOURTH), Clip)
