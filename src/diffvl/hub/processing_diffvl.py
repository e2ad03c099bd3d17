"""Images and conversations -> tensors, by the checkpoint's own chat template, for training and decoding alike.

One function, `encode_chat`, turns messages into token ids in both worlds (see `chat_diffvl`).

There are two kinds. The own kind has an image processor that makes one square of every image, and each image takes the same
number of tokens; or it cuts tiles, and an image's tokens follow from its size (see `tiled_images_diffvl`). The native kind
speaks for a checkpoint's own processor (see `source_diffvl`): what an image is in text and in pixels is what that one makes of
it, and its text follows from the image's size.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from math import isqrt
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoImageProcessor, BatchFeature, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from .chat_diffvl import ChatEncoder, ChatEncoding, alone_in, arranged
from .clips_diffvl import ClipSize, Sampler
from .messages_diffvl import Messages
from .pixels_diffvl import Pixels, join_pixels
from .seen_diffvl import Size, images_as_seen
from .source_diffvl import SourceImages, build_processor
from .template_diffvl import Visual
from .tiled_images_diffvl import TiledImages
from .tiling_diffvl import Tiling
from .video_processor_diffvl import build_video_processor
from .visuals_diffvl import clips_of, flat, in_order, size_of_visual

# Not attributes of the processors: what is remembered is neither saved, copied nor sent to other processes.
_ENCODERS: WeakKeyDictionary[Any, ChatEncoder] = WeakKeyDictionary()
_IMAGES: WeakKeyDictionary[Any, tuple[tuple[Any, Any], SourceImages]] = WeakKeyDictionary()
_TILED: WeakKeyDictionary[Any, tuple[tuple[Any, ...], TiledImages]] = WeakKeyDictionary()
BACKEND, TORCHVISION = "pil", "torchvision"
TEXT_INPUTS = ("input_ids", "attention_mask", "answer_index")
UNUSED = ("tools", "documents", "continue_final_message", "return_assistant_tokens_mask", "audio")


class DiffVLProcessor(ProcessorMixin):
    """An image processor and a tokenizer, and what an image is in the text.

    Args:
        image_token: the placeholder's text; one of it stands for one image until it is expanded.
        image_tokens: tokens that one image takes, or one view of it where images are tiled; of the native kind: 0, since that
            follows from the image.
        stop_token: what the chat template writes after an answer.
        system_turn: `first_question` puts a system turn in front of the first question, for chat templates that take none;
            `template` leaves it to the template.
        source: of the native kind: `class` and `settings` of the checkpoint's own processor; `first_tokens`, which it puts
            before every chat that does not begin with them; `backend`, by which images are resized; `video`, where it takes
            videos: `class` and `settings` of its video processor.
        tiling: of the own kind: how images are cut, as `DiffVLConfig.tiling`; None: one square an image.
    """

    system_turn = "template"
    source: dict[str, Any] | None = None
    tiling: dict[str, Any] | None = None

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_token: str = "<image>",
        image_tokens: int = 1,
        stop_token: str = "",
        chat_template: str | None = None,
        system_turn: str = "template",
        source: dict[str, Any] | None = None,
        tiling: dict[str, Any] | None = None,
    ) -> None:
        if system_turn not in ("template", "first_question"):
            raise ValueError(f"system_turn is {system_turn!r}; expected template or first_question")
        if source is not None:  # so that the own kind writes nothing of it
            self.source = source
        if tiling is not None:
            self.tiling = tiling
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

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Loads the parts. Images are resized by Pillow, wherever they are: what torchvision makes of them differs. It does so
        only where there is no form by Pillow, and the checkpoint says it.

        Raises:
            ImportError: if it has to, and is not installed.
        """
        backend = ((processor_dict or {}).get("source") or {}).get("backend", BACKEND)
        if backend == TORCHVISION and not is_torchvision_available():
            raise ImportError(
                f"{pretrained_model_name_or_path}: images of this checkpoint are resized by torchvision, and would be others "
                "without it: install torchvision"
            )
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend=backend, **kwargs)
        return [image_processor, cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)]

    @property
    def asks_sizes(self) -> bool:
        """Whether an image's tokens follow from its size."""
        return self.source is not None or self.tiling is not None

    @property
    def tiles(self) -> Tiling | None:
        """How images are cut; None where they are not, and in the native kind."""
        if self.tiling is None:
            return None
        return Tiling.of(self.tiling, isqrt(self.image_tokens), self.image_processor.size["height"])

    @property
    def images(self) -> SourceImages | TiledImages | None:
        """Images whose tokens follow from their sizes; None where all take the same number."""
        if self.source is None:
            return self._tiled_images()
        parts = self.image_processor, self.tokenizer
        known = _IMAGES.get(self)
        if known is None or any(one is not other for one, other in zip(known[0], parts, strict=True)):
            video = self.source.get("video")
            frames = None if video is None else build_video_processor(video["class"], video["settings"])
            inner = build_processor(self.source["class"], self.source["settings"], *parts, frames)
            first = self.tokenizer.convert_tokens_to_ids(self.source["first_tokens"])
            known = _IMAGES[self] = parts, SourceImages(inner, first, "".join(self.source["first_tokens"]))
        return known[1]

    def _tiled_images(self) -> TiledImages | None:
        tiles = self.tiles
        if tiles is None:
            return None
        parts = self.image_processor, tiles, self.image_token, self.image_token_id
        known = _TILED.get(self)
        if known is None or known[0] != parts:
            known = _TILED[self] = parts, TiledImages(*parts)
        return known[1]

    @property
    def sampler(self) -> Sampler | None:
        """Which frames of a video are shown; None where the model takes no videos."""
        return None if self.images is None else self.images.sampler

    @property
    def video_token(self) -> str | None:
        """The placeholder's text of a video; None where the model takes none."""
        return None if self.images is None else self.images.placeholders.get(Visual.VIDEO)

    @property
    def encoder(self) -> ChatEncoder:
        """The encoder of chats for the tokenizer and settings as they are now."""
        settings = (
            *(self.tokenizer, self.image_token, self.image_tokens, self.stop_token, self.system_turn),
            self.images,
        )
        encoder = _ENCODERS.get(self)
        if encoder is None or encoder.key != ChatEncoder.key_of(*settings[:-1], id(settings[-1])):
            encoder = _ENCODERS[self] = ChatEncoder(*settings)
        return encoder

    # --- rendered text -------------------------------------------------------------------------------------------------------

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that one image's placeholder becomes."""
        return self.image_token * self.image_tokens

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Images, videos and *rendered* chat text -> input_ids, attention_mask and the pixel tensors; the template has put the
        special tokens in already, so none are added. A text with earlier answers also gives `answer_index`, as in
        apply_chat_template.

        Raises:
            ValueError: if earlier answers cannot be found again in the tokens, or what is shown cannot be read.
        """
        images = images_as_seen(images)
        clips = clips_of(videos, self.sampler)
        if self.asks_sizes:
            return self._call_with_sizes({Visual.IMAGE: flat(images), Visual.VIDEO: clips}, text, **kwargs)
        kwargs.setdefault("add_special_tokens", False)
        if images is None and text is not None:
            data = BatchFeature(dict(self.tokenizer(text, **kwargs)), tensor_type=kwargs.get("return_tensors"))
        else:
            data = super().__call__(images=images, text=text, **kwargs)
        texts = [text] if isinstance(text, str) else list(text or [])
        spans = [self._spans_in(one) for one in texts]
        if any(spans):
            data["answer_index"] = self._marks(texts, spans, data)
        return data

    def _call_with_sizes(
        self, given: dict[Visual, list[Any]], text: Any, padding: Any = False, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """The same where an image's tokens follow from its size."""
        known = ("max_length", "padding_side", "pad_to_multiple_of")
        # What is switched off (truncation=False, as evaluation harnesses write it) says what happens anyway.
        asked = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        if refused := [name for name in asked if name not in known]:
            raise ValueError(f"{refused[0]} is not taken here: texts are tokenised as they are in training, and never cut")
        if text is None:
            return BatchFeature(self.pixels([*given[Visual.IMAGE], *given[Visual.VIDEO]]), tensor_type=return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        rest = {visual: iter(ones) for visual, ones in given.items()}
        shown = [[one for visual in self.encoder.shown_in(text) for one in islice(rest[visual], 1)] for text in texts]
        encodings = [
            self.encoder.mark(text, self._spans_in(text), [size_of_visual(one) for one in own])
            for text, own in zip(texts, shown, strict=True)
        ]
        for visual, ones in rest.items():
            if left := sum(1 for _ in ones):
                raise ValueError(f"{left} {visual.value}s more than {self.encoder.placeholders.get(visual)!r} in the texts")
        pixels = self.pixels([one for own in shown for one in own], alone_in(encodings))
        return BatchFeature({**self._padded(encodings, padding, **asked), **pixels}, tensor_type=return_tensors)

    def _padded(self, encodings: list[ChatEncoding], padding: Any, **kwargs: Any) -> dict[str, Any]:
        """Rows as the tokenizer pads them, with `answer_index` where there are answers."""
        rows = {"input_ids": [encoding.ids for encoding in encodings]}
        data = dict(self.tokenizer.pad(rows, padding=padding, **kwargs))
        if any(any(encoding.answer) for encoding in encodings):
            side = kwargs.get("padding_side") or self.tokenizer.padding_side
            data["answer_index"] = []
            for row, encoding in zip(data["input_ids"], encodings, strict=True):
                pads = [0] * (len(row) - len(encoding.answer))
                data["answer_index"].append(pads + encoding.answer if side == "left" else encoding.answer + pads)
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

    def pixels(self, images: Sequence[Any], alone: Sequence[bool] | None = None) -> Pixels:
        """Images as `as_seen` gives them, and clips, in the order of the text -> the model's pixel tensors, {} for none.

        Args:
            alone: of each image whether it is the only one of its question, as their `ChatEncoding` tells; default: all are.
        Raises:
            ValueError: if the checkpoint's own processor refuses one.
        """
        if (tiled := self._tiled_images()) is not None:
            return join_pixels(tiled.pixels(images, [True] * len(images) if alone is None else alone))
        if isinstance(shown := self.images, SourceImages):
            return join_pixels([shown.pixels(image) for image in images])
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
        videos: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation (or several), and with `tokenize=True` encodes it.

        Image parts carry their image (`{"type": "image", "image": PIL image or path}`, or "path" or "base64") or leave it to
        `images`, which go to such parts in order. So do video parts (`{"type": "video", "video": a path, a folder of frames or a
        list of frames}`) where the model takes videos. The encoded form also has `answer_index` [B, L], which tells the
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
        turns = [self.encoder.turns(messages) for messages in batch]
        shown = in_order(batch, {Visual.IMAGE: images, Visual.VIDEO: videos}, self.sampler)
        encodings = [
            self.encoder.encode_turns(one, add_generation_prompt, [*map(size_of_visual, own)] if self.asks_sizes else None)
            for one, own in zip(turns, shown, strict=True)
        ]
        if self.asks_sizes:
            shown = [arranged(encoding.shown, own) for encoding, own in zip(encodings, shown, strict=True)]
        pixels = self.pixels([image for own in shown for image in own], alone_in(encodings))
        data = {**self._pad_left(encodings), **pixels}
        return BatchFeature(data, tensor_type=return_tensors) if return_dict else data["input_ids"]

    def encode_chat(
        self, messages: Messages, add_generation_prompt: bool = False, sizes: Sequence[Size | ClipSize] | None = None
    ) -> ChatEncoding:
        """Messages -> token ids and answer marks, images expanded to their length.

        Args:
            sizes: of each image and video, as `size_as_seen` and `clip_size` give them. Needed where the tokens of an image
                follow from them, and the messages do not carry the images.
        Raises:
            ValueError: see apply_chat_template.
        """
        turns = self.encoder.turns(messages)
        if self.asks_sizes and sizes is None:
            (shown,) = in_order([messages], {}, self.sampler)
            sizes = [size_of_visual(one) for one in shown]
        return self.encoder.encode_turns(turns, add_generation_prompt, sizes)

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


def pixels_in(inputs: Mapping[str, Any]) -> Pixels:
    """The pixel tensors among what the processor gives for a chat."""
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
