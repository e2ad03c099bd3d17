"""Tiny checkpoints that decode in blocks, and short ways to ask them: what the tests of decoding for people share."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_runs import copy
from transformers import PreTrainedTokenizerFast

from diffvl.demo import standins

BLOCK = 4


def block_checkpoint(prepared: Path, to: Path, context: str = "block", grid: str = "absolute", target: str = "same") -> Path:
    """A copy of a prepared directory whose configuration says that it was trained on blocks of BLOCK tokens."""
    copy(prepared, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config |= {"decoding": "blocks", "block_size": BLOCK, "context": context, "grid": grid, "target": target}
    config["text_config"]["block_size"] = BLOCK
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def fed(streamer: Any, ids: list[int], size: int) -> None:
    """Gives a streamer what `generate` would: the prompt, the answer in pieces, the end."""
    streamer.put(torch.tensor([[1, 2, 3]]))
    for start in range(0, len(ids), size):
        streamer.put(torch.tensor(ids[start : start + size]))
    streamer.end()


def tokenizer() -> PreTrainedTokenizerFast:
    return standins.make_tokenizer()
