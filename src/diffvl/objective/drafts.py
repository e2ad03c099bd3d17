"""Drafts of a frozen parent's answers, which its gated adapters learn (lossless conversion; after arXiv 2507.11851).

A draft is [last known token | D masks]. The mask at position p stands for the token there and says the one after it, as the
parent's own row at p would (target "shift"); so the first token of a draft is the parent's own word, and costs no mask. A draft
may begin anywhere in an answer: every clean token is a block of its own, a draft's block is its first position, and drafts have
copy numbers, so that `Layout.allowed` holds as it stands, also where drafts overlap.

The clean tokens hold nothing that trains. In two forwards they go first, without a graph, and the drafts see their keys and
values; in one forward the gate keeps adapters off them. Both give the same numbers. What the parent says at the place of a mask
comes from the clean tokens of the same step, and is the target, or a part of it.

Shapes: S samples, L clean length, K drafts of D masks, R = K D; packed into B rows of C clean and N noisy tokens; M masks that
carry loss, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from diffvl.attention.block_mask import training_masks
from diffvl.config.objectives import DraftObjective
from diffvl.data.samples import IGNORED, Batch
from diffvl.hub.configuration_diffvl import DiffVLConfig, never_predicted
from diffvl.hub.layout_diffvl import Layout, NoisyStream, clean_layout
from diffvl.hub.masks_diffvl import attention_masks
from diffvl.objective.packing import Packed
from diffvl.objective.streams import Draw, LossOutput, clean_rope, mark_spans, packed_rows, scores_dtype, shown_images
from diffvl.seeding import sample_generator

# predicted: masks that carry loss. agreed: those that say what the parent says. drafts, and accepted: masks of a draft before the
# first that does not agree. cost: the loss of the masks, each counted once.
DRAFT_SUMS = ("accepted", "agreed", "cost", "drafts", "predicted")

Judge = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Drafts:
    """The masks of a batch's drafts. stream: as of noised blocks; `eligible` are those that carry loss. number, place [S, R]: of
    the draft, from 1, and of the mask in it, from 0. size: D."""

    stream: NoisyStream
    number: torch.Tensor
    place: torch.Tensor
    size: int

    @property
    def layout(self) -> Layout:
        stream = self.stream
        nothing = torch.zeros_like(stream.position)
        return Layout(stream.position, stream.block, self.number, stream.valid, nothing, "causal")


def draft(model: Any, config: DiffVLConfig, batch: Batch, objective: DraftObjective, draw: Draw) -> LossOutput:
    """Computes what the masks of drafts cost: the divergence from the parent's distribution at their places, the cross-entropy of
    the data there, or a mixture. Of each sample it is the mean over its masks, weighted by place, times its answer tokens."""
    # 1. Where drafts begin, and who sees whom.
    size = objective.block_size_at(draw.progress)
    drafts = placed_drafts(batch["answer_index"], size, objective.drafts, draw, batch["sample"])
    pass_ = _Pass.of(model, config, batch, drafts)
    # 2. The masks that carry loss, each with the clean token at its place, and the token that follows in the data.
    sample, column = drafts.stream.eligible.nonzero(as_tuple=True)
    position = drafts.stream.position[sample, column]
    pairs = pass_.pairs(sample, column, position)
    following = batch["input_ids"][sample, position + 1]
    # 3. The forwards; logits are judged chunk by chunk.
    judge = _judge(config, objective, following)
    judged = pass_.in_two(pairs, judge) if objective.forwards == "two" else pass_.in_one(pairs, judge)
    cost, agreed = judged[:, 0], judged[:, 1]
    # 4. The weighted sum, and what is counted.
    weights = objective.decay ** drafts.place[sample, column].to(cost.dtype)
    whole = torch.zeros(len(batch["sample"]), dtype=cost.dtype, device=cost.device).index_add_(0, sample, weights)
    answers = (batch["labels"] != IGNORED).sum(1).to(cost.dtype)
    loss = (cost * weights * (answers / whole.clamp_min(1e-9))[sample]).sum()
    agrees_SR = torch.zeros(drafts.place.shape, device=cost.device).index_put_((sample, column), agreed.detach().float())
    eligible_SKD = drafts.stream.eligible.unflatten(1, (-1, size))
    sums = {
        "predicted": drafts.stream.eligible.sum(),
        "agreed": agreed.detach().sum(),
        "drafts": eligible_SKD.any(-1).sum(),
        "accepted": agrees_SR.unflatten(1, (-1, size)).cumprod(-1).sum(),
        "cost": cost.detach().sum(),
    }
    return LossOutput(loss, int(batch["valid"].sum()) + int(drafts.stream.valid.sum()), sums)


def draft_rates(sums: dict[str, float]) -> dict[str, float]:
    """Computes the figures of a log line: mean loss of a mask, how many masks agree with the parent, and how many of a draft do
    before the first that does not."""
    predicted, drafts = max(sums["predicted"], 1.0), max(sums["drafts"], 1.0)
    return {
        "draft_loss": sums["cost"] / predicted,
        "draft_agreement": sums["agreed"] / predicted,
        "draft_accepted": sums["accepted"] / drafts,
    }


def placed_drafts(answer: torch.Tensor, size: int, count: int, draw: Draw, samples: torch.Tensor) -> Drafts:
    """Draws where drafts begin, each sample from its own generator: up to `count` different tokens of its answers that have
    another one after them. A mask behind the end of its answer carries no loss. A sample without such a token gets a draft that
    carries none, so that every step is one for every process.

    Args:
        answer: [S, L], see `block_index`. samples: dataset indices [S].
    """
    follows = torch.zeros_like(answer, dtype=torch.bool)
    follows[:, :-1] = (answer[:, :-1] > 0) & (answer[:, 1:] == answer[:, :-1])
    starts = []
    for line, sample in zip(follows.cpu(), samples.tolist(), strict=True):
        able = line.nonzero()[:, 0]
        order = torch.randperm(len(able), generator=sample_generator(draw.seed, draw.step, sample))
        starts.append(able[order[:count]].sort().values if len(able) else torch.zeros(1, dtype=torch.long))
    start_SK = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True, padding_value=-1).to(answer.device)
    place = torch.arange(size, device=answer.device).repeat(start_SK.shape[1]).expand(len(answer), -1)
    block = start_SK.repeat_interleave(size, 1)
    valid = block >= 0
    block = block.clamp_min(0)
    number = torch.arange(1, start_SK.shape[1] + 1, device=answer.device).repeat_interleave(size).expand_as(block)
    position = block + place
    own = answer.gather(1, block)
    inside = position.clamp_max(answer.shape[1] - 1)
    in_answer = (answer.gather(1, inside) == own) & (position == inside) & (own > 0)
    eligible = valid & in_answer & follows.gather(1, inside)
    # Behind an answer positions count on from its last token, as in decoding, whatever the next turn has there.
    last = torch.where(in_answer, position, -1).unflatten(1, (-1, size)).amax(-1).repeat_interleave(size, 1)
    source = torch.where(in_answer, position, last.clamp_min(0))
    stream = NoisyStream(source, position, block, eligible, torch.zeros_like(valid), valid)
    return Drafts(stream, number, place, size)


@dataclass(frozen=True)
class _Pass:
    """A batch as it goes through the trunk: clean tokens [B, C], and behind them the masks [B, N]."""

    model: Any
    config: DiffVLConfig
    batch: Batch
    clean: Packed
    noisy: Packed
    clean_inputs: dict[str, torch.Tensor]
    noisy_inputs: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any, config: DiffVLConfig, batch: Batch, drafts: Drafts) -> "_Pass":
        ids, stream = batch["input_ids"], drafts.stream
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        layout = clean_layout(index, batch["valid"], "causal")
        mark_spans(layout, batch, config)
        rope = clean_rope(model, config, batch)
        clean, noisy = packed_rows(layout, batch["row"], config), packed_rows(drafts.layout, batch["row"], config)
        masks = torch.full_like(stream.position, config.mask_token_id)
        clean_inputs = {
            "input_ids": clean.moved(ids, 0),
            "image_index": clean.moved(shown_images(config, batch), -1),
            "position_ids": clean.moved(rope.at(layout.position), 0),
        }
        noisy_inputs = {
            "input_ids": noisy.moved(masks, 0),
            "image_index": noisy.moved(torch.full_like(masks, -1), -1),
            "position_ids": noisy.moved(rope.of_stream(stream), 0),
        }
        return cls(model, config, batch, clean, noisy, clean_inputs, noisy_inputs)

    @property
    def layout(self) -> Layout:
        return self.clean.layout.joined(self.noisy.layout)

    @property
    def dtype(self) -> torch.dtype:
        return scores_dtype(self.model, self.batch["input_ids"].device.type)

    def pairs(self, sample: torch.Tensor, column: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Places of masks and of the clean tokens at their positions, in the flattened rows of both, [M, 2]."""
        clean, noisy = self.clean.layout.valid.shape[1], self.noisy.layout.valid.shape[1]
        at_mask, at_clean = self.noisy.place[sample, column], self.clean.place[sample, position]
        row = torch.div(at_mask, noisy, rounding_mode="floor")
        return torch.stack([row * (clean + noisy) + clean + at_mask % noisy, row * (clean + noisy) + at_clean % clean], 1)

    def in_one(self, pairs: torch.Tensor, judge: Judge) -> torch.Tensor:
        """Judges pairs after one forward of clean tokens and masks, with the gate open for the masks."""
        both = {name: torch.cat([value, self.noisy_inputs[name]], -1) for name, value in self.clean_inputs.items()}
        layout = self.layout
        return self.model(
            **both,
            **self.batch.get("pixels", {}),
            attention_mask=training_masks(self.config.text_config, layout, self.dtype),
            noisy=layout.noisy.bool(),
            logits_rows=pairs,
            row_map=judge,
        ).logits

    def in_two(self, pairs: torch.Tensor, judge: Judge) -> torch.Tensor:
        """Judges pairs after a forward of the clean tokens, without adapters and without a graph, and one of the masks."""
        text_config, layout = self.config.text_config, self.layout
        length = self.clean.layout.valid.shape[1]
        with torch.no_grad():
            seen = self.model(
                **self.clean_inputs,
                **self.batch.get("pixels", {}),
                attention_mask=attention_masks(text_config, self.clean.layout, slice(None), self.dtype),
                past_key_values=DynamicCache(),
                use_cache=True,
                keep_states=True,
            )
        return self.model(
            **self.noisy_inputs,
            attention_mask=attention_masks(text_config, layout, slice(length, None), self.dtype),
            past_key_values=seen.past_key_values,
            store_kv=False,
            text_only=True,
            noisy=self.noisy.layout.valid,
            earlier_states=seen.hidden_states[0],
            logits_rows=pairs,
            row_map=judge,
        ).logits


def _judge(config: DiffVLConfig, objective: DraftObjective, following_M: torch.Tensor) -> Judge:
    """Makes what turns the logits of masks and of the clean tokens at their places, [m, 2, V], into (cost, agrees with the
    parent), [m, 2]."""

    def judge(logits_m2V: torch.Tensor, which: slice) -> torch.Tensor:
        forbidden = never_predicted(config, logits_m2V.shape[-1], logits_m2V.device)
        scores = logits_m2V.float().masked_fill(forbidden, float("-inf"))
        says, parent = scores[:, 0], scores[:, 1].detach()
        cost = torch.zeros_like(says[:, 0])
        if objective.parent_weight > 0:
            wanted, given = parent.log_softmax(-1), says.log_softmax(-1)
            # What may never be predicted has no probability in either: its part is nothing, and no number by arithmetic.
            parts = wanted.exp() * torch.where(forbidden, 0.0, wanted - given)
            cost = cost + objective.parent_weight * parts.sum(-1)
        if objective.parent_weight < 1:
            entropy = functional.cross_entropy(says, following_M[which], reduction="none")
            cost = cost + (1 - objective.parent_weight) * entropy
        agrees = says.detach().argmax(-1) == parent.argmax(-1)
        return torch.stack([cost, agrees.to(cost.dtype)], -1)

    return judge
