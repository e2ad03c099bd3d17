"""Blocks on torch's `meta` device, whose tensors have shapes and no values.

Whatever reads a value, or takes a shape from values, raises there, and so do operators that mix it with the CPU. On a GPU the
same code would wait for the device, or raise as well. What the values are is for tests/test_gpu.py.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_chats import CHATS
from helpers import CONTEXTS, TARGETS, pairwise
from shared_fixtures import Loaded

from diffvl.hub.answers_diffvl import BatchAnswers, picker
from diffvl.hub.cache_diffvl import static_trunk
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.generation_diffvl import denoise
from diffvl.hub.judge_diffvl import Sampling
from diffvl.hub.masks_diffvl import block_kernels
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.hub.settings_diffvl import DecodeSettings

META = torch.device("meta")


@torch.no_grad()
def decode_without_values(
    loaded: Loaded, chats: list[Any], monkeypatch: pytest.MonkeyPatch, static: bool, settings: DecodeSettings
) -> None:
    """Three blocks after the prompt; what a real decoder counts on the way in, by looking at values, is told to this one."""
    model, processor = loaded
    inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    arguments = [inputs["input_ids"], inputs["attention_mask"].bool(), inputs["answer_index"], pixels_in(inputs)]
    counts = BlockDecoder(model, *arguments).counts
    monkeypatch.setattr(BlockDecoder, "_count", lambda _: counts)
    copied: Any = copy.deepcopy(model)
    moved = copied.to(META)
    given: Any = [one.to(META) for one in arguments[:3]]
    given.append({name: value.to(META) for name, value in arguments[3].items()})
    engine = static_trunk(moved, len(chats), 200, None) if static else None
    decoder = BlockDecoder(moved, *given, static=engine)
    settings = settings.for_checkpoint(model.config)
    answers = BatchAnswers(decoder, settings, None, None)
    pick = picker(Sampling(settings, torch.device("cpu"), model.config), settings)
    with block_kernels(moved.trunk):
        decoder.prefill()
        for _ in range(3):
            settled_at = denoise(answers, settings, pick)
            assert settled_at.device == decoder.block.ids_BD.device == META
            decoder.commit()


@pytest.mark.parametrize(
    ("model_type", "context", "target", "static"), pairwise(["llama", "gemma2"], CONTEXTS, TARGETS, [False, True])
)
def test_a_block_needs_no_values(
    model_type: str,
    context: str,
    target: str,
    static: bool,
    loaded: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
):
    model, _ = both = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, "absolute", target)
    for chats in (CHATS[:1], CHATS):
        for settings in (DecodeSettings(denoising_steps=2), DecodeSettings(remasking="sequential")):
            with monkeypatch.context() as patch:
                decode_without_values(both, chats, patch, static, settings)


def test_a_rule_that_must_look_is_noticed(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    loaded("llama")[0].config.set_decoding("blocks", 4, "block", "absolute", "same")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        settings = DecodeSettings(denoising_steps=2, remasking="low_confidence_dynamic")
        decode_without_values(loaded("llama"), CHATS, monkeypatch, False, settings)
