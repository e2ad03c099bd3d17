"""Stops that are no tokens (-1: never), in a batch whose answers end at different places, in every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_chats import CHATS
from shared_fixtures import Loaded
from transformers import GenerationConfig

from diffvl.hub.settings_diffvl import MODES

TOKENS = 14
NEVER: list[Any] = [[-1], [], 99_999, torch.tensor(-1)]


@pytest.fixture(scope="module")
def both(loaded: Callable[[str], Loaded]) -> Loaded:
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    return model, processor


def decoded(both: Loaded, chats: list[Any], **settings: Any) -> tuple[list[str], torch.Tensor]:
    """The texts of the answers, and their tokens with what stands behind them."""
    model, processor = both
    inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    sequences = model.generate(**inputs, max_new_tokens=TOKENS, tokenizer=processor.tokenizer, **settings)
    assert isinstance(sequences, torch.Tensor)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in new], new


@pytest.mark.parametrize(
    ("mode", "size", "never"),
    [*((mode, size, -1) for mode in MODES for size in (1, 2, 3)), *(("ar", 2, never) for never in NEVER)],
    ids=str,
)
def test_a_stop_string_ends_one_of_a_batch_that_never_stops(mode: str, size: int, never: Any, both: Loaded):
    model, processor = both
    arguments: dict[str, Any] = {"mode": mode, "eos_token_id": never}
    (free,), tokens = decoded(both, CHATS[:1], **arguments)
    assert tokens.shape == (1, TOKENS)
    string = processor.tokenizer.decode(tokens[0, 3:5])
    texts, new = decoded(both, CHATS[:size], stop_strings=[string], **arguments)
    assert texts[0].endswith(string) and len(texts[0]) < len(free) and free.startswith(texts[0])
    assert int(new.min()) >= 0 and int(new.max()) < model.config.vocabulary_size, "what stands behind an answer is a token"
    for place in range(size):
        alone = decoded(both, CHATS[place : place + 1], stop_strings=[string], **arguments)[0][0]
        assert texts[place] == alone


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_that_is_none_beside_one_that_is(mode: str, both: Loaded):
    _, tokens = decoded(both, CHATS[:1], mode=mode, eos_token_id=-1)
    stop = int(tokens[0, 4])
    for stops in ([-1, stop], torch.tensor([stop, 99_999]), torch.tensor(stop)):
        _, new = decoded(both, CHATS[:3], mode=mode, eos_token_id=stops)
        row = new[0].tolist()
        assert row[: row.index(stop) + 1] == tokens[0].tolist()[: tokens[0].tolist().index(stop) + 1]


def test_padding_is_a_token_unless_the_caller_says_otherwise(both: Loaded, monkeypatch: pytest.MonkeyPatch):
    """Some published checkpoints say -1 in their generation_config."""
    model, processor = both
    _, tokens = decoded(both, CHATS[:1], eos_token_id=-1)
    stop = int(tokens[0, 0])
    monkeypatch.setattr(model, "generation_config", GenerationConfig(pad_token_id=-1))
    chats = [*CHATS[:1], CHATS[1]]
    assert decoded(both, chats, eos_token_id=[stop, -1])[1][0, -1] == stop
    assert decoded(both, chats, eos_token_id=[stop, -1], pad_token_id=-1)[1][0, -1] == -1


@pytest.mark.parametrize("mode", MODES)
def test_a_caller_s_own_criterion_ends_an_answer(mode: str, both: Loaded):
    """As evaluation harnesses give it: asked after every token, also inside a block; for one prompt."""
    _, tokens = decoded(both, CHATS[:1], mode=mode, eos_token_id=-1)
    seen: list[int] = []

    def criterion(input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        seen.append(input_ids.shape[1])
        return input_ids[:, -1] == tokens[0, 5]

    _, new = decoded(both, CHATS[:1], mode=mode, eos_token_id=-1, stopping_criteria=[criterion])
    first = tokens[0].tolist().index(int(tokens[0, 5]))
    assert new[0].tolist() == tokens[0, : first + 1].tolist()
    assert seen == list(range(seen[0], seen[0] + first + 1))
    with pytest.raises(ValueError, match="stopping_criteria take one prompt, got 2"):
        decoded(both, CHATS[:2], mode=mode, stopping_criteria=[criterion])
