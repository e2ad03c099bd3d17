"""`diffvl bench drafts`: which ways are compared with whom, and what is said of their answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gated_models import LONGEST, gated_model
from tiny_runs import command

from diffvl.bench import answers
from diffvl.decode.answer import Decoder


@pytest.fixture
def tiny(prepared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that loads as a tiny gated model."""
    monkeypatch.setattr(answers, "load_block_decoder", lambda directory, device: Decoder(*gated_model(directory)))
    return prepared("llama")


def test_every_way_gives_the_parents_answers(tiny: Path, shapes: dict[str, Path]):
    words = ("--data", shapes["test"], "--limit", 2, "--lengths", "1,2", "--batch", "1,2", "--max-new-tokens", 6)
    ended = command("bench", "drafts", tiny, *words, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    ways = ["ar", "fused 1", "fused 2", "separate 1", "separate 2", "auto"]
    assert [(row["way"], row["batch"]) for row in found["rows"]] == [(way, batch) for batch in (1, 2) for way in ways]
    for row in found["rows"]:
        assert row["equal"] == row["equal_to_single"] == row["answers"] == 2
        assert row["tokens"] == found["rows"][0]["tokens"] and row["forwards"] > 0
        assert row["way"] not in ("ar", "auto") or row["expected_ratio"] is None
        assert row["way"] == "ar" or len(row["accepted_by_place"]) <= LONGEST
    assert [row["tokens"] for row in found["costs"]][:2] == [1, 2] and all(row["plain_ms"] > 0 for row in found["costs"])
    table = command("bench", "drafts", tiny, *words[:-4], "--batch", 1, "--max-new-tokens", 3, "--precision", "bf16")
    assert table.code == 0 and "fused 2" in table.out and "ms with adapters" in table.out


def test_a_mistake_ends_in_one_message(tiny: Path, shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    ended = command("bench", "drafts", tiny, "--data", shapes["test"], "--lengths", "9")
    assert ended.code == 2 and f"--lengths 9: expected at most {LONGEST}, the longest draft of this checkpoint" in ended.err

    def plain(directory: Path, device: Any) -> Decoder:
        model, processor = gated_model(directory)
        model.gate = None
        return Decoder(model, processor)

    monkeypatch.setattr(answers, "load_block_decoder", plain)
    ended = command("bench", "drafts", tiny, "--data", shapes["test"])
    assert ended.code == 2 and "no gated adapters there; expected a checkpoint of a lossless conversion" in ended.err
