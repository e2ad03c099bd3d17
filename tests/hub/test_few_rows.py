"""A few tokens go through linear layers as columns where that is faster, and nobody can tell by what comes out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_chats import CHATS
from gated_models import gated_model
from served import sample
from shared_fixtures import Loaded

from diffvl.hub import few_rows_diffvl
from diffvl.hub.few_rows_diffvl import MOST_ROWS, few_rows, linear
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.block_batch import BlockBatch
from diffvl.serve.draft_batch import DraftBatch

SETTINGS = DecodeSettings(max_new_tokens=6)


class Counted:
    """How often layers were asked, and how often for few rows; in the place of `linear`."""

    def __init__(self) -> None:
        self.calls = self.few = 0

    def __call__(self, layer: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.few += 1 < rows.shape[:-1].numel() <= MOST_ROWS
        return linear(layer, rows)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """On whatever machine: few rows are slow here."""
    counter = Counted()
    monkeypatch.setattr(few_rows_diffvl, "has_slow_rows", lambda: True)
    monkeypatch.setattr(few_rows_diffvl, "linear", counter)
    return counter


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (4,), (1, 4), (4, 1), (2, 3), (8,), (9,), (3, 2, 2), (0,)])
def test_the_sums_are_the_same(shape: tuple[int, ...], bias: bool):
    layer = torch.nn.Linear(48, 80, bias=bias)
    for rows in (torch.randn(*shape, 48), torch.randn(48, *shape).movedim(0, -1)):
        wanted = layer(rows)
        found = linear(layer, rows)
        assert found.shape == wanted.shape and found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_only_layers_that_gain_are_touched_and_all_are_given_back(counted: Counted):
    class Own(torch.nn.Linear):
        pass

    plain, half, own, hooked = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).bfloat16(), Own(4, 4), torch.nn.Linear(4, 4)
    hooked.forward = lambda input: input  # as libraries leave it that move weights
    trunk = torch.nn.ModuleList([plain, half, own, hooked])
    with pytest.raises(RuntimeError, match="stop"), few_rows(trunk):
        assert "forward" in vars(plain) and not {"forward"} & (vars(half).keys() | vars(own).keys())
        assert hooked(torch.ones(2, 4)).sum() == 8
        plain(torch.ones(2, 4))
        with torch.autocast("cpu", torch.bfloat16):
            assert plain(torch.ones(2, 4)).dtype == torch.bfloat16
        raise RuntimeError("stop")
    assert counted.few == 2 and "forward" not in vars(plain) and "forward" in vars(hooked)


def test_a_machine_on_which_they_are_not_slow_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(few_rows_diffvl, "has_slow_rows", lambda: False)
    trunk = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    with few_rows(trunk):
        assert "forward" not in vars(trunk[0])


@pytest.mark.parametrize(
    "settings",
    [{}, {"denoising_steps": 1}, {"remasking": "entropy", "entropy_budget": 6.0}, {"mode": "ar"}, {"mode": "speculative"}],
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2_5_vl"])
def test_answers_are_the_same(
    model_type: str, settings: dict[str, Any], loaded: Callable[[str], Loaded], counted: Counted, monkeypatch: pytest.MonkeyPatch
):
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "causal", "response", "shift")
    for chats in (CHATS[:1], CHATS):
        inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
        counted.few = 0
        found = model.generate(**inputs, max_new_tokens=12, **settings)
        assert counted.few > 0 or (len(chats) == 1 and settings.get("mode") == "ar")
        with monkeypatch.context() as patch:
            patch.setattr(few_rows_diffvl, "has_slow_rows", lambda: False)
            counted.few = 0
            torch.testing.assert_close(model.generate(**inputs, max_new_tokens=12, **settings), found, rtol=0, atol=0)
            assert counted.few == 0


@pytest.mark.parametrize("drafts", [False, True])
def test_batches_of_the_server_do_so_too(drafts: bool, prepared: Callable[[str], Any], counted: Counted):
    model, processor = both = gated_model(prepared("qwen2"))
    batch = DraftBatch(model, processor.pad_token_id, 2) if drafts else BlockBatch(model, processor.pad_token_id)
    assert (counted.calls > 0) == drafts, "what drafts cost is timed in the same way"
    for work in (lambda: batch.add(*batch.take_in([sample(both, CHATS[0], SETTINGS)])), batch.decode_block):  # type: ignore[arg-type]
        counted.calls = 0
        work()
        assert counted.calls > 0
