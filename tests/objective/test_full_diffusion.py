"""The loss of diffusion language models: answers noised in their place. Against a forward written out, and against its leaks.

Shapes: L tokens of a sample, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TARGETS, batch, sample
from shared_fixtures import Loaded
from torch.nn import functional

from diffvl.config.objectives import FullDiffusionObjective
from diffvl.data.samples import Sample
from diffvl.hub.layout_diffvl import NoisyStream, block_index
from diffvl.objective import losses
from diffvl.objective.losses import Draw, curriculum_state, full_diffusion, measure, measured_sums

HERE = Draw(seed=3, step=2, progress=0.5)
LENGTHS = [(21, 6, 3, 9), (6, 7)]  # prompt, answer, prompt, answer; prompt, answer


def full(**settings: Any) -> FullDiffusionObjective:
    return FullDiffusionObjective.model_validate(settings)


def samples(model: Any) -> list[Sample]:
    return [sample(model.config, lengths, index, image=index == 0) for index, lengths in enumerate(LENGTHS)]


# --- the loss, written out ---------------------------------------------------------------------------------------------------


def plain_loss(model: Any, one: Sample, masked: list[bool], t: list[float], settings: FullDiffusionObjective) -> torch.Tensor:
    """One sample alone: masks in its ids, a dense mask turn by turn, the weighted loss summed over the masked tokens."""
    config = model.config
    turn, turns = 0, []
    for place in range(len(one.ids)):
        turn += place > 0 and one.answer[place - 1] > 0 and one.answer[place] != one.answer[place - 1]
        turns.append(turn)
    ids = torch.tensor([[config.mask_token_id if hit else token for token, hit in zip(one.ids, masked, strict=True)]])
    embeds = model.get_input_embeddings()(ids)
    if one.pixels is not None:
        features = iter(model.image_features(one.pixels["pixel_values"]).flatten(0, 1))
        shown = [next(features) if token == config.image_token_id else embeds[0, place] for place, token in enumerate(one.ids)]
        embeds = torch.stack(shown)[None]
    allowed = torch.tensor([[seen <= own for seen in turns] for own in turns])[None, None]
    position = torch.arange(len(one.ids))[None]
    logits = model.language_model(inputs_embeds=embeds, attention_mask=allowed, position_ids=position).logits[0]
    barred = torch.zeros(logits.shape[-1], dtype=torch.bool)
    barred[[config.mask_token_id, config.image_token_id]] = True
    barred[config.vocabulary_size :] = True
    loss = torch.zeros(())
    for place, hit in enumerate(masked):
        if not hit:
            continue
        own = [other for other in range(len(turns)) if turns[other] == turns[place] and one.answer[other] > 0]
        weight = {"none": 1.0, "1/t": 1 / t[place], "effective": len(own) / sum(masked[other] for other in own)}[settings.weight]
        read = logits[place - (settings.target == "shift")].masked_fill(barred, float("-inf"))
        loss = loss + weight * functional.cross_entropy(read[None], torch.tensor([one.ids[place]]))
    return loss


@pytest.mark.parametrize("weight", ["1/t", "effective", "none"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_the_loss_written_out(target: str, weight: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    model, _ = loaded("llama")
    drawn: list[Any] = []
    noise = losses.noise_blocks

    def recorded(*arguments: Any) -> Any:
        drawn.append(noise(*arguments))
        return drawn[-1]

    monkeypatch.setattr(losses, "noise_blocks", recorded)
    settings = full(target=target, weight=weight)
    both = samples(model)
    with torch.no_grad():
        output = full_diffusion(model, model.config, batch(both), settings, HERE)
        expected = torch.zeros(())
        for row, one in enumerate(both):
            length = len(one.ids)
            masked, t = drawn[0].masked[row, :length].tolist(), drawn[0].p[row, :length].tolist()
            assert any(masked) and not any(hit and not mark for hit, mark in zip(masked, one.answer, strict=True))
            expected = expected + plain_loss(model, one, masked, t, settings)
    torch.testing.assert_close(output.loss, expected, rtol=2e-5, atol=0.0)
    assert output.tokens == sum(map(sum, LENGTHS)), "nothing goes through the trunk twice"
    assert float(output.sums["eligible"]) == 22 and float(output.sums["predicted"]) == float(drawn[0].masked.sum())


# --- leaks -------------------------------------------------------------------------------------------------------------------


def seen_ids(one: Sample, settings: FullDiffusionObjective, model: Any) -> torch.Tensor:
    """The tokens that the model is shown."""
    seen: dict[str, Any] = {}

    def spy(**given: Any) -> Any:
        seen.update(given)
        return model(**given)

    full_diffusion(spy, model.config, batch([one]), settings, HERE)
    return seen["input_ids"]


@torch.no_grad()
def test_a_masked_token_stands_nowhere(loaded: Callable[[str], Loaded]):
    """All answers masked: the model is shown the same whatever they say, so nothing can leak."""
    model, _ = loaded("llama")
    one = samples(model)[1]
    other = Sample(
        [token if not mark else (token + 1) % 250 for token, mark in zip(one.ids, one.answer, strict=True)], one.answer, None, 1
    )
    settings = full(noise={"schedule": "full"})
    shown, again = (seen_ids(which, settings, model) for which in (one, other))
    assert torch.equal(shown, again) and int((shown == model.config.mask_token_id).sum()) == 7


@torch.no_grad()
def test_no_turn_sees_a_later_one_and_a_leak_would_show(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """The second turn changes, and the loss of the first answer stays to the bit; with all tokens in one turn it moves."""
    model, _ = loaded("llama")
    one = sample(model.config, (6, 7, 5, 4), 5)
    answer = [-mark if mark == 2 else mark for mark in one.answer]  # the second answer is context only
    other = [token if place < 13 else (token + 1) % 250 for place, token in enumerate(one.ids)]

    def both() -> list[float]:
        batches = [batch([Sample(ids, answer, None, 5)]) for ids in (one.ids, other)]
        return [float(full_diffusion(model, model.config, given, full(), HERE).loss) for given in batches]

    ours = both()
    assert ours[0] == ours[1] > 0
    monkeypatch.setattr(losses, "block_index", lambda answer, *_: torch.zeros_like(answer))
    leaking = both()
    assert leaking[0] != pytest.approx(leaking[1], rel=1e-4)


@torch.no_grad()
def test_a_prompt_sees_its_noised_answer(loaded: Callable[[str], Loaded]):
    """Attention both ways is what such a model was trained on, and what sets this loss apart from one with blocks."""
    model, _ = loaded("llama")
    one = samples(model)[1]
    layouts: list[Any] = []

    def spy(**given: Any) -> Any:
        layouts.append(given["attention_mask"])
        return model(**given)

    full_diffusion(spy, model.config, batch([one]), full(), HERE)
    assert bool(layouts[0].all())


# --- what belongs to it --------------------------------------------------------------------------------------------------------


def test_one_t_for_each_answer():
    """Blocks are the turns: an answer's tokens share their t, and other answers have others."""
    answer = torch.tensor([[0, 1, 1, 1, 0, 0, 2, 2, 0]])
    turn = block_index(answer, answer.shape[1], "absolute")
    assert turn.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2]]
    position, none = torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.bool)
    stream = NoisyStream(position, position, turn, answer > 0, none, ~none)
    p = losses.noise_blocks(stream, full().noise, 0.0, HERE, torch.tensor([0])).p[0]
    assert len(set(p[1:4].tolist())) == len(set(p[6:8].tolist())) == 1 and p[1] != p[6]


@torch.no_grad()
def test_it_is_measured_and_told(loaded: Callable[[str], Loaded]):
    model, _ = loaded("llama")
    kinds = ("full", "uniform")
    one, other = (measure(model, model.config, [batch(samples(model))], full(noise={"schedule": kind})) for kind in kinds)
    assert sorted(one) == measured_sums(full()) and all(torch.equal(one[name], other[name]) for name in one)
    assert curriculum_state(full(), 0.5) == {}
    beta = full(noise={"schedule": "beta"})
    assert set(curriculum_state(beta, 0.5)) == {"noise_mean", "noise_concentration"}


@torch.no_grad()
def test_a_batch_in_which_nothing_is_masked(loaded: Callable[[str], Loaded]):
    model, _ = loaded("llama")
    one = samples(model)[1]
    output = full_diffusion(model, model.config, batch([Sample(one.ids, [-mark for mark in one.answer], None, 0)]), full(), HERE)
    assert float(output.loss) == 0.0 and float(output.sums["predicted"]) == 0
