"""The messages of a request -> turns of texts and image sources, checked message by message.

Images of a question stand where its parts say. Those that stand all before or all after its text are put before it, each on a
line of its own, as `diffvl generate` does and as LLaVA's records have it: clients write them on either side. Neighbouring texts
are one text: finding a chat's answers takes time that grows with its parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from diffvl.data.content import kind_of
from diffvl.serve.limits import MOST_MESSAGES, MOST_PARTS, Limits
from diffvl.serve.refusals import short, wrong

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("text", "input_text")


@dataclass(frozen=True)
class ImageSource:
    """An image that a request shows: where it stands in the request, and its URL."""

    param: str
    url: str

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0].lower()

    @property
    def is_on_the_net(self) -> bool:
        return self.scheme in ("http", "https")


Part = str | ImageSource


@dataclass(frozen=True)
class Conversation:
    """turns: role and parts of each."""

    turns: tuple[tuple[str, tuple[Part, ...]], ...]

    @property
    def images(self) -> list[ImageSource]:
        return [part for _, parts in self.turns for part in parts if isinstance(part, ImageSource)]

    def messages(self, images: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Messages as the processor takes them, with the images by where they stand in the request."""
        return [{"role": role, "content": [_part(part, images) for part in parts]} for role, parts in self.turns]


def _part(part: Part, images: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": images[part.param]}


def conversation_of(messages: Any, limits: Limits) -> Conversation:
    """Raises Refusal, naming the message and its part, for one that cannot be answered."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", f"messages is {kind_of(messages)}: expected a list of {{role, content}}, the user's last")
    if len(messages) > MOST_MESSAGES:
        raise wrong("messages", f"messages has {len(messages)} entries, at most {MOST_MESSAGES} are taken")
    turns = tuple(_turn(message, f"messages[{number}]") for number, message in enumerate(messages))
    if turns[-1][0] != "user":
        last = f"messages[{len(turns) - 1}]"
        raise wrong(f"{last}.role", f"{last}.role is {turns[-1][0]}: expected user, whom the answer is for; nothing is continued")
    conversation = Conversation(turns)
    if len(conversation.images) > limits.images:
        raise wrong("messages", f"the messages show {len(conversation.images)} images, at most {limits.images} are taken")
    letters = sum(len(part) for _, parts in turns for part in parts if isinstance(part, str))
    if letters > limits.letters:
        raise wrong(
            "messages",
            f"the messages have {letters} letters, and a prompt at most {limits.prompt_tokens} tokens: shorten them",
            "context_length_exceeded",
        )
    return conversation


def _turn(message: Any, where: str) -> tuple[str, tuple[Part, ...]]:
    if not isinstance(message, dict):
        raise wrong(where, f"{where} is {kind_of(message)}: expected an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(short(role)) if isinstance(role, str) else kind_of(role)
        raise wrong(f"{where}.role", f"{where}.role is {shown}: expected system, developer, user or assistant")
    _refuse_others(message, where, ("role", "content"))
    content = message.get("content")
    if isinstance(content, str):
        parts: list[Part] = [_text(content, f"{where}.content")]
    elif isinstance(content, list) and len(content) > MOST_PARTS:
        raise wrong(f"{where}.content", f"{where}.content has {len(content)} parts, at most {MOST_PARTS} are taken")
    elif isinstance(content, list) and content:
        parts = [_content_part(part, role, f"{where}.content[{number}]") for number, part in enumerate(content)]
    else:
        raise wrong(f"{where}.content", f"{where}.content is {kind_of(content)}: expected a string or a list of parts")
    return ROLES[role], _laid_out(parts)


def _content_part(part: Any, role: str, where: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise wrong(
            where, f"{where} is {kind_of(part)}{' without a type' if isinstance(part, dict) else ''}: expected text or image_url"
        )
    if kind in TEXTS:
        _refuse_others(part, where, ("type", "text"))
        return _text(part.get("text"), f"{where}.text")
    if kind != "image_url":
        raise wrong(f"{where}.type", f"{where}.type is {short(kind)!r}, which is not supported: expected text or image_url")
    if role != "user":
        raise wrong(where, f"{where} shows an image in a turn of the role {role}: images are the user's")
    _refuse_others(part, where, ("type", "image_url"))
    return _image(part.get("image_url"), f"{where}.image_url")


def _image(given: Any, where: str) -> ImageSource:
    if not isinstance(given, dict):
        raise wrong(where, f'{where} is {kind_of(given)}: expected an object, {{"url": "data:image/png;base64,..."}}')
    url, detail = given.get("url"), given.get("detail")
    if not isinstance(url, str) or not url:
        raise wrong(f"{where}.url", f"{where}.url is {kind_of(url)}: expected a data URL, data:image/png;base64,...")
    if detail is not None and detail != "auto":
        raise wrong(
            f"{where}.detail", f"{where}.detail is not supported: images are seen as in training; leave it out, or send auto"
        )
    _refuse_others(given, where, ("url", "detail"))
    return ImageSource(f"{where}.url", url)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise wrong(where, f"{where} is {kind_of(text)}: expected a string")
    try:
        text.encode()  # not letter by letter: its length is not known to be right yet, and all others wait meanwhile
    except UnicodeEncodeError as error:
        raise wrong(where, f"{where} holds {text[error.start]!r}, half of a surrogate pair: not valid text") from error
    return text


def _refuse_others(given: Mapping[str, Any], where: str, known: tuple[str, ...]) -> None:
    """Raises Refusal for a key that says more than the known ones; clients send back whole answers, with empty keys."""
    for key, value in given.items():
        if key not in known and value not in (None, [], {}, "", False):
            raise wrong(f"{where}.{short(key)}", f"{where}.{short(key)} is not supported, and would be left out: take it out")


def _joined(parts: list[Part]) -> Iterator[Part]:
    """The parts, with neighbouring texts in one."""
    for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
        if is_text:
            yield "".join(part for part in run if isinstance(part, str))
        else:
            yield from run


def _laid_out(parts: list[Part]) -> tuple[Part, ...]:
    """See the module."""
    kinds = [kind for kind, _ in groupby(isinstance(part, ImageSource) for part in parts)]
    if sorted(kinds) != [False, True]:  # texts alone, images alone, or both in turn
        return tuple(_joined(parts))
    texts = "".join(part for part in parts if isinstance(part, str))
    lines: list[Part] = []
    for part in parts:
        if isinstance(part, ImageSource):
            lines += [part, "\n"]
    return (*lines, texts)
