"""Processors of tiny vision-language checkpoints, read as `prepare` reads them, beside the checkpoint's own."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import CONFIG_MAPPING

from diffvl.demo.standin_processors import LOOKS, make_processor_files
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.hub.source_diffvl import build_processor
from diffvl.prepare.processor import NativeFacts, read_native_processor

# The token that shows a row of an image; the placeholder where a family has no other one.
ROWS = {"internvl": "<IMG_CONTEXT>", "gemma3": "<image_soft_token>"} | dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|image_pad|>"
)


class Native(NamedTuple):
    family: str
    directory: Path
    processor: DiffVLProcessor
    facts: NativeFacts
    inner: Any  # the checkpoint's own processor


def config_of(family: str, tokenizer: Any) -> Any:
    """The model's configuration, as far as processors look at it."""
    config = CONFIG_MAPPING[family]()
    name = "image_token_id" if hasattr(config, "image_token_id") else "image_token_index"
    setattr(config, name, tokenizer.convert_tokens_to_ids(ROWS.get(family, "<image>")))
    return config


def read(directory: Path, family: str, tokenizer: Any, **settings: Any) -> tuple[DiffVLProcessor, NativeFacts]:
    return read_native_processor(str(directory), config=config_of(family, tokenizer), **settings)


@cache
def native(family: str) -> Native:
    directory = Path(tempfile.mkdtemp(prefix=f"diffvl-{family}-"))
    tokenizer = make_processor_files(directory, family)
    processor, facts = read(directory, family, tokenizer)
    look = LOOKS[family]
    inner = build_processor(look.processor, look.settings, processor.image_processor, processor.tokenizer)
    return Native(family, directory, processor, facts, inner)


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    colours = torch.randint(0, 256, (3, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize((width, height), Image.Resampling.BILINEAR)


def chat(*turns: Any) -> list[dict[str, Any]]:
    """User and assistant by turns; a turn is a text, or a list of texts and images."""
    return [{"role": ("user", "assistant")[number % 2], "content": _content(turn)} for number, turn in enumerate(turns)]


def _content(turn: Any) -> list[dict[str, Any]]:
    parts = turn if isinstance(turn, list) else [turn]
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]


CHATS: dict[str, list[dict[str, Any]]] = {
    "none": chat("Just say hello."),
    "one": chat([image(90, 120), "What is this?"]),
    "text first": chat(["Look at\n", image(60, 200), "\n\nand tell me."]),
    "one only": chat([image(56, 56)]),
    "several": chat(
        ["Compare ", image(90, 120), " and\n", image(140, 64, 1), " please."],
        "The first is wider.",
        ["And this?", image(70, 71, 2)],
    ),
    "rounds": chat([image(30, 40), "Colour?"], "Red, I think.", "Sure?", "Été: 90 °. 🙂", "Thanks"),
}
