"""Whether the memory of caches is free as soon as nobody needs it, and not when the garbage collector comes by."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from diffvl.hub.cache_diffvl import BufferLayer


@contextmanager
def freed_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is cached in the block must be gone at its end, without the garbage collector."""
    made: list[weakref.ref[Any]] = []
    start = BufferLayer.__init__

    def noted(layer: BufferLayer, *given: Any) -> None:
        made.append(weakref.ref(layer))
        start(layer, *given)

    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(BufferLayer, "__init__", noted)
            yield
        assert made, "nothing was cached"
        assert not [one for one in made if one() is not None]
    finally:
        gc.enable()
