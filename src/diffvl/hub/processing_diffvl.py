"""Pictures and conversations -> tensors, by the checkpoint's own chat template, for training and decoding alike.

One function, `encode_chat`, turns messages into token ids in both worlds. A prompt rendered for decoding is byte-equal and
token-equal to the same prompt inside a training sample: where a tokenizer would merge across the seam between prompt and
answer, the text is tokenised in two pieces, in training as in decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from .picture_diffvl import all_seen

Messages = list[dict[str, Any]]
FIXED_DATE = "26 Jul 2024"  # the default of the Llama 3 templates


@dataclass(frozen=True)
class ChatEncoding:
    """ids: token ids. answer: per token 0, or k inside the k-th answer (its stop token included). text: what was tokenised."""

    ids: list[int]
    answer: list[int]
    text: str


class DiffVLProcessor(ProcessorMixin):
    """An image processor and a tokenizer with the image token's length.

    Args:
        image_token: the placeholder's text; one of it stands for one picture until it is expanded.
        image_tokens: tokens that one picture takes.
        stop_token: what the chat template writes behind an answer.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_token: str = "<image>",
        image_tokens: int = 1,
        stop_token: str = "",
        chat_template: str | None = None,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_tokens = image_tokens
        self.stop_token = stop_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that one picture's placeholder becomes."""
        return self.image_token * self.image_tokens

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Pictures and *rendered* chat text -> input_ids, attention_mask, pixel_values; the template has put the special
        tokens in already, so none are added. A text with earlier answers also gives `answer_index`, as in apply_chat_template.

        Raises:
            ValueError: if earlier answers cannot be found again in the tokens.
        """
        kwargs.setdefault("add_special_tokens", False)
        images = all_seen(images)
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
        asked = [{"role": "user", "content": "?"}]
        before, prompt = (self._render(asked, add_generation_prompt=flag) for flag in (False, True))
        marker = prompt[len(before) :] if prompt.startswith(before) else ""
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
            encoding = self._encode(text, found)
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

    def apply_chat_template(
        self,
        conversation: Messages | list[Messages],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = True,
        images: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation (or several), and with `tokenize=True` encodes it.

        Picture parts carry their picture (`{"type": "image", "image": PIL image or path}`) or leave it to `images`. The
        encoded form also has `answer_index` [B, L], which tells the decoder where earlier answers end. Rows are padded left.

        Raises:
            ValueError: if the placeholder's text occurs in a message, pictures and parts do not match in number, or the
                template is not prefix-stable.
        """
        batch: Any = conversation if conversation and isinstance(conversation[0], list) else [conversation]
        if chat_template is not None:
            raise ValueError("a DiffVL checkpoint is trained on its own chat template: leave chat_template out")
        if not tokenize:
            texts = [self._render(messages, add_generation_prompt) for messages in batch]
            return texts if batch is conversation else texts[0]
        encodings = [self.encode_chat(messages, add_generation_prompt) for messages in batch]
        pictures = all_seen(list(images or []) + [picture for messages in batch for picture in _pictures(messages)])
        data = self._pad_left(encodings)
        placeholders = sum(encoding.ids.count(self.image_token_id) for encoding in encodings)
        if placeholders != len(pictures) * self.image_tokens:
            raise ValueError(f"{placeholders // self.image_tokens} picture parts in the messages, {len(pictures)} pictures given")
        if pictures:
            data["pixel_values"] = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors) if return_dict else data["input_ids"]

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = False) -> ChatEncoding:
        """Messages -> token ids and answer marks, pictures expanded to their length.

        Raises:
            ValueError: see apply_chat_template.
        """
        rendered = self._render(messages, add_generation_prompt)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:turn], add_generation_prompt=True)
            if not rendered.startswith(prompt):
                raise ValueError(
                    "the chat template is not prefix-stable: the prompt of an answer is not the beginning of the whole chat\n"
                    f"prompt: {prompt[-80:]!r}\nchat:   {rendered[max(0, len(prompt) - 80) : len(prompt)]!r}"
                )
            spans.append(self._answer_span(rendered, len(prompt), message))
        return self._encode(rendered, spans)

    def _encode(self, rendered: str, spans: list[tuple[int, int]]) -> ChatEncoding:
        """A rendered chat, with the characters of its answers -> tokens."""
        text, cuts = self._expand(rendered), []
        for begin, _ in spans:
            start = len(self._expand(rendered[:begin]))
            if self._token_ids(text[:start], cuts) != self._prefix_ids(text, start, cuts):
                cuts.append(start)
        ids, offsets = self._tokenise(text, cuts)
        answer = [0] * len(ids)
        for number, (start, end) in enumerate(spans, 1):
            first, last = (len(self._expand(rendered[:place])) for place in (start, end))
            for place, offset in enumerate(offsets):
                if first <= offset < last:
                    answer[place] = number
        return ChatEncoding(ids, answer, text)

    def _answer_span(self, rendered: str, start: int, message: dict[str, Any]) -> tuple[int, int]:
        """Characters of an answer: from the end of its prompt to the end of its stop token."""
        content = _flatten(message["content"], self.image_token).strip()
        found = rendered.find(content, start)
        stop = rendered.find(self.stop_token, found + len(content)) if found >= 0 else -1
        if stop >= 0 and rendered[start:found].strip():
            raise ValueError(
                f"the chat template writes {rendered[start:found]!r} before an answer, but not at the end of its prompt: "
                "training and decoding would differ"
            )
        if stop < 0:
            raise ValueError(f"the chat template does not write {self.stop_token!r} behind the answer {content[:60]!r}")
        return start, stop + len(self.stop_token)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        plain = []
        for message in messages:
            if isinstance(message["content"], str) and self.image_token in message["content"]:
                raise ValueError(f"the text holds {self.image_token!r}, which stands for a picture: give pictures as parts")
            plain.append({"role": message["role"], "content": _flatten(message["content"], self.image_token)})
            if self.tokenizer.mask_token in plain[-1]["content"]:
                raise ValueError(f"the text holds {self.tokenizer.mask_token!r}, which stands for a token not known yet")
        # Templates that print the date take it from here where they can: a prompt must not depend on the day.
        return self.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=FIXED_DATE
        )

    def _expand(self, text: str) -> str:
        return text.replace(self.image_token, self.image_token * self.image_tokens)

    def _tokenise(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and the character at which each starts; no token crosses a cut."""
        ids: list[int] = []
        offsets: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            # Not verbose: who calls compares the length with what fits, and says so in its own words.
            piece = text[start:end]
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += encoded["input_ids"]
            offsets += [start + offset[0] for offset in encoded["offset_mapping"]]
        return ids, offsets

    def _token_ids(self, text: str, cuts: list[int]) -> list[int]:
        return self._tokenise(text, cuts)[0]

    def _prefix_ids(self, text: str, end: int, cuts: list[int]) -> list[int]:
        """Tokens of the whole text that start before `end`."""
        ids, offsets = self._tokenise(text, cuts)
        return [token for token, offset in zip(ids, offsets, strict=True) if offset < end]

    def _pad_left(self, encodings: list[ChatEncoding]) -> dict[str, Any]:
        longest = max(len(encoding.ids) for encoding in encodings)
        pad_id = self.tokenizer.pad_token_id
        pad_id = pad_id if pad_id is not None else self.tokenizer.eos_token_id
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "answer_index": []}
        for encoding in encodings:
            missing = longest - len(encoding.ids)
            rows["input_ids"].append([pad_id] * missing + encoding.ids)
            rows["attention_mask"].append([0] * missing + [1] * len(encoding.ids))
            rows["answer_index"].append([0] * missing + encoding.answer)
        return {name: torch.tensor(value) for name, value in rows.items()}


def _flatten(content: str | list[dict[str, Any]], image_token: str) -> str:
    """Message content as one string, each picture part as one placeholder."""
    if isinstance(content, str):
        return content
    pieces = []
    for part in content:
        if part["type"] == "image":
            pieces.append(image_token)
        elif image_token in part["text"]:
            raise ValueError(f"the text holds {image_token!r}, which stands for a picture: give pictures as parts")
        else:
            pieces.append(part["text"])
    return "".join(pieces)


def _pictures(messages: Messages) -> list[Any]:
    """The pictures that the parts carry, in order."""
    found = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            picture = part.get("image", part.get("path"))
            if part["type"] == "image" and picture is not None:
                found.append(picture)
    return found
