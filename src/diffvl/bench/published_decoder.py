"""The block loop as it is published, written plainly: one sample, a forward of its own to commit a block, Python per step.

What SDAR (arXiv 2510.06303), SDAR-VL and DiffusionVL (arXiv 2512.15713) do in their `generate`: the prompt's whole blocks go in
by one block-causal pass whose logits are thrown away; each block is read again at every denoising step with `store_kv=False`
(the cache and the block's keys are joined anew in every layer) and once more with `store_kv=True`; the head runs on all D
positions, in fp32; which tokens settle is decided sample by sample. The model is called through the named arguments of its
`forward` alone, so any checkpoint that has them could stand here.

It departs from those files where they cannot give the same tokens as a right decoder: the quota of a step is counted over the
masks of the block, as LLaDA does (SDAR counts over D, which is the same for a block without prompt tokens); a tie between
confidences goes to the left; the mask token, the image token and the table's padding rows are never predicted; and the grid
and the attention among clean tokens are those of the checkpoint.

Shapes: P prompt length, T prompt and blocks, D block size, V vocabulary. Batch size is 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from diffvl.errors import UsageError
from diffvl.hub.configuration_diffvl import never_predicted
from diffvl.hub.pixels_diffvl import Pixels


@dataclass(frozen=True)
class Published:
    """tokens: the answer up to and including its stop. denoising, commits, prefills: forwards of each kind."""

    tokens: list[int]
    denoising: int
    commits: int
    prefills: int


def require_same_target(config: Any) -> None:
    """Raises UsageError for a checkpoint that the published loop cannot decode."""
    if config.target != "same":
        raise UsageError(
            f"the checkpoint has target {config.target!r}; the published loop reads token i at position i (target 'same'), so "
            "there is nothing to compare with. Measure a checkpoint with target 'same'"
        )


@torch.no_grad()
def decode_published(
    model: Any,
    prompt_ids: torch.Tensor,
    pixels: Pixels,
    steps: int,
    limit: int,
    stops: frozenset[int],
    on_first: Callable[[], None] | None = None,
) -> Published:
    """Decodes greedily with `low_confidence_static`.

    Args:
        prompt_ids: [1, P], without padding and without earlier answers.
        limit: most tokens of the answer. stops: ids that end it.
        on_first: called when the first tokens have settled.
    Raises:
        UsageError: if an image reaches into the block that the prompt shares with the answer; the loop cannot take one there.
    """
    config = model.config
    size, mask_id = config.block_size, config.mask_token_id
    length = prompt_ids.shape[1]
    start = answer_start(config, length)
    total = start + -(-(length + limit - start) // size) * size
    if bool((prompt_ids[:, start:] == config.image_token_id).any()):
        raise UsageError(
            f"an image stands in the last {length - start} tokens of the prompt, in the block where the answer begins; the "
            "published loop encodes images in the prefill only. Take data whose images stand before their question"
        )
    forbidden_V = never_predicted(config, model.get_output_embeddings().weight.shape[0], prompt_ids.device)
    clean_TT = clean_mask(config, start, total, prompt_ids.device)
    position_T = torch.arange(total, device=prompt_ids.device)[None]
    ids_T = torch.full((1, total), mask_id, device=prompt_ids.device)
    ids_T[:, :length] = prompt_ids
    cache = DynamicCache()
    prefills = denoising = commits = 0

    # 1. The prompt's whole blocks, with logits for all of them.
    if start > 0:
        _forward(model, ids_T[:, :start], clean_TT[:, :start, :start], position_T[:, :start], cache, True, **pixels)
        prefills = 1
    # 2. Block by block.
    begin = start
    while begin < total:
        end = begin + size
        block_D, position_D = ids_T[:, begin:end].clone(), position_T[:, begin:end]
        everything = torch.ones(1, size, end, device=prompt_ids.device)
        masks = int((block_D == mask_id).sum())
        for step in range(steps + 1):
            masked_D = block_D == mask_id
            if not masked_D.any():
                _forward(model, block_D, clean_TT[:, begin:end, :end], position_D, cache, True)
                commits += 1
                break
            logits = _forward(model, block_D, everything, position_D, cache, False).float()
            denoising += 1
            block_D = settle(logits.masked_fill(forbidden_V, float("-inf")), block_D, masked_D, quota(masks, steps, step))
            if on_first is not None and denoising == 1:
                on_first()
        ids_T[:, begin:end] = block_D
        begin = end
        # 3. Stop tokens are looked for in all that was generated, once the block is finished.
        if any(token in stops for token in ids_T[0, length:end].tolist()):
            break
    tokens = ids_T[0, length:begin].tolist()[:limit]
    return Published(cut_at_stop(tokens, stops), denoising, commits, prefills)


def cut_at_stop(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Returns an answer up to and including its first stop token."""
    stop = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return list(tokens[: stop + 1])


def answer_start(config: Any, length: int) -> int:
    """Returns where the first decoded block begins in a prompt without earlier answers."""
    return length if config.grid == "response" else length // config.block_size * config.block_size


def clean_mask(config: Any, start: int, total: int, device: torch.device) -> torch.Tensor:
    """Says which clean token sees which, [1, T, T] with 1 = attend."""
    index = torch.arange(total, device=device)
    if config.context == "causal":
        return torch.ones(total, total, device=device).tril()[None]
    size = config.block_size
    # The blocks of the answer begin at `start`, those of the prompt at token 0.
    block = torch.where(index < start, index // size, -(-start // size) + (index - start) // size)
    return (block[None, :] <= block[:, None]).float()[None]


def quota(masks: int, steps: int, step: int) -> int:
    """Counts the tokens that settle in a step, of a block with this many masks; the remainder goes to the first steps."""
    return masks // steps + (step < masks % steps)


def settle(logits: torch.Tensor, block_D: torch.Tensor, masked_D: torch.Tensor, count: int) -> torch.Tensor:
    """Writes the most confident predictions into the block, sample by sample."""
    confidence, ids = logits.softmax(-1).max(-1)
    confidence = torch.where(masked_D, confidence, -torch.inf)
    transfer = torch.zeros_like(masked_D)
    for row in range(len(block_D)):
        most = min(count, int(masked_D[row].sum()))
        order = torch.sort(confidence[row], descending=True, stable=True).indices
        transfer[row, order[:most]] = True
    block_D[transfer] = ids[transfer]
    return block_D


def _forward(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    position: torch.Tensor,
    cache: DynamicCache,
    store_kv: bool,
    **images: torch.Tensor,
) -> torch.Tensor:
    """Runs one forward; returns the logits of all positions."""
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        store_kv=store_kv,
        **images,
    ).logits
