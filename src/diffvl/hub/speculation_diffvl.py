"""Self-speculation: blocks are drafted by denoising and kept as far as the weights' own causal logits agree.

For checkpoints whose clean stream is token-causal, and best with an AR loss on it (`ar_weight`): such a model can check its own
drafts, as a second model does in speculative decoding (arXiv 2211.17192; here greedy, so that the answer is the AR answer of the
same weights, token for token). A round takes the draft's forwards and one to check it, and gives at least two tokens.

Shapes: B batch, D block size.
"""

from typing import Any

import torch

from .decoder_diffvl import BlockDecoder
from .layout_diffvl import Layout
from .pieces_diffvl import Piece, Places
from .run_diffvl import Run
from .sampling_diffvl import Remasking, settled


def speculate(run: Run, steps: int, pick: Any) -> None:
    """Decodes every sample of a run to its end, with so many denoising steps a draft."""
    decoder = run.decoder
    decoder.gaps = True  # what does not agree stays in the cache as padding
    ended = [False] * len(run.answers)
    known = _take_in_prompt(decoder)
    decoder.open_block()
    while True:
        # 1. Draft: the last known token goes in as a clean one and says the next; the rest of its block is denoised.
        live = ~torch.tensor(ended, device=decoder.start.device)
        masked = decoder.open_BD & live[:, None]
        drafted = _draft(decoder, known, masked, steps, pick)
        run.predicted()
        # 2. Check: the drafted tokens go in as clean ones, and each must be what the one before it says.
        kept, correction = _check(decoder, drafted, masked, pick)
        # 3. What agreed and the first correction are final.
        for sample in range(len(ended)):
            if not ended[sample]:
                ended[sample] = run.extend(sample, [*drafted[sample][kept[sample]].tolist(), int(correction[sample])])
        if all(ended):
            return
        live = ~torch.tensor(ended, device=decoder.start.device)
        known = _go_on(decoder, drafted, kept, correction, live)


def _take_in_prompt(decoder: BlockDecoder) -> Piece:
    """Commits the prompt but for its last token, which is returned; raises ValueError where there is none."""
    length = decoder.prompt_length
    if bool((length == 0).any()):
        raise ValueError("mode='speculative' goes on from a prompt, but one is empty")
    before = int(length.max()) - 1
    if before:
        index = torch.arange(before, device=length.device).expand(len(length), before)
        rows = _clean(decoder, index, decoder.prompt_block[:, :before], index < length[:, None] - 1)
        image = decoder.image_index[:, :before] if decoder.has_images else None
        decoder.forward(Piece(decoder.prompt_ids[:, :before], rows, image), None, None, None)
    last = length[:, None] - 1
    rows = _clean(decoder, last, decoder.prompt_block.gather(1, last), torch.ones_like(last, dtype=torch.bool))
    image = decoder.image_index.gather(1, last) if decoder.has_images else None
    return Piece(decoder.prompt_ids.gather(1, last), rows, image)


def _clean(decoder: BlockDecoder, position: torch.Tensor, block: torch.Tensor, valid: torch.Tensor) -> Layout:
    zeros = torch.zeros_like(position)
    return Layout(position, block, zeros, valid, zeros, decoder.config.context)


def _draft(decoder: BlockDecoder, known: Piece, masked: torch.Tensor, steps: int, pick: Any) -> torch.Tensor:
    """Tokens for the masked places, ids [B, D]; the first of each sample is what its known token says, so it is final already."""
    first = masked & (masked.long().cumsum(1) == 1)
    rule = Remasking(steps)
    waiting: Piece | None = known
    left, count = masked.clone(), masked.sum(1) - 1
    for step in range(steps):
        # A shifted target is read at the token before; the first masked token needs none, the causal logits have it.
        open_BD = left & ~first
        asked = open_BD if decoder.config.target == "same" else torch.roll(open_BD, -1, 1) & decoder.valid_BD
        if waiting is None and not bool(open_BD.any()):
            break
        read = decoder.block_piece(noisy=1) if bool(open_BD.any()) else None
        everything = None if waiting is None else Places.last_of(waiting.rows)
        wanted = None if read is None else Places.of(asked, int(asked.sum()))
        of_known, logits = decoder.forward(waiting, read, everything, wanted)
        ids = decoder.ids_BD.clone()
        if waiting is not None:
            following = pick(of_known).ids
            ids = torch.where(first, following[:, None], ids)
            left = left & ~first
        chosen = torch.zeros_like(left)
        if read is not None:
            prediction = pick(logits)
            confidence = torch.zeros(left.shape, device=left.device)
            ids[open_BD], confidence[open_BD] = prediction.ids, prediction.confidence
            quota = torch.minimum(rule.quota(count, step), open_BD.sum(1))
            chosen = settled(rule, quota, open_BD, confidence)
        decoder.ids_BD = torch.where(chosen | (first & (waiting is not None)), ids, decoder.ids_BD)
        left, waiting = left & ~chosen, None
    return decoder.ids_BD


def _check(decoder: BlockDecoder, drafted: torch.Tensor, masked: torch.Tensor, pick: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Commits the drafted tokens as clean ones and forgets those that do not agree.

    Returns:
        bool [B, D], the drafted tokens that are kept; and [B], the token that follows them.
    """
    block = decoder.block_number[:, None].expand_as(drafted)
    piece = Piece(drafted, _clean(decoder, decoder.position_BD, block, masked), None)
    says = torch.zeros_like(drafted)
    says[masked] = pick(decoder.forward(piece, None, Places.of(masked, int(masked.sum())), None)[0]).ids
    agrees = torch.ones_like(masked)
    agrees[:, 1:] = (drafted[:, 1:] == says[:, :-1]) | ~masked[:, :-1]
    kept = masked & (agrees | ~masked).long().cumprod(1).bool()
    assert decoder.layout is not None
    decoder.layout.valid[:, -drafted.shape[1] :] = kept
    last = torch.where(kept, torch.arange(kept.shape[1], device=kept.device), -1).max(1, keepdim=True).values
    return kept, says.gather(1, last.clamp_min(0))[:, 0]


def _go_on(
    decoder: BlockDecoder, drafted: torch.Tensor, kept: torch.Tensor, correction: torch.Tensor, live: torch.Tensor
) -> Piece:
    """Opens the block of the next unknown token, with what is known of it, and returns the last known token. Samples that have
    ended stay where they are, and what goes in for them is no token."""
    position = torch.where(kept, decoder.position_BD, -1).max(1).values + 1  # of the correction
    decoder.ids_BD = torch.where(kept | ~decoder.open_BD, drafted, decoder.config.mask_token_id)
    in_block = (decoder.position_BD == position[:, None]) & live[:, None]
    decoder.ids_BD = torch.where(in_block & decoder.valid_BD, correction[:, None], decoder.ids_BD)
    decoder.open_BD = decoder.open_BD & ~kept & ~in_block
    block = torch.where(position < decoder.end, decoder.block_number, decoder.block_number + 1)
    rows = _clean(decoder, position[:, None], block[:, None], live[:, None])
    known = Piece(correction[:, None], rows, None)
    _next_block(decoder, position, correction, live)
    return known


def _next_block(decoder: BlockDecoder, position: torch.Tensor, correction: torch.Tensor, live: torch.Tensor) -> None:
    """Moves the samples on whose block is full: their next one is all masks, but for a known token that begins it."""
    size = decoder.config.block_size
    full = ~decoder.open_BD.any(1) & live
    while bool(full.any()):
        start = torch.where(full, decoder.end, decoder.start)
        decoder.start, decoder.end = start, torch.where(full, decoder.end + size, decoder.end)
        decoder.block_number = decoder.block_number + full.long()
        place = start[:, None] + torch.arange(size, device=start.device)[None]
        begins = (place == position[:, None]) & full[:, None]
        decoder.position_BD = torch.where(full[:, None], place, decoder.position_BD)
        decoder.valid_BD = decoder.position_BD < decoder.end[:, None]
        decoder.image_BD = torch.where(full[:, None], -1, decoder.image_BD)
        fresh = torch.where(begins, correction[:, None], decoder.config.mask_token_id)
        decoder.ids_BD = torch.where(full[:, None], fresh, decoder.ids_BD)
        decoder.open_BD = torch.where(full[:, None], decoder.valid_BD & ~begins, decoder.open_BD)
        full = ~decoder.open_BD.any(1) & live
