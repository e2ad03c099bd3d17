"""Prompts for a batch behind a server, as samples that come and go."""

from dataclasses import replace
from io import BytesIO
from typing import Any

from helpers import random_image
from PIL import Image
from shared_fixtures import Loaded

from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.sample import Sample
from tools.serve_mistakes import data_url

IMAGE = random_image(seed=1)
# Prompts of many lengths; an image last in its message stands in the first open block of a large enough grid.
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is to be seen here?"}]}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes, one."},
        {"role": "user", "content": "And now a much longer question, with an end."},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": random_image(seed=2)}]}],
]


def alone(loaded: Loaded, chat: list[dict[str, Any]], settings: DecodeSettings) -> list[int]:
    """What `generate` gives."""
    model, processor = loaded
    inputs = processor.apply_chat_template([chat], tokenize=True, add_generation_prompt=True)
    ids: Any = model.generate(**inputs, **settings.arguments())
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def sample(loaded: Loaded, chat: list[dict[str, Any]], settings: DecodeSettings) -> Sample:
    model, processor = loaded
    inputs = processor.apply_chat_template([chat], tokenize=True, add_generation_prompt=True)
    return Sample(inputs, replace(settings, tokenizer=processor.tokenizer).for_checkpoint(model.config))


def arrivals_of(samples: list[Sample]) -> list[list[Sample]]:
    """One, then two together, then one at a time."""
    return [samples[:1], samples[1:3], *([one] for one in samples[3:])]


def url_of(image: Image.Image) -> str:
    out = BytesIO()
    image.save(out, "PNG")
    return data_url(out.getvalue())
