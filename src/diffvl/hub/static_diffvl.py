"""Decoding in fixed shapes: a cache that never moves, and the trunk compiled for it.

Once the prompt is in, block decoding has two forwards only: [masks], and [finished block | masks]. With a cache of fixed
capacity both have fixed shapes, so that the trunk can be compiled once and, on a GPU, replayed as CUDA graphs, without a kernel
launched from Python. The compiling is transformers' own (`get_compiled_call`), and so are the words: `generate(...,
cache_implementation="static", compile_config=CompileConfig(...), disable_compile=...)`.

What is compiled depends on where the buffers lie; so they stay with the model from call to call, and are made anew only for
another batch size or a longer conversation.

Shapes: B batch, n tokens, H trunk width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CompileConfig

from .cache_diffvl import StaticBlockCache

SMALLEST = 256  # tokens of the smallest cache; larger ones have a power of two
# Compiled forms of one function that torch keeps before it gives up: two for each cache that was ever in use.
MOST_FORMS = 64


class StaticTrunk:
    """A trunk with a static cache for batches of one size, and its compiled call."""

    def __init__(self, trunk: Any, batch: int, tokens: int, compile_config: CompileConfig | None) -> None:
        self.trunk, self.batch, self.compile_config = trunk, batch, compile_config
        capacity = max(SMALLEST, 2 ** (tokens - 1).bit_length())
        self.cache = StaticBlockCache(capacity, trunk.device)
        self._call: Callable[..., Any] = trunk if compile_config is None else trunk.get_compiled_call(compile_config)

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model makes its own when it decodes."""
        return None

    def fits(self, batch: int, tokens: int, compile_config: CompileConfig | None) -> bool:
        layers: list[Any] = self.cache.layers
        moved = bool(layers) and (layers[0].dtype, layers[0].device) != (self.trunk.dtype, self.trunk.device)
        return not moved and self.compile_config == compile_config and self.batch == batch and tokens <= self.cache.capacity

    def logits(self, embeds: torch.Tensor, masks: Any, position: torch.Tensor, keep: int) -> torch.Tensor:
        """One forward of embeddings [B, n, H]; logits of the last `keep` tokens, [B, keep, V]."""
        if self.compile_config is not None and embeds.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self._call(
            inputs_embeds=embeds,
            attention_mask=masks,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits


def static_trunk(model: Any, batch: int, tokens: int, compile_config: CompileConfig | None) -> StaticTrunk:
    """The model's static trunk, empty, for so many samples and at least so many tokens each.

    Raises:
        ValueError: if the trunk cannot return the logits of its last tokens alone.
    """
    trunk = model.language_model
    if "logits_to_keep" not in inspect.signature(trunk.forward).parameters:
        raise ValueError(f"cache_implementation='static' does not know {type(trunk).__name__}: its forward has no logits_to_keep")
    held = getattr(model, "_static_trunk", None)
    if held is None or not held.fits(batch, tokens, compile_config):
        model._static_trunk = held = StaticTrunk(trunk, batch, tokens, compile_config)
    held.cache.move_to(0)
    return held


def compile_config_of(given: CompileConfig | None, disable: bool, device: torch.device) -> CompileConfig | None:
    """How a static trunk is compiled, None for not at all. As in transformers: on a GPU unless it is disabled, elsewhere if a
    configuration is given.

    Raises:
        ValueError: if a configuration is given and compiling disabled.
    """
    if disable and given is not None:
        raise ValueError("compile_config has no effect with disable_compile=True: leave one of them out")
    if disable or (given is None and device.type != "cuda"):
        return None
    return given or CompileConfig(fullgraph=True, dynamic=False)


@contextmanager
def many_forms() -> Iterator[None]:
    """In the block torch may compile as many forms of the trunk as there are caches, and says so where it cannot."""
    with torch._dynamo.config.patch(recompile_limit=MOST_FORMS, fail_on_recompile_limit_hit=True):
        yield
