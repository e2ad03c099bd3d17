"""Conversations that tests decode with tiny models: images, earlier turns, different lengths; and short ways to do it."""

from typing import Any

from helpers import random_image
from shared_fixtures import Loaded

from diffvl.hub.answers_diffvl import BlockGenerationOutput

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "text", "text": "Now?"}, {"type": "image", "image": random_image()}]}],
    [{"role": "user", "content": "A longer question, which has no picture to go with it. " * 2}],
    [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": [{"type": "image", "image": random_image(1)}, {"type": "text", "text": "and then?"}]},
    ],
    [{"role": "user", "content": "Hi"}],
]


def generated(loaded: Loaded, chats: list[Any], **settings: Any) -> BlockGenerationOutput:
    model, processor = loaded
    inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    output = model.generate(**inputs, return_dict_in_generate=True, **settings)
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None
    output.sequences = output.sequences[:, inputs["input_ids"].shape[1] :]
    return output


def answers(loaded: Loaded, chats: list[Any], **settings: Any) -> list[list[int]]:
    """Up to and including the stop."""
    output = generated(loaded, chats, **settings)
    stops, rows = loaded[0].config.stop_token_ids, []
    assert output.sequences is not None
    for row in output.sequences.tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        rows.append(row[:end])
    return rows
