"""What one turn of a conversation leaves for the next: committed tokens with their keys, values and picture features."""

from dataclasses import dataclass

import torch

from .cache_diffvl import BlockCache
from .layout_diffvl import Layout


@dataclass
class Prefix:
    """What a decoder has committed for one conversation, for the next turn to go on from: ids [1, C] and layout of the cached
    tokens, and the pictures [N, 3, S, S] with their features."""

    ids: torch.Tensor
    rows: Layout
    cache: BlockCache
    pixel_values: torch.Tensor | None
    image_features: torch.Tensor | None
    used: bool = False

    def shared(self, ids: torch.Tensor, block: torch.Tensor) -> int:
        """How many of the cached tokens a prompt with these ids and blocks, each [1, n], begins with. Where clean tokens see
        their whole block, a block counts only if both have all of it."""
        most = min(self.ids.shape[1], ids.shape[1])
        own, index = self.rows, torch.arange(most, device=ids.device)
        same = (self.ids[0, :most] == ids[0, :most]) & (own.block[0, :most] == block[0, :most])
        same &= own.valid[0, :most] & (own.position[0, :most] == index)
        count = int(same.long().cumprod(0).sum())
        if self.rows.context == "causal":
            return count
        goes_on = [False, False]
        for number, blocks in enumerate((own.block[0], block[0])):
            goes_on[number] = 0 < count < len(blocks) and bool(blocks[count] == blocks[count - 1])
        return int((block[0, :count] < block[0, count - 1]).sum()) if any(goes_on) else count

    def shows(self, pixel_values: torch.Tensor | None) -> bool:
        """Whether the pictures of a prompt begin with these: others could stand behind the same placeholders."""
        seen = self.pixel_values
        if seen is None:
            return True
        return pixel_values is not None and len(pixel_values) >= len(seen) and torch.equal(pixel_values[: len(seen)], seen)

    def begun(self, count: int) -> "Prefix":
        """The first so many tokens of it; it is used up by that.

        Raises:
            ValueError: if it was used before.
        """
        if self.used:
            raise ValueError("this prefix was used before: a turn goes on from the prefix of the turn before it, once")
        self.used = True
        self.cache.crop(count - self.ids.shape[1])
        rows = {name: row[:, :count] for name, row in self.rows.rows.items()}
        layout = Layout(**rows, context=self.rows.context)
        return Prefix(self.ids[:, :count], layout, self.cache, self.pixel_values, self.image_features)
