"""The text of an answer as it is sent."""

import json
from typing import Any

import pytest

from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.replies import AnswerText, event


class Retracting:
    """A tokenizer whose text of many tokens does not begin with that of fewer."""

    texts = ("", "caf\u00e9", "caf\ufffd\ufffd\ufffd", "caf\ufffd\ufffd\ufffd and", "caf\ufffd\ufffd\ufffd and tea")

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.texts[len(ids)]


def test_a_stream_goes_on_after_what_a_tokenizer_takes_back():
    """What was sent stays sent; what follows is not lost with it."""
    text = AnswerText(Retracting(), DecodeSettings())
    pieces = [text.add([0], length, has_ended=length == 4) for length in range(1, 5)]
    assert pieces == ["caf\u00e9", "", "\ufffd\ufffd and", " tea"]
    assert text.whole() == Retracting.texts[-1]


def test_a_line_end_of_unicode_ends_no_line_of_a_stream():
    """Some readers split decoded text at all of them."""
    said = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    sent = event({"said": said})
    assert sent.decode().splitlines() == [sent.decode().strip(), ""] and json.loads(sent[6:]) == {"said": said}


class Bytes:
    """A tokenizer whose tokens are bytes: three for a Chinese character."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("好的。用户：再来", "好的。"),
        ("好的。用心：再来", "好的。用心：再来"),  # it was none
        ("好的。用户", "好的。用户"),
        ("用户：", ""),
        ("a \ufffd b", "a \ufffd b"),
    ],
)
def test_nothing_of_a_stop_text_is_sent_while_its_next_character_is_unfinished(said: str, answer: str, size: int):
    settings = DecodeSettings(stop_strings=("用户：",))
    ids = list(said.encode())
    text, pieces = AnswerText(Bytes(), settings), list[str]()
    for begin in range(0, len(ids), size):
        length = min(begin + size, len(ids))
        pieces.append(text.add(ids[begin:length], length, has_ended=length == len(ids)))
    assert "".join(pieces) == answer == text.whole()
    assert all(answer.startswith("".join(pieces[:count])) for count in range(len(pieces)))
