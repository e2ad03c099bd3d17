"""The text of an answer as it is sent."""

from typing import Any

from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.replies import AnswerText


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
