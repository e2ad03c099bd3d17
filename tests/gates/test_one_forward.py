"""The invariants of one forward (docs/architecture.md, "What always holds"): AR parity, no leak, layout equivalence.

Train = decode is in test_train_is_decode.py, whole training runs are in test_training_runs.py, export is in test_export.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import CONTEXTS, GRIDS, ORDINARY, TARGETS, batch, crossed, objective, pairwise, sample, tiled_sample
from shared_fixtures import TILED, Loaded
from transformers import AutoModelForCausalLM

from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.data.samples import Sample
from diffvl.demo.standins import TRUNKS, WINDOW
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.layout_diffvl import Layout, NoisyStream, block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.hub.masks_diffvl import attention_masks
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.objective.losses import Corruption, Draw, block_diffusion, corrupt

Model = DiffVLForConditionalGeneration

# --- 1. AR parity ----------------------------------------------------------------------------------------------------------


def kept_rows(model: Model, rows: int) -> list[int]:
    """Rows of the source's head that preparation may not touch: all but those it gave to the mask and the image token."""
    return [row for row in range(rows) if row not in (model.config.mask_token_id, model.config.image_token_id)]


@pytest.mark.parametrize("model_type", TRUNKS)
@torch.no_grad()
def test_ar_parity(model_type: str, source: Callable[[str], Path], loaded: Callable[[str], Loaded]):
    """Whatever form the causal mask takes, and whatever blocks are around, the logits are the source checkpoint's."""
    model, _ = loaded(model_type)
    stock = AutoModelForCausalLM.from_pretrained(source(model_type)).eval()
    ids = torch.randint(0, ORDINARY, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    expected = stock(input_ids=ids).logits
    kept = kept_rows(model, expected.shape[-1])
    layout = clean_layout(torch.arange(ids.shape[1]).expand_as(ids) // 4, valid, context="causal")
    given: dict[str, dict] = {
        "no mask": {},
        "2-D": {"attention_mask": valid.long()},
        "3-D": {"attention_mask": torch.ones(2, 30, 30).tril()},
        "a layout's": {
            "attention_mask": attention_masks(model.config.text_config, layout, slice(None), torch.float32),
            "position_ids": layout.position,
        },
    }
    for form, arguments in given.items():
        logits = model(ids, **arguments).logits
        torch.testing.assert_close(
            logits[..., kept], expected[..., kept], rtol=1e-5, atol=2e-5, msg=lambda text, form=form: f"{form}: {text}"
        )


@pytest.mark.parametrize(("model_type", "side"), crossed(["left", "right"]))
@torch.no_grad()
def test_ar_parity_with_padding(model_type: str, side: str, source: Callable[[str], Path], loaded: Callable[[str], Loaded]):
    model, _ = loaded(model_type)
    stock = AutoModelForCausalLM.from_pretrained(source(model_type)).eval()
    ids = torch.randint(0, ORDINARY, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(None, 7) if side == "left" else slice(-7, None)] = 0
    position = (mask.cumsum(1) - 1).clamp_min(0)  # as the stock `generate` gives them
    logits = model(ids, attention_mask=mask).logits
    expected = stock(input_ids=ids, attention_mask=mask, position_ids=position).logits
    text, kept = mask.bool(), kept_rows(model, expected.shape[-1])
    torch.testing.assert_close(logits[text][:, kept], expected[text][:, kept], rtol=1e-5, atol=2e-5)
    # The padded row is the same text as without padding: what is padded does not count as text.
    alone = stock(input_ids=ids[1:, text[1]]).logits[0]
    torch.testing.assert_close(logits[1, text[1]][:, kept], alone[:, kept], rtol=1e-5, atol=5e-5)


# --- 2. no leak ------------------------------------------------------------------------------------------------------------

SEVERAL_BLOCKS = (9, 7, 6, 9)  # prompt, answer, prompt, answer: cut inside blocks of 4 on either grid, longer than the window


class LeakyLayout(Layout):
    """The bug: `<=` for `<`, so that a noisy token sees the clean copy of its own block."""

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        own_block = self.block[:, None, :] == self.block[:, queries, None]
        noisy = self.noisy.bool()
        leak = own_block & noisy[:, queries, None] & ~noisy[:, None, :] & self.valid[:, None, :]
        if window is not None:
            leak = leak & (self.position[:, None, :] > self.position[:, queries, None] - window)
        return super().allowed(queries, window, chunk) | leak


@dataclass
class Streams:
    """Both streams of one sample, every second eligible token masked; ids [1, L + R], a row per variant is made of it."""

    model: Model
    layout: Layout
    ids: torch.Tensor
    clean: int

    @property
    def noisy_blocks(self) -> list[int]:
        return self.layout.block[0, self.clean :].unique().tolist()

    def rows_of(self, block: int, noisy: bool) -> torch.Tensor:
        """bool [T]: the tokens of a block in one of the streams."""
        return (self.layout.block[0] == block) & (self.layout.noisy[0] == noisy)

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V]; all rows have the same layout."""
        batch_size = len(ids_BT)
        rows = {name: row.expand(batch_size, -1) for name, row in self.layout.rows.items()}
        layout = replace(self.layout, **rows)
        masks = attention_masks(self.model.config.text_config, layout, slice(None), torch.float32)
        with torch.no_grad():
            return self.model(ids_BT, attention_mask=masks, position_ids=layout.position).logits

    def change(self, *where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits before and after other tokens stand at `where` (bool [T], one variant each), both [variants, T, V]."""
        before = self.ids.expand(len(where), -1)
        other = (before + 1) % ORDINARY
        return self.logits(before), self.logits(torch.where(torch.stack(where), other, before))


def streams(model: Model, context: str, grid: str, kind: type[Layout] = Layout) -> Streams:
    one = batch([sample(model.config, SEVERAL_BLOCKS)])
    block = block_index(one["answer_index"], 4, grid)
    stream = noisy_stream(one["answer_index"], block, 4, grid)
    layout = clean_layout(block, one["valid"], context).joined(noisy_layout(stream, context))
    noisy = one["input_ids"].gather(1, stream.source)
    masked = stream.eligible & (torch.arange(noisy.shape[1]) % 2 == 0)
    noisy = noisy.masked_fill(masked, model.config.mask_token_id)
    ids = torch.cat([one["input_ids"], noisy], 1)
    return Streams(model, kind(**vars(layout)), ids, one["input_ids"].shape[1])


def leak(two: Streams) -> float:
    """How far the noisy logits of a block move when the clean tokens of that block and of all later ones change."""
    position = torch.arange(two.ids.shape[1])
    later = [(two.layout.block[0] >= block) & (position < two.clean) for block in two.noisy_blocks]
    before, after = two.change(*later)
    moved = (after - before).abs()
    own = torch.stack([two.rows_of(block, noisy=True) for block in two.noisy_blocks])
    assert own.any(1).all()
    return float(moved[own].max())


@pytest.mark.parametrize(("model_type", "context", "grid"), pairwise(TRUNKS, CONTEXTS, GRIDS))
def test_no_leak_and_the_bug_is_caught(model_type: str, context: str, grid: str, loaded: Callable[[str], Loaded]):
    model, _ = loaded(model_type)
    assert leak(streams(model, context, grid)) == 0.0
    assert leak(streams(model, context, grid, LeakyLayout)) > 0.1


@pytest.mark.parametrize(("model_type", "context", "grid"), crossed(CONTEXTS, GRIDS))
def test_who_sees_whom(model_type: str, context: str, grid: str, loaded: Callable[[str], Loaded]):
    """A noisy block sees earlier clean blocks and itself both ways, no other noisy block; clean tokens see no noisy one."""
    two = streams(loaded(model_type)[0], context, grid)
    blocks = two.noisy_blocks
    assert len(blocks) >= 4

    def edge(block: int, last: bool) -> torch.Tensor:
        places = two.rows_of(block, noisy=True).nonzero()[:, 0]
        return torch.arange(two.ids.shape[1]) == places[-1 if last else 0]

    for number, block in enumerate(blocks):
        variants = (edge(block, last=True), edge(block, last=False), two.rows_of(block - 1, noisy=False))
        before, after = two.change(*variants)
        moved = (after - before).abs().amax(-1)
        assert moved[0, edge(block, last=False)] > 1e-3, "the first token of a block does not see its last"
        assert moved[1, edge(block, last=True)] > 1e-3, "the last token of a block does not see its first"
        assert (moved[2, two.rows_of(block, noisy=True)] > 1e-3).all(), "a noisy block does not see the clean block before it"
        assert (moved[:2, : two.clean] == 0.0).all(), "a clean token sees a noisy one"
        others = [other for place, other in enumerate(blocks) if place != number]
        for other in others:
            assert (moved[:2, two.rows_of(other, noisy=True)] == 0.0).all(), "a noisy block sees another noisy block"


@pytest.mark.parametrize(("model_type", "context"), crossed(CONTEXTS))
def test_clean_tokens_see_their_context(model_type: str, context: str, loaded: Callable[[str], Loaded]):
    """`causal`: nothing later. `block`: the rest of the own block, and nothing behind it."""
    two = streams(loaded(model_type)[0], context, "absolute")
    middle = 5  # the second token of the second block
    position = torch.arange(two.ids.shape[1])
    before, after = two.change(position == middle + 1, (position > 7) & (position < two.clean))
    moved = (after - before).abs().amax(-1)
    assert (moved[0, middle] > 1e-3) == (context == "block")
    assert (moved[1, :8] == 0.0).all()


@pytest.mark.parametrize(("model_type", "context"), crossed(CONTEXTS))
def test_packed_documents_are_isolated(model_type: str, context: str, loaded: Callable[[str], Loaded]):
    """Two samples in one row give the logits that each gives alone, and neither moves with the other."""
    one = streams(loaded(model_type)[0], context, "absolute")
    other = replace(one, ids=torch.where(one.ids < ORDINARY, (one.ids + 3) % ORDINARY, one.ids))
    clean, total = slice(0, one.clean), one.ids.shape[1]

    def part(layout: Layout, places: slice, document: int) -> Layout:
        rows = {name: row[:, places] for name, row in layout.rows.items()}
        return layout.with_rows({**rows, "document": rows["document"] + document})

    noisy = slice(one.clean, total)
    layout = part(one.layout, clean, 0).joined(part(other.layout, clean, 1))
    layout = layout.joined(part(one.layout, noisy, 0)).joined(part(other.layout, noisy, 1))
    ids = torch.cat([one.ids[:, clean], other.ids[:, clean], one.ids[:, noisy], other.ids[:, noisy]], 1)
    packed = Streams(one.model, layout, ids, 2 * one.clean)
    logits = packed.logits(ids)[0]
    for document, alone in enumerate((one, other)):
        expected = alone.logits(alone.ids)[0]
        torch.testing.assert_close(logits[layout.document[0] == document], expected, rtol=1e-4, atol=5e-5)
    before, after = packed.change(layout.document[0] == 0)
    moved = (after - before).abs().amax(-1)[0]
    assert (moved[layout.document[0] == 1] == 0.0).all()
    assert (moved[layout.document[0] == 0] > 0.0).all()


# --- 3. layout equivalence -------------------------------------------------------------------------------------------------
# Here nothing comes from Layout: blocks, rows, mask and loss are written out again, token by token, from the rule in
# docs/architecture.md.


@dataclass(frozen=True)
class Token:
    """id: what the model reads; truth: what it should predict. weight: of this token's cross-entropy, 0 where it has none."""

    id: int
    truth: int
    position: int
    block: int
    noisy: bool
    answer: bool
    weight: float = 0.0


def plain_blocks(answer: list[int], block_size: int, grid: str) -> tuple[list[int], list[int]]:
    """Block of every token, and where the grid cell ends in which it lies."""
    blocks, ends = [0], []
    origin = 0
    for place, number in enumerate(answer):
        if place:
            ended = answer[place - 1] != 0 and number != answer[place - 1]
            begins = grid == "response" and number != answer[place - 1]
            if grid == "response" and (ended or begins):
                origin = place
            new = ended or begins or (place - origin) % block_size == 0
            blocks.append(blocks[-1] + new)
        ends.append(origin + ((place - origin) // block_size + 1) * block_size)
    return blocks, ends


def two_streams(one: Sample, mask_id: int, settings: BlockDiffusionObjective, drawn: dict) -> list[Token]:
    """All clean tokens, then a noisy copy of every block. `drawn`: (block, position) -> (masked, t)."""
    blocks, ends = plain_blocks(one.answer, settings.block_size, settings.grid)
    clean = [
        Token(token, token, place, blocks[place], noisy=False, answer=number > 0)
        for place, (token, number) in enumerate(zip(one.ids, one.answer, strict=True))
    ]
    noisy: list[tuple[Token, bool]] = []  # with: is a padding stop
    for place, token in enumerate(clean):
        noisy.append((replace(token, noisy=True), False))
        if token.answer and [*one.answer, 0][place + 1] != one.answer[place]:
            stops = range(place + 1, ends[place])
            noisy += [(replace(token, noisy=True, position=position), True) for position in stops]
    weighted = []
    for token, is_stop in noisy:
        masked, t = drawn[token.block, token.position] if token.answer else (False, 1.0)
        mates = [drawn[other.block, other.position][0] for other, _ in noisy if other.block == token.block and other.answer]
        ratio = {"1/t": t, "effective": sum(mates) / max(len(mates), 1)}[settings.weight]
        weight = (settings.pad_weight if is_stop else 1.0) / ratio if masked else 0.0
        weighted.append(replace(token, id=mask_id if masked else token.id, weight=weight))
    return clean + weighted


def sees(query: Token, key: Token, context: str, window: int | None) -> bool:
    if window is not None and key.position <= query.position - window:
        return False
    if query.noisy:
        return key.block == query.block if key.noisy else key.block < query.block
    if key.noisy:
        return False
    return key.position <= query.position if context == "causal" else key.block <= query.block


def plain_forward(model: Model, tokens: list[Token], one: Sample, context: str) -> torch.Tensor:
    """Logits [T, V] of the stock trunk under a mask that a double loop writes."""
    config = model.config.text_config

    def mask(window: int | None) -> torch.Tensor:
        allowed = torch.tensor([[sees(query, key, context, window) for key in tokens] for query in tokens])[None, None]
        if config._attn_implementation == "sdpa":
            return allowed
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    masks = {"gemma2": lambda: {"full_attention": mask(None), "sliding_attention": mask(WINDOW)}, "mistral": lambda: mask(WINDOW)}
    ids = torch.tensor([[token.id for token in tokens]])
    embeds = model.get_input_embeddings()(ids)
    if one.pixels is not None:
        places = [place for place, token in enumerate(one.ids) if token == model.config.image_token_id]
        features = model.images.encode(one.pixels).output
        shown = [places.index(token.position) if token.id == model.config.image_token_id else -1 for token in tokens]
        rows = torch.stack([features[row] if row >= 0 else embeds[0, place] for place, row in enumerate(shown)])
        embeds = rows[None]
    position = torch.tensor([[token.position for token in tokens]])
    steering = masks.get(config.model_type, lambda: mask(None))()
    return model.language_model(inputs_embeds=embeds, attention_mask=steering, position_ids=position).logits[0]


def plain_loss(model: Model, one: Sample, settings: BlockDiffusionObjective, drawn: dict) -> torch.Tensor:
    config: DiffVLConfig = model.config
    tokens = two_streams(one, config.mask_token_id, settings, drawn)
    logits = plain_forward(model, tokens, one, settings.context)
    allowed = [v for v in range(config.vocabulary_size) if v not in (config.mask_token_id, config.image_token_id)]
    noisy_place = {(token.block, token.position): place for place, token in enumerate(tokens) if token.noisy}
    loss = torch.zeros(())
    for place, token in enumerate(tokens):
        read, weight = place, token.weight
        if not token.noisy:
            read, weight = place - 1, settings.ar_weight if token.answer else 0.0
        elif settings.target == "shift":
            read = noisy_place.get((token.block, token.position - 1), token.position - 1)
        if weight:
            loss = loss - weight * (logits[read, token.truth] - logits[read, allowed].logsumexp(0))
    return loss


def drawn_for(row: int, stream: NoisyStream, corruption: Corruption) -> dict[tuple[int, int], tuple[bool, float]]:
    """(block, position) -> (masked, t) of the eligible tokens of one sample."""
    places = stream.eligible[row].nonzero()[:, 0].tolist()
    keys = [(int(stream.block[row, place]), int(stream.position[row, place])) for place in places]
    values = [(bool(corruption.masked[row, place]), float(corruption.p[row, place])) for place in places]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, values, strict=True))


@pytest.mark.parametrize(("model_type", "context", "grid", "target"), pairwise(TRUNKS, CONTEXTS, GRIDS, TARGETS))
def test_layout_equivalence(model_type: str, context: str, grid: str, target: str, loaded: Callable[[str], Loaded]):
    """Loss and gradients of the short layout (L + R) are those of the full two-stream form (2L), summed over the samples; of two
    complementary copies, they are the mean of two such forms."""
    model, _ = loaded(model_type)
    samples = [sample(model.config, (21, 6, 3, 9), index=4, image=True), sample(model.config, (6, 7), index=9)]
    require_equal_forms(model, samples, context, grid, target)


@pytest.mark.parametrize(("context", "grid", "target"), [("block", "response", "same"), ("causal", "absolute", "shift")])
def test_layout_equivalence_with_tiles(context: str, grid: str, target: str, loaded: Callable[[str], Loaded]):
    """An image in tiles that are reduced, whose newline has gradients too, and two that are one view each."""
    model, _ = loaded(TILED)
    tiled = tiled_sample(model.config, (50, 6, 3, 9), [(64, 64)], index=4)
    assert tiled.pixels is not None and tiled.pixels["num_tiles"].tolist() == [5]
    require_equal_forms(model, [tiled, tiled_sample(model.config, (40, 7), [(33, 32), (9, 90)], index=9)], context, grid, target)


@pytest.mark.parametrize(("context", "grid", "untrained"), pairwise(CONTEXTS, GRIDS, [1, 2]))
def test_layout_equivalence_where_an_answer_is_not_trained_on(
    context: str, grid: str, untrained: int, loaded: Callable[[str], Loaded]
):
    """In the plain form that answer is context, cut into blocks as any other, and has no weight."""
    model, _ = loaded("llama")
    one = sample(model.config, (21, 6, 3, 9), index=4, image=True)
    marked = replace(one, answer=[-mark if mark == untrained else mark for mark in one.answer])
    require_equal_forms(model, [marked, sample(model.config, (6, 7), index=9)], context, grid, "same")


def require_equal_forms(model: Model, samples: list[Sample], context: str, grid: str, target: str) -> None:
    rest = {"ar_weight": 0.3, "weight": "effective"} if context == "causal" else {"pad_weight": 0.5, "weight": "1/t"}
    variant = {"context": context, "grid": grid, "target": target, "complementary": grid == "response", **rest}
    settings = objective(noise={"schedule": "uniform", "t_min": 0.3, "t_max": 0.95}, **variant)
    both = batch(samples)
    draw = Draw(seed=3, step=2, progress=0.5)
    block = block_index(both["answer_index"], settings.block_size, settings.grid)
    stream = noisy_stream(both["answer_index"], block, settings.block_size, settings.grid)
    copies = corrupt(stream, settings, draw, both["sample"])
    assert copies[0].masked[stream.padding_stop].any(), "the draw must mask a padding stop, or its weight is not tested"
    output = block_diffusion(model, model.config, both, settings, draw)
    plain = torch.stack(
        [
            plain_loss(model, one, settings, drawn_for(row, stream, copy)) / len(copies)
            for row, one in enumerate(samples)
            for copy in copies
        ]
    )
    torch.testing.assert_close(output.loss, plain.sum(), rtol=2e-6, atol=0.0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(plain.sum(), parameters, allow_unused=True)
    loudest = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            # Some gradients are zero in exact arithmetic (key biases of the tower), so rounding counts against the largest.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * loudest, msg=lambda text, name=name: f"{name}: {text}")
