"""Keys and values of a prompt and its committed blocks, in buffers that are read without being copied.

A denoising step must see the cache and leave it as it was; a fused commit stores the first part of what comes in and not the
rest. So whatever comes in is written after the committed tokens, where attention finds it in one piece, and only `store`
decides how much of it stays. Windows live in the masks: every layer keeps all tokens.

There are two kinds. A `BlockCache` grows. A `StaticBlockCache` never moves, so that the trunk can be compiled for it: once the
prompt is in, block decoding has two forwards only, [masks] and [finished block | masks], and both then have fixed shapes. So have
drafts and their checks (`drafts_diffvl`). On a
GPU they are replayed as CUDA graphs, without a kernel launched from Python. The arguments are those of transformers:
`generate(..., cache_implementation="static", compile_config=..., disable_compile=...)`. The prompt goes in over a cache that
grows, as ever, and its tokens then move into the buffers. What is compiled depends on where the buffers lie; so they stay with
the model from call to call, and are made anew only for another batch size or a longer conversation.

Shapes: B batch, H heads, C committed tokens, n tokens, V vocabulary.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, CompileConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .masks_diffvl import masks_for
from .settings_diffvl import DecodeSettings

FIRST_CAPACITY = 256  # tokens
SMALLEST = 256  # tokens of the smallest static cache; larger ones have a power of two
MOST_ROOM = 8  # how many times larger than needed a static cache may be before a smaller one takes its place
# Compiled forms of one function that torch keeps before it gives up: two for each batch size and capacity.
MOST_FORMS = 64


class Store:
    """How many of the incoming tokens stay. A cache and its layers share it; layers that knew their cache itself would be in a
    ring with it, whose memory waits for the garbage collector when nobody needs it any more."""

    def __init__(self) -> None:
        self.tokens: bool | int = True


class BufferLayer(DynamicLayer):
    """One layer; `keys` and `values` are its committed tokens [B, H, C, head], views of larger buffers."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
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
        kept = committed + (incoming if self.store.tokens is True else int(self.store.tokens))
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
        store: how many of the tokens of the coming forward stay; True for all, False for none.
    """

    def __init__(self) -> None:
        self._store = Store()
        super().__init__(layer_class_to_replicate=functools.partial(BufferLayer, self._store))  # type: ignore[arg-type]

    @property
    def store(self) -> bool | int:
        return self._store.tokens

    @store.setter
    def store(self, tokens: bool | int) -> None:
        self._store.tokens = tokens

    def add_layer(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds a layer that holds these tokens already, [B, H, C, head]."""
        layer = BufferLayer(self._store)
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        self.layers.append(layer)

    def rearrange(self, order: torch.Tensor) -> None:
        """Puts the committed tokens in another order, int64 [B, n] of their places, and forgets the others."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.keys, layer.values = (_ordered(states, order) for states in (layer.keys, layer.values))
            layer.room = None


def _ordered(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, H, C, head] of the tokens [B, n] of each sample."""
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1]))


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
    device; a forward writes after it, and `advance` says how much of that stays. Masks hide the rest of the buffers.

    Attributes:
        committed: tokens, the cursor as a number.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        with torch.inference_mode(False):
            self.cursor = torch.zeros((), dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(self.cursor)
        self.committed = 0
        cursor = self.cursor  # and not the cache: see Store
        super().__init__(layer_class_to_replicate=lambda: StaticBufferLayer(capacity, cursor))  # type: ignore[arg-type]

    def advance(self, tokens: int) -> None:
        if tokens:
            self.move_to(self.committed + tokens)

    def crop(self, tokens: int) -> None:
        """Forgets the last tokens, whose number is given with a minus as transformers' caches take it."""
        self.move_to(self.committed + tokens)

    def rearrange(self, order: torch.Tensor) -> None:
        """As `BlockCache.rearrange`."""
        layers: list[Any] = self.layers
        for layer in layers:
            for states in (layer.keys, layer.values):
                states[:, :, : order.shape[1]] = _ordered(states, order)
        self.move_to(order.shape[1])

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
            copied.add_layer(*(states[..., : self.committed, :].clone() for states in (layer.keys, layer.values)))
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


# --- the trunk that a static cache is for ------------------------------------------------------------------------------------


class StaticTrunk:
    """A trunk with a static cache for batches of one size, and its compiled call."""

    def __init__(self, trunk: Any, batch: int, capacity: int, compile_config: CompileConfig | None, masks_at: str) -> None:
        self.trunk, self.batch, self.compile_config, self.masks_at = trunk, batch, compile_config, masks_at
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

    def logits(self, ids: torch.Tensor, masks: Any, rope_ids: torch.Tensor, keep: int) -> torch.Tensor:
        """One forward of text tokens [B, n]; logits of the last `keep` of them, [B, keep, V]."""
        if self.compile_config is not None and ids.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with masks_for(self.trunk, masks, self.masks_at) as given:
            return self._call(
                input_ids=ids,
                attention_mask=given,
                position_ids=rope_ids,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits


def static_trunk(model: Any, batch: int, tokens: int, compile_config: CompileConfig | None) -> StaticTrunk:
    """The model's static trunk, empty, for a batch of `batch` samples with at least `tokens` tokens each.

    Raises:
        ValueError: see require_static; and if its forward, which is compiled, takes one mask for all layers.
    """
    trunk = model.trunk
    require_static(trunk)
    if compile_config is not None and model.config.masks_at != "forward":
        raise ValueError(f"{type(trunk).__name__} takes one mask for all layers and cannot be compiled: set disable_compile=True")
    capacity = max(SMALLEST, 2 ** (tokens - 1).bit_length())
    held = getattr(model, "_static_trunk", None)
    if held is None or not held.fits(trunk, batch, capacity, compile_config):
        model._static_trunk = held = StaticTrunk(trunk, batch, capacity, compile_config, model.config.masks_at)
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


def compile_config_for(settings: DecodeSettings, device: torch.device) -> CompileConfig | None:
    """How the trunk is compiled, None for not at all. As in transformers: on a GPU unless it is disabled, elsewhere if a
    configuration is given."""
    given = settings.compile_config
    if not settings.is_static or settings.disable_compile or (given is None and device.type != "cuda"):
        return None
    return given or CompileConfig(fullgraph=True, dynamic=False)


def on_every_device(config: CompileConfig) -> CompileConfig:
    """The same for transformers' own `generate`, which compiles on a CPU only when it is told so."""
    copied = copy.copy(config)
    copied._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    return copied


@contextmanager
def many_forms() -> Iterator[None]:
    """In the block torch may compile as many forms of the trunk as there are caches, and says so where it cannot."""
    with torch._dynamo.config.patch(recompile_limit=MOST_FORMS, fail_on_recompile_limit_hit=True):
        yield
