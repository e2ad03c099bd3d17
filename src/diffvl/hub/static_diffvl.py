"""Decoding in fixed shapes: a cache that never moves, and the trunk compiled for it.

Once the prompt is in, block decoding has two forwards only: [masks], and [finished block | masks]. With a cache of fixed
capacity both have fixed shapes, so that the trunk can be compiled once and, on a GPU, replayed as CUDA graphs, without a kernel
launched from Python. The words are those of transformers: `generate(..., cache_implementation="static", compile_config=...,
disable_compile=...)`. The prompt goes in over a cache that grows, as ever, and its tokens then move into the buffers.

What is compiled depends on where the buffers lie; so they stay with the model from call to call, and are made anew only for
another batch size or a longer conversation.

Shapes: B batch, n tokens, H trunk width, V vocabulary.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CompileConfig

from .cache_diffvl import StaticBlockCache

SMALLEST = 256  # tokens of the smallest cache; larger ones have a power of two
MOST_ROOM = 8  # a cache so many times larger than what is needed is given up for a smaller one
# Compiled forms of one function that torch keeps before it gives up: two for each batch size and capacity.
MOST_FORMS = 64


class StaticTrunk:
    """A trunk with a static cache for batches of one size, and its compiled call."""

    def __init__(self, trunk: Any, batch: int, capacity: int, compile_config: CompileConfig | None) -> None:
        self.trunk, self.batch, self.compile_config = trunk, batch, compile_config
        self.kind = (trunk.dtype, trunk.device)
        self.cache = StaticBlockCache(capacity, trunk.device)
        # Not transformers' get_compiled_call, which leaves a function on the trunk that a copied model would go on calling.
        compiled = compile_config is not None
        self._call = torch.compile(trunk.__call__, **compile_config.to_dict()) if compiled else trunk.__call__

    def __reduce__(self) -> Any:
        """A copied or pickled model has none, and makes its own when it decodes."""
        return (type(None), ())

    def fits(self, trunk: Any, batch: int, capacity: int, compile_config: CompileConfig | None) -> bool:
        same = self.trunk is trunk and self.kind == (trunk.dtype, trunk.device) and self.compile_config == compile_config
        return same and self.batch == batch and capacity <= self.cache.capacity <= MOST_ROOM * capacity

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
        ValueError: see require_static.
    """
    trunk = model.language_model
    require_static(trunk)
    capacity = max(SMALLEST, 2 ** (tokens - 1).bit_length())
    held = getattr(model, "_static_trunk", None)
    if held is None or not held.fits(trunk, batch, capacity, compile_config):
        model._static_trunk = held = StaticTrunk(trunk, batch, capacity, compile_config)
    held.cache.clear()
    return held


def require_static(trunk: Any) -> None:
    """Raises ValueError if a trunk cannot decode in fixed shapes."""
    name = type(trunk).__name__
    if hasattr(trunk, "get_base_model"):
        raise ValueError(f"cache_implementation='static' does not know {name}: merge the adapter first")
    if "logits_to_keep" not in inspect.signature(trunk.forward).parameters:
        raise ValueError(f"cache_implementation='static' does not know {name}: its forward has no logits_to_keep")
    if len({parameter.device for parameter in trunk.parameters()}) > 1:
        raise ValueError("cache_implementation='static' needs the whole trunk on one device")


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


def on_every_device(config: CompileConfig) -> CompileConfig:
    """The same for transformers' own `generate`, which compiles on a CPU only when it is told so."""
    told = copy.copy(config)
    told._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    return told


@contextmanager
def many_forms() -> Iterator[None]:
    """In the block torch may compile as many forms of the trunk as there are caches, and says so where it cannot."""
    with torch._dynamo.config.patch(recompile_limit=MOST_FORMS, fail_on_recompile_limit_hit=True):
        yield
