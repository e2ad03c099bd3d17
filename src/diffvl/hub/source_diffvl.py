"""A vision-language checkpoint's own processor: what an image becomes in its text, and in pixels.

The processor is rebuilt from the name of its class and its settings, with Pillow's image processor. What it needs for videos and
sounds alone is not there: those parts need packages that images do not. It is called for one image at a time, so an image is the
same tokens and the same pixels wherever it stands, in training and in decoding.

The tokens of an image follow from its size: they are taken from a blank image of that size, once.
"""

from types import FunctionType
from typing import Any

import transformers
from PIL import Image

from .chat_diffvl import ImageText, walls_of
from .images_diffvl import Pixels
from .seen_diffvl import Size

MAX_SIZES = 16_384  # remembered; their texts are far fewer
SAMPLE: Size = (64, 64)
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
    """

    structured = True

    def __init__(self, processor: Any, first_ids: list[int], first_text: str) -> None:
        self.processor, self.first_ids, self.first_text = processor, first_ids, first_text
        self.placeholder = placeholder_of(processor)
        self._backend: Any = processor.tokenizer.backend_tokenizer
        self._walls = walls_of(processor.tokenizer)
        self._by_size: dict[Size, ImageText] = {}
        self._by_text: dict[str, ImageText] = {}
        vocabulary = processor.tokenizer.convert_ids_to_tokens(sorted(set(self.of(SAMPLE).ids)))
        self.tokens = frozenset(vocabulary) - {self.placeholder}

    def of(self, size: Size, alone: bool = True) -> ImageText:
        """What an image of this height and width is in the text, whether others stand beside it or not.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        if size not in self._by_size:
            if len(self._by_size) >= MAX_SIZES:
                self._by_size.clear()
                self._by_text.clear()
            height, width = size
            blank = Image.new("RGB", (width, height))
            self._by_size[size] = self._image_text(self._call(blank, return_text_replacement_offsets=True))
        return self._by_size[size]

    def pixels(self, image: Any) -> Pixels:
        """The pixel tensors of one image.

        Raises:
            ImageRefusedError: if the processor does not take it.
        """
        inputs = self._call(image)
        return {name: value for name, value in inputs.items() if name not in _OF_TEXT and not name.endswith("token_type_ids")}

    def _call(self, image: Any, **settings: Any) -> Any:
        arguments = {"add_special_tokens": False, "return_tensors": "pt", "verbose": False, **settings}
        try:
            return self.processor(text=[self.placeholder], images=[image], **arguments)
        except FAULTS as error:
            size = "x".join(map(str, getattr(image, "size", ())))
            raise ImageRefusedError(f"{type(self.processor).__name__} refuses an image of {size} pixels: {error}") from error

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
        found = ImageText(text, ids[first : last + 1], text[:begin], text[end:])
        return self._by_text.setdefault(text, found)
