"""What a fast tokenizer does not say of itself: which of its tokens no neighbour can change, and where its tokens begin."""

import json
from itertools import takewhile
from typing import Any


class LeadingSpaces(dict[int, int]):
    """Token id -> spaces at its beginning, of which offsets that are trimmed know nothing."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> int:
        text = self._tokenizer.convert_ids_to_tokens(token)
        self[token] = sum(1 for _ in takewhile(lambda sign: sign == "\u0120" or sign.isspace(), text))  # \u0120: a space
        return self[token]


def trims_offsets(backend: Any) -> bool:
    """Whether a tokenizer leaves spaces out of its tokens' offsets, as byte-level ones may."""
    if backend.post_processor is None:
        return False
    found: list[Any] = [json.loads(backend.post_processor.__getstate__())]
    for part in found:  # grows while it is walked through
        if part.get("trim_offsets"):
            return True
        found += part.get("processors", [])
    return False


def walls_of(tokenizer: Any) -> frozenset[int]:
    """Added tokens that are found before anything else is done with the text, so that neither side of one depends on the
    other."""
    plain = tokenizer.backend_tokenizer.normalizer is None
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if not token.single_word and (plain or not token.normalized))
