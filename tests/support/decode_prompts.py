"""What the tests of `diffvl bench decode` decode: tiny models with random prompts, and stand-ins that are asked something."""

from typing import Any

import torch
from helpers import random_image
from shared_fixtures import Loaded

from diffvl.bench.decoders import Prompts
from diffvl.bench.random_model import TrunkSize
from diffvl.bench.workload import random_workload
from diffvl.hub.messages_diffvl import visuals_of
from diffvl.hub.processing_diffvl import pixels_in

CPU = torch.device("cpu")
TINY = TrunkSize(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=512)


def chat(text: str, seen: bool = False) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": random_image()}] if seen else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def prompts_of(loaded: Loaded, chats: list[list[dict[str, Any]]], limit: int, stops: frozenset[int] | None = None) -> Prompts:
    model, processor = loaded
    inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    found = frozenset(model.config.stop_token_ids) if stops is None else stops
    images = tuple(len(list(visuals_of(one))) for one in chats)
    return Prompts(inputs["input_ids"], inputs["attention_mask"].bool(), pixels_in(inputs), limit, found, images)


def tiny(context: str = "block", batch: int = 1, tokens: int = 16) -> tuple[Any, Prompts]:
    workload = random_workload(TINY, 8, context, batch, tokens, CPU, torch.float32, seed=0)
    return workload.model, workload.prompts
