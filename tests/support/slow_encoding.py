"""Encoding as it was first written: plain, and quadratic in the turns. The reference for `hub/chat_diffvl.py`.

The chat is rendered once for every answer and tokenised once for every seam, images at their length, and the whole prompt's
tokens are compared. Offsets must not be trimmed (see `untrimmed`).
"""

import copy
from typing import Any

from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.hub.template_diffvl import FIXED_DATE

Encoded = tuple[list[int], list[int], str]  # ids, answer marks, text


def untrimmed(tokenizer: Any) -> Any:
    """The same tokenizer without what it does behind the tokens: no special tokens are added here, so that is offsets only."""
    twin = copy.deepcopy(tokenizer)
    twin.backend_tokenizer.post_processor = None
    return twin


def encode_slowly(processor: DiffVLProcessor, tokenizer: Any, messages: list[Any], add_generation_prompt: bool) -> Encoded:
    """Raises ValueError where the template does not fit the chat."""
    token = processor.image_token
    plain = [{"role": message["role"], "content": _flat(message["content"], token)} for message in messages]
    rendered = _render(tokenizer, plain, add_generation_prompt)
    spans = [_span(processor, tokenizer, rendered, plain, turn) for turn, one in enumerate(plain) if one["role"] == "assistant"]

    def expand(text: str) -> str:
        return text.replace(token, token * processor.image_tokens)

    text, cuts = expand(rendered), []
    for begin, _ in spans:
        start = len(expand(rendered[:begin]))
        alone = [one for one, _ in _tokenise(tokenizer, text[:start], cuts)]
        if alone != [one for one, at in _tokenise(tokenizer, text, cuts) if at < start]:
            cuts.append(start)
    pairs = _tokenise(tokenizer, text, cuts)
    answer = [0] * len(pairs)
    for number, (begin, end) in enumerate(spans, 1):
        first, last = (len(expand(rendered[:place])) for place in (begin, end))
        for place, (_, at) in enumerate(pairs):
            if first <= at < last:
                answer[place] = number
    return [one for one, _ in pairs], answer, text


def _render(tokenizer: Any, turns: list[Any], prompt: bool) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, date_string=FIXED_DATE)


def _span(processor: DiffVLProcessor, tokenizer: Any, rendered: str, plain: list[Any], turn: int) -> tuple[int, int]:
    """Characters of an answer."""
    prompt, content = _render(tokenizer, plain[:turn], True), plain[turn]["content"].strip()
    if not rendered.startswith(prompt):
        raise ValueError("not prefix-stable")
    found = rendered.find(content, len(prompt))
    stop = rendered.find(processor.stop_token, found + len(content)) if found >= 0 else -1
    if stop < 0 or rendered[len(prompt) : found].strip():
        raise ValueError("no answer")
    return len(prompt), stop + len(processor.stop_token)


def _tokenise(tokenizer: Any, text: str, cuts: list[int]) -> list[tuple[int, int]]:
    """Tokens, and where each begins."""
    pairs = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        encoded = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs += [(one, start + at[0]) for one, at in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
    return pairs


def _flat(content: str | list[dict[str, Any]], token: str) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", token) for part in content)
