"""Messages -> token ids and answer marks, in time linear in the tokens, for training and decoding alike.

What a message says is used or refused by name: nothing that a caller gives is dropped in silence.

A chat is rendered once and tokenised once with one placeholder an image; images get their length by list arithmetic. A prompt
rendered for decoding is byte-equal and token-equal to the same prompt inside a training sample: where a tokenizer would merge
across the seam between prompt and answer, the text is cut there and its pieces are tokenised once more, in training as in
decoding. A seam is looked at from the last token before it that no neighbour can change.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from .template_diffvl import ChatTemplate, ChatTemplateError, Spans, Turn

Messages = Sequence[Mapping[str, Any]]

SOURCES = ("image", "url", "path", "base64")  # where the part of an image may carry it, as in transformers' own processors
EXPECTED = (
    'expected {"type": "text", "text": "..."} or {"type": "image"}, the latter with one of '
    '"image" (a PIL image or a path), "path" and "base64", or with none of them where images are given beside the messages'
)

MAX_SEAMS, LONGEST_SEAM = 1024, 256  # remembered, and their characters


@dataclass(frozen=True)
class ChatEncoding:
    """ids: token ids. answer: per token 0, or k inside the k-th answer (its stop token included). rendered: what was tokenised,
    with one placeholder, `image_token`, for each image of `image_tokens` tokens."""

    ids: list[int]
    answer: list[int]
    rendered: str
    image_token: str = ""
    image_tokens: int = 1

    @property
    def text(self) -> str:
        """What the tokens stand for: the rendered chat with images at their length."""
        if self.image_tokens == 1 or not self.image_token:
            return self.rendered
        return self.rendered.replace(self.image_token, self.image_token * self.image_tokens)


class ChatEncoder:
    """Encodes chats for one tokenizer with its chat template. It remembers what chats have in common; nothing of it is saved.

    Args:
        image_token: the placeholder's text; one of it stands for one image of `image_tokens` tokens.
        stop_token: what the chat template writes after an answer.
        system_turn: see `ChatTemplate`.
    """

    def __init__(
        self, tokenizer: Any, image_token: str, image_tokens: int, stop_token: str, system_turn: str = "template"
    ) -> None:
        self.key = self.key_of(tokenizer, image_token, image_tokens, stop_token, system_turn)
        self.tokenizer, self.image_token, self.image_tokens = tokenizer, image_token, image_tokens
        self.template = ChatTemplate(tokenizer, stop_token, system_turn)
        self._image_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self._walls = _walls(tokenizer)
        self._control = self._control_tokens()
        self._spaces = _LeadingSpaces(tokenizer) if _trims_offsets(tokenizer.backend_tokenizer) else None
        self._seams: dict[str, list[int]] = {}

    @staticmethod
    def key_of(tokenizer: Any, *settings: Any) -> tuple[Any, ...]:
        """What an encoder is made for; another tokenizer, template or length needs another encoder."""
        return (id(tokenizer), tokenizer.get_chat_template(), *settings)

    # --- messages ------------------------------------------------------------------------------------------------------------

    def turns(self, messages: Messages) -> list[Turn]:
        """The turns that are rendered.

        Raises:
            ValueError: see `turns_of`; and if a text holds a token that means something else than its letters.
        """
        turns, mask = turns_of(messages, self.image_token), self.tokenizer.mask_token
        for _, text in turns:
            if mask is not None and mask in text:
                raise ValueError(f"the text holds {mask!r}, which stands for a token not known yet")
            if found := self._control.search(text):
                raise ValueError(
                    f"the text holds {found[0]!r}, a control token of the model, which would act as one: write it otherwise, "
                    "for example with a space in it"
                )
        return self.template.fold(turns)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The chat template's text, with one placeholder an image."""
        return self.template.render(self.turns(messages), add_generation_prompt)

    def encode(self, messages: Messages, add_generation_prompt: bool = False) -> ChatEncoding:
        """Token ids and answer marks.

        Raises:
            ValueError: see `turns` and `encode_turns`.
        """
        return self.encode_turns(self.turns(messages), add_generation_prompt)

    def encode_turns(self, turns: list[Turn], add_generation_prompt: bool) -> ChatEncoding:
        """Token ids and answer marks of what `turns` gave.

        Raises:
            ChatTemplateError: see `ChatTemplate.spans`; and if the template changes the placeholder of an image.
        """
        rendered, spans = self.template.spans(turns, add_generation_prompt)
        if rendered.count(self.image_token) != sum(text.count(self.image_token) for _, text in turns):
            raise ChatTemplateError(
                f"the chat template changes {self.image_token!r}, which stands for an image, or writes one of its own; correct it"
            )
        return self.mark(rendered, spans)

    def mark(self, rendered: str, spans: Spans) -> ChatEncoding:
        """Tokens of a rendered chat, with the characters of its answers."""
        ids, begins = self._tokenise(rendered)
        cuts = self._bad_seams(rendered, [start for start, _ in spans], ids, begins)
        if cuts:
            ids, begins = self._tokenise_pieces(rendered, cuts)
        answer = [0] * len(ids)
        for number, (start, end) in enumerate(spans, 1):
            first, last = bisect_left(begins, start), bisect_left(begins, end)
            answer[first:last] = [number] * (last - first)
        ids, answer = self._expand(ids, answer)
        return ChatEncoding(ids, answer, rendered, self.image_token, self.image_tokens)

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes before an answer; empty where it cannot be distinguished from the question."""
        asked = [("user", "?")]
        before, prompt = (self.template.render(asked, flag) for flag in (False, True))
        return prompt[len(before) :] if prompt.startswith(before) else ""

    # --- tokens --------------------------------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, placeholders as they are."""
        return self._tokenise(text)[0]

    def _tokenise(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each begins."""
        tokenizer = self.tokenizer
        backend = tokenizer.backend_tokenizer
        # What an earlier call of the tokenizer with truncation or padding has left set.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # how tokenizers tell half a surrogate pair
            half = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), "")
            raise ValueError(f"the text is not valid Unicode: it holds {half!r}, half of a pair") from error
        ids: list[int] = encoding.ids
        if self._spaces is None:
            return ids, [offset[0] for offset in encoding.offsets]
        spaces = self._spaces
        return ids, [max(0, offset[0] - spaces[token]) for token, offset in zip(ids, encoding.offsets, strict=True)]

    def _tokenise_pieces(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """The same, with no token across a cut."""
        ids, begins = [], []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece_ids, piece_begins = self._tokenise(text[start:end])
            ids += piece_ids
            begins += [start + begin for begin in piece_begins]
        return ids, begins

    def _bad_seams(self, text: str, starts: Sequence[int], ids: list[int], begins: list[int]) -> list[int]:
        """Which answers' starts must be cuts: those before which the text has other tokens than a prompt that ends there."""
        cuts: list[int] = []
        base = floor = 0  # the tokens are those of text[base:], and those from `floor` on stand after the last cut
        for start in starts:
            place = bisect_left(begins, start)
            wall = self._last_wall(ids, floor, place)
            if wall is None and cuts and base != cuts[-1]:
                # Nothing between the last cut and here keeps the cut from changing these tokens.
                base, floor = cuts[-1], 0
                ids, begins = self._tokenise(text[base:])
                begins = [base + begin for begin in begins]
                place = bisect_left(begins, start)
                wall = self._last_wall(ids, floor, place)
            first, begin = (floor, base) if wall is None else (wall, begins[wall])
            if ids[first:place] != self._prompt_ids(text[begin:start]):
                cuts.append(start)
                floor = place
        return cuts

    def _last_wall(self, ids: list[int], floor: int, end: int) -> int | None:
        return next((place for place in range(end - 1, floor - 1, -1) if ids[place] in self._walls), None)

    def _prompt_ids(self, piece: str) -> list[int]:
        """Tokens of the end of a prompt; chats share these."""
        ids = self._seams.get(piece)
        if ids is None:
            ids = self._tokenise(piece)[0]
            if len(piece) <= LONGEST_SEAM:
                if len(self._seams) >= MAX_SEAMS:
                    self._seams.clear()
                self._seams[piece] = ids
        return ids

    def _expand(self, ids: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Gives every placeholder its length."""
        image, length = self._image_id, self.image_tokens
        if length == 1 or image not in ids:
            return ids, answer
        wide_ids: list[int] = []
        wide_answer: list[int] = []
        at = 0
        for _ in range(ids.count(image)):
            place = ids.index(image, at)
            wide_ids += ids[at:place]
            wide_ids += [image] * length
            wide_answer += answer[at:place]
            wide_answer += [answer[place]] * length
            at = place + 1
        return wide_ids + ids[at:], wide_answer + answer[at:]

    def _control_tokens(self) -> re.Pattern[str]:
        """Tokens that no text may hold: special ones, the stop token, and others that the template writes around questions (not
        around answers, where it may write those of a text, as <think> is one)."""
        written = "\n".join(
            piece
            for roles in (("user",), ("system", "user"))
            if (skeleton := self.template.skeleton(roles)) is not None
            for piece in skeleton.pieces
        )
        stop = self.template.stop_token
        control = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content == stop or token.content in written)
        ]
        own = (self.image_token, self.tokenizer.mask_token)  # these have messages of their own
        control = sorted({token for token in control if token not in own}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, control)) or "(?!)")


class _LeadingSpaces(dict[int, int]):
    """Token id -> spaces at its beginning, of which offsets that are trimmed know nothing."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> int:
        text = self._tokenizer.convert_ids_to_tokens(token)
        self[token] = sum(1 for _ in takewhile(lambda sign: sign == "\u0120" or sign.isspace(), text))  # \u0120: a space
        return self[token]


def _trims_offsets(backend: Any) -> bool:
    """Whether a tokenizer leaves spaces out of its tokens' offsets, as byte-level ones may."""
    if backend.post_processor is None:
        return False
    found: list[Any] = [json.loads(backend.post_processor.__getstate__())]
    for part in found:  # grows while it is walked through
        if part.get("trim_offsets"):
            return True
        found += part.get("processors", [])
    return False


def _walls(tokenizer: Any) -> frozenset[int]:
    """Added tokens that are found before anything else is done with the text, so that neither side of one depends on the
    other."""
    plain = tokenizer.backend_tokenizer.normalizer is None
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if not token.single_word and (plain or not token.normalized))


# --- messages ---------------------------------------------------------------------------------------------------------------


def turns_of(messages: Messages, image_token: str) -> list[Turn]:
    """Role and text of every message; each image part becomes one placeholder.

    Raises:
        ValueError: naming what is wrong with a message, or what it holds that would be left out.
    """
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"a message has the role {role!r}; expected system, user or assistant")
        if not isinstance(content, str):
            content = _flatten(role, content, image_token)
        elif image_token in content:
            raise _placeholder(image_token)
        if len(message) > 2:
            _refuse_others(f"a message of the role {role!r}", message, ("role", "content"))
        turns.append((role, content))
    return turns


def images_of(messages: Messages) -> Iterator[tuple[str, Any] | None]:
    """For each image part, in order: where the image stands (one of SOURCES) and what stands there; None where the part
    carries none. The messages are ones that `turns_of` took."""
    for message in messages:
        content = message["content"]
        for part in () if isinstance(content, str) else content:
            if part["type"] == "image":
                yield next(((key, part[key]) for key in SOURCES if part.get(key) is not None), None)


def _flatten(role: str, content: Any, image_token: str) -> str:
    """Content given as parts, as one string."""
    if not isinstance(content, list | tuple):
        raise ValueError(f"a message of the role {role!r} has {type(content).__name__} as its content; expected text or parts")
    pieces = [_part(role, part, image_token) for part in content]
    text = "".join(pieces)
    # Counted in the whole: two parts may join to the placeholder's text.
    if text.count(image_token) != sum(isinstance(part, Mapping) and part["type"] == "image" for part in content):
        raise _placeholder(image_token)
    return text


def _part(role: str, part: Any, image_token: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else f"({type(part).__name__})"
    if kind == "text" and isinstance(part.get("text"), str):
        if len(part) > 2:
            _refuse_others("a text part", part, ("type", "text"))
        return part["text"]
    if kind == "text":
        raise ValueError(f"a text part has {type(part.get('text')).__name__} as its text; {EXPECTED}")
    if kind != "image":
        raise ValueError(f"a message of the role {role!r} has a part of the type {kind!r}; {EXPECTED}")
    _refuse_others("an image part", part, ("type", *SOURCES))
    given = [key for key in SOURCES if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"an image part carries {' and '.join(map(repr, given))}; expected one of them")
    return image_token


def _refuse_others(what: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError if `item` says more than the known keys do. None and empty values say nothing."""
    for key in item.keys() - set(known):
        value = item[key]
        if value is not None and not (isinstance(value, str | list | tuple | dict) and not value):
            raise ValueError(f"{what} has {key!r}, which would be left out; take it out, or write what it says into the text")


def _placeholder(image_token: str) -> ValueError:
    return ValueError(f"the text holds {image_token!r}, which stands for an image: give images as parts")
