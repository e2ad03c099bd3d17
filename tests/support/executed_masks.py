"""What a block mask makes a kernel compute."""

import itertools

import torch
from torch.nn.attention.flex_attention import BlockMask


def executed(mask: BlockMask, tile: int) -> torch.Tensor:
    """What a kernel that goes by the mask computes, bool [B, T, T]: full tiles whole, partial ones by the rule."""
    length = mask.seq_lengths[0]
    tiles = -(-length // tile)
    index = torch.arange(length)
    rule = mask.mask_mod(
        torch.arange(mask.kv_indices.shape[0])[:, None, None], torch.tensor(0), index[None, :, None], index[None, None, :]
    )
    computed = torch.zeros(len(mask.kv_indices), tiles * tile, tiles * tile, dtype=torch.bool)
    counts, lists = (mask.kv_num_blocks, mask.full_kv_num_blocks), (mask.kv_indices, mask.full_kv_indices)
    for number, (count, indices) in enumerate(zip(counts, lists, strict=True)):
        assert count is not None and indices is not None
        for b, q in itertools.product(range(len(count)), range(tiles)):
            for k in indices[b, 0, q, : count[b, 0, q]].tolist():
                place = (b, slice(q * tile, (q + 1) * tile), slice(k * tile, (k + 1) * tile))
                assert not computed[place].any(), "a tile is listed twice"
                whole = torch.ones(tile, tile, dtype=torch.bool)
                own = torch.nn.functional.pad(rule, (0, tiles * tile - length) * 2)[place]
                computed[place] = whole if number else own
    return computed[:, :length, :length]
