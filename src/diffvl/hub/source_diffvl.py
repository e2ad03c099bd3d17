"""A vision-language checkpoint's own processor: what an image or a video becomes in its text, and in pixels.

The processor is rebuilt from the name of its class and its settings, with Pillow's image processor and, where it takes videos, a
video processor that does without torchvision. What it needs for sounds is not there. It is called for one image or video at a
time, so each is the same tokens and the same pixels wherever it stands, in training and in decoding.

The tokens follow from the size: they are taken from a blank image of that size, or from frames without pixels, once.
"""

from types import FunctionType
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata

from .chat_diffvl import ImageText
from .clips_diffvl import Clip, ClipSize, Sampler
from .images_diffvl import VIDEO_FRAMES, Pixels
from .messages_diffvl import Placeholders
from .seen_diffvl import Size
from .template_diffvl import Visual
from .tokens_diffvl import walls_of

MAX_SIZES = 16_384  # remembered; their texts are far fewer
SAMPLE: Size = (64, 64)
SAMPLE_CLIP = ClipSize(64, 64, tuple(range(0, 64, 8)), 64, 8.0)
DEFAULT_FPS = 2.0  # frames that are shown of a second, where a checkpoint does not say it
# What calling the processor may raise for an image that it is not made for.
FAULTS = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError)
# What stands in its results beside the pixels: one value a token, or where texts were replaced.
_OF_TEXT = ("input_ids", "attention_mask", "labels", "text_replacement_offsets")
# What a video processor's own call takes out of its settings before it samples.
_NOT_SAMPLING = ("input_data_format", "do_convert_rgb", "do_sample_frames", "device", "video_metadata")


class ImageRefusedError(ValueError):
    """A checkpoint's processor does not take an image or a video."""


class Absent:
    """In the place of a processor's part for sounds, or for videos where these are not taken."""

    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def build_processor(
    class_name: str, settings: dict[str, Any], image_processor: Any, tokenizer: Any, video_processor: Any = None
) -> Any:
    """A processor of this class of transformers, without its part for sounds, and without videos if there is no such processor.

    Raises:
        ValueError: if transformers has no such class here.
        ImportError, TypeError, AttributeError: by the class itself, if a setting or a token is missing.
    """
    found = getattr(transformers, class_name, None)
    if found is None or getattr(found, "is_dummy", False):
        raise ValueError(f"transformers has no {class_name} here" + (": it needs torchvision" if found is not None else ""))
    present = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": video_processor}
    parts = {name: Absent() if present.get(name) is None else present[name] for name in found.get_attributes()}

    def check(processor: Any, name: str, part: Any) -> Any:
        if name == "video_processor" or isinstance(part, Absent):  # whose proper class needs torchvision
            return type(part)
        return found.check_argument_for_proper_class(processor, name, part)

    made = type(class_name, (found,), {"check_argument_for_proper_class": check, "__init__": _without_packages(found.__init__)})
    return made(**parts, **settings)


def _without_packages(init: Any) -> Any:
    """The same `__init__`, for which optional packages that are not installed, None in its module, are there: SmolVLM's asks for
    one that writes the number of frames of a video in words."""
    known = init.__globals__
    missing = {name: Absent() for name in init.__code__.co_names if name in known and known[name] is None}
    made = FunctionType(init.__code__, {**known, **missing}, init.__name__, init.__defaults__, init.__closure__)
    made.__kwdefaults__ = init.__kwdefaults__
    return made


def placeholder_of(processor: Any) -> str | None:
    """The text that stands for an image in a text for this processor; some use another token for its rows."""
    return getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)


def sampler_of(video_processor: Any) -> Sampler:
    """Which frames of a video this processor of transformers shows."""
    names = [name for name in video_processor.valid_kwargs.__annotations__ if name not in _NOT_SAMPLING]

    def of_file(metadata: VideoMetadata) -> list[int]:
        settings = {name: getattr(video_processor, name, None) for name in names}
        return [int(index) for index in video_processor.sample_frames(metadata=metadata, **settings)]

    most = video_processor.num_frames or getattr(video_processor, "max_frames", None)
    return Sampler(of_file, float(video_processor.fps or DEFAULT_FPS), most)


class SourceImages:
    """Images and videos through a checkpoint's own processor.

    Args:
        processor: what `build_processor` gave.
        first_ids, first_text: see `ImageTexts`.
    """

    structured = True

    def __init__(self, processor: Any, first_ids: list[int], first_text: str) -> None:
        self.processor, self.first_ids, self.first_text = processor, first_ids, first_text
        self.placeholders: Placeholders = {Visual.IMAGE: str(placeholder_of(processor))}
        video_processor = getattr(processor, "video_processor", None)
        self.sampler = None if video_processor is None or isinstance(video_processor, Absent) else sampler_of(video_processor)
        if self.sampler is not None:
            self.placeholders = {**self.placeholders, Visual.VIDEO: processor.video_token}
        self._backend: Any = processor.tokenizer.backend_tokenizer
        self._walls = walls_of(processor.tokenizer)
        self._by_size: dict[Size, ImageText] = {}
        self._by_text: dict[str, ImageText] = {}
        samples = [self.of(SAMPLE), *([self.of(SAMPLE_CLIP)] if self.sampler is not None else [])]
        ids = sorted({one for sample in samples for one in sample.ids})
        self.tokens = frozenset(processor.tokenizer.convert_ids_to_tokens(ids)) - {*self.placeholders.values()}

    def of(self, size: Size | ClipSize, alone: bool = True) -> ImageText:
        """What an image of this height and width is in the text, or a video, whether others stand beside it or not.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        if isinstance(size, ClipSize):  # no two videos are alike, and their texts are long
            return self._image_text(self._call(_blank(size), return_text_replacement_offsets=True))
        if size not in self._by_size:
            if len(self._by_size) >= MAX_SIZES:
                self._by_size.clear()
                self._by_text.clear()
            found = self._image_text(self._call(_blank(size), return_text_replacement_offsets=True))
            self._by_size[size] = self._by_text.setdefault(found.text, found)
        return self._by_size[size]

    def pixels(self, image: Any) -> Pixels:
        """The pixel tensors of one image or `Clip`.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        inputs = self._call(image)
        found = {name: value for name, value in inputs.items() if name not in _OF_TEXT and not name.endswith("token_type_ids")}
        frames = found.get("pixel_values_videos")
        if frames is not None and frames.dim() == 5:  # one video a row
            found[VIDEO_FRAMES] = torch.tensor([frames.shape[1]])
        return found

    def _call(self, image: Any, **settings: Any) -> Any:
        arguments = {"add_special_tokens": False, "return_tensors": "pt", "verbose": False, **settings}
        clip = isinstance(image, Clip)
        if clip:
            arguments |= {"videos": [image.frames], "video_metadata": [image.size.metadata], "do_sample_frames": False}
        else:
            arguments |= {"images": [image]}
        try:
            return self.processor(text=[self.placeholders[Visual.VIDEO if clip else Visual.IMAGE]], **arguments)
        except (*FAULTS, NotImplementedError) as error:
            told = f"a video of {len(image.frames)} frames" if clip else "an image"
            height, width = image.frames.shape[-2:] if clip else getattr(image, "size", (0, 0))[::-1]
            raise ImageRefusedError(
                f"{type(self.processor).__name__} refuses {told} of {width}x{height} pixels: {error}"
            ) from error

    def _image_text(self, inputs: Any) -> ImageText:
        """Splits what the processor wrote into added tokens, with all between them, and plain text around them."""
        ids = [int(one) for one in inputs["input_ids"][0]]
        told = inputs.get("text_replacement_offsets")
        text = told[0][0]["replacement"] if told else self.processor.tokenizer.decode(ids)
        if text in self._by_text:
            return self._by_text[text]
        encoded = self._backend.encode(text, add_special_tokens=False)
        walls = [place for place, one in enumerate(encoded.ids) if one in self._walls]
        if encoded.ids != ids or not walls:
            raise ImageRefusedError(
                f"{type(self.processor).__name__} writes an image that cannot be found again in the text: {text[:60]!r}"
            )
        first, last = walls[0], walls[-1]
        begin, end = encoded.offsets[first][0], encoded.offsets[last][1]
        return ImageText(text, ids[first : last + 1], text[:begin], text[end:])


def _blank(size: Size | ClipSize) -> Image.Image | Clip:
    """What has this size and shows nothing."""
    if not isinstance(size, ClipSize):
        height, width = size
        return Image.new("RGB", (width, height))
    frames = torch.empty(len(size.indices), 3, size.height, size.width, dtype=torch.uint8, device="meta")
    return Clip(frames, size)
