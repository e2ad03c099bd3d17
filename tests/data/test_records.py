"""Data files -> records: what is read, what is refused and in which words, and the cache."""

import json
import os
from pathlib import Path
from typing import Any

import datasets.config
import pytest

from diffvl.data.records import Record, Turn, iterate_records
from diffvl.data.table import open_records
from diffvl.errors import DataError

GOOD = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record cache of one test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "diffvl"


@pytest.fixture(params=[".json", ".jsonl"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def write(folder: Path, suffix: str, objects: list[Any], name: str = "train") -> Path:
    """Object number i (from 0) starts in line i + 2 of a .json file, i + 1 of a .jsonl file."""
    lines = [json.dumps(value) for value in objects]
    path = folder / f"{name}{suffix}"
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if suffix == ".json" else "\n".join(lines) + "\n", encoding="utf-8")
    return path


def image(folder: Path, name: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"only its presence counts here")
    return name


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def fail(path: Path) -> str:
    """The error of `open_records`; reading record by record must refuse the same file."""
    with pytest.raises(DataError):
        list(iterate_records(path))
    with pytest.raises(DataError) as caught:
        open_records(path)
    return str(caught.value)


# --- what is read --------------------------------------------------------------------------------------------------------


def test_both_forms_and_both_files_give_the_same_record(tmp_path: Path, suffix: str) -> None:
    image(tmp_path, "images/a.png")
    said = [
        ("system", "Be brief."),
        ("user", "<image>\nWhat?"),
        ("assistant", "Ein Bär."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    llava = {"id": 7, "image": "images/a.png", "conversations": [{"from": names[role], "value": text} for role, text in said]}
    chat = {
        "id": "7",
        "images": ["images/a.png"],
        "messages": [{"role": role, "content": text} for role, text in said],
        "extra": [1],
    }
    path = write(tmp_path, suffix, [llava, chat])
    first, second = iterate_records(path)
    line = 2 if suffix == ".json" else 1
    assert first == Record("7", (str(tmp_path / "images/a.png"),), tuple(Turn(*pair) for pair in said), f"train{suffix}:{line}")  # type: ignore[arg-type]
    assert (second.id, second.images, second.turns) == (first.id, first.images, first.turns)
    assert second.source == f"train{suffix}:{line + 1}"
    dataset = open_records(path)
    assert [dataset[index] for index in range(len(dataset))] == [first, second]


def test_missing_markers_are_put_before_the_first_user_text(tmp_path: Path) -> None:
    names = [image(tmp_path, "a.png"), image(tmp_path, "b.png")]
    said = [{"from": "system", "value": "S"}, *turns("What?", "A.", "And?", "B.")]
    (record,) = iterate_records(write(tmp_path, ".json", [{"image": names, "conversations": said}]))
    assert [turn.text for turn in record.turns] == ["S", "<image>\n<image>\nWhat?", "A.", "And?", "B."]


def test_given_markers_stay_where_they_are(tmp_path: Path) -> None:
    names = [image(tmp_path, "a.png"), image(tmp_path, "b.png")]
    value = {"image": names, "conversations": turns("What is <image>?", "A.", "And\n<image>", "B.")}
    (record,) = iterate_records(write(tmp_path, ".json", [value]))
    assert [turn.text for turn in record.turns] == ["What is <image>?", "A.", "And\n<image>", "B."]


@pytest.mark.parametrize("absent", [{}, {"image": None}, {"images": []}])
def test_text_only_record(tmp_path: Path, absent: dict[str, Any]) -> None:
    path = write(tmp_path, ".jsonl", [{"conversations": GOOD, **absent}])
    assert open_records(path)[0] == Record("train.jsonl:1", (), (Turn("user", "Hi"), Turn("assistant", "Yes.")), "train.jsonl:1")


def test_absolute_image_path(tmp_path: Path) -> None:
    image(tmp_path, "elsewhere/a.png")
    absolute = str(tmp_path / "elsewhere/a.png")
    (tmp_path / "data").mkdir()
    (record,) = iterate_records(write(tmp_path / "data", ".json", [{"image": absolute, "conversations": GOOD}]))
    assert record.images == (absolute,)


def test_relative_data_path_gives_absolute_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ".json", [{"image": image(tmp_path, "a.png"), "conversations": GOOD}])
    monkeypatch.chdir(tmp_path)
    assert open_records(Path("train.json"))[0].images == (str(tmp_path / "a.png"),)


# --- what is refused: the record -----------------------------------------------------------------------------------------

IMAGE = {"image": "a.png"}

BAD_RECORDS = {
    "not an object": ([1], "expected an object with `conversations`, got a list"),
    "bad id": ({"id": 1.5, "conversations": GOOD}, "`id` must be a string or a whole number, got a number"),
    "no conversations": ({"id": "a"}, "no `conversations` (nor `messages`): expected a list of turns"),
    "both forms": ({"conversations": GOOD, "messages": []}, "both `conversations` and `messages`: keep one of them"),
    "no turns": ({"conversations": []}, "`conversations` must be a list of turns with at least one in it, got an empty list"),
    "turn without text": ({"conversations": [{"from": "human"}]}, "turn 1: expected an object with `from` and `value`"),
    "text not a string": ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: `value` must be a string, got a number"),
    "unknown role": (
        {"conversations": [GOOD[0], {"from": "bot", "value": "A"}]},
        "turn 2: unknown role 'bot'; expected one of human, gpt, system",
    ),
    "role of the other form": (
        {"messages": [{"role": "human", "content": "A"}]},
        "turn 1: unknown role 'human'; expected one of user, assistant, system",
    ),
    "first not user": (
        {"conversations": GOOD[1:]},
        "turn 1 is from assistant (gpt): after an optional system turn the first must be",
    ),
    "first after system": (
        {"conversations": [{"from": "system", "value": "S"}, GOOD[1]]},
        "turn 2 is from assistant (gpt): after an optional system turn the first must be from user (human)",
    ),
    "system only": ({"conversations": [{"from": "system", "value": "S"}]}, "turn 2 is missing: after an optional system turn"),
    "twice user": (
        {"conversations": [GOOD[0], GOOD[0], GOOD[1]]},
        "turn 2 is from user (human), expected assistant (gpt): user and assistant must alternate",
    ),
    "system later": (
        {"conversations": [*GOOD, {"from": "system", "value": "S"}]},
        "turn 3 is from system, expected user (human): user and assistant must alternate",
    ),
    "last not assistant": (
        {"conversations": [*GOOD, GOOD[0]]},
        "turn 3, the last, is from user (human), expected an answer from assistant (gpt)",
    ),
    "empty answer": ({"conversations": turns("Hi", "Yes.", "And?", " \n\t")}, "turn 4: empty answer"),
    "more markers": (
        {**IMAGE, "conversations": turns("<image>\nA <image>", "B")},
        "more <image> than images: 2 in the text, 1 in the record",
    ),
    "marker, no image": ({"conversations": turns("<image>\nA", "B")}, "more <image> than images: 1 in the text, 0 in the record"),
    "fewer markers": (
        {"image": ["a.png", "a.png"], "conversations": turns("<image>\nA", "B")},
        "fewer <image> than images: 1 in the text, 2 in the record",
    ),
    "marker in an answer": (
        {**IMAGE, "conversations": turns("<image>\nA", "B <image>")},
        "turn 2: <image> in a turn of assistant (gpt); images stand in user turns only",
    ),
    "marker in system": (
        {**IMAGE, "conversations": [{"from": "system", "value": "<image>"}, *GOOD]},
        "turn 1: <image> in a turn of system; images stand in user turns only",
    ),
    "missing image": (
        {"image": "no/such.png", "conversations": GOOD},
        "no/such.png (relative paths start at the data file's folder; set data.image_folder if they start elsewhere)",
    ),
    "image not a path": (
        {"image": {"bytes": ""}, "conversations": GOOD},
        "`image` must be a path or a list of paths, got an object",
    ),
    "empty path": (
        {"images": ["a.png", ""], "conversations": GOOD},
        "`images` must be a path or a list of paths, got an empty string",
    ),
    "both image keys": (
        {"image": "a.png", "images": ["a.png"], "conversations": GOOD},
        "both `image` and `images`: keep one of them",
    ),
    "half a surrogate": ({"conversations": turns("Hi", "\ud83d")}, "turn 2: `value` holds half of a surrogate pair, '\\ud83d'"),
}


@pytest.mark.parametrize(("value", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_bad_record_is_refused_with_its_line(tmp_path: Path, suffix: str, cache: Path, value: Any, message: str) -> None:
    image(tmp_path, "a.png")
    path = write(tmp_path, suffix, [{"conversations": GOOD}, value, {"conversations": GOOD}])
    error = fail(path)
    assert error.startswith(f"{path}:{3 if suffix == '.json' else 2}: ")
    assert message in error
    assert "\n" not in error
    assert list(cache.iterdir()) == []  # nothing half-written


# --- what is refused: the file -------------------------------------------------------------------------------------------


def test_first_five_problems_and_the_number_of_the_others(tmp_path: Path, suffix: str, cache: Path) -> None:
    path = write(tmp_path, suffix, [{"conversations": GOOD}] + [{"id": number} for number in range(12)])
    first = 3 if suffix == ".json" else 2
    lines = fail(path).split("\n")
    assert lines[0] == f"{path}: 12 problems"
    problem = "no `conversations` (nor `messages`): expected a list of turns, {from: human or gpt, value: text}"
    assert lines[1:6] == [f"  {path}:{first + number}: {problem} (record {number + 2}, id '{number}')" for number in range(5)]
    assert lines[6] == "  and 7 more" and lines[7].startswith("all of them: ")
    listed = [json.loads(line) for line in Path(lines[7].removeprefix("all of them: ")).read_text().splitlines()]
    assert [(line["record"], line["id"]) for line in listed] == [(number + 2, str(number)) for number in range(12)]
    assert list(cache.iterdir()) == []
    lines = fail(write(tmp_path, suffix, [{"id": number} for number in range(5)])).split("\n")
    assert lines[0] == f"{path}: 5 problems"
    assert len(lines) == 7 and lines[6].startswith("set data.on_error=skip")


def test_records_before_the_first_problem_are_given(tmp_path: Path) -> None:
    records = iterate_records(write(tmp_path, ".json", [{"conversations": GOOD}, {}]))
    assert next(records).source == "train.json:2"
    with pytest.raises(DataError, match=r"train\.json:3: no `conversations`"):
        next(records)


BAD_FILES = {
    "json, malformed": (
        ".json",
        f"[\n{json.dumps({'conversations': GOOD})},\n{{oops}}]",
        ":3: malformed JSON at column 2: Expecting property name",
    ),
    "jsonl, malformed": (".jsonl", '\n{"id" 1}\n', ":2: malformed JSON at column 7: Expecting ':' delimiter"),
    "json, an object": (".json", '{"conversations": []}', ":1: holds one record alone: put [ and ] around it"),
    "json, no records": (".json", " [ ]\n", ": no records in it; expected at least one object with `conversations`"),
    "json, empty": (".json", "", ": no records in it"),
    "jsonl, empty": (".jsonl", "\n\n", ": no records in it"),
    "another kind": (".csv", "id", ": unknown kind of data file '.csv'"),
}


@pytest.mark.parametrize(("suffix", "text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_refused(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_text(text)
    assert fail(path).startswith(f"{path}{message}")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert fail(tmp_path / "no.json") == f"{tmp_path}/no.json: no such data file"


def test_malformed_line_does_not_hide_the_next_problem(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{\n" + json.dumps({"conversations": GOOD}) + "\n{}\n")
    lines = fail(path).split("\n")
    assert lines[0] == f"{path}: 2 problems"
    assert lines[1] == "  malformed JSON: 1" and lines[2].startswith(f"    {path}:1: malformed JSON at column ")
    assert lines[3] == "  no turns: 1" and lines[4].startswith(f"    {path}:3: no `conversations`")


def test_image_is_looked_for_once_per_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [{"image": name, "conversations": GOOD} for name in [image(tmp_path, "a.png"), image(tmp_path, "b.png")] * 4]
    path = write(tmp_path, ".json", objects)
    looked: list[str] = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda name: (looked.append(str(name)), isfile(name))[1])
    assert len(list(iterate_records(path))) == 8
    assert sorted(looked) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


# --- the cache -----------------------------------------------------------------------------------------------------------


def test_unchanged_file_is_not_read_again(tmp_path: Path, suffix: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, suffix, [{"image": image(tmp_path, "a.png"), "conversations": GOOD}])
    first = open_records(path)
    monkeypatch.setattr("diffvl.data.reading.read_places", lambda path: pytest.fail("read again"))
    second = open_records(path)
    assert second[0] == first[0]
    assert second.content == first.content
    assert len(list(cache.iterdir())) == 1


def test_changed_file_is_read_again(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"conversations": turns("Hi", "One.")}])
    assert open_records(path)[0].turns[1].text == "One."
    status = path.stat()
    write(tmp_path, suffix, [{"conversations": turns("Hi", "Two.")}])  # the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_records(path)[0].turns[1].text == "Two."


def test_image_lost_after_the_first_reading_is_told(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"conversations": GOOD}, {"image": image(tmp_path, "a.png"), "conversations": GOOD}])
    open_records(path)
    (tmp_path / "a.png").unlink()
    assert fail(path).startswith(f"{path}:{3 if suffix == '.json' else 2}: image file not found: {tmp_path}/a.png")


def test_more_records_than_one_batch(tmp_path: Path) -> None:
    dataset = open_records(write(tmp_path, ".jsonl", [{"id": number, "conversations": GOOD} for number in range(2500)]))
    assert [dataset[index].id for index in (0, 1023, 1024, 2499)] == ["0", "1023", "1024", "2499"]
    assert len(dataset) == 2500
    assert dataset[3].source == "train.jsonl:4"


def test_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, ".json", [{"conversations": GOOD}])
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="record cache .* cannot be written .*; set HF_DATASETS_CACHE to a folder"):
        open_records(path)
