"""Videos of a few small frames, written by PyAV."""

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
from PIL import Image


def frames(count: int, width: int, height: int, seed: int = 0) -> list[Image.Image]:
    """Frames that all differ, and whose patches do."""
    drawn = numpy.random.default_rng(seed).integers(0, 256, (count, 3, 4, 3), dtype=numpy.uint8)
    return [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in drawn]


def write_video(path: Path, shown: list[Image.Image], fps: int = 8, codec: str = "mpeg4") -> Path:
    """Writes a file of these frames; its format is told by its name."""
    av: Any = importlib.import_module("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = shown[0].size
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(shown):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_frames(folder: Path, shown: list[Image.Image]) -> Path:
    """Writes a folder of numbered frames."""
    folder.mkdir()
    for number, image in enumerate(shown):
        image.save(folder / f"frame_{number}.png")
    return folder
