"""Images and conversations -> tensors, by the checkpoint's own chat template, for training and decoding alike.

One function, `encode_chat`, turns messages into token ids in both worlds (see `chat_diffvl`). And one, `as_seen`, says what an
image is: RGB, as a viewer shows it.

* Turned as its EXIF orientation says.
* Laid on white where it is transparent, by an alpha channel, a palette or a transparent colour.
* Deep greyscale in 8 bits. 16-bit images (`I;16`) are divided by 257. What has no depth of its own (`I`, `F`: 32-bit numbers)
  is taken by its largest value: up to 255 as 8-bit values, up to 65535 as 16-bit ones; floats up to 1 as shares of white.
  Others, negative ones and those that are not finite are refused: nobody knows what is black in them.
* Of an animation, the frame that the image stands at (the first of one just opened).
"""

import base64
import io
import struct
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin

from .chat_diffvl import ChatEncoder, ChatEncoding, Messages, images_of
from .images_diffvl import Pixels

# Not attributes of the processors: what is remembered is neither saved, copied nor sent to other processes.
_ENCODERS: WeakKeyDictionary[Any, ChatEncoder] = WeakKeyDictionary()
TEXT_INPUTS = ("input_ids", "attention_mask", "answer_index")
UNUSED = ("tools", "documents", "continue_final_message", "return_assistant_tokens_mask", "videos", "audio")

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class DiffVLProcessor(ProcessorMixin):
    """An image processor and a tokenizer with the image token's length.

    Args:
        image_token: the placeholder's text; one of it stands for one image until it is expanded.
        image_tokens: tokens that one image takes.
        stop_token: what the chat template writes after an answer.
        system_turn: `first_question` puts a system turn in front of the first question, for chat templates that take none;
            `template` leaves it to the template.
    """

    system_turn = "template"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_token: str = "<image>",
        image_tokens: int = 1,
        stop_token: str = "",
        chat_template: str | None = None,
        system_turn: str = "template",
    ) -> None:
        if system_turn not in ("template", "first_question"):
            raise ValueError(f"system_turn is {system_turn!r}; expected template or first_question")
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_tokens = image_tokens
        self.stop_token = stop_token
        self.system_turn = system_turn
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @property
    def pad_token_id(self) -> int:
        """What fills rows up: the tokenizer's padding token, or the stop token where it has none."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.convert_tokens_to_ids(self.stop_token)

    @property
    def encoder(self) -> ChatEncoder:
        """The encoder of chats for the tokenizer and settings as they are now."""
        settings = self.tokenizer, self.image_token, self.image_tokens, self.stop_token, self.system_turn
        encoder = _ENCODERS.get(self)
        if encoder is None or encoder.key != ChatEncoder.key_of(*settings):
            encoder = _ENCODERS[self] = ChatEncoder(*settings)
        return encoder

    # --- rendered text -------------------------------------------------------------------------------------------------------

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that one image's placeholder becomes."""
        return self.image_token * self.image_tokens

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Images and *rendered* chat text -> input_ids, attention_mask, pixel_values; the template has put the special
        tokens in already, so none are added. A text with earlier answers also gives `answer_index`, as in apply_chat_template.

        Raises:
            ValueError: if earlier answers cannot be found again in the tokens.
        """
        kwargs.setdefault("add_special_tokens", False)
        images = images_as_seen(images)
        if images is None and text is not None:
            data = BatchFeature(dict(self.tokenizer(text, **kwargs)), tensor_type=kwargs.get("return_tensors"))
        else:
            data = super().__call__(images=images, text=text, **kwargs)
        texts = [text] if isinstance(text, str) else list(text or [])
        spans = [self._spans_in(one) for one in texts]
        if any(spans):
            data["answer_index"] = self._marks(texts, spans, data)
        return data

    def _spans_in(self, rendered: str) -> list[tuple[int, int]]:
        """Characters of the answers in a rendered chat: from every generation prompt to the next stop token."""
        marker = self.encoder.generation_prompt
        if not marker and self.stop_token in rendered:
            raise ValueError(
                "this chat template writes nothing before an answer, so that earlier answers cannot be found in a rendered text; "
                "encode such chats with processor.apply_chat_template(..., tokenize=True)"
            )
        spans, place = [], rendered.find(marker) if marker else -1
        while place >= 0:
            start = place + len(marker)
            stop = rendered.find(self.stop_token, start)
            if stop < 0:
                break
            spans.append((start, stop + len(self.stop_token)))
            place = rendered.find(marker, spans[-1][1])
        return spans

    def _marks(self, texts: list[str], spans: list[list[tuple[int, int]]], data: BatchFeature) -> Any:
        """Which answer each token of `data` belongs to, in the form of its input_ids."""
        ids = data["input_ids"]
        listed: Any = ids.tolist() if hasattr(ids, "tolist") else ids
        rows = listed if isinstance(listed[0], list) else [listed]
        marks = []
        for row, text, found in zip(rows, texts, spans, strict=True):
            encoding = self.encoder.mark(text, found)
            pads = len(row) - len(encoding.ids)
            before = pads if self.tokenizer.padding_side == "left" else 0
            if pads < 0 or row[before : before + len(encoding.ids)] != encoding.ids:
                raise ValueError(
                    "the answers of earlier turns do not stand in the tokens as they did in training; encode such chats with "
                    "processor.apply_chat_template(..., tokenize=True)"
                )
            marks.append([0] * before + encoding.answer + [0] * (pads - before))
        if hasattr(ids, "tolist"):
            return torch.tensor(marks) if isinstance(ids, torch.Tensor) else torch.tensor(marks).numpy()
        return marks if isinstance(ids[0], list) else marks[0]

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """Images as `as_seen` gives them -> the model's pixel tensors, {} for none."""
        return {"pixel_values": self.image_processor(images=images, return_tensors="pt")["pixel_values"]} if images else {}

    # --- messages ------------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = True,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation (or several), and with `tokenize=True` encodes it.

        Image parts carry their image (`{"type": "image", "image": PIL image or path}`, or "path" or "base64") or leave it to
        `images`, which go to such parts in order. The encoded form also has `answer_index` [B, L], which tells the
        decoder where earlier answers end. Rows are padded left.

        Raises:
            ValueError: if the placeholder's text or a control token occurs in a message, images and parts do not match in
                number, an image cannot be read, a part is of another kind, or the template does not fit the conversation.
        """
        batch: Any = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
        if chat_template is not None:
            raise ValueError("a DiffVL checkpoint is trained on its own chat template: leave chat_template out")
        if refused := [name for name in UNUSED if kwargs.get(name)]:
            raise ValueError(f"{refused[0]} is not taken here, and would be left out: write what it says into the messages")
        if not tokenize:
            texts = [self.encoder.render(messages, add_generation_prompt) for messages in batch]
            return texts if batch is conversation else texts[0]
        encodings = [self.encode_chat(messages, add_generation_prompt) for messages in batch]
        shown = images_as_seen(_in_order(batch, images))
        data = self._pad_left(encodings)
        if shown:
            data |= self.pixels(shown)
        return BatchFeature(data, tensor_type=return_tensors) if return_dict else data["input_ids"]

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = False) -> ChatEncoding:
        """Messages -> token ids and answer marks, images expanded to their length.

        Raises:
            ValueError: see apply_chat_template.
        """
        return self.encoder.encode(messages, add_generation_prompt)

    def _pad_left(self, encodings: list[ChatEncoding]) -> dict[str, Any]:
        longest = max(len(encoding.ids) for encoding in encodings)
        pad_id = self.pad_token_id
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "answer_index": []}
        for encoding in encodings:
            missing = longest - len(encoding.ids)
            rows["input_ids"].append([pad_id] * missing + encoding.ids)
            rows["attention_mask"].append([0] * missing + [1] * len(encoding.ids))
            rows["answer_index"].append([0] * missing + encoding.answer)
        return {name: torch.tensor(value) for name, value in rows.items()}


# --- images ------------------------------------------------------------------------------------------------------------------


def pixels_in(inputs: Mapping[str, Any]) -> Pixels:
    """The pixel tensors among what the processor gives for a chat."""
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}


def _in_order(batch: Sequence[Messages], images: Any) -> list[Any]:
    """The images of several conversations in the order of their parts: a part's own, or the next of `images`, a flat list or
    one list for each conversation.

    Raises:
        ValueError: if parts without an image and `images` differ in number, or an image cannot be read.
    """
    given: list[Any] = [images] if images is not None and not isinstance(images, list | tuple) else list(images or [])
    nested = [one for one in given if isinstance(one, list | tuple)]
    if nested and (len(nested) < len(given) or len(nested) != len(batch)):
        raise ValueError(f"images is neither a flat list nor one list for each of the {len(batch)} conversations")
    found = []
    for messages, own in zip(batch, given, strict=True) if nested else [([m for one in batch for m in one], given)]:
        parts = list(images_of(messages))
        bare = parts.count(None)
        if bare != len(own):
            raise ValueError(
                f"{len(own)} images are given beside the messages, but {bare} of their {len(parts)} image parts carry none "
                "and wait for one"
            )
        rest = iter(own)
        found += [_pixels("image", next(rest)) if part is None else _pixels(*part) for part in parts]
    return found


def _pixels(key: str, source: Any) -> Any:
    """One image, opened if it is named: `source` is what stands under `key` in an image part.

    Raises:
        ValueError: if it cannot be read.
    """
    if not isinstance(source, str | bytes | Path):
        return source
    shown = repr(source if len(source) <= 80 else source[:77]) if isinstance(source, str | bytes) else str(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"the image {shown} is an address on the net; images are not fetched: give a file's path")
    try:
        with Image.open(_file_of(key, source)) as image:
            return as_seen(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {shown} cannot be read ({error})") from error


def _file_of(key: str, source: str | bytes | Path) -> Path | io.BytesIO:
    """What an image can be opened from."""
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(base64.b64decode(source.partition(",")[2]))
    if isinstance(source, str) and key == "base64":
        return io.BytesIO(base64.b64decode(source))
    if isinstance(source, str):
        return Path(unquote(source.removeprefix("file://")) if source.startswith("file://") else source)
    return source if isinstance(source, Path) else io.BytesIO(source)


# --- what an image is -------------------------------------------------------------------------------------------------------


def as_seen(image: Image.Image) -> Image.Image:
    """The image as the model gets it: a new one of mode RGB, without anything in it that would change it again.

    Raises:
        ValueError: if it has no pixels, or numbers that are no brightness.
        OSError, SyntaxError: from PIL, if its file is damaged.
    """
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width} x {image.height} pixels has nothing to show")
    image.load()  # a few formats turn themselves here
    turn = _TURNS.get(_orientation(image))
    flat = _flattened(image)
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info = {}
    return flat


def images_as_seen(images: Any) -> Any:
    """`as_seen` of every image in what a caller gives: one or a list (of lists); PIL images, paths of files, or arrays.

    Arrays and tensors are given back as they are: they are pixels already.

    Raises:
        ValueError: for a URL, a file that is no image, an array that is not of three colours, and as `as_seen`.
    """
    if isinstance(images, list | tuple):
        return [images_as_seen(image) for image in images]
    if isinstance(images, str | PathLike):
        return _opened(images)
    if isinstance(images, Image.Image):
        return as_seen(images)
    shape = getattr(images, "shape", None)
    if shape is not None and (len(shape) < 3 or 3 not in (shape[-1], shape[-3])):
        raise ValueError(
            f"an array of the shape {tuple(shape)} is no RGB image: expected [height, width, 3] or [3, height, width]; a PIL "
            "image of any mode is taken too"
        )
    return images


def _opened(path: str | PathLike[str]) -> Image.Image:
    if "://" in str(path) or str(path).startswith("data:"):
        raise ValueError(f"{str(path)[:80]!r} is no file: images are not fetched, give a path or a PIL image")
    try:
        with Image.open(path) as image:
            return as_seen(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {str(path)[:80]!r} cannot be read ({error})") from error


def _orientation(image: Image.Image) -> int:
    """What EXIF (or XMP) says; 1, upright, where it says nothing that can be read, as viewers take it."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, KeyError, OverflowError, EOFError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _flattened(image: Image.Image) -> Image.Image:
    """A new image of mode RGB, on white."""
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        turned = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
        assert turned is not None
        return turned
    keyed = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    if not keyed and image.mode not in _WITH_ALPHA:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """A greyscale image of 16-bit or 32-bit numbers, as RGB."""
    is_float = image.mode.startswith("F")
    wide = image if image.mode in ("I", "F") else image.convert("F" if is_float else "I")
    values = torch.frombuffer(bytearray(wide.tobytes()), dtype=torch.float32 if is_float else torch.int32).double()
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif is_float and high <= 1:
        white = 1.0
    else:
        white = 255.0 if high <= 255 else 65535.0
    if not (low >= 0 and high <= white):  # so that nan fails
        raise ValueError(
            f"values from {low:g} to {high:g} in an image of the mode {image.mode} do not say what is black and what is "
            "white: save it with 8 or 16 bits"
        )
    grey = (values * (255.0 / white)).round().to(torch.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.frombytes("L", image.size, grey.numpy().tobytes()).convert("RGB")
