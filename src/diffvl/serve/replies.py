"""Tokens -> text -> the objects of OpenAI's API.

An answer's text is that of `diffvl generate`, without white space around it, but it ends before its stop text, as OpenAI's does.
In a stream nothing is sent that may still change: white space at the end, a character with bytes missing, the beginning of a stop
text, and what a loop in progress may take away.
"""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from diffvl.config.recipe import VERSION
from diffvl.decode.answer import UNFINISHED
from diffvl.hub.answers_diffvl import certain
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.denoising import Step
from diffvl.serve.refusals import json_bytes

CONTEXT = 4  # committed tokens that are decoded along, because a token's text may depend on the ones before it
DONE = b"data: [DONE]\n\n"


@dataclass
class AnswerText:
    """The text of an answer as its tokens come."""

    tokenizer: Any
    settings: DecodeSettings
    ids: list[int] = field(default_factory=list)
    sent: str = ""

    def add(self, tokens: list[int], length: int, has_ended: bool) -> str:
        """Takes further tokens, of an answer that is `length` tokens long: a loop that closes takes some away. Returns the text
        that can be sent now."""
        self.ids += tokens
        del self.ids[length:]
        known = self._text(self.ids if has_ended else self.ids[: certain(self.ids, self.settings)], has_ended)
        piece = known[len(self.sent) :]  # of a tokenizer that takes back what it said, what comes after that all the same
        if piece:
            self.sent = known
        return piece

    def whole(self) -> str:
        """The text of an answer that has ended."""
        return self._text(self.ids, True)

    def _text(self, ids: list[int], has_ended: bool) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [text.index(stop) for stop in self.settings.stop_strings if stop in text]
        if ends:
            return text[: min(ends)].strip()
        if has_ended:
            return text.strip()
        text = text.rstrip(UNFINISHED)  # first: what stands before it may be the beginning of a stop text that it goes on
        return text[: len(text) - self._may_be_stop(text)].strip()

    def _may_be_stop(self, text: str) -> int:
        """How many letters at the end of a text are the beginning of a stop text."""
        lengths = [
            length
            for stop in self.settings.stop_strings
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ]
        return max(lengths, default=0)

    def cells(self, step: Step) -> list[dict[str, Any] | None]:
        """The tokens of the open block as a page shows them: text, confidence and whether they settled just now; None where
        nothing has settled. The confidence is that of the step in which a token settled."""
        found: list[dict[str, Any] | None] = []
        run = self.ids[-CONTEXT:]
        before = self._piece(run)
        for token, is_new, settled, sure in zip(step.ids, step.is_new, step.settled, step.confidence, strict=True):
            if not is_new:
                continue
            if token == self.mask_token_id:
                found.append(None)
                run, before = [], ""
                continue
            run = [*run, token]
            after = self._piece(run)
            found.append(
                {"text": after[len(before) :], "settled": settled, **({"confidence": round(sure, 4)} if settled else {})}
            )
            before = after
        return found

    def _piece(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False).rstrip(UNFINISHED) if ids else ""

    @property
    def mask_token_id(self) -> int:
        return self.tokenizer.mask_token_id


@dataclass
class Completion:
    """A chat completion on its way out. name: of the model. prompt_tokens: images included."""

    name: str
    prompt_tokens: int
    includes_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, tokens: int, ended: str, figures: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request without a stream."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ended}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(tokens), "diffvl": figures}

    def chunk(self, delta: dict[str, Any], ended: str | None = None, **more: Any) -> bytes:
        """A piece of a stream; `more` are keys of ours."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": ended}
        usage = {"usage": None} if self.includes_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage, **more})

    def last(self, tokens: int) -> bytes:
        """The end of a stream."""
        if not self.includes_usage:
            return DONE
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(tokens)}) + DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": f"diffvl-{VERSION}",
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": self.prompt_tokens + tokens}


def event(value: Any) -> bytes:
    """One event of a stream; JSON has no line ends of its own."""
    return b"data: " + json_bytes(value) + b"\n\n"
