"""Lossless: what a gated model answers is what transformers' own `generate` answers with the source, token for token in fp32.

200 prompts of many lengths for each architecture, most of them in batches, with drafts that are often right, sometimes wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_models import gated_model, guess_well
from helpers import random_image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from diffvl.demo.standin_vlms import VLMS
from diffvl.hub.images_diffvl import token_types
from diffvl.hub.processing_diffvl import pixels_in

NEW = 10
LONGEST = 60  # tokens of a prompt
STATIC = {"cache_implementation": "static", "draft_length": 3}
# (model type, prompts, batch): every kind in the default run, all prompts of all kinds in the slow one.
CASES = [
    ("qwen2", 200, 25),
    *(pytest.param(one, 200, 25, marks=pytest.mark.slow) for one in ("llama", "gpt2", "gemma2", "qwen3")),
    *(pytest.param(one, 200, 1, marks=pytest.mark.slow) for one in ("qwen2", "gemma2")),
]
VLM_CASES = [
    ("llava", 12, 6),
    ("qwen3_vl", 12, 6),
    *(pytest.param(one, 200, 8, marks=pytest.mark.slow) for one in ("llava", "qwen3_vl", "gemma3", "idefics3")),
    *(pytest.param(one, 40, 1, marks=pytest.mark.slow) for one in ("llava", "qwen3_vl")),
]


def up_to(row: list[int], stops: Any) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def same_answers(model: Any, inputs: dict[str, Any], expected: list[list[int]], number: int) -> None:
    """Every way to draft, one after the other from batch to batch."""
    ways: list[dict[str, Any]] = [
        {"draft_length": 2}, STATIC, {"draft_length": 4, "drafting": "separate"}, {"draft_length": 4, "draft_threshold": 0.1},
    ]  # fmt: skip
    length = inputs["input_ids"].shape[1]
    with pytest.MonkeyPatch.context() as patch:
        if number % 3:  # else the adapters' own
            guess_well(patch, expected)
        given = model.generate(**inputs, max_new_tokens=NEW, **ways[number % len(ways)])[:, length:]
    assert [up_to(row, model.config.stop_token_ids) for row in given.tolist()] == expected


@pytest.mark.parametrize(("model_type", "number", "batch"), CASES)
def test_texts(model_type: str, number: int, batch: int, source: Callable[[str], Path], prepared: Callable[[str], Path]):
    model, _ = gated_model(prepared(model_type))
    stock: Any = AutoModelForCausalLM.from_pretrained(source(model_type)).eval()
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, LONGEST, (number,), generator=draw).tolist()
    stops, seen = model.config.stop_token_ids, set()
    never = [*range(model.config.vocabulary_size - 2, stock.config.vocab_size)]  # the mask, the image and rows without a token
    for place in range(0, number, batch):
        some = lengths[place : place + batch]
        ids, mask = torch.zeros(len(some), max(some), dtype=torch.long), torch.zeros(len(some), max(some), dtype=torch.long)
        for row, length in enumerate(some):
            ids[row, -length:] = torch.randint(0, 250, (length,), generator=draw)
            mask[row, -length:] = 1
        told: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": stops, "pad_token_id": stops[0]}
        theirs = stock.generate(ids, **told, suppress_tokens=never)[:, ids.shape[1] :]
        expected = [up_to(row, stops) for row in theirs.tolist()]
        same_answers(model, {"input_ids": ids, "attention_mask": mask}, expected, place // batch)
        seen |= set(map(tuple, expected))
    assert len(seen) > number // 4, "answers that are all alike prove little"


@pytest.mark.parametrize(("model_type", "number", "batch"), VLM_CASES)
def test_images(model_type: str, number: int, batch: int, source: Callable[[str], Path], prepared: Callable[[str], Path]):
    """None, one or two of them in a prompt."""
    assert model_type in VLMS
    model, processor = gated_model(prepared(model_type))
    stock: Any = AutoModelForImageTextToText.from_pretrained(source(model_type)).eval()
    config, draw = model.config, torch.Generator().manual_seed(8)
    rows = stock.get_output_embeddings().weight.shape[0]
    never = [config.image_token_id, *config.placeholder_ids, *range(config.vocabulary_size - 1, rows)]
    for place in range(0, number, batch):
        chats = []
        for prompt in range(place, min(place + batch, number)):
            text = "".join(chr(97 + int(sign)) for sign in torch.randint(0, 26, (int(prompt * 7 % 40) + 1,), generator=draw))
            shown = [
                {"type": "image", "image": random_image(prompt + one).resize((40, 56))} for one in range((1, 0, 2)[prompt % 3])
            ]
            chats.append([{"role": "user", "content": [*shown, {"type": "text", "text": text}]}])
        inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
        ids, pixels = inputs["input_ids"], pixels_in(inputs)
        types = token_types(stock, ids, config.image_token_id, None, config.token_types)
        told: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": config.stop_token_ids, "suppress_tokens": never}
        theirs = stock.generate(ids, attention_mask=inputs["attention_mask"], **pixels, **types, **told)[:, ids.shape[1] :]
        same_answers(model, dict(inputs), [up_to(row, config.stop_token_ids) for row in theirs.tolist()], place // batch)
