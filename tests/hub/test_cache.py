"""Caches: when their memory is free, and what a copy shares."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_refs import freed_at_once
from gated_models import gated_model
from shared_fixtures import Loaded

from diffvl.hub.cache_diffvl import BlockCache


def generate(loaded: Loaded, **settings: Any) -> Any:
    model, processor = loaded
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "What is it, and why?")]
    inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    return model.generate(**inputs, max_new_tokens=9, eos_token_id=-1, **settings)


@pytest.mark.parametrize("mode", ["blocks", "speculative"])
def test_the_cache_of_generate_is_gone_when_it_returns(
    mode: str, loaded: Callable[[str], Loaded], prepared: Any, monkeypatch: pytest.MonkeyPatch
):
    if mode == "speculative":
        both = gated_model(prepared("qwen2"))
    else:
        both = loaded("llama")
        both[0].config.set_decoding("blocks", 4, "causal", "absolute", "same")
    with freed_at_once(monkeypatch):
        assert len(generate(both, mode=mode)) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_has_layers_of_its_own(copied: Callable[[BlockCache], BlockCache]):
    """Those it has, and those it makes: how much stays is the copy's affair in all of them."""
    states = torch.ones(1, 1, 3, 2)
    first = BlockCache()
    first.update(states, states, 0)
    second = copied(first)
    second.store = 1
    for layer in range(2):
        second.update(states, states, layer)
        first.update(states, states, layer)
    assert [second.get_seq_length(layer) for layer in range(2)] == [4, 1]
    assert [first.get_seq_length(layer) for layer in range(2)] == [6, 3]
    assert first.store is True and second.store == 1
