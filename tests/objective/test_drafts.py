"""Drafts: where they begin, what they see, what they cost; two forwards are one, packed or not, checkpointed or not."""

from typing import Any

import pytest
import torch
from helpers import batch, random_image, sample
from lossless import Prepared, draft_stage, fitted, gradients, largest_difference
from shared_fixtures import Loaded
from torch.nn import functional

from diffvl.config.objectives import DraftObjective
from diffvl.data.samples import Sample
from diffvl.demo.standins import TRUNKS
from diffvl.hub import head_diffvl
from diffvl.hub.configuration_diffvl import never_predicted
from diffvl.objective.drafts import DRAFT_SUMS, placed_drafts
from diffvl.objective.losses import Draw, curriculum_state, loss_of, measure, measured_sums, rates, scores

HERE = Draw(seed=1, step=2, progress=0.5)
# Two answers with a question between them; a short one; one of a single token, behind which nothing is to be drafted.
ANSWERS = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 2, 2, 2], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, -2, -2, 0, 0, 0, 0, 0]])
SAMPLES = torch.tensor([5, 6, 7])


def two_texts(model: Any, row: list[int] | None = None) -> Any:
    """Two rounds in one sample, one in the other; in rows of their own unless `row` says otherwise."""
    texts: Any = batch([sample(model.config, [9, 7, 4, 6], 0), sample(model.config, [5, 12], 1)])
    if row is not None:
        texts["row"] = torch.tensor(row)
    return texts


def trained(model: Any, objective: DraftObjective, given: Any, draw: Draw = HERE) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients of it."""
    output = loss_of(model.train(), model.config, given, objective, draw)
    output.loss.backward()
    return float(output.loss.detach()), gradients(model)


# --- where drafts begin -----------------------------------------------------------------------------------------------------


def test_drafts_begin_at_any_token_of_an_answer_that_has_another_behind_it():
    seen: set[tuple[int, int]] = set()
    for step in range(40):
        drafts = placed_drafts(ANSWERS, 3, 2, Draw(0, step, 0.0), SAMPLES)
        stream = drafts.stream
        assert torch.equal(stream.position, stream.block + drafts.place)
        for number in range(3):
            starts = stream.block[number, stream.valid[number]][::3].tolist()
            assert len(starts) == len(set(starts))  # different places, so that no draft is trained twice
            seen |= {(number, start) for start in starts}
    assert seen == {*((0, place) for place in (1, 2, 3, 7, 8)), (1, 3), (2, 0)}


def test_masks_carry_loss_up_to_the_end_of_their_answer():
    drafts = placed_drafts(ANSWERS, 4, 9, HERE, SAMPLES)
    stream = drafts.stream
    loss = {(int(s), int(stream.block[s, c]), int(stream.position[s, c])) for s, c in stream.eligible.nonzero()}
    expected = {(0, start, at) for start in (1, 2, 3) for at in range(start, 4)}
    assert loss == expected | {(0, 7, 7), (0, 7, 8), (0, 8, 8), (1, 3, 3)}
    assert drafts.number[0].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    # Behind an answer they count on from its last token; the next turn's entry is another token's.
    first = [int(place) for place in stream.source[0, :4]]
    assert (stream.position[0, :4].tolist(), first) == ([1, 2, 3, 4], [1, 2, 3, 4])
    behind = (stream.block[0] == 3).nonzero()[:, 0]
    assert (stream.position[0, behind].tolist(), stream.source[0, behind].tolist()) == ([3, 4, 5, 6], [3, 4, 4, 4])
    # An answer of one token, and one that is not trained on: a draft that carries none.
    assert stream.valid[2].sum() == 4
    assert not stream.eligible[2].any()


def test_a_draw_depends_on_seed_step_and_sample_alone():
    one, other = (placed_drafts(ANSWERS[:1], 2, 2, Draw(0, step, 0.0), SAMPLES[:1]).stream.block for step in (1, 2))
    beside = placed_drafts(ANSWERS, 2, 2, Draw(0, 1, 0.9), SAMPLES).stream.block[:1, : one.shape[1]]
    assert torch.equal(one, beside)
    many = {
        tuple(placed_drafts(ANSWERS[:1], 2, 2, Draw(0, step, 0.0), SAMPLES[:1]).stream.block[0].tolist()) for step in range(9)
    }
    assert len(many) > 1
    assert other.shape == one.shape


# --- two forwards are one ---------------------------------------------------------------------------------------------------


def few(*default: str) -> list[Any]:
    """Trunk types, these by default and the others among the slow tests."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in TRUNKS]


@pytest.mark.parametrize("model_type", few("llama", "gpt2"))
def test_two_forwards_are_one(model_type: str, prepared: Prepared):
    """Also packed into one row, and under gradient checkpointing, which some trunks take without their cache only."""
    model, stage = fitted(prepared(model_type), draft_stage("one"))
    expected, gradient = trained(model, stage.objective, two_texts(model))  # type: ignore[arg-type]
    assert all(".lora_" in name or name == "mask_row" for name in gradient)
    assert len(gradient) == sum(parameter.requires_grad for parameter in model.parameters())
    for settings, row in (("two", None), ("two", [0, 0]), ("one", [0, 0])):
        model, stage = fitted(prepared(model_type), draft_stage(settings))
        loss, other = trained(model, stage.objective, two_texts(model, row))  # type: ignore[arg-type]
        assert loss == pytest.approx(expected, rel=1e-5)
        assert largest_difference(gradient, other) < 2e-5
    for settings in ("one", "auto"):
        model, stage = fitted(prepared(model_type), draft_stage(settings, checkpointed=True))
        assert stage.objective.forwards == ("two" if settings == "auto" and model_type != "gpt2" else "one")  # type: ignore[union-attr]
        loss, other = trained(model, stage.objective, two_texts(model))  # type: ignore[arg-type]
        assert loss == pytest.approx(expected, rel=1e-6)
        assert largest_difference(gradient, other) < 2e-6


def shown(loaded: Loaded) -> Any:
    """Two chats with images in a batch, as a native model encodes them."""
    _, processor = loaded
    samples = []
    for number, text in enumerate(("A red circle and, to the right, 2 blue stars.", "Nothing at all, I think.")):
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        image = random_image(number)
        encoding = processor.encode_chat(chat, sizes=[(image.height, image.width)])
        samples.append(Sample(encoding.ids, encoding.answer, processor.pixels([image], encoding.alone), number, 1))
    return batch(samples)


VLMS = (
    "qwen2_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "gemma3",
    "paligemma",
    "idefics3",
    "smolvlm",
)
SLOW_VLMS = [pytest.param(name, marks=pytest.mark.slow) for name in VLMS]


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.slow), "qwen2_5_vl", *SLOW_VLMS])
def test_two_forwards_are_one_with_images(model_type: str, prepared: Prepared, loaded: Any):
    found = []
    for settings in ("one", "two"):
        model, stage = fitted(prepared(model_type), draft_stage(settings))
        given = shown(loaded(model_type))
        found.append(trained(model, stage.objective, given))  # type: ignore[arg-type]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert largest_difference(found[0][1], found[1][1]) < 2e-5


def test_head_chunks_change_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    model, stage = fitted(prepared("qwen2"), draft_stage())
    expected, gradient = trained(model, stage.objective, two_texts(model))  # type: ignore[arg-type]
    monkeypatch.setattr(head_diffvl, "CHUNK_LOGITS", 3 * 2 * model.config.text_config.vocab_size)
    loss, other = trained(model, stage.objective, two_texts(model))  # type: ignore[arg-type]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert largest_difference(gradient, other) < 1e-6


# --- what a draft sees, and what it costs --------------------------------------------------------------------------------------


def logits_seen(model: Any, objective: DraftObjective, given: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits of each mask that carries loss and of the clean token at its place, [M, 2, V]."""
    found: list[torch.Tensor] = []
    whole = type(model).forward

    def spy(self: Any, *arguments: Any, **named: Any) -> Any:
        if judge := named.get("row_map"):

            def note(logits: torch.Tensor, which: slice) -> torch.Tensor:
                found.append(logits.detach())
                return judge(logits, which)

            named["row_map"] = note
        return whole(self, *arguments, **named)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(model), "forward", spy)
        loss_of(model, model.config, given, objective, HERE)
    return torch.cat(found)


@pytest.mark.parametrize("forwards", ["one", "two"])
def test_a_draft_sees_what_is_known_when_it_is_made(forwards: str, prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    """A token changes the drafts that begin behind it, and none that begin at it or before: these are to say it."""
    model, stage = fitted(prepared("llama"), draft_stage(forwards, drafts=20))
    objective: Any = stage.objective
    one, other = two_texts(model), two_texts(model)
    at = 12  # in the first answer of the first sample
    other["input_ids"][0, at] = (other["input_ids"][0, at] + 1) % 50
    drafts = placed_drafts(one["answer_index"], 4, 20, HERE, one["sample"])
    line, column = drafts.stream.eligible.nonzero(as_tuple=True)
    behind = (line == 0) & (drafts.stream.block[line, column] > at)
    moved = (logits_seen(model, objective, one, monkeypatch) - logits_seen(model, objective, other, monkeypatch))[:, 0].abs()
    assert float(moved[~behind].max()) < 1e-5
    assert float(moved[behind].amax(-1).min()) > 1e-3
    assert behind.any()
    assert (~behind & (line == 0)).any()


@pytest.mark.parametrize("forwards", ["one", "two"])
def test_the_target_is_the_parents_own_distribution(
    forwards: str, prepared: Prepared, loaded: Any, monkeypatch: pytest.MonkeyPatch
):
    """The clean token at a mask's place says what the parent says, and nothing of the adapters."""
    model, stage = fitted(prepared("llama"), draft_stage(forwards))
    parent, given = loaded("llama")[0], two_texts(model)
    seen: Any = logits_seen(model, stage.objective, given, monkeypatch)  # type: ignore[arg-type]
    stream = placed_drafts(given["answer_index"], 4, 5, HERE, given["sample"]).stream
    line, column = stream.eligible.nonzero(as_tuple=True)
    with torch.no_grad():
        whole = parent(given["input_ids"], attention_mask=given["valid"].long()).logits
    torch.testing.assert_close(seen[:, 1], whole[line, stream.position[line, column]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parent_weight", [0.0, 0.25, 1.0])
def test_the_cost_is_the_equation(parent_weight: float, prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    model, stage = fitted(prepared("llama"), draft_stage(parent_weight=parent_weight, decay=0.5))
    objective: Any = stage.objective
    given = two_texts(model)
    seen = logits_seen(model, objective, given, monkeypatch)
    drafts = placed_drafts(given["answer_index"], 4, 5, HERE, given["sample"])
    line, column = drafts.stream.eligible.nonzero(as_tuple=True)
    following = given["input_ids"][line, drafts.stream.position[line, column] + 1]
    allowed = ~never_predicted(model.config, seen.shape[-1], seen.device)
    says, parent = seen[:, 0, allowed].double().log_softmax(-1), seen[:, 1, allowed].double().log_softmax(-1)
    kept = allowed.long().cumsum(0) - 1
    divergence = (parent.exp() * (parent - says)).sum(-1)
    entropy = functional.nll_loss(says, kept[following], reduction="none")
    cost = parent_weight * divergence + (1 - parent_weight) * entropy
    weight = 0.5 ** drafts.place[line, column].double()
    answers = (given["answer_index"] > 0).sum(1)
    expected = sum(
        float((cost * weight)[line == number].sum() / weight[line == number].sum() * answers[number]) for number in (0, 1)
    )
    with torch.no_grad():
        output = loss_of(model, model.config, given, objective, HERE)
    assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    sums = {name: float(value) for name, value in output.sums.items()}
    assert sums.keys() == set(DRAFT_SUMS) == set(measured_sums(objective))
    agrees = says.argmax(-1) == parent.argmax(-1)
    assert (sums["predicted"], sums["agreed"], sums["drafts"]) == (len(line), int(agrees.sum()), 10)
    assert rates(sums)["draft_loss"] == pytest.approx(float(cost.sum()) / len(line), rel=1e-5)
    assert scores(sums)["tokens"] == len(line)


def test_accepted_masks_end_with_the_first_that_does_not_agree(prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    """With adapters that add nothing and the parent's own rows in the place of the masks' all agree."""
    model, stage = fitted(prepared("llama"), draft_stage())
    given = two_texts(model)
    whole = type(model).forward
    wrong: list[int] = []

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        if judge := named.get("row_map"):

            def same(logits: torch.Tensor, which: slice) -> torch.Tensor:
                logits = logits[:, 1:].expand(-1, 2, -1).clone()
                for number in wrong:
                    logits[number, 0] = -logits[number, 0]
                return judge(logits, which)

            named["row_map"] = same
        return whole(self, *arguments, **named)

    monkeypatch.setattr(type(model), "forward", forward)
    with torch.no_grad():
        all_agree = loss_of(model, model.config, given, stage.objective, HERE).sums
        wrong.append(1)  # the second mask of the first draft
        one_less = loss_of(model, model.config, given, stage.objective, HERE).sums
    first = int((placed_drafts(given["answer_index"], 4, 5, HERE, given["sample"]).stream.eligible[0, :4]).sum())
    assert float(all_agree["accepted"]) == float(all_agree["predicted"]) == float(all_agree["agreed"])
    assert float(one_less["agreed"]) == float(all_agree["agreed"]) - 1
    assert float(one_less["accepted"]) == float(all_agree["accepted"]) - (first - 1)


def test_draft_length_is_a_curriculum(prepared: Prepared):
    model, stage = fitted(prepared("llama"), draft_stage(block_curriculum={0.0: 1, 0.5: 4}))
    objective: Any = stage.objective
    assert curriculum_state(objective, 0.2) == {"block_size": 1}
    short, long = (loss_of(model, model.config, two_texts(model), objective, Draw(1, 2, share)).sums for share in (0.2, 0.6))
    assert float(short["predicted"]) == float(short["drafts"]) < float(long["predicted"])
    held_out = measure(model, model.config, [two_texts(model)], objective)  # with the length of decoding, whatever the progress
    again = measure(model, model.config, [two_texts(model)], objective.model_copy(update={"block_curriculum": {}}))
    assert held_out == again


def test_a_batch_without_anything_to_draft_is_a_step_like_any_other(prepared: Prepared):
    for forwards in ("one", "two"):
        model, stage = fitted(prepared("llama"), draft_stage(forwards))
        loss, found = trained(model, stage.objective, batch([Sample([1, 2, 3], [0, 0, 1], None, 0)]))  # type: ignore[arg-type]
        assert loss == 0
        assert all(float(gradient.abs().max()) == 0 for gradient in found.values())
