"""Turns -> the chat template's text, and the characters of the answers in it.

A chat is rendered once. Its skeleton is what the template writes around the texts: the template rendered with stand-ins for the
texts of a chat of the same shape, cut at them. Walking through skeleton and texts checks every byte of what was rendered, so
places found this way are exact. Invariant: an answer begins where the prompt ends that a decoder is given for it.

A turn is one text, or parts: texts, images and videos. What a template makes of an image belongs to the skeleton, wherever it
puts it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from jinja2.exceptions import TemplateError


class Visual(Enum):
    """A part of a turn that is looked at; the value is the type of such a part."""

    IMAGE = "image"
    VIDEO = "video"


Part = str | Visual
Content = str | tuple[Part, ...]
Turn = tuple[str, Content]  # role and content
Shape = tuple[str, str]  # role and kinds of the parts, "t", "i" or "v" each; no kinds: one text that is no part
Spans = list[tuple[int, int]]  # first character and end of each answer

FIXED_DATE = "26 Jul 2024"  # the default of the Llama 3 templates
# What the code inside a chat template may raise.
FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError)
MAX_SKELETONS = 4096

# A prompt must not depend on the day it is asked on: this stands in for the function that gives templates the date. The line end
# is taken away again, as transformers renders with trim_blocks.
_DATE_CODES = (
    *(("%-d", "26"), ("%-m", "7"), ("%-H", "0"), ("%-I", "12"), ("%-M", "0"), ("%-S", "0"), ("%-j", "208"), ("%-y", "24")),
    *(("%F", "2024-07-26"), ("%D", "07/26/24"), ("%x", "07/26/24"), ("%c", "Fri Jul 26 00:00:00 2024")),
    *(("%T", "00:00:00"), ("%X", "00:00:00"), ("%R", "00:00"), ("%r", "12:00:00 AM"), ("%s", "1721952000")),
    *(("%d", "26"), ("%e", "26"), ("%m", "07"), ("%B", "July"), ("%b", "Jul"), ("%h", "Jul"), ("%Y", "2024"), ("%y", "24")),
    *(("%G", "2024"), ("%g", "24"), ("%C", "20"), ("%j", "208"), ("%U", "29"), ("%W", "30"), ("%V", "30")),
    *(("%A", "Friday"), ("%a", "Fri"), ("%w", "5"), ("%u", "5"), ("%H", "00"), ("%k", " 0"), ("%I", "12"), ("%l", "12")),
    *(("%p", "AM"), ("%P", "am"), ("%M", "00"), ("%S", "00"), ("%f", "000000"), ("%z", "+0000"), ("%:z", "+00:00")),
    *(("%Z", "UTC"), ("%n", "\\n"), ("%t", "\\t"), ("%%", "%")),
)
_DATE = (
    "{%- macro strftime_now(format='%d %b %Y') -%}{%- set diffvl = namespace(date=format) -%}{%- for code, value in ["
    + ", ".join(f"('{code}', '{value}')" for code, value in _DATE_CODES)
    + "] -%}{%- set diffvl.date = diffvl.date | replace(code, value) -%}{%- endfor -%}{{- diffvl.date -}}{%- endmacro %}\n"
)


def with_fixed_date(template: str) -> str:
    """A chat template that gives the same text every day."""
    return template if "strftime_now" not in template or template.startswith(_DATE) else _DATE + template


class ChatTemplateError(ValueError):
    """A chat template refuses a chat, or gives a text in which answers cannot be trained."""


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the texts of a chat.

    pieces: what stands before each text, and after the last. starts: per answer which text it is, and the end of its prompt in
    the piece before it. ends: per answer the end of the stop token in the piece after it; 0 where there is none. left_out: turns
    of which what is rendered says nothing.
    """

    pieces: tuple[str, ...] = ()
    starts: tuple[tuple[int, int], ...] = ()
    ends: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()

    @property
    def walkable(self) -> bool:
        """Whether every answer follows its prompt, but for white space, and ends with the stop token."""
        return all(self.ends) and not any(self.pieces[text][start:].strip() for text, start in self.starts)


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        stop_token: what it writes after an answer.
        system_turn: `first_question` puts a system turn in front of the first question; `template` leaves it to the template.
        structured: whether turns are parts, of which the template writes images by itself.
    """

    def __init__(self, tokenizer: Any, stop_token: str, system_turn: str = "template", structured: bool = False) -> None:
        self.tokenizer, self.stop_token, self.system_turn = tokenizer, stop_token, system_turn
        self.source = with_fixed_date(tokenizer.get_chat_template())
        self.structured = structured
        self._skeletons: dict[tuple[tuple[Shape, ...], bool], Skeleton | None] = {}
        self._as_parts = self._find_form()

    def shapes(self, *roles: str) -> tuple[Shape, ...]:
        """The shapes of a chat of these roles, one text each."""
        return tuple((role, "t" if self.structured else "") for role in roles)

    # --- text ----------------------------------------------------------------------------------------------------------------

    def fold(self, turns: list[Turn]) -> list[Turn]:
        """The turns as the template is given them.

        Raises:
            ValueError: if a system turn has no question to go into.
        """
        if self.system_turn != "first_question" or not turns or turns[0][0] != "system":
            return turns
        if len(turns) == 1 or turns[1][0] != "user":
            raise ValueError("the system turn goes in front of the first question, but no question follows it")
        (_, system), (role, question), *rest = turns
        return [(role, _in_front("".join(texts_of(system)), question)), *rest]

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        """The template's text.

        Raises:
            ChatTemplateError: in the template's own words, if it refuses the turns.
        """
        try:
            return self._render(turns, add_generation_prompt)
        except FAULTS as error:
            raise ChatTemplateError(f"the chat template refuses this chat ({error}){self._advice(turns)}") from error

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": self._content(role, content)} for role, content in turns]
        rendered = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=FIXED_DATE,
        )
        return str(rendered)

    def _content(self, role: str, content: Content) -> Any:
        """Raises ValueError for an image where the template takes text alone."""
        parts = (content,) if isinstance(content, str) else content
        if role in self._as_parts:
            return [{"type": part.value} if isinstance(part, Visual) else {"type": "text", "text": part} for part in parts]
        if any(isinstance(part, Visual) for part in parts):
            raise ValueError(f"it takes no images in a turn of the role {role}")
        return "".join(texts_of(content))

    def _find_form(self) -> frozenset[str]:
        """Roles whose content the template wants as a list of parts: some templates take both. Text is tried first, or, where
        turns are parts, parts."""
        chat = ("user", "assistant")
        forms: tuple[tuple[str, ...], ...] = ((), ("system", *chat), ("user",), chat)
        for roles in (forms[1], forms[3], forms[2], forms[0]) if self.structured else forms:
            self._as_parts = frozenset(roles)
            if self._keeps(chat):
                break
        else:
            return frozenset()
        form = self._as_parts
        for self._as_parts in (form, form ^ {"system"}):
            if self._keeps(("system", *chat)):
                return self._as_parts
        return form

    def _keeps(self, roles: tuple[str, ...]) -> bool:
        try:
            turns = _stand_ins(self.shapes(*roles))
            rendered = self._render(turns, False)
        except FAULTS:
            return False
        return all(text in rendered for _, content in turns for text in texts_of(content))

    # --- skeletons -----------------------------------------------------------------------------------------------------------

    def skeleton(self, shapes: tuple[Shape, ...], add_generation_prompt: bool = False) -> Skeleton | None:
        """The skeleton of a chat of these shapes; None where there is none: the template refuses them, repeats a text or orders
        texts anew, or a prompt is not the beginning of the chat."""
        key = shapes, add_generation_prompt
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._make_skeleton(*key)
        return self._skeletons[key]

    def _make_skeleton(self, shapes: tuple[Shape, ...], add_generation_prompt: bool) -> Skeleton | None:
        prompt: Skeleton | None = Skeleton()
        answers = [turn for turn, (role, _) in enumerate(shapes) if role == "assistant"]
        for turn in answers:  # each prompt contains the one before it, so the last alone is compared below
            prompt = self.skeleton(shapes[:turn], add_generation_prompt=True) if turn else None
            if prompt is None or prompt.left_out:
                break
        turns = _stand_ins(shapes)
        try:
            rest = self._render(turns, add_generation_prompt)
        except FAULTS:
            return None
        left_out = tuple(turn for turn, (_, content) in enumerate(turns) if any(text not in rest for text in texts_of(content)))
        if left_out:
            return Skeleton(left_out=left_out)
        pieces = []
        for text in all_texts(turns):
            piece, found, rest = rest.partition(text)
            if not found or text in rest:
                return None
            pieces.append(piece)
        if prompt is None or prompt.left_out:
            return None
        skeleton = Skeleton((*pieces, rest), prompt.starts, prompt.ends)
        return self._with_last_answer(skeleton, prompt.pieces) if answers else skeleton

    def _with_last_answer(self, skeleton: Skeleton, prompt: tuple[str, ...]) -> Skeleton | None:
        pieces, text = skeleton.pieces, len(prompt) - 1  # the answer is the first text that its prompt does not have
        if pieces[:text] != prompt[:-1] or not pieces[text].startswith(prompt[-1]):
            return None
        place = pieces[text + 1].find(self.stop_token)
        end = place + len(self.stop_token) if place >= 0 else 0
        return replace(skeleton, starts=(*skeleton.starts, (text, len(prompt[-1]))), ends=(*skeleton.ends, end))

    # --- answers -------------------------------------------------------------------------------------------------------------

    def spans(self, turns: Sequence[Turn], add_generation_prompt: bool) -> tuple[str, Spans]:
        """The chat's text, and the characters of each answer with its stop token.

        Raises:
            ChatTemplateError: if the template refuses the chat, leaves a turn out or changes an answer, or if a decoder could
                not be given the beginning of the text as the prompt of an answer.
        """
        text = self.render(turns, add_generation_prompt)
        skeleton = self.skeleton(shapes_of(turns), add_generation_prompt)
        if skeleton is not None and skeleton.left_out:
            role = turns[skeleton.left_out[0]][0]
            raise ChatTemplateError(f"the chat template leaves the turn of the role {role!r} out{self._advice(turns)}")
        found = walk(text, turns, skeleton) if skeleton is not None and skeleton.walkable else None
        return text, self.search(text, turns, skeleton) if found is None else found

    def search(self, text: str, turns: Sequence[Turn], skeleton: Skeleton | None = None) -> Spans:
        """The same without a walk, by rendering the prompt of every answer: for templates that look into contents, and to say
        what is wrong with the others.

        Raises:
            ChatTemplateError: see `spans`.
        """
        spans: Spans = []
        for turn, (role, content) in enumerate(turns):
            if role != "assistant":
                continue
            if turn == 0:
                raise ChatTemplateError("the chat begins with an answer: there is no prompt for it")
            prompt = self.render(turns[:turn], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ChatTemplateError(
                    "the chat template is not prefix-stable: the prompt of an answer is not the beginning of the whole chat\n"
                    f"prompt: {prompt[-80:]!r}\nchat:   {text[max(0, len(prompt) - 80) : len(prompt)]!r}{self._advice(turns)}"
                )
            number, tail = len(spans), ""
            if skeleton is not None and skeleton.pieces:
                tail = skeleton.pieces[skeleton.starts[number][0] + 1][: skeleton.ends[number]]
            spans.append(self._span(text, len(prompt), "".join(texts_of(content)).strip(), tail, number + 1))
        return spans

    def _span(self, text: str, start: int, content: str, tail: str, number: int) -> tuple[int, int]:
        """Characters of an answer: from the end of its prompt to the end of its stop token.

        Args:
            tail: what the template writes after the answer of such a chat, up to the stop token.
        """
        found, first_stop = text.find(content, start), text.find(self.stop_token, start)
        written = text[start:first_stop] if first_stop >= 0 else text[start:]
        if found < 0 or (text[start:found].strip() and content not in written):
            raise ChatTemplateError(
                f"the chat template changes answer {number}: of {_short(content)} it writes {_short(written.strip())}; an answer "
                "is trained as it stands in the chat: leave out what the template takes away, or correct the template"
            )
        if text[start:found].strip():
            raise ChatTemplateError(
                f"the chat template writes {text[start:found]!r} before an answer, but not at the end of its prompt: "
                "training and decoding would differ"
            )
        stop = text.find(self.stop_token, found + len(content))
        following = text[found + len(content) : stop] if stop >= 0 else text[found + len(content) :]
        if stop < 0 or (following.strip() and not (tail and text.startswith(tail, found + len(content)))):
            raise ChatTemplateError(
                f"the chat template does not write {self.stop_token!r} after answer {number}, {_short(content)}: it writes "
                f"{_short(following)} there, which would be trained as a part of the answer"
            )
        return start, stop + len(self.stop_token)

    # --- system turns --------------------------------------------------------------------------------------------------------

    def system_fault(self) -> str:
        """Why chats of one and of two rounds that begin with a system turn do not work; empty if they do."""
        if self.system_turn == "first_question":
            return ""
        rounds = ("user", "assistant")
        for roles in (("system", *rounds), ("system", *rounds, *rounds)):
            try:
                shapes = self.shapes(*roles)
                turns = _stand_ins(shapes)
                text = self._render(turns, False)
                skeleton = self.skeleton(shapes)
                if skeleton is not None and skeleton.left_out:
                    return "it leaves the system turn out"
                if skeleton is None or not skeleton.walkable:
                    for turn in range(1, len(roles), 2):
                        if not text.startswith(self._render(turns[: turn + 1], True)):
                            return f"it writes the system turn elsewhere in a chat of {len(roles) // 2} rounds"
            except FAULTS as error:
                return str(error)
        return ""

    def _advice(self, turns: Sequence[Turn]) -> str:
        """What to do, where it is the system turn that does not fit."""
        if not turns or turns[0][0] != "system" or not self.system_fault():
            return ""
        return (
            "; it does not take system turns: put the system turn's text into the first question, or convert with "
            "--set prepare.system_turn=first_question, which does it for every chat"
        )


def walk(text: str, turns: Sequence[Turn], skeleton: Skeleton) -> Spans | None:
    """The characters of the answers; None if `text` is not the skeleton with the texts in it, whole or stripped."""
    pieces, places, at = skeleton.pieces, [], 0
    if not text.startswith(pieces[0]):
        return None
    for content, before, after in zip(all_texts(turns), pieces, pieces[1:], strict=False):
        at += len(before)
        for form in _forms(content):
            if text.startswith(form, at) and text.startswith(after, at + len(form)):
                break
        else:
            return None
        places.append((at, at + len(form)))
        at += len(form)
    if at + len(pieces[-1]) != len(text):
        return None
    return [
        (places[number][0] - len(pieces[number]) + start, places[number][1] + end)
        for (number, start), end in zip(skeleton.starts, skeleton.ends, strict=True)
    ]


def texts_of(content: Content) -> tuple[str, ...]:
    return (content,) if isinstance(content, str) else tuple(part for part in content if isinstance(part, str))


def all_texts(turns: Sequence[Turn]) -> list[str]:
    return [text for _, content in turns for text in texts_of(content)]


def shapes_of(turns: Sequence[Turn]) -> tuple[Shape, ...]:
    return tuple((role, "" if isinstance(content, str) else kinds_of(content)) for role, content in turns)


def kinds_of(parts: tuple[Part, ...]) -> str:
    return "".join(part.value[0] if isinstance(part, Visual) else "t" for part in parts)


def _in_front(system: str, question: Content) -> Content:
    """A question with the system turn's text in front of it."""
    if isinstance(question, str):
        return f"{system}\n\n{question}" if system and question else system or question
    first = question[0] if question else ""
    if isinstance(first, Visual):
        return (f"{system}\n\n", *question) if system else question
    return (f"{system}\n\n{first}" if system and first else system or first, *question[1:])


def _forms(content: str) -> tuple[str, ...]:
    """What a template may make of a content."""
    stripped = content.strip()
    return (content,) if len(stripped) == len(content) else (content, stripped, content.lstrip(), content.rstrip())


def _stand_ins(shapes: Sequence[Shape]) -> list[Turn]:
    """Turns whose texts are numbers: no template trims, escapes or capitalises them, and none writes them by itself."""
    numbers = (f"90817{number:06d}71809" for number in itertools.count())
    looked_at = {visual.value[0]: visual for visual in Visual}
    return [
        (role, tuple(looked_at[kind] if kind in looked_at else next(numbers) for kind in kinds) if kinds else next(numbers))
        for role, kinds in shapes
    ]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
