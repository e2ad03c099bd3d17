"""The head on chunks of rows against the head on all of them at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ORDINARY, trunks
from shared_fixtures import Loaded

from diffvl.config.recipe import Lora
from diffvl.hub import head_diffvl
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train.parts import add_adapters

ROWS = torch.tensor([3, 17, 17, 40, 25, 0, 59])  # one of them twice, in no order


def asked(loaded: Loaded, **how: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """log-probabilities of some tokens at ROWS, [M], and the gradients of a sum of them."""
    model, _ = loaded
    ids = torch.randint(0, ORDINARY, (2, 30), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(len(ROWS))

    def judge(logits: torch.Tensor, which: slice) -> torch.Tensor:
        return logits.log_softmax(-1).gather(1, targets[which, None])[:, 0]

    output = model(ids, logits_rows=ROWS, **({"row_map": judge} if how.get("chunks") else {})).logits
    found = output if how.get("chunks") else judge(output, slice(0, len(ROWS)))
    weights = torch.arange(1.0, len(ROWS) + 1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    return found, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
@pytest.mark.parametrize("model_type", trunks())
def test_chunks_are_the_whole(
    model_type: str, rows_at_once: int, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    model, _ = loaded(model_type)
    expected, truth = asked(loaded(model_type))
    rows = model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
    monkeypatch.setattr(head_diffvl, "CHUNK_LOGITS", rows_at_once * rows)
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output[..., 0].numel()))
    try:
        given, gradients = asked(loaded(model_type), chunks=True)
    finally:
        hook.remove()
    # One row to learn the vocabulary's size, then chunks; those of several are computed a second time in the backward pass.
    chunks = [min(rows_at_once, len(ROWS) - start) for start in range(0, len(ROWS), rows_at_once)]
    assert sorted(seen) == sorted([1, *chunks * (2 if len(chunks) > 1 else 1)])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(truth)
    loudest = max(float(gradient.abs().max()) for gradient in truth)
    for gradient, other in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 * loudest)


def test_chunks_under_adapters(prepared: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch):
    model, processor = load_checkpoint(prepared("llama"))
    add_adapters(model, Lora(rank=2, alpha=4), "all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected, truth = asked((model, processor))
    monkeypatch.setattr(head_diffvl, "CHUNK_LOGITS", 700)
    given, gradients = asked((model, processor), chunks=True)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(truth) > 10
    for gradient, other in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def test_no_rows_at_all(loaded: Callable[[str], Loaded]):
    """A batch without answers: an empty result that still hangs in the graph."""
    model, _ = loaded("llama")
    ids = torch.zeros(1, 5, dtype=torch.long)
    none = torch.empty(0, dtype=torch.long)
    output = model(ids, logits_rows=none, row_map=lambda logits, _: logits[:, 0]).logits
    assert output.shape == (0,)


def test_a_map_needs_rows(loaded: Callable[[str], Loaded]):
    with pytest.raises(ValueError, match="row_map needs logits_rows"):
        loaded("llama")[0](torch.zeros(1, 5, dtype=torch.long), row_map=lambda logits, _: logits)
