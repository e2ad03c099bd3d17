"""`diffvl answers`: whose answers they are, where they stand, and what a kill, a bad record or another place may do to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import command, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffvl.data.records import iterate_records
from diffvl.decode import own_answers
from diffvl.errors import UsageError

NEW = 6


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def asked(model: Path, data: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    ended = succeed("answers", model, "--data", data, "--out", out, "--max-new-tokens", NEW, *words)
    assert ended.out == f"{out}\n" and not list(out.parent.glob("*.partial*"))
    return read(out)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def own_words(model: Any, tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """What transformers' own `generate` answers."""
    inputs = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    spare = list(range(len(tokenizer), model.config.vocab_size))  # rows of the table without a token, which stand-ins love
    output = model.generate(**inputs, max_new_tokens=NEW, suppress_tokens=spare)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


TURNS = (
    {"prompt": "What is it?", "id": "a", "mine": {"kept": [3]}},
    {"id": 7, "conversations": [human("Hi"), {"from": "gpt", "value": "old", "train": False}, human("And then?")], "extra": 1},
    {"messages": [{"role": "user", "content": "One"}, {"role": "user", "content": [{"type": "text", "text": "Two"}]}]},
    {"system": "Speak.", "conversations": [human("Three, please"), {"from": "gpt", "value": "of another"}]},
)  # fmt: skip


def test_a_language_model_answers_every_question_in_its_place(source: Callable[[str], Path], tmp_path: Path):
    """The words are transformers' own, later ones after its own earlier ones; the rest of a record stays as it was."""
    path = source("qwen2")
    rows = asked(path, write(tmp_path / "p.jsonl", *TURNS), tmp_path / "own.jsonl", "--batch-size", 3)
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def said(*texts: str) -> str:
        return own_words(
            stock, tokenizer, [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        )

    one = said("One")
    assert rows[0] == {
        "conversations": [human("What is it?"), {"from": "gpt", "value": said("What is it?")}],
        "id": "a",
        "mine": {"kept": [3]},
    }
    assert rows[1] == {
        **TURNS[1],
        "conversations": [*TURNS[1]["conversations"], {"from": "gpt", "value": said("Hi", "old", "And then?")}],
    }
    assert [turn["content"] for turn in rows[2]["messages"]] == [
        "One",
        one,
        [{"type": "text", "text": "Two"}],
        said("One", one, "Two"),
    ]
    system = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Three, please"}]
    assert rows[3]["conversations"][1] == {"from": "gpt", "value": own_words(stock, tokenizer, system)}
    assert len({one, *(row["conversations"][-1]["value"] for row in (rows[0], rows[1], rows[3]))}) == 4
    assert [record.turns[-1].text for record in iterate_records(tmp_path / "own.jsonl")] == [
        rows[0]["conversations"][1]["value"], rows[1]["conversations"][3]["value"], rows[2]["messages"][3]["content"],
        rows[3]["conversations"][1]["value"],
    ]  # fmt: skip


def test_images_are_seen(source: Any, prepared: Any, shapes: dict[str, Path], tmp_path: Path):
    """By a model as it was published as by the checkpoint that is made of it; the records lie where their images are not."""
    records = json.loads(shapes["test"].read_text(encoding="utf-8"))
    questions = [{"id": number, "image": one["image"], "prompt": "Which?"} for number, one in enumerate(records)]
    data = write(tmp_path / "p.jsonl", *questions, {**questions[0], "image": questions[-1]["image"]})
    words = ("--image-folder", shapes["test"].parent)
    rows, ours = (asked(path, data, tmp_path / f"{path.name}.jsonl", *words) for path in (source("llava"), prepared("llava")))
    assert rows == ours and [row["image"] for row in rows] == [*(one["image"] for one in records), records[-1]["image"]]
    answers = [row["conversations"][1]["value"] for row in rows]
    assert answers[-1] == answers[len(records) - 1] != answers[0]


def test_a_killed_run_goes_on_to_the_same_file(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To the bit, sampled answers too; what the kill left of a batch is not taken."""
    data = write(tmp_path / "p.jsonl", *({"prompt": f"Number {number}?"} for number in range(7)))
    words = ("--batch-size", 2, "--temperature", 1, "--seed", 3)
    whole = asked(source("qwen2"), data, tmp_path / "whole.jsonl", *words)
    assert len({row["conversations"][1]["value"] for row in whole}) == 7
    answer, calls = own_answers.answer_chats, []

    def killed(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*given)

    out = tmp_path / "own.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(own_answers, "answer_chats", killed)
        ended = command("answers", source("qwen2"), "--data", data, "--out", out, "--max-new-tokens", NEW, *words)
    assert ended.code == 130 and "--resume" in ended.err and not out.exists()
    work = out.with_name("own.jsonl.partial")
    assert len(read(work)) == 4
    work.write_text(work.read_text(encoding="utf-8") + '{"prompt": "half a li', encoding="utf-8")
    again = command("answers", source("qwen2"), "--data", data, "--out", out, "--max-new-tokens", NEW, *words)
    assert again.code == 2 and "holds an interrupted run: continue it with --resume, or remove it" in again.err
    other = command("answers", source("qwen2"), "--data", data, "--out", out, "--resume", *words[:2])
    assert other.code == 2 and "was begun with another settings" in other.err
    calls.clear()
    monkeypatch.setattr(own_answers, "answer_chats", lambda *given: calls.append(1) or answer(*given))
    assert asked(source("qwen2"), data, out, *words, "--resume") == whole and len(calls) == 2


@pytest.mark.parametrize("room", [2, 0])
def test_an_answer_ends_where_the_context_does(room: int, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An earlier answer may have more tokens when it is read again, which nobody knows before; the file goes on."""
    data = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"conversations": [human("b"), human("c")]})
    answer, out = own_answers.answer_chats, tmp_path / "own.jsonl"

    def full(decoder: Any, chats: list[Any], settings: Any) -> Any:
        if len(chats) == 1 and settings.max_new_tokens == NEW:
            length = own_answers.encode(decoder, chats)["input_ids"].shape[1]
            monkeypatch.setattr(own_answers, "context_length", lambda _: length + room)
            raise UsageError("does not fit")
        return answer(decoder, chats, settings)

    monkeypatch.setattr(own_answers, "answer_chats", full)
    ended = command("answers", source("qwen2"), "--data", data, "--out", out, "--max-new-tokens", NEW)
    if not room:
        assert ended.code == 2 and "p.jsonl:2: " in ended.err and "which leave no room for the next one" in ended.err
        return
    assert ended.code == 0 and "3 of 3 answers end at --max-new-tokens" in ended.err
    monkeypatch.undo()
    whole = asked(source("qwen2"), data, tmp_path / "whole.jsonl")[1]["conversations"][3]["value"]
    said = read(out)[1]["conversations"][3]["value"]
    assert 0 < len(said) <= 2 < len(whole)


def test_markers_in_an_answer_are_text(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model may write what a record would take for an image."""
    text = r"see <image> and <|image|> and \<image>"

    def said(_: Any, chats: list[Any], *__: Any) -> list[Any]:
        return [own_answers.Answer(text, 3, 3, 1.0, 0.0, 0.0, 0.0) for _ in chats]

    monkeypatch.setattr(own_answers, "answer_chats", said)
    asked(source("qwen2"), write(tmp_path / "p.jsonl", {"prompt": "?"}), tmp_path / "own.jsonl")
    (record,) = iterate_records(tmp_path / "own.jsonl")
    assert record.turns[1].text == text


def test_what_is_told_of_the_answers(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = iter([("", 1), ("x", NEW)])

    def said(_: Any, chats: list[Any], *__: Any) -> list[Any]:
        return [own_answers.Answer(text, count, 3, 1.0, 0.0, 0.0, 0.0) for text, count in [next(answers) for _ in chats]]

    monkeypatch.setattr(own_answers, "answer_chats", said)
    data = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    (tmp_path / "there").mkdir()
    ended = succeed("answers", source("qwen2"), "--data", data, "--out", tmp_path / "there/o.jsonl", "--max-new-tokens", NEW)
    assert "1 answers are empty; training takes none: set data.on_error=skip to leave them out" in ended.err
    assert f"1 of 2 answers end at --max-new-tokens {NEW}, or where the context does" in ended.err
    assert f"relative paths of images in it start at {tmp_path}: set data.image_folder to it" in ended.err


BAD: list[tuple[tuple[dict[str, Any], ...], tuple[object, ...], list[str]]] = [
    (({"prompt": "a"}, {"prompt": 3}, {"question": "x"}), (), ["p.jsonl: 2 problems", "p.jsonl:2: no `conversations`", ":3: "]),
    (({"conversations": [human("a"), {"from": "gpt", "value": "b", "train": False}]},), (), ["p.jsonl:1: no answer to train on"]),
    (({"prompt": "a", "image": "none.png"},), (), ["p.jsonl:1", "none.png"]),
    (({"prompt": "a", "tools": [1]},), (), ["`tools`: calls of tools are not supported"]),
    (({"prompt": "a"},), ("--out", "own.json"), ["own.json: answers are written as JSON lines: name a .jsonl file"]),
    (({"prompt": "a"},), ("--out", "p.jsonl"), ["p.jsonl exists; nothing was written"]),
    (({"prompt": "a"},), ("--out", "no/own.jsonl"), ["there is no folder"]),
    (({"prompt": "a"},), ("--top-k", 3), ["--top-k has no effect with temperature 0"]),
    (({"prompt": "a"},), ("--max-new-tokens", 10**6), ["p.jsonl:1", "1 answers of up to 1000000 do not fit the context"]),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "words", "says"), BAD, ids=[case[2][-1][:40] for case in BAD])
def test_a_mistake_ends_in_one_message(rows: Any, words: Any, says: list[str], source: Any, tmp_path: Path):
    data = write(tmp_path / "p.jsonl", *rows)
    words = [tmp_path / word if str(word).endswith((".json", ".jsonl")) else word for word in words]
    out = () if "--out" in words else ("--out", tmp_path / "own.jsonl")
    ended = command("answers", source("qwen2"), "--data", data, *out, *words)
    assert ended.code == 2 and all(text in ended.err for text in says), ended.err
    assert "Traceback" not in ended.err and [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_who_cannot_answer(source: Any, dllm: Any, shapes: dict[str, Path], tmp_path: Path):
    """A language model sees no images, and a diffusion language model has no answers of its own token by token."""
    image = json.loads(shapes["test"].read_text(encoding="utf-8"))[0]["image"]
    data = write(tmp_path / "p.jsonl", {"prompt": "a", "image": str(shapes["test"].parent / image)})
    ended = command("answers", source("qwen2"), "--data", data, "--out", tmp_path / "own.jsonl")
    assert ended.code == 2 and "p.jsonl:1: a record with images, and this is a language model: convert it first" in ended.err
    ended = command("answers", dllm("Dream"), "--data", data, "--out", tmp_path / "own.jsonl")
    assert ended.code == 2 and "a diffusion language model, which answers in blocks; expected an AR model" in ended.err
