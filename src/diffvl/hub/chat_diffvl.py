"""Messages -> token ids and answer marks, in time linear in the tokens, for training and decoding alike.

A chat is rendered once and tokenised once with one placeholder an image or video, which get their tokens by list arithmetic. A
prompt rendered for decoding is byte-equal and token-equal to the same prompt inside a training sample: where a tokenizer would
merge across the seam between prompt and answer, the text is cut there and its pieces are tokenised once more, in training as in
decoding. A seam is looked at from the last token before it that no neighbour can change.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice
from typing import Any, Protocol, TypeVar

from .clips_diffvl import Clip, ClipSize
from .messages_diffvl import Messages, Placeholders, turns_of
from .seen_diffvl import Size
from .template_diffvl import ChatTemplate, ChatTemplateError, Shape, Spans, Turn, Visual, all_texts
from .tokens_diffvl import LeadingSpaces, trims_offsets, walls_of

T = TypeVar("T")
MAX_SEAMS, LONGEST_SEAM = 1024, 256  # remembered, and their characters


@dataclass(frozen=True)
class ImageText:
    """What one image or video is in a chat. text: what its placeholder becomes. ids: the tokens of that text, but for `before`
    and `after`, plain text at its ends whose tokens depend on what stands beside it."""

    text: str
    ids: list[int]
    before: str = ""
    after: str = ""


class ImageTexts(Protocol):
    """The images of a checkpoint whose images have other tokens by size. placeholders: what stands for one in a rendered chat.
    first_ids: tokens that stand before every chat, and first_text what a chat begins with that has them already. tokens: what
    stands for images in a text, beside the placeholders. structured: whether the chat template writes the placeholders."""

    structured: bool
    placeholders: Placeholders
    first_ids: list[int]
    first_text: str
    tokens: frozenset[str]

    def of(self, size: Size | ClipSize, alone: bool = True) -> ImageText: ...

    def in_place(self, images: list[ImageText], following: list[str]) -> list[ImageText]: ...


@dataclass(frozen=True)
class ChatEncoding:
    """ids: token ids. answer: per token 0, or k inside the k-th answer (its stop token included). rendered: the chat template's
    text, with one placeholder for each image and video. image_texts: what these become. shown: which placeholders are images and
    which videos, in order. alone: for each whether no other stands between the same two answers."""

    ids: list[int]
    answer: list[int]
    rendered: str
    placeholders: tuple[str, ...] = ()
    image_texts: tuple[str, ...] = ()
    shown: tuple[Visual, ...] = ()
    alone: tuple[bool, ...] = ()

    @property
    def text(self) -> str:
        """What the tokens stand for: the rendered chat with images at their length."""
        return insert(self.rendered, self.placeholders, self.image_texts)


def arranged(shown: Sequence[Visual], ones: Sequence[T]) -> list[T]:
    """Images and clips, or their sizes, in the order of a rendered chat: a template may put all images before the videos, or
    behind.

    Args:
        ones: in the order of the messages' parts.
    """
    rest = {
        visual: iter([one for one in ones if isinstance(one, Clip | ClipSize) is (visual is Visual.VIDEO)]) for visual in Visual
    }
    return [one for visual in shown for one in islice(rest[visual], 1)]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of some texts."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def insert(rendered: str, placeholders: Sequence[str], texts: Sequence[str]) -> str:
    """The text with a text for each placeholder, in order."""
    if not texts:
        return rendered
    first, *others = any_of(placeholders).split(rendered)
    return first + "".join(text + piece for text, piece in zip(texts, others, strict=True))


def alone_in(encodings: Sequence[ChatEncoding]) -> list[bool]:
    """Of each image of several chats, in order, whether it is the only one of its question."""
    return list(chain.from_iterable(encoding.alone for encoding in encodings))


class ChatEncoder:
    """Encodes chats for one tokenizer with its chat template. It remembers what chats have in common; nothing of it is saved.

    Args:
        image_token: the placeholder's text; one of it stands for one image, where no `images` name theirs.
        image_tokens: tokens of each image, where all take the same number of placeholders.
        stop_token: what the chat template writes after an answer.
        system_turn: see `ChatTemplate`.
        images: what images are in the text, where that follows from their sizes.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token: str,
        image_tokens: int,
        stop_token: str,
        system_turn: str = "template",
        images: ImageTexts | None = None,
    ) -> None:
        self.key = self.key_of(tokenizer, image_token, image_tokens, stop_token, system_turn, id(images))
        self.tokenizer, self.images = tokenizer, images
        self.placeholders: Placeholders = {Visual.IMAGE: image_token} if images is None else images.placeholders
        self._placeholder = any_of(self.placeholders.values())
        self.template = ChatTemplate(tokenizer, stop_token, system_turn, structured=images is not None and images.structured)
        image_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self._placeholder_ids = frozenset(tokenizer.convert_tokens_to_ids([*self.placeholders.values()]))
        self._same_image = ImageText(image_token * image_tokens, [image_id] * image_tokens)
        self._walls = walls_of(tokenizer)
        self._control = self._control_tokens()
        self._spaces = LeadingSpaces(tokenizer) if trims_offsets(tokenizer.backend_tokenizer) else None
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
        turns, mask = turns_of(messages, self.placeholders, self.template.structured), self.tokenizer.mask_token
        for text in all_texts(turns):
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

    def encode(
        self, messages: Messages, add_generation_prompt: bool = False, sizes: Sequence[Size | ClipSize] | None = None
    ) -> ChatEncoding:
        """Token ids and answer marks.

        Args:
            sizes: of the images and videos, in order, where their tokens follow from these.
        Raises:
            ValueError: see `turns` and `encode_turns`.
        """
        return self.encode_turns(self.turns(messages), add_generation_prompt, sizes)

    def encode_turns(
        self, turns: list[Turn], add_generation_prompt: bool, sizes: Sequence[Size | ClipSize] | None = None
    ) -> ChatEncoding:
        """Token ids and answer marks of what `turns` gave.

        Raises:
            ChatTemplateError: see `ChatTemplate.spans`; and if the template changes the placeholder of an image.
            ValueError: see `mark`.
        """
        rendered, spans = self.template.spans(turns, add_generation_prompt)
        for visual, token in self.placeholders.items():
            found = rendered.count(token)
            shown = sum(content.count(token if isinstance(content, str) else visual) for _, content in turns)  # type: ignore[arg-type]
            if found != shown:
                raise ChatTemplateError(
                    f"the chat template changes {token!r}, which stands for {visual.value}s, or writes one of its own: "
                    f"{found} of them for {shown} {visual.value}s; correct it"
                )
        return self.mark(rendered, spans, sizes)

    def mark(self, rendered: str, spans: Spans, sizes: Sequence[Size | ClipSize] | None = None) -> ChatEncoding:
        """Tokens of a rendered chat, with the characters of its answers.

        Raises:
            ValueError: if sizes and placeholders differ in number, or the processor refuses an image of such a size.
        """
        alone = self._alone(rendered, spans)
        images = self._image_texts(rendered, sizes, alone)
        chat, spans = self._with_edges(rendered, spans, images)
        ids, begins = self._tokenise(chat)
        cuts = self._bad_seams(chat, [start for start, _ in spans], ids, begins)
        if cuts:
            ids, begins = self._tokenise_pieces(chat, cuts)
        answer = [0] * len(ids)
        for number, (start, end) in enumerate(spans, 1):
            first, last = bisect_left(begins, start), bisect_left(begins, end)
            answer[first:last] = [number] * (last - first)
        ids, answer = self._expand(ids, answer, images)
        if self.images is not None and self.images.first_ids and not rendered.startswith(self.images.first_text):
            ids, answer = self.images.first_ids + ids, [0] * len(self.images.first_ids) + answer
        placeholders = tuple(self.placeholders.values())
        shown = tuple(self.shown_in(rendered)) if images else ()
        return ChatEncoding(ids, answer, rendered, placeholders, tuple(image.text for image in images), shown, tuple(alone))

    def _alone(self, rendered: str, spans: Spans) -> list[bool]:
        """Of each placeholder whether no other stands between the same two answers: in the same question, that is. Later
        turns change nothing of it, so an image is in training what it is while a conversation goes on."""
        starts = [start for start, _ in spans]
        turns = [bisect_right(starts, match.start()) for match in self._placeholder.finditer(rendered)]
        shown_in = Counter(turns)
        return [shown_in[turn] == 1 for turn in turns]

    def _image_texts(self, rendered: str, sizes: Sequence[Size | ClipSize] | None, alone: list[bool]) -> list[ImageText]:
        """What the placeholders of a chat become, in order."""
        if self.images is None:
            return [self._same_image] * len(alone)
        shown, given = self.shown_in(rendered), sizes or ()
        in_order = arranged(shown, given)
        if not len(shown) == len(given) == len(in_order):
            raise ValueError(f"the sizes of {len(given)} images are given for the {len(shown)} images of the chat")
        found = [self.images.of(size, is_alone) for size, is_alone in zip(in_order, alone, strict=True)]
        return self.images.in_place(found, self._placeholder.split(rendered)[1:])

    def _with_edges(self, rendered: str, spans: Spans, images: list[ImageText]) -> tuple[str, Spans]:
        """The chat with the plain text that some processors write beside an image, whose tokens depend on its neighbours."""
        if not any(image.before or image.after for image in images):
            return rendered, spans
        found = list(self._placeholder.finditer(rendered))
        ends = [match.end() for match in found]
        grown = [0, *accumulate(len(image.before) + len(image.after) for image in images)]
        moved = [(start + grown[bisect_right(ends, start)], end + grown[bisect_right(ends, end)]) for start, end in spans]
        with_edges = [image.before + match[0] + image.after for match, image in zip(found, images, strict=True)]
        return insert(rendered, tuple(self.placeholders.values()), with_edges), moved

    def shown_in(self, rendered: str) -> list[Visual]:
        """What a rendered chat shows, in order."""
        visuals = {token: visual for visual, token in self.placeholders.items()}
        return [visuals[token] for token in self._placeholder.findall(rendered)]

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

    def _expand(self, ids: list[int], answer: list[int], images: list[ImageText]) -> tuple[list[int], list[int]]:
        """Gives every placeholder its tokens."""
        if self.images is None and len(self._same_image.ids) == 1:
            return ids, answer
        places = sorted(place for token in self._placeholder_ids for place in _places_of(token, ids))
        if len(places) != len(images):
            told = " or ".join(map(repr, self.placeholders.values()))
            raise ValueError(
                f"{len(places)} tokens {told} for {len(images)} images: the tokenizer splits it, or a text spells it"
            )
        wide_ids: list[int] = []
        wide_answer: list[int] = []
        at = 0
        for place, image in zip(places, images, strict=True):
            wide_ids += ids[at:place]
            wide_ids += image.ids
            wide_answer += answer[at:place]
            wide_answer += [answer[place]] * len(image.ids)
            at = place + 1
        return wide_ids + ids[at:], wide_answer + answer[at:]

    def _control_tokens(self) -> re.Pattern[str]:
        """Tokens that no text may hold: special ones, the stop token, and others that the template writes around questions (not
        around answers, where it may write those of a text, as <think> is one)."""
        chats: list[tuple[Shape, ...]] = [self.template.shapes("user"), self.template.shapes("system", "user")]
        if self.template.structured:
            chats += [(("user", f"{visual.value[0]}t"),) for visual in self.placeholders]
        written = "\n".join(
            piece for shapes in chats if (skeleton := self.template.skeleton(shapes)) is not None for piece in skeleton.pieces
        )
        others = {self.template.stop_token, *(self.images.tokens if self.images is not None else ())}
        control = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in others or token.content in written)
        ]
        own = (*self.placeholders.values(), self.tokenizer.mask_token)  # these have messages of their own
        control = sorted({token for token in control if token not in own}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, control)) or "(?!)")


def _places_of(token: int, ids: list[int]) -> Iterator[int]:
    place = -1
    for _ in range(ids.count(token)):
        place = ids.index(token, place + 1)
        yield place
