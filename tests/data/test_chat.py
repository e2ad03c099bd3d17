"""Records -> messages and samples: what marks mean in the tokens, and texts that a checkpoint would take for images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from helpers import random_image
from shared_fixtures import Loaded

from diffvl.config.recipe import Data
from diffvl.data.records import Record, Turn
from diffvl.data.samples import encode_record, messages_of, sample_of
from diffvl.data.table import open_records
from diffvl.decode.answer import user_message
from diffvl.errors import DataError, UsageError
from diffvl.evaluation.questions import answer_turns, questions

DRAFTED = (
    Turn("user", "What?"),
    Turn("assistant", "A draft.", trained=False),
    Turn("user", "Again."),
    Turn("assistant", "The answer."),
)


def test_marks_of_an_untrained_answer_are_negative(loaded: Callable[[str], Loaded]) -> None:
    _, processor = loaded("llama")
    record = Record("r", (), DRAFTED, "x.json:1")
    encoding, sample = encode_record(record, processor), sample_of(record, 0, processor)
    assert sample.ids == encoding.ids and [abs(mark) for mark in sample.answer] == encoding.answer
    assert set(sample.answer) == {0, -1, 2}
    trained = Record("r", (), tuple(Turn(turn.role, turn.text) for turn in DRAFTED), "x.json:1")
    assert sample_of(trained, 0, processor).answer == encoding.answer


def test_only_trained_answers_are_asked_for() -> None:
    record = Record("r", (), DRAFTED, "x.json:1")
    assert list(answer_turns(record)) == [3]
    assert list(questions([record])) == [(record, 3)]


def test_the_table_keeps_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [("human", "What?"), ("gpt", "A draft."), ("human", "Again."), ("gpt", "The answer.")]
    turns: list[dict[str, Any]] = [{"from": name, "value": text} for name, text in texts]
    turns[1]["loss"] = False
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": [*turns[:2], *turns]}]), encoding="utf-8")
    first, second = (open_records(path)[place] for place in range(2))
    assert first.turns == DRAFTED and [turn.trained for turn in second.turns] == [True, False, True, False, True, True]
    # Read in another way, it is another table.
    path.write_text(json.dumps([{"conversations": [turns[1], *turns]}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.unpaired_turns=drop"):
        open_records(path)
    assert open_records(path, Data(unpaired_turns="drop"))[0].turns == DRAFTED


LITERAL = (Turn("user", r"<image>What is \<image>?"), Turn("assistant", "SVG has <image> tags."))


def test_a_literal_marker_reaches_the_tokenizer_as_text(loaded: Callable[[str], Loaded]) -> None:
    """Where the checkpoint's own placeholder is spelled otherwise."""
    _, processor = loaded("qwen2")
    assert processor.image_token != "<image>"
    record = Record("r", ("a.png",), LITERAL, "x.json:1")
    assert messages_of(record) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]},
        {"role": "assistant", "content": "SVG has <image> tags."},
    ]
    encoding = encode_record(record, processor)
    assert encoding.text.count("<image>") == 2 and "\\" not in encoding.text
    assert encoding.ids.count(processor.image_token_id) == processor.image_tokens
    prompt = user_message(r"What is \<image>?", [])
    assert prompt["content"] == [{"type": "text", "text": "What is <image>?"}]
    shown = random_image()
    both = user_message(r"What is \<image>?", [shown])["content"]
    assert [part["type"] for part in both] == ["image", "text"] and both[1]["text"] == "\nWhat is <image>?"
    with pytest.raises(UsageError, match=r"the prompt has 1 <image> markers, 0 images were given .*write \\<image>"):
        user_message("What is <image>?", [])


@pytest.mark.parametrize("turn", [0, 1])
def test_a_literal_that_the_checkpoint_reads_as_an_image(turn: int, loaded: Callable[[str], Loaded]) -> None:
    _, processor = loaded("llama")
    assert processor.image_token == "<image>"
    turns = list(DRAFTED[:1] + DRAFTED[3:])
    turns[turn] = Turn(turns[turn].role, r"See \<image>." if turn == 0 else "See <image>.")
    with pytest.raises(DataError) as caught:
        encode_record(Record("q7", (), tuple(turns), "x.json:1"), processor)
    assert str(caught.value).startswith(
        f"x.json:1: record q7: turn {turn + 1}: the text <image> is what this checkpoint reads as an image, so it cannot stand"
    )
    assert caught.value.kind == "image token in the text"
