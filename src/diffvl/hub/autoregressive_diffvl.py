"""The modes whose answer is the AR answer of the weights: checked drafts of whole blocks, and plain token by token.

Self-speculation: blocks are drafted by denoising and kept as far as the weights' own causal logits agree. It is for checkpoints
whose clean stream is token-causal, and best with an AR loss on it (`ar_weight`): such a model can check its own drafts, as a
second model does in speculative decoding (arXiv 2211.17192). So the answer is the AR answer of the same weights: greedily token
for token in fp32 (in less precision up to rounding: a check of several tokens rounds otherwise than a step of one), in sampling
in distribution (`judge_diffvl`). A round takes the draft's forwards and one to check it, and gives at least two tokens.

Shapes: B batch, D block size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from .answers_diffvl import BatchAnswers, quota, settled
from .blocks_diffvl import OpenBlock, Piece, Places, clean
from .cache_diffvl import on_every_device
from .configuration_diffvl import never_predicted
from .decoder_diffvl import BlockDecoder
from .judge_diffvl import Drafts, Judge, Sampling
from .settings_diffvl import DecodeSettings

# --- checked drafts ---------------------------------------------------------------------------------------------------------


def speculate(answers: BatchAnswers, settings: DecodeSettings, sampling: Sampling) -> None:
    """Decodes every sample of a batch to its end."""
    decoder, judge = answers.decoder, Judge(sampling)
    decoder.committed.has_gaps = True  # what does not agree stays in the cache as padding
    ended = [False] * len(answers.answers)
    known = _take_in_prompt(decoder)
    while True:
        # 1. Draft: the last known token goes in as a clean one and says the next; the rest of its block is denoised.
        live = ~torch.tensor(ended, device=decoder.device)
        masked = decoder.block.open_BD & live[:, None]
        drafted = _draft(decoder, known, masked, settings, judge)
        answers.note_prediction()
        # 2. Check: the drafted tokens go in as clean ones, and each must be what the one before it says.
        kept, correction = _check(decoder, drafted, masked, judge)
        # 3. What agreed and the first correction are final.
        ids = drafted.ids
        for sample in range(len(ended)):
            if not ended[sample]:
                final = [*ids[sample][kept[sample]].tolist(), int(correction[sample])]
                answers.note_drafts(sample, int(masked[sample].sum()) - 1, len(final) - 2)  # the first is no guess
                ended[sample] = answers.extend(sample, final)
        if all(ended):
            return
        live = ~torch.tensor(ended, device=decoder.device)
        known = _go_on(decoder, ids, kept, correction, live)


def _take_in_prompt(decoder: BlockDecoder) -> Piece:
    """Commits the prompt but for its last token, which is returned; raises ValueError where there is none."""
    prompt, context = decoder.prompt, decoder.config.context
    length, has_images = prompt.length_B, decoder.counts.image_tokens > 0
    if decoder.counts.has_empty:
        raise ValueError("mode='speculative' goes on from a prompt, but one is empty")
    before = int(length.max()) - 1
    if before:
        valid = torch.arange(before, device=decoder.device)[None] < length[:, None] - 1
        decoder.forward(prompt.beginning(before, valid, context, has_images), None, None, None)
    last = length[:, None] - 1
    layout = clean(last, prompt.block.gather(1, last), torch.ones_like(last, dtype=torch.bool), context)
    image_index = prompt.image_index.gather(1, last) if has_images else None
    layout.span = None if prompt.span is None else prompt.span.gather(1, last)
    return Piece(prompt.ids.gather(1, last), layout, prompt.rope.at(last), image_index)


@dataclass
class _Drafted:
    """ids: tokens for the masked places of a block, [B, D]; the first of each sample is final, as its known token says it. kept:
    in sampling, the distributions that the others were drawn from, [B, D, V]."""

    ids: torch.Tensor
    kept: torch.Tensor | None = None

    def note(self, where: torch.Tensor, kept: torch.Tensor | None) -> None:
        """Notes the distributions [n, V] of the places that are True in `where`."""
        if kept is None:
            return
        if self.kept is None:
            self.kept = kept.new_zeros(*where.shape, kept.shape[-1])
        self.kept[where] = kept


def _draft(decoder: BlockDecoder, known: Piece, masked: torch.Tensor, settings: DecodeSettings, judge: Judge) -> _Drafted:
    """Tokens for the masked places. In sampling they settle from the left: only then is each drawn from the distribution that it
    is judged by, whatever the others became."""
    steps = settings.denoising_steps
    assert steps is not None
    order = settings if judge.sampling.is_greedy else replace(settings, remasking="sequential")
    first = masked & (masked.long().cumsum(1) == 1)
    waiting: Piece | None = known
    left, count = masked.clone(), masked.sum(1) - 1
    drafted = _Drafted(decoder.block.ids_BD)
    for step in range(steps):
        # A shifted target is read at the token before; the first masked token needs none, the causal logits have it.
        open_BD = left & ~first
        same = decoder.config.target == "same"
        asked = open_BD if same else torch.roll(open_BD, -1, 1) & decoder.block.valid_BD
        if waiting is None and not bool(open_BD.any()):
            break
        read = decoder.block.piece(decoder.config.context, noisy=1) if bool(open_BD.any()) else None
        at_known = None if waiting is None else Places.last_valid(waiting.layout)
        wanted = None if read is None else Places.true_in(asked, int(asked.sum()))
        of_known, logits = decoder.forward(waiting, read, at_known, wanted)
        ids = decoder.block.ids_BD.clone()
        if waiting is not None:
            ids = torch.where(first, judge.drafts(of_known[:, None]).ids, ids)
            left = left & ~first
        chosen = torch.zeros_like(left)
        if read is not None:
            found = judge.drafts(logits[None])
            confidence = torch.zeros(left.shape, device=left.device)
            ids[open_BD], confidence[open_BD] = found.ids[0], found.certainty[0]
            quota_B = torch.minimum(quota(count, step, steps), open_BD.sum(1))
            chosen = settled(order, quota_B, open_BD, confidence)
            drafted.note(open_BD, None if found.kept is None else found.kept[0])  # those of the last step in which it was open
        ids_BD = torch.where(chosen | (first & (waiting is not None)), ids, decoder.block.ids_BD)
        decoder.block = replace(decoder.block, ids_BD=ids_BD)
        left, waiting = left & ~chosen, None
    drafted.ids = decoder.block.ids_BD
    return drafted


def _check(decoder: BlockDecoder, drafted: _Drafted, masked: torch.Tensor, judge: Judge) -> tuple[torch.Tensor, torch.Tensor]:
    """Commits the drafted tokens as clean ones and turns those that are not accepted into padding.

    Returns:
        bool [B, D], the drafted tokens that are kept; and [B], the token that follows them.
    """
    ids = drafted.ids
    number, position = decoder.block.number_B[:, None].expand_as(ids), decoder.block.position_BD
    piece = Piece(ids, clean(position, number, masked, decoder.config.context), decoder.prompt.rope.at(position), None)
    places = Places.true_in(masked, int(masked.sum()))
    logits = decoder.forward(piece, None, places, None)[0]
    # From here on each sample's places are counted from its first masked one, which is final already.
    place = torch.arange(ids.shape[1], device=ids.device)
    first_B = masked.long().argmax(1)
    says = logits.new_zeros(*ids.shape, logits.shape[-1])
    says[places.sample, places.place - first_B[places.sample]] = logits
    behind = (first_B[:, None] + place[None, 1:]).clamp_max(ids.shape[1] - 1)
    kept = None if drafted.kept is None else drafted.kept[torch.arange(len(ids), device=ids.device)[:, None], behind]
    guesses = ids.gather(1, behind)
    verdict = judge.verdict(says, Drafts(guesses, torch.zeros_like(guesses).float(), kept, (masked.sum(1) - 1).clamp_min(0)))
    accepted = masked & (place[None] <= (first_B + verdict.accepted_B)[:, None])
    decoder.committed.keep_last(accepted)
    return accepted, verdict.following_B


def _go_on(
    decoder: BlockDecoder, drafted: torch.Tensor, kept: torch.Tensor, correction: torch.Tensor, live: torch.Tensor
) -> Piece:
    """Opens the block of the next unknown token, with what is known of it, and returns the last known token. Samples that have
    ended stay where they are, and what goes in for them is no token."""
    block, mask = decoder.block, decoder.config.mask_token_id
    position = torch.where(kept, block.position_BD, -1).max(1).values + 1  # of the correction
    ids_BD = torch.where(kept | ~block.open_BD, drafted, mask)
    in_block = (block.position_BD == position[:, None]) & live[:, None]
    ids_BD = torch.where(in_block & block.valid_BD, correction[:, None], ids_BD)
    number = torch.where(position < block.end_B, block.number_B, block.number_B + 1)
    layout = clean(position[:, None], number[:, None], live[:, None], decoder.config.context)
    known = Piece(correction[:, None], layout, decoder.prompt.rope.at(position[:, None]), None)
    block = replace(block, ids_BD=ids_BD, open_BD=block.open_BD & ~kept & ~in_block)
    decoder.block = _next_block(block, position, correction, live, decoder.config)
    return known


def _next_block(block: OpenBlock, position: torch.Tensor, correction: torch.Tensor, live: torch.Tensor, config: Any) -> OpenBlock:
    """Moves the samples on whose block is full: their next one is all masks, but for a known token that begins it."""
    size, mask = config.block_size, config.mask_token_id
    full = ~block.open_BD.any(1) & live
    while bool(full.any()):
        start_B, end_B = torch.where(full, block.end_B, block.start_B), torch.where(full, block.end_B + size, block.end_B)
        place = start_B[:, None] + torch.arange(size, device=start_B.device)[None]
        begins = (place == position[:, None]) & full[:, None]
        position_BD = torch.where(full[:, None], place, block.position_BD)
        valid_BD = position_BD < end_B[:, None]
        fresh = torch.where(begins, correction[:, None], mask)
        block = replace(
            block,
            number_B=block.number_B + full.long(),
            start_B=start_B,
            end_B=end_B,
            ids_BD=torch.where(full[:, None], fresh, block.ids_BD),
            position_BD=position_BD,
            valid_BD=valid_BD,
            open_BD=torch.where(full[:, None], valid_BD & ~begins, block.open_BD),
            image_index_BD=torch.where(full[:, None], -1, block.image_index_BD),
            span_BD=None if block.span_BD is None else torch.where(full[:, None], 0, block.span_BD),
        )
        full = ~block.open_BD.any(1) & live
    return block


# --- token by token ---------------------------------------------------------------------------------------------------------


class _Follower(StoppingCriteria):
    """Gives the answers every token as transformers' `generate` makes it, and ends what has ended."""

    def __init__(self, answers: BatchAnswers) -> None:
        self.answers, self.ended = answers, [False] * len(answers.answers)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.answers.note_prediction()
        for sample, token in enumerate(input_ids[:, -1].tolist()):
            self.ended[sample] = self.ended[sample] or self.answers.extend(sample, [token])
        return torch.tensor(self.ended, device=input_ids.device)


def token_by_token(answers: BatchAnswers, settings: DecodeSettings, sampling: Sampling) -> None:
    """transformers' own `generate` on the trunk: one token a forward, the weights' own causal logits, its own cache and sampler
    (`sampling` is not used)."""
    decoder, model = answers.decoder, answers.decoder.model
    if decoder.counts.has_empty:
        raise ValueError("mode='ar' goes on from a prompt, but one is empty")
    prompt, device = decoder.prompt, decoder.device
    length = prompt.ids.shape[1] - 1
    _refuse_answers_in_spans(model.config, prompt)
    # Padded left, as it wants them.
    valid = torch.arange(length, device=device)[None] < prompt.length_B[:, None]
    order = torch.argsort(valid.long(), dim=1, stable=True)
    ids, mask = prompt.ids[:, :length].gather(1, order), valid.gather(1, order)
    trunk, pixels = model.trunk, decoder.committed.pixels
    vocabulary = trunk.get_output_embeddings().weight.shape[0]
    assert settings.eos_token_id is not None
    stops = sorted(token for token in settings.eos_token_id if 0 <= token < vocabulary)  # -1 says "never", and is no token
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _no_habits(trunk):
        torch.manual_seed(settings.seed)
        sequences = trunk.generate(
            **model.images.prompt(ids, pixels, decoder.committed.rows),
            attention_mask=mask.long(),
            max_new_tokens=settings.max_new_tokens,
            do_sample=bool(settings.do_sample),
            eos_token_id=stops,
            pad_token_id=min(stops, default=0),  # of ended samples in a batch; nobody reads it
            suppress_tokens=never_predicted(model.config, vocabulary, torch.device("cpu")).nonzero()[:, 0].tolist(),
            stopping_criteria=[_Follower(answers)],
            **_more_arguments(settings),
        )
    decoder.forwards += sequences.shape[1] - (ids.shape[1] if model.is_native else 0)


@contextmanager
def _no_habits(trunk: Any) -> Iterator[None]:
    """In the block, leaves out what a published checkpoint's `generation_config.json` adds to whatever `generate` is asked for,
    greedy or not (a penalty on repetitions, say): answers follow from the logits, as in every other mode."""
    owner = next(module for module in trunk.modules() if "generation_config" in vars(module))  # below adapters
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = own


def _refuse_answers_in_spans(config: Any, prompt: Any) -> None:
    """Raises ValueError where a source would let earlier answers, and questions before them, see what comes after them."""
    if config.token_types != "answers":
        return
    place = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)[None]
    if bool(((prompt.span == 0) & (place < prompt.length_B[:, None])).any()):
        raise ValueError("mode='ar' takes single questions with this model: its own generate knows no conversations")


def _more_arguments(settings: DecodeSettings) -> dict[str, Any]:
    """What transformers is told only where it is asked for: how to sample, and a cache that never moves."""
    arguments: dict[str, Any] = {}
    if not settings.is_greedy:
        arguments |= {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    if settings.is_static:
        config = settings.compile_config
        arguments |= {
            "cache_implementation": "static",
            "compile_config": None if config is None else on_every_device(config),
            "disable_compile": config is None,
        }
    return arguments
