"""Accept or resample: what comes out has the checking weights' own distribution, shown by chi-square on few tokens, seeded."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decode_chats import CHATS
from gated_models import gated_models
from shared_fixtures import Loaded

from diffvl.hub import judge_diffvl
from diffvl.hub.judge_diffvl import Drafts, Judge, Sampling
from diffvl.hub.settings_diffvl import DecodeSettings

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(vocabulary_size=6, mask_token_id=7, image_token_id=7, placeholder_ids=[])
Z = 3.7  # of a chance of 1 in 10,000; the draws are seeded


def most(freedom: int) -> float:
    """The chi-square that is exceeded once in 10,000 times (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + Z * part**0.5) ** 3


def chi_square(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of counts against probabilities [n], over what it may be; outcomes that are rare count together."""
    counts, wanted = found.double(), expected.double() / expected.double().sum() * found.sum()
    often = wanted >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([wanted[often], wanted[~often].sum()[None]])
    if wanted[-1] < 1e-9:  # what may not come at all
        if counts[-1]:
            return float("inf")
        counts, wanted = counts[:-1], wanted[:-1]
    return float(((counts - wanted) ** 2 / wanted).sum()) / most(len(counts) - 1)


def sampling(**settings: Any) -> Sampling:
    return Sampling(DecodeSettings(temperature=0.9, **settings), CPU, CONFIG)


def judged(drawer: Judge, judge: Judge, number: int = 40_000, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Drafts of two places, the verdicts on them, and the distributions [3, V] by which they were judged."""
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5)) * 1.2
    drafts = drawer.drafts(logits[0, None, :2].expand(number, -1, -1))
    drafts = replace(drafts, count_B=torch.full((number,), count))
    verdict = judge.verdict(logits[1, None].expand(number, -1, -1), drafts)
    ids = torch.cat([drafts.ids, torch.zeros(number, 1, dtype=torch.long)], 1)
    ids[torch.arange(number), verdict.accepted_B] = verdict.following_B
    return ids, verdict.accepted_B, judge.sampling.distributions(logits[1]).kept


def worst(ids: torch.Tensor, accepted_B: torch.Tensor, p: torch.Tensor) -> float:
    """The largest chi-square of the places that were reached."""
    found = []
    for place in range(3):
        reached = ids[accepted_B >= place, place]
        if len(reached):
            found.append(chi_square(torch.bincount(reached, minlength=8), p[place]))
    return max(found)


SAMPLINGS: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
def test_what_comes_out_has_the_distribution_of_who_judges(settings: dict[str, Any]):
    """Place by place, whatever was drafted: by another distribution, by the likeliest token, or cut short."""
    judge = Judge(sampling(**settings))
    ids, accepted, p = judged(judge, judge)
    assert worst(ids, accepted, p) < 1 and 0.3 < (accepted > 0).float().mean() < 0.95
    ids, accepted, p = judged(judge, judge, count=1)
    assert worst(ids, accepted, p) < 1 and int(accepted.max()) == 1


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Resampling from p, and a cut at drafts whose own probability is small, which looks at what was drawn."""
    judge = Judge(sampling())
    with monkeypatch.context() as patch:
        patch.setattr(judge_diffvl, "_remaining", lambda p, drafts, accepted: p[torch.arange(len(p)), accepted])
        assert worst(*judged(judge, judge)) > 3
    drafts = judge.drafts

    def cut(logits: torch.Tensor) -> Drafts:
        found = drafts(logits)
        assert found.kept is not None
        own = found.kept.gather(2, found.ids[..., None])[..., 0]
        return replace(found, count_B=(own > 0.25).long().cumprod(1).sum(1))

    monkeypatch.setattr(judge, "drafts", cut)
    number, logits = 40_000, torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5)) * 1.2
    found = judge.drafts(logits[0, None, :2].expand(number, -1, -1))
    verdict = judge.verdict(logits[1, None].expand(number, -1, -1), found)
    first = torch.where(verdict.accepted_B > 0, found.ids[:, 0], verdict.following_B)
    assert chi_square(torch.bincount(first, minlength=8), judge.sampling.distributions(logits[1]).kept[0]) > 3


def test_equal_distributions_keep_every_draft():
    """And greedily what is likeliest is kept; what is never predicted is neither drafted nor drawn."""
    judge = Judge(sampling())
    logits = torch.randn(500, 3, 8, generator=torch.Generator().manual_seed(1))
    verdict = judge.verdict(logits, judge.drafts(logits[:, :2]))
    assert verdict.accepted_B.tolist() == [2] * 500 and int(verdict.following_B.max()) < 6
    greedy = Judge(Sampling(DecodeSettings(), CPU, CONFIG))
    drafts = greedy.drafts(logits[:, :2])
    assert drafts.kept is None and torch.equal(drafts.ids, logits[:, :2, :6].argmax(-1))
    other = replace(drafts, ids=torch.stack([drafts.ids[:, 0], (drafts.ids[:, 1] + 1) % 6], 1))
    verdict = greedy.verdict(logits, other)
    assert verdict.accepted_B.tolist() == [1] * 500 and torch.equal(verdict.following_B, drafts.ids[:, 1])


# --- whole answers --------------------------------------------------------------------------------------------------------------

NEW, WORDS, NUMBER = 3, 5, 1500
WAYS: list[Any] = [
    pytest.param(True, {"draft_length": 2, "top_k": 4}, marks=pytest.mark.slow),
    (True, {"draft_length": 3, "drafting": "separate", "denoising_steps": 2}),
    (True, {"draft_length": 2, "draft_threshold": 0.3, "top_p": 0.9}),
    (False, {"target": "same", "denoising_steps": 2}),
    pytest.param(False, {"target": "shift", "top_k": 4}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def gated(prepared: Callable[[str], Path]) -> Callable[[str], Loaded]:
    return gated_models(prepared)


@pytest.mark.parametrize(("by_gate", "way"), WAYS, ids=str)
def test_sampled_answers_have_the_parents_distribution(
    by_gate: bool, way: dict[str, Any], gated: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
):
    """The joint one of three tokens, from a vocabulary of five, against that of the weights' own causal logits."""
    model, processor = (gated if by_gate else loaded)("llama")
    settings = {name: value for name, value in way.items() if name != "target"} | {"temperature": 1.7}
    if not by_gate:
        model.config.set_decoding("blocks", 4, "causal", "response", way["target"])
    monkeypatch.setattr(model.config, "vocabulary_size", WORDS)
    ids = processor.apply_chat_template(CHATS[3:], tokenize=True, add_generation_prompt=True)["input_ids"]
    output = model.generate(
        ids.expand(NUMBER, -1), mode="speculative", max_new_tokens=NEW, eos_token_id=-1, return_dict_in_generate=True, **settings
    )
    found = output.sequences[:, ids.shape[1] :]
    counts = torch.bincount((found * torch.tensor([WORDS**2, WORDS, 1])).sum(1), minlength=WORDS**NEW)
    rule = Sampling(DecodeSettings(temperature=1.7, top_k=way.get("top_k"), top_p=way.get("top_p")), CPU, model.config)
    answers = torch.tensor(list(itertools.product(range(WORDS), repeat=NEW)))
    logits = model(torch.cat([ids.expand(len(answers), -1), answers], 1)).logits[:, ids.shape[1] - 1 : -1].float()
    kept = rule.distributions(logits.flatten(0, 1)).kept.view(*logits.shape)
    exact = kept.detach().gather(2, answers[..., None])[..., 0].prod(1)
    assert 0.02 < output.drafts.accepted / output.drafts.drafted < 0.98
    assert chi_square(counts, exact) < 1
    assert chi_square(counts, exact.roll(1)) > 1
