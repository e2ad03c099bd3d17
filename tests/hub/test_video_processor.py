"""Video processors of transformers without torchvision."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models
from PIL import Image
from tiny_videos import frames

from diffvl.hub.clips_diffvl import ClipSize, open_clip
from diffvl.hub.source_diffvl import sampler_of
from diffvl.hub.video_processor_diffvl import NoVideoProcessorError, build_video_processor, crop, pad, resize

# These take more from torchvision than stands in the hub, or their folder has another name.
WITHOUT = {"Ernie4_5_VLMoeVideoProcessor", "NemotronH_Omni_Reasoning_V3VideoProcessor", "MiniMaxM3VLVideoProcessor"}
COMMON = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "LlavaOnevisionVideoProcessor", "InternVLVideoProcessor")
COMMON += ("SmolVLMVideoProcessor", "Glm4vVideoProcessor", "Gemma4VideoProcessor")
# What it compresses follows from the pixels, so that its tokens are not known from a size.
BY_CONTENT = {"VideoLlama3VideoProcessor"}


def classes() -> list[str]:
    root = Path(next(iter(transformers.models.__path__)))
    files = sorted(root.glob("*/video_processing_*.py"))
    return [name for file in files for name in re.findall(r"^class (\w+VideoProcessor)\(", file.read_text(), re.MULTILINE)]


def called(processor: Any, shown: torch.Tensor) -> dict[str, Any]:
    count = len(shown)
    height, width = shown.shape[2:]
    size = ClipSize(height, width, tuple(range(0, 10 * count, 10)), 10 * count, 24.0)
    given = {"do_sample_frames": False, "video_metadata": [size.metadata], "return_tensors": "pt"}
    return dict(processor(videos=[shown], **given))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COMMON else pytest.mark.slow)
        for name in sorted({*classes()} - WITHOUT - BY_CONTENT)
    ],
)
def test_frames_without_pixels_have_the_same_sizes(name: str):
    processor = build_video_processor(name, {})
    shown = open_clip(frames(8, 90, 120), sampler_of(processor)).frames
    seen, measured = called(processor, shown), called(processor, shown.to("meta"))
    tensors = {key: value for key, value in seen.items() if isinstance(value, torch.Tensor)}
    assert any(key.startswith("pixel_values") for key in tensors)
    for key, value in tensors.items():
        assert value.shape == measured[key].shape and bool(torch.isfinite(value.float()).all()), key


@pytest.mark.parametrize("name", sorted(WITHOUT | {"NoSuchVideoProcessor", "Qwen2VLImageProcessor"}))
def test_others_are_refused(name: str):
    with pytest.raises(NoVideoProcessorError, match=f"{name} needs torchvision|has no {name} here"):
        build_video_processor(name, {})


def test_a_frame_is_resized_as_an_image_is():
    """Square frames through Qwen's processor, patch by patch, against Pillow and arithmetic."""
    processor = build_video_processor("Qwen2VLVideoProcessor", {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}})
    drawn = frames(2, 100, 100)
    pixels = called(processor, open_clip(drawn, sampler_of(processor)).frames)["pixel_values_videos"]
    whole = torch.stack(
        [
            torch.frombuffer(bytearray(one.resize((56, 56), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8)
            for one in drawn
        ]
    )
    values = whole.view(2, 56, 56, 3).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    values = (values - mean) / std
    # [frames, channel, tile row, row in it, patch row, tile column, ...]: 2 x 2 patches stand together, both frames in one row
    cut = values.view(2, 3, 2, 2, 14, 2, 2, 14).permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(16, -1)
    torch.testing.assert_close(pixels, cut, rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_place_of_torchvision():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    assert torch.equal(crop(pad(image, (1, 2, 0, 1), fill=9), 2, 1, 3, 4), image)
    assert int(pad(image, [1] * 2)[0, 0, 0]) == 0 and pad(image, [1, 2]).shape == (1, 7, 6)
    smooth = resize(image.float() / 255, [6, 8], Image.Resampling.NEAREST)
    assert smooth.dtype == torch.float32 and torch.equal(smooth[:, ::2, ::2], image / 255)
    assert resize(image.expand(2, 5, 3, 3, 4).to("meta"), (2, 2)).shape == (2, 5, 3, 2, 2)


def test_sampling_takes_what_is_set():
    facts = ClipSize(48, 64, (), 64, 8.0).metadata
    processor = build_video_processor("Qwen3VLVideoProcessor", {"fps": 2})
    assert sampler_of(processor).fps == 2.0 and len(sampler_of(processor).of_file(facts)) == 16
    processor.fps, processor.num_frames = None, 4
    sampler = sampler_of(processor)
    assert len(sampler.of_file(facts)) == 4 and sampler.of_frames(8) == (1, 3, 5, 7) and sampler.of_frames(3) == (0, 1, 2)
