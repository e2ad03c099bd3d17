"""What a server answers instead of an answer, in the form of OpenAI's API."""

import json
from typing import Any

KINDS = {401: "authentication_error", 429: "rate_limit_error", 499: "client_closed", 504: "timeout_error"}


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP; 500 and above are our own fault, or the machine's.
        message: what is wrong, what was expected, what to do.
        param: the key of the request that is wrong, as `messages[0].content[1].image_url`.
        code: a word for programs.
        headers: that go with it.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str | None, message: str, code: str | None = None) -> Refusal:
    """A request with a mistake in one of its keys."""
    return Refusal(400, message, param, code)


def ending() -> Refusal:
    """What is told to whoever is still there when the server ends."""
    return Refusal(503, "the server is shutting down", code="shutting_down")


def stopped() -> Refusal:
    """What is told when nothing decodes any more."""
    return Refusal(503, "the server decodes no more: start it again", code="stopped")


def failed() -> Refusal:
    """What is told of a fault of our own."""
    return Refusal(500, "the server failed at this request; its log says why", code="internal_error")


_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def json_bytes(value: Any) -> bytes:
    """JSON of any text: half a surrogate pair, which UTF-8 has no bytes for, is spelled out as JSON spells it, and so are the
    signs at which some readers of streams end a line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return text.encode("utf-8", "backslashreplace")


def short(value: Any) -> str:
    """A value of a request as a message shows it: whoever sends megabytes need not get them back."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
