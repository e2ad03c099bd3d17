"""A vision-language checkpoint's own processor: what an image or a video becomes in its text, and in pixels.

The processor is rebuilt from the name of its class and its settings, with Pillow's image processor and, where it takes videos, a
video processor that does without torchvision. What it needs for sounds is not there. It is called for one image or video at a
time, so each is the same tokens and the same pixels wherever it stands, in training and in decoding.

The tokens follow from the size: they are taken from a blank image of that size, or from frames without pixels, once.
"""

import importlib
import sys
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata

from .chat_diffvl import ImageText
from .clips_diffvl import Clip, ClipSize, Sampler
from .messages_diffvl import Placeholders
from .pixels_diffvl import VIDEO_FRAMES, Pixels
from .seen_diffvl import Size
from .template_diffvl import Visual
from .tokens_diffvl import walls_of

MAX_SIZES = 16_384  # remembered; their texts are far fewer
SAMPLE: Size = (64, 64)
GAPS = ("", " ")  # what a processor may write between an image and a text
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
    found: Any = processor_class(class_name)
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


def processor_class(name: str) -> Any:
    """The class of transformers with this name; None, or one that says `is_dummy`, where there is none here.

    transformers hides some where torchvision is not installed, although their images have a form by Pillow: all that they take
    from the module of the other form stands in that of this one, which is put in its place for the import.
    """
    found = getattr(transformers, name, None)
    if not getattr(found, "is_dummy", False):
        return found
    module = str(getattr(found, "__module__", ""))
    folder, _, family = module.rpartition(".processing_")
    other = f"{folder}.image_processing_{family}"
    try:
        by_pillow = importlib.import_module(f"{folder}.image_processing_pil_{family}")
        sys.modules[other] = by_pillow
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return found
    finally:
        sys.modules.pop(other, None)


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
    Attributes:
        rewrites_texts: whether the processor may write something around images that depends on the text there.
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
        self._gaps: dict[str, str] = {}
        self._overlap: int | None = None
        self.rewrites_texts = False
        samples = [self.of(SAMPLE), *([self.of(SAMPLE_CLIP)] if self.sampler is not None else [])]
        ids = sorted({one for sample in samples for one in sample.ids})
        self.tokens = frozenset(processor.tokenizer.convert_ids_to_tokens(ids)) - {*self.placeholders.values()}

    def of(self, size: Size | ClipSize, alone: bool = True) -> ImageText:
        """What an image of this height and width is in the text, or a video, whether others stand beside it or not.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        if isinstance(size, ClipSize):  # no two videos are alike, and their texts are long
            return self._image_text(self.inputs(_blank(size), return_text_replacement_offsets=True))
        if size not in self._by_size:
            if len(self._by_size) >= MAX_SIZES:
                self._by_size.clear()
                self._by_text.clear()
            found = self._image_text(self.inputs(_blank(size), return_text_replacement_offsets=True))
            self._by_size[size] = self._by_text.setdefault(found.text, found)
        return self._by_size[size]

    def in_place(self, images: list[ImageText], following: list[str]) -> list[ImageText]:
        """The images of a chat, each before the text that follows it: what is written between an image and a word, and what two
        images write once if nothing stands between them, is part of them.

        Raises:
            ImageRefusedError: if the processor writes something else there.
        """
        if not self.rewrites_texts:
            return images
        placed, cut = [], 0
        for number, (image, text) in enumerate(zip(images, following, strict=True)):
            begin = len(image.before)
            end = begin + len(self.processor.tokenizer.decode(image.ids[:cut]))
            gap = self._gap(text[:1]) if text else ""
            written = image.text[:begin] + image.text[end:] + gap
            placed.append(replace(image, text=written, ids=image.ids[cut:], after=image.after + gap))
            cut = self._shared() if not text and number + 1 < len(images) else 0
        return placed

    def _gap(self, sign: str) -> str:
        """What the processor writes between an image and a text that begins with this sign."""
        if sign not in self._gaps:
            ids, alone = self._ids(self.placeholders[Visual.IMAGE] + sign, 1), self.of(SAMPLE).text
            fitting = [gap for gap in GAPS if self._backend.encode(alone + gap + sign, add_special_tokens=False).ids == ids]
            if not fitting:
                raise ImageRefusedError(
                    f"{type(self.processor).__name__} changes a text that begins with {sign!r} behind an image"
                )
            self._gaps[sign] = fitting[0]
        return self._gaps[sign]

    def _shared(self) -> int:
        """How many tokens at the end of an image are also the first of another one right behind it."""
        if self._overlap is None:
            alone, both = self.of(SAMPLE).ids, self._ids(2 * self.placeholders[Visual.IMAGE], 2)
            fitting = [count for count in range(len(alone)) if alone + alone[count:] == both]
            if not fitting:
                raise ImageRefusedError(
                    f"{type(self.processor).__name__} writes two images, side by side, in another way than one"
                )
            self._overlap = fitting[0]
        return self._overlap

    def pixels(self, image: Any) -> Pixels:
        """The pixel tensors of one image or `Clip`.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        inputs = self.inputs(image)
        found = {name: value for name, value in inputs.items() if name not in _OF_TEXT and not name.endswith("token_type_ids")}
        frames = found.get("pixel_values_videos")
        if frames is not None and frames.dim() == 5:  # one video a row
            found[VIDEO_FRAMES] = torch.tensor([frames.shape[1]])
        return found

    def inputs(self, image: Any, **settings: Any) -> Any:
        """All that the processor gives for a text of one image or `Clip`.

        Raises:
            ImageRefusedError: if it does not take it.
        """
        if not isinstance(image, Clip):
            return self._call(self.placeholders[Visual.IMAGE], image, images=[image], **settings)
        video = {"videos": [image.frames], "video_metadata": [image.size.metadata], "do_sample_frames": False}
        return self._call(self.placeholders[Visual.VIDEO], image, **video, **settings)

    def _call(self, text: str, one: Any, **given: Any) -> Any:
        """Calls the processor for a text with one image or clip, or the same one several times."""
        try:
            return self.processor(text=[text], add_special_tokens=False, return_tensors="pt", verbose=False, **given)
        except (*FAULTS, NotImplementedError) as error:
            clip = isinstance(one, Clip)
            told = f"a video of {len(one.frames)} frames" if clip else "an image"
            height, width = one.frames.shape[-2:] if clip else getattr(one, "size", (0, 0))[::-1]
            raise ImageRefusedError(
                f"{type(self.processor).__name__} refuses {told} of {width}x{height} pixels: {error}"
            ) from error

    def _ids(self, text: str, images: int) -> list[int]:
        blank = _blank(SAMPLE)
        return [int(one) for one in self._call(text, blank, images=[blank] * images)["input_ids"][0]]

    def _image_text(self, inputs: Any) -> ImageText:
        """Splits what the processor wrote into added tokens, with all between them, and plain text around them."""
        ids = [int(one) for one in inputs["input_ids"][0]]
        told = inputs.get("text_replacement_offsets")
        self.rewrites_texts |= not told
        text = told[0][0]["replacement"] if told else self.processor.tokenizer.decode(ids)
        if text in self._by_text:
            return self._by_text[text]
        encoded = self._backend.encode(text, add_special_tokens=False)
        walls = [place for place, one in enumerate(encoded.ids) if one in self._walls]
        # Around a text that was put in the placeholder's place some write more: what stands around a question, say.
        found_again = _holds(ids, encoded.ids) if told else encoded.ids == ids
        if not found_again or not walls:
            raise ImageRefusedError(
                f"{type(self.processor).__name__} writes an image that cannot be found again in the text: {text[:60]!r}"
            )
        first, last = walls[0], walls[-1]
        begin, end = encoded.offsets[first][0], encoded.offsets[last][1]
        return ImageText(text, encoded.ids[first : last + 1], text[:begin], text[end:])


def _holds(ids: list[int], part: list[int]) -> bool:
    """Whether a part stands in a list, whole and in order."""
    return any(ids[place : place + len(part)] == part for place in range(len(ids) - len(part) + 1))


def _blank(size: Size | ClipSize) -> Image.Image | Clip:
    """What has this size and shows nothing."""
    if not isinstance(size, ClipSize):
        height, width = size
        return Image.new("RGB", (width, height))
    frames = torch.empty(len(size.indices), 3, size.height, size.width, dtype=torch.uint8, device="meta")
    return Clip(frames, size)
