"""Keys and values of a prompt and its committed blocks, in buffers that are read without being copied.

A denoising step must see the cache and leave it as it was; a fused commit stores the first part of what comes in and not the
rest. So whatever comes in is written behind the committed tokens, where attention finds it in one piece, and only `store`
decides how much of it stays. Windows live in the masks: every layer keeps all tokens.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

FIRST_CAPACITY = 256  # tokens


class BufferLayer(DynamicLayer):
    """One layer; `keys` and `values` are its committed tokens [B, H, C, head], views of larger buffers."""

    def __init__(self, cache: "BlockCache") -> None:
        super().__init__()
        self.cache = cache
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Committed and incoming tokens for the attention; how many of the incoming ones stay is the cache's `store`."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("a BlockCache is for inference: its buffers are written in place, which gradients do not survive")
        committed = self.get_seq_length()
        incoming = key_states.shape[-2]
        end = committed + incoming
        keys, values = self._with_room(key_states, value_states, committed, end)
        keys[..., committed:end, :] = key_states
        values[..., committed:end, :] = value_states
        kept = committed + (incoming if self.cache.store is True else int(self.cache.store))
        self.keys, self.values = keys[..., :kept, :], values[..., :kept, :]
        return keys[..., :end, :], values[..., :end, :]

    def _with_room(
        self, key_states: torch.Tensor, value_states: torch.Tensor, committed: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, grown to twice their size where they are too short."""
        if self.room is None or self.room[0].shape[-2] < end:
            capacity = max(FIRST_CAPACITY, 2 * end)
            grown = []
            for states, old in ((key_states, self.keys), (value_states, self.values)):
                buffer = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
                if committed:
                    assert old is not None
                    buffer[..., :committed, :] = old
                grown.append(buffer)
            self.room = (grown[0], grown[1])
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.room

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


class BlockCache(Cache):
    """The cache of block decoding.

    Attributes:
        store: of the tokens of the coming forward, True keeps all, False none, a number the first so many.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=lambda: BufferLayer(self))  # type: ignore[arg-type]
        self.store: bool | int = True


class StaticBufferLayer(StaticLayer):
    """One layer of a StaticBlockCache, [B, H, capacity, head]: incoming tokens are written from the cache's cursor on, and
    attention is given the whole buffer."""

    def __init__(self, capacity: int, cursor: torch.Tensor) -> None:
        super().__init__(capacity)
        self.cumulative_length = cursor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        with torch.inference_mode(False):  # the buffers are written by later calls too, which may be in another mode
            super().lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        place = torch.arange(key_states.shape[-2], device=key_states.device) + self.cumulative_length
        # Under autocast what comes in may have another dtype than the call before had.
        self.keys.index_copy_(2, place, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, place, value_states.to(self.values.dtype))
        return self.keys, self.values


class StaticBlockCache(Cache):
    """Buffers that never move or grow, for a trunk that is compiled for fixed shapes. What is committed ends at a cursor on the
    device; a forward writes behind it, and `advance` says how much of that stays. Masks hide the rest of the buffers.

    Attributes:
        committed: tokens, the cursor as a number.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        with torch.inference_mode(False):
            self.cursor = torch.zeros((), dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(self.cursor)
        self.committed = 0
        super().__init__(layer_class_to_replicate=lambda: StaticBufferLayer(capacity, self.cursor))  # type: ignore[arg-type]

    def advance(self, tokens: int) -> None:
        if tokens:
            self.move_to(self.committed + tokens)

    def clear(self) -> None:
        """Empties the buffers: what is hidden still counts, as nothing times what stands there, and must be a number."""
        self.move_to(0)
        layers: list[Any] = self.layers
        for layer in layers:
            layer.keys.zero_()
            layer.values.zero_()

    def move_to(self, committed: int) -> None:
        assert committed <= self.capacity
        self.committed = committed
        self.cursor.fill_(committed)

    def snapshot(self) -> BlockCache:
        """A copy of what is committed, which later calls leave alone."""
        copied = BlockCache()
        layers: list[Any] = self.layers
        for layer in layers:
            fresh = BufferLayer(copied)
            fresh.keys, fresh.values = (states[..., : self.committed, :].clone() for states in (layer.keys, layer.values))
            fresh.dtype, fresh.device, fresh.is_initialized = layer.dtype, layer.device, True
            copied.layers.append(fresh)
        return copied

    def load(self, cache: Cache) -> None:
        """Takes over all tokens of another cache, into empty buffers."""
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            self.update(layer.keys, layer.values, number)
        self.move_to(cache.get_seq_length())


class ReadingCache(DynamicCache):
    """A view of another cache that gives incoming keys and values to the attention and forgets them."""

    def __init__(self, cache: Cache) -> None:
        """Raises ValueError for a cache whose layers drop old tokens."""
        super().__init__()
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError("store_kv=False needs a cache of plain layers: build it as DynamicCache() without a config")
        self.layers = cache.layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx >= len(self.layers) or not getattr(self.layers[layer_idx], "is_initialized", False):
            return key_states, value_states
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)
