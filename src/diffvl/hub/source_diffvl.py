"""A vision-language checkpoint's own processor: what an image becomes in its text, and in pixels.

The processor is rebuilt from the name of its class and its settings, with Pillow's image processor. What it needs for videos and
sounds alone is not there: those parts need packages that images do not. It is called for one image at a time, so an image is the
same tokens and the same pixels wherever it stands, in training and in decoding.

The tokens of an image follow from its size: they are taken from a blank image of that size, once.
"""

from dataclasses import replace
from types import FunctionType
from typing import Any

import transformers
from PIL import Image

from .chat_diffvl import ImageText, walls_of
from .images_diffvl import Pixels
from .seen_diffvl import Size

MAX_SIZES = 16_384  # remembered; their texts are far fewer
SAMPLE: Size = (64, 64)
GAPS = ("", " ")  # what a processor may write between an image and a text
# What calling the processor may raise for an image that it is not made for.
FAULTS = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError)
# What stands in its results beside the pixels: one value a token, or where texts were replaced.
_OF_TEXT = ("input_ids", "attention_mask", "labels", "text_replacement_offsets")


class ImageRefusedError(ValueError):
    """A checkpoint's processor does not take an image."""


class Absent:
    """In the place of a processor's part for videos or sounds."""

    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def build_processor(class_name: str, settings: dict[str, Any], image_processor: Any, tokenizer: Any) -> Any:
    """A processor of this class of transformers, without its parts for videos and sounds.

    Raises:
        ValueError: if transformers has no such class here.
        ImportError, TypeError, AttributeError: by the class itself, if a setting or a token is missing.
    """
    found = getattr(transformers, class_name, None)
    if found is None or getattr(found, "is_dummy", False):
        raise ValueError(f"transformers has no {class_name} here" + (": it needs torchvision" if found is not None else ""))
    present = {"image_processor": image_processor, "tokenizer": tokenizer}
    parts = {name: present.get(name, Absent()) for name in found.get_attributes()}

    def check(processor: Any, name: str, part: Any) -> Any:
        return Absent if isinstance(part, Absent) else found.check_argument_for_proper_class(processor, name, part)

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


class SourceImages:
    """Images through a checkpoint's own processor.

    Args:
        processor: what `build_processor` gave.
        first_ids, first_text: see `ImageTexts`.
    Attributes:
        rewrites_texts: whether the processor may write something around images that depends on the text there.
    """

    def __init__(self, processor: Any, first_ids: list[int], first_text: str) -> None:
        self.processor, self.first_ids, self.first_text = processor, first_ids, first_text
        self.placeholder = str(placeholder_of(processor))
        self._backend: Any = processor.tokenizer.backend_tokenizer
        self._walls = walls_of(processor.tokenizer)
        self._by_size: dict[Size, ImageText] = {}
        self._by_text: dict[str, ImageText] = {}
        self._gaps: dict[str, str] = {}
        self._overlap: int | None = None
        self.rewrites_texts = False
        vocabulary = processor.tokenizer.convert_ids_to_tokens(sorted(set(self.of(SAMPLE).ids)))
        self.tokens = frozenset(vocabulary) - {self.placeholder}

    def of(self, size: Size) -> ImageText:
        """What an image of this height and width is in the text.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        if size not in self._by_size:
            if len(self._by_size) >= MAX_SIZES:
                self._by_size.clear()
                self._by_text.clear()
            height, width = size
            blank = Image.new("RGB", (width, height))
            self._by_size[size] = self._image_text(self.inputs(blank, return_text_replacement_offsets=True))
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
            ids, alone = self._ids(self.placeholder + sign, 1), self.of(SAMPLE).text
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
            alone, both = self.of(SAMPLE).ids, self._ids(2 * self.placeholder, 2)
            fitting = [count for count in range(len(alone)) if alone + alone[count:] == both]
            if not fitting:
                raise ImageRefusedError(
                    f"{type(self.processor).__name__} writes two images, side by side, in another way than one"
                )
            self._overlap = fitting[0]
        return self._overlap

    def pixels(self, image: Any) -> Pixels:
        """The pixel tensors of one image.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        inputs = self.inputs(image)
        return {name: value for name, value in inputs.items() if name not in _OF_TEXT and not name.endswith("token_type_ids")}

    def inputs(self, image: Any, **settings: Any) -> Any:
        """All that the processor gives for a text of one image.

        Raises:
            ImageRefusedError: if it does not take it.
        """
        return self._call(self.placeholder, [image], **settings)

    def _call(self, text: str, images: list[Any], **settings: Any) -> Any:
        arguments = {"add_special_tokens": False, "return_tensors": "pt", "verbose": False, **settings}
        try:
            return self.processor(text=[text], images=images, **arguments)
        except FAULTS as error:
            size = "x".join(map(str, getattr(images[0], "size", ())))
            raise ImageRefusedError(f"{type(self.processor).__name__} refuses an image of {size} pixels: {error}") from error

    def _ids(self, text: str, images: int) -> list[int]:
        height, width = SAMPLE
        blank = Image.new("RGB", (width, height))
        return [int(one) for one in self._call(text, [blank] * images)["input_ids"][0]]

    def _image_text(self, inputs: Any) -> ImageText:
        """Splits what the processor wrote into added tokens, with all between them, and plain text around them."""
        ids = [int(one) for one in inputs["input_ids"][0]]
        told = inputs.get("text_replacement_offsets")
        self.rewrites_texts = not told
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
        found = ImageText(text, ids[first : last + 1], text[:begin], text[end:])
        return self._by_text.setdefault(text, found)


def _holds(ids: list[int], part: list[int]) -> bool:
    """Whether a part stands in a list, whole and in order."""
    return any(ids[place : place + len(part)] == part for place in range(len(ids) - len(part) + 1))
