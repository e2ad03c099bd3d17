"""Token by token: transformers' own `generate` on a whole vision-language model, given rows that are encoded already."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from helpers import random_image
from shared_fixtures import Loaded
from transformers import AutoModelForImageTextToText

from diffvl.decode.answer import Decoder, answer_chats
from diffvl.demo.standin_processors import PROCESSORS
from diffvl.demo.standin_vlms import VLMS
from diffvl.errors import UsageError
from diffvl.hub.images_diffvl import token_types
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.hub.settings_diffvl import DecodeSettings

DIFFERENT = ("qwen3_vl", "gemma3", "paligemma")
NATIVE = [pytest.param(one, marks=() if one in DIFFERENT else pytest.mark.slow) for one in VLMS if one in PROCESSORS]


def question(text: str, *shapes: tuple[int, int]) -> list[dict[str, Any]]:
    images = [random_image(number).resize(shape) for number, shape in enumerate(shapes)]
    return [{"role": "user", "content": [*({"type": "image", "image": one} for one in images), {"type": "text", "text": text}]}]


SHORT, LONG = question("One?", (40, 40)), question("And what else is to be seen here?", (112, 60), (56, 100))
ANSWERED = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Which?"}]


@pytest.mark.parametrize("model_type", NATIVE)
def test_token_by_token_is_the_sources_own_and_encodes_images_once(
    model_type: str, source: Callable[[str], Path], loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    model, processor = loaded(model_type)
    stock: Any = AutoModelForImageTextToText.from_pretrained(source(model_type)).eval()
    inputs = processor.apply_chat_template([SHORT, LONG], tokenize=True, add_generation_prompt=True)
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], pixels_in(inputs)
    types = token_types(stock, ids, model.config.image_token_id, None, model.config.token_types)
    length, never = ids.shape[1], [model.config.image_token_id, *model.config.placeholder_ids]
    expected = stock.generate(ids, attention_mask=mask, **pixels, **types, max_new_tokens=8, suppress_tokens=never)[:, length:]
    images: Any = model.images
    encoder, seen = type(images.body).get_image_features, []

    @wraps(encoder)
    def counted(*given: Any, **named: Any) -> Any:
        seen.append(1)
        return encoder(*given, **named)

    monkeypatch.setattr(type(images.body), "get_image_features", counted)
    answer: Any = model.generate(**inputs, mode="ar", max_new_tokens=8)
    assert len(seen) == 1
    for ours, theirs in zip(answer[:, length:].tolist(), expected.tolist(), strict=True):
        stop = next((place for place, token in enumerate(theirs) if token in model.config.stop_token_ids), len(theirs))
        assert ours[:stop] == theirs[:stop] and stop > 0


def test_a_conversation_is_no_question_where_the_whole_prompt_sees_itself(loaded: Callable[[str], Loaded]):
    model, processor = loaded("paligemma")
    inputs = processor.apply_chat_template([*SHORT, *ANSWERED], tokenize=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="mode='ar' takes single questions with this model"):
        model.generate(**inputs, mode="ar", max_new_tokens=2)
    with pytest.raises(UsageError, match="token by token this model answers single questions only"):
        answer_chats(Decoder(model, processor), [[*SHORT, *ANSWERED]], DecodeSettings(mode="ar", max_new_tokens=2))
    assert answer_chats(Decoder(model, processor), [SHORT], DecodeSettings(mode="ar", max_new_tokens=2))[0].tokens
