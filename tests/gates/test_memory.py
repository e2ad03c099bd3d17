"""What must not grow with the sequence: no tensor of tokens x vocabulary, and with block masks none of tokens x tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import batch, objective, sample
from shared_fixtures import Loaded
from torch.utils._python_dispatch import TorchDispatchMode

from diffvl.attention.block_mask import block_mask
from diffvl.attention.choose import choose
from diffvl.attention.cpu import TILED
from diffvl.demo.standins import HIDDEN
from diffvl.hub import head_diffvl
from diffvl.hub.layout_diffvl import block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.objective.losses import Draw, block_diffusion


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.seen.add(tuple(one.shape))
        return result


@contextmanager
def tiled(model: Any) -> Iterator[None]:
    choose(model.language_model, TILED, torch.device("cpu"))
    try:
        yield
    finally:
        choose(model.language_model, "sdpa", torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_loss_holds_one_chunk_of_logits(model_type: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """Forward and backward of 200 masked tokens, 16 rows of logits at a time."""
    model, _ = loaded(model_type)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
    monkeypatch.setattr(head_diffvl, "CHUNK_LOGITS", 16 * vocabulary)
    one = batch([sample(model.config, (40, 200))])
    with tiled(model), Shapes() as shapes:
        loss = block_diffusion(model, model.config, one, objective(noise={"schedule": "full"}), Draw(0, 0, 0.0)).loss
        loss.backward()
    model.zero_grad()
    wide = [shape for shape in shapes.seen if shape[-1:] == (vocabulary,) and len(shape) > 1]
    rows = {torch.Size(shape[:-1]).numel() for shape in wide} - {HIDDEN}  # the head's own weight, transposed
    assert max(rows) == 16 and len(rows) > 1


def test_building_a_block_mask_makes_nothing_of_tokens_by_tokens():
    answer = torch.zeros(1, 4096, dtype=torch.long)
    answer[0, -512:] = 1
    block = block_index(answer, 8, "absolute")
    stream = noisy_stream(answer, block, 8, "absolute")
    layout = clean_layout(block, torch.ones_like(answer, dtype=torch.bool), "block").joined(noisy_layout(stream, "block"))
    with Shapes() as shapes:
        block_mask(layout, 128)
    assert max(torch.Size(shape).numel() for shape in shapes.seen) <= 4096 + 512
