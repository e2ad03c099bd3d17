"""Blocks on torch's `meta` device, whose tensors have shapes and no values.

Whatever reads a value, or takes a shape from values, raises there, and so do operators that mix it with the CPU. On a GPU the
same code would wait for the device, or raise as well. What the values are is for tests/test_gpu.py.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Loaded
from decode_chats import CHATS
from helpers import CONTEXTS, TARGETS

from diffvl.hub.attention_diffvl import block_kernels
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.generation_diffvl import denoise
from diffvl.hub.run_diffvl import Run
from diffvl.hub.sampling_diffvl import Remasking, Sampling, picker
from diffvl.hub.static_diffvl import static_trunk
from diffvl.hub.stopping_diffvl import Stopping

META = torch.device("meta")
# What a decoder counts on the way in, once, by looking at values.
COUNTED = ("longest_start", "gaps", "open_count", "cell_is_whole", "image_in_block", "has_images", "has_empty")


@torch.no_grad()
def decode_without_values(
    loaded: Loaded, chats: list[Any], monkeypatch: pytest.MonkeyPatch, static: bool, remasking: Remasking
) -> None:
    """Three blocks after the prompt; what a real decoder counted is told to this one."""
    model, processor = loaded
    inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    arguments = [inputs["input_ids"], inputs["attention_mask"].bool(), inputs["answer_index"], inputs.get("pixel_values")]
    real = BlockDecoder(model, *arguments)
    counted = {name: getattr(real, name) for name in COUNTED}
    images = int((inputs["input_ids"] == model.config.image_token_id).sum())

    def told(decoder: BlockDecoder) -> int:
        vars(decoder).update(counted)
        return images

    monkeypatch.setattr(BlockDecoder, "_count", told)
    copied: Any = copy.deepcopy(model)
    moved = copied.to(META)
    given: Any = [None if one is None else one.to(META) for one in arguments]
    engine = static_trunk(moved, len(chats), 200, None) if static else None
    decoder = BlockDecoder(moved, *given, static=engine)
    run = Run(decoder, Stopping(frozenset({1}), 50), None, None)
    pick = picker(Sampling(False, 0.0), 0, torch.device("cpu"), model.config, with_entropy=False)
    with block_kernels(moved.language_model):
        decoder.prefill()
        for _ in range(3):
            decoder.open_block()
            settled_at = denoise(run, remasking, pick)
            assert settled_at.device == decoder.ids_BD.device == META
            decoder.commit()


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
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
        for rule in (Remasking(2), Remasking(4, "sequential")):
            with monkeypatch.context() as patch:
                decode_without_values(both, chats, patch, static, rule)


def test_a_rule_that_must_look_is_noticed(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    loaded("llama")[0].config.set_decoding("blocks", 4, "block", "absolute", "same")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        decode_without_values(loaded("llama"), CHATS, monkeypatch, False, Remasking(2, "low_confidence_dynamic", threshold=0.9))
