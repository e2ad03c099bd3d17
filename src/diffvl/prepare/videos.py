"""A vision-language checkpoint -> its video processor, with what the recipe says of sampling; or the reason why it takes none.

Place in the flow: `prepare.processor` asks for it beside the image processor.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

from diffvl.config.recipe import Video
from diffvl.errors import ConfigError, UnsupportedModelError, first_line
from diffvl.hub.clips_diffvl import Clip, ClipSize
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.hub.source_diffvl import DEFAULT_FPS, FAULTS, SAMPLE_CLIP, sampler_of
from diffvl.hub.template_diffvl import ChatTemplateError, Visual
from diffvl.hub.video_processor_diffvl import NoVideoProcessorError, build_video_processor
from diffvl.prepare.image_size import limit_by
from diffvl.prepare.same_as_native import require_same_videos
from diffvl.store.published import settings_in

# Where a checkpoint describes its video processor, in the order in which transformers looks.
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_NOT_SETTINGS = re.compile(r".*_type$|^processor_class$|^auto_map$|^backend$")
_SHOWS_VIDEOS = ("video_token_id", "video_token_index")  # in a model's configuration
_LARGE = ClipSize(1024, 1536, tuple(range(0, 64, 8)), 64, 8.0)


@dataclass(frozen=True)
class VideoPart:
    """described: class and settings, as `DiffVLProcessor` keeps them; None where videos are not taken, for this `reason`.
    expected: nobody looks for videos there."""

    described: dict[str, Any] | None
    reason: str = ""
    expected: bool = False

    def build(self) -> Any:
        """Builds the processor; None where there is none."""
        return None if self.described is None else build_video_processor(self.described["class"], self.described["settings"])


def read_video_part(model: str, revision: str | None, processor_class: type, asked: Video) -> VideoPart:
    """Reads how a checkpoint's videos are processed.

    Args:
        processor_class: of the checkpoint, in transformers.
        asked: what the recipe sets.
    Raises:
        ConfigError: if the recipe sets what this checkpoint does not do.
    """
    found = _read(model, revision, processor_class, asked) if asked.enabled else VideoPart(None, "switched off", expected=True)
    wanted = [name for name in ("fps", "num_frames", "min_pixels", "max_pixels") if getattr(asked, name) is not None]
    if found.described is None and asked.enabled and wanted:
        raise ConfigError(f"prepare.video.{wanted[0]}: this checkpoint takes no videos ({found.reason}); leave it out")
    return found


def _read(model: str, revision: str | None, processor_class: Any, asked: Video) -> VideoPart:
    if "video_processor" not in processor_class.get_attributes():
        return VideoPart(None, f"its {processor_class.__name__} takes none", expected=True)
    published = _published(model, revision)
    if published is None:
        return VideoPart(None, "it describes no video processor")
    name, settings = published
    try:
        processor = build_video_processor(name, settings)
    except (NoVideoProcessorError, ImportError, *FAULTS) as error:
        return VideoPart(None, f"its video processor cannot be used here: {first_line(error)}")
    if getattr(processor, "cap_pixels_per_frame", False) is None:
        processor.cap_pixels_per_frame = False  # recorded, as transformers means to change what it does where nobody says it
    _set_sampling(processor, asked)
    limit_by(processor, asked.min_pixels, asked.max_pixels, "prepare.video", lambda: _shown_pixels(processor))
    return VideoPart({"class": name, "settings": _settings_of(json.loads(processor.to_json_string()))})


def _published(model: str, revision: str | None) -> tuple[str, dict[str, Any]] | None:
    """Finds name and settings where transformers finds them."""
    nested = (settings_in(model, "processor_config.json", revision) or {}).get("video_processor")
    described = [nested, *(settings_in(model, file, revision) for file in _FILES)]
    settings = next((one for one in described if one), None)
    if settings is None:
        return None
    name = settings.get("video_processor_type")
    if name is None:  # older checkpoints describe both in one file
        name = re.sub(r"ImageProcessor(Fast|Pil)?$", "VideoProcessor", str(settings.get("image_processor_type") or ""))
    return (name, _settings_of(settings)) if name else None


def _settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not _NOT_SETTINGS.match(name)}


def _set_sampling(processor: Any, asked: Video) -> None:
    """Sets how many frames are shown: what the recipe says, what the checkpoint says, or a rate that all can be asked for. Most
    classes take one of fps and num_frames; a few want both."""
    fps, num_frames = processor.fps, processor.num_frames
    if asked.fps is not None:
        choices, told = [(asked.fps, None), (asked.fps, num_frames)], "prepare.video.fps: "
    elif asked.num_frames is not None:
        choices, told = [(None, asked.num_frames), (fps, asked.num_frames)], "prepare.video.num_frames: "
    else:
        choices, told = [(fps, num_frames), (fps, None), (DEFAULT_FPS, None)], ""
    fault = ""
    for processor.fps, processor.num_frames in choices:
        if processor.fps is None and processor.num_frames is None:
            continue
        try:
            sampler_of(processor).of_file(SAMPLE_CLIP.metadata)
        except FAULTS as error:
            fault = fault or first_line(error)
        else:
            return
    raise ConfigError(f"{told}{type(processor).__name__} cannot sample a video of 64 frames so ({fault})")


def _shown_pixels(processor: Any) -> int:
    """Counts the numbers that a large video becomes."""
    frames = torch.empty(len(_LARGE.indices), 3, _LARGE.height, _LARGE.width, dtype=torch.uint8, device="meta")
    given = {"video_metadata": [_LARGE.metadata], "do_sample_frames": False, "return_tensors": "pt"}
    shown = processor(videos=[frames], **given)
    return next(value.numel() for name, value in shown.items() if name.startswith("pixel_values"))


# --- what is asked of it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakenVideos:
    """A processor, with videos or, for this `reason` (none where nobody expects any), without. token_id: the token that shows a
    row of a video, None where that is the token of images. inputs: names of the tensors that say what the videos are, beside
    those of images."""

    processor: DiffVLProcessor
    token_id: int | None = None
    inputs: list[str] = field(default_factory=list)
    reason: str = ""


def with_videos(
    processor: DiffVLProcessor, part: VideoPart, config: PretrainedConfig, image_id: int, image_inputs: list[str]
) -> TakenVideos:
    """Lets a processor take videos, if chats with them are then read as the checkpoint's own processor reads them."""
    if part.described is None:
        return TakenVideos(processor, reason="" if part.expected else part.reason)
    assert processor.source is not None
    source = {**processor.source, "video": part.described}
    facts = {name: getattr(processor, name) for name in ("image_token", "image_tokens", "stop_token", "system_turn")}
    try:
        taken = DiffVLProcessor(processor.image_processor, processor.tokenizer, **facts, source=source)
        _require_placeholder(taken)
        require_same_videos(taken)
        token_id, inputs = _rows_of_videos(taken, config, image_id, image_inputs)
    except (UnsupportedModelError, ChatTemplateError, ImportError, *FAULTS) as error:
        return TakenVideos(processor, reason=first_line(error))
    return TakenVideos(taken, token_id, inputs)


def _require_placeholder(processor: DiffVLProcessor) -> None:
    """Raises UnsupportedModelError unless tokenizer and chat template know what stands for a video."""
    token = str(processor.video_token)
    if token not in processor.tokenizer.get_added_vocab():
        raise UnsupportedModelError(f"its tokenizer lacks {token}, which stands for a video")
    rendered = processor.encoder.template.render([("user", (Visual.VIDEO, "question 0"))], add_generation_prompt=True)
    if rendered.count(token) != 1:
        raise UnsupportedModelError(f"its chat template writes no {token} for a video")


def _rows_of_videos(
    processor: DiffVLProcessor, config: PretrainedConfig, image_id: int, image_inputs: list[str]
) -> tuple[int | None, list[str]]:
    """Finds the token that shows a row of a video, and its tensors."""
    assert processor.images is not None
    frames = torch.zeros(len(SAMPLE_CLIP.indices), 3, SAMPLE_CLIP.height, SAMPLE_CLIP.width, dtype=torch.uint8)
    names, ids = processor.pixels([Clip(frames, SAMPLE_CLIP)]).keys(), processor.images.of(SAMPLE_CLIP).ids
    if names <= set(image_inputs):
        return None, []
    token = next((id for name in _SHOWS_VIDEOS if (id := getattr(config, name, None)) in ids), None)
    if token is None or token == image_id or set(names) & set(image_inputs):
        raise UnsupportedModelError("its videos are shown by the token of images, from tensors of their own")
    return token, sorted(names)
