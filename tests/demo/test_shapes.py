"""The built-in image set: right answers, a split that does not leak, the same bytes again."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from PIL import Image

from diffvl.data.table import open_records
from diffvl.demo.shapes import CELLS, COLOURS, KINDS, NUMBERS, SHAPES, SPLITS, Content, draw_image, is_test, write_shapes
from diffvl.errors import DataError

SIZES = {"align": 60, "train": 300, "test": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(out, **SIZES)
    return out


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{split}.json").read_text())


def content_of(record: dict[str, Any]) -> Content:
    at = {thing["cell"]: (thing["colour"], thing["shape"]) for thing in record["objects"]}
    return tuple(at.get(cell) for cell in CELLS)


def questions(record: dict[str, Any]) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def solve(question: str, things: list[dict[str, str]]) -> str:
    """The answer, found by another way than the module's: from the words of the question and the objects in the scene."""
    words = question.removesuffix("?").split()
    if question == "What is in the picture?":
        (thing,) = things
        return f"{thing['cell'].capitalize()} a {thing['colour']} {thing['shape']}."
    if question == "Describe the picture.":
        shown = {thing["cell"]: f"a {thing['colour']} {thing['shape']}" for thing in things}
        names = [shown.get(cell, "nothing") for cell in ("top left", "top right", "bottom left", "bottom right")]
        return "Top left {}, top right {}, bottom left {}, bottom right {}.".format(*names)
    if question.startswith("How many"):
        wanted = things if words[2] == "shapes" else [thing for thing in things if thing["colour"] == words[2]]
        return f"{words[2].capitalize()}: {['zero', 'one', 'two', 'three', 'four'][len(wanted)]}."
    if question.startswith("What is at the"):
        found = [thing for thing in things if thing["cell"] == " ".join(words[4:])]
        name = f"a {found[0]['colour']} {found[0]['shape']}" if found else "nothing"
        return f"{' '.join(words[4:]).capitalize()} {name}."
    assert question.startswith("What colour is the ")
    (thing,) = [thing for thing in things if thing["shape"] == words[-1]]  # exactly one, or the question has no answer
    return f"The {thing['shape']} is {thing['colour']}."


# --- the questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_answers_agree_with_the_objects(folder: Path, split: str) -> None:
    records = read(folder, split)
    assert len(records) == SIZES[split]
    for record in records:
        for number, (question, answer) in enumerate(questions(record)):
            assert question.startswith("<image>\n") == (number == 0)
            truth = solve(question.removeprefix("<image>\n"), record["objects"])
            if number == 0 and question.startswith(("<image>\nHow many", "<image>\nWhat colour")):
                truth = f"{solve('Describe the picture.', record['objects'])} {truth}"  # it looks before it answers
            assert answer == truth, record["id"]


@pytest.mark.parametrize("split", SPLITS)
def test_images_show_the_objects(folder: Path, split: str) -> None:
    for number, record in enumerate(read(folder, split)):
        assert record["image"] == f"images/{split}/{number:05d}.png"
        image = Image.open(folder / record["image"])
        assert (image.size, image.mode, image.format) == ((112, 112), "RGB", "PNG")
        seen = []
        for index in range(4):
            y, x = 28 + 56 * (index // 2), 28 + 56 * (index % 2)
            pixel = image.getpixel((x, y))
            seen.append(next((colour for colour, value in COLOURS.items() if value == pixel), None))
        assert seen == [thing and thing[0] for thing in content_of(record)]


def test_objects_are_large_clean_and_inside_their_cell() -> None:
    for shape in SHAPES:
        for number in range(20):
            image = draw_image((("blue", shape), None, None, None), random.Random(f"test/{number}"))
            assert len(set(image.crop((56, 0, 112, 112)).get_flattened_data())) == 1  # nothing beyond the cell
            assert len(set(image.crop((0, 56, 112, 112)).get_flattened_data())) == 1
            share = Counter(image.crop((0, 0, 56, 56)).get_flattened_data())[COLOURS["blue"]] / 56**2
            assert 0.12 < share < 0.5, shape


def test_each_split_asks_its_kinds(folder: Path) -> None:
    asked = Counter(question[8:] for record in read(folder, "align") for question, _ in questions(record))
    assert 0.4 < asked.pop("What is in the picture?") / SIZES["align"] < 0.8
    assert {question.removesuffix("?") for question in asked} == {f"What is at the {cell}" for cell in CELLS}
    assert {len(record["objects"]) for record in read(folder, "align")} == {1}
    asked = [[question.removeprefix("<image>\n") for question, _ in questions(record)] for record in read(folder, "train")]
    assert all(1 <= len(one) <= 3 and len(set(one)) == len(one) for one in asked)
    firsts = Counter(one[0][:8] for one in asked)
    assert set(firsts) == {"How many", "What is ", "What col", "Describe"} and min(firsts.values()) > 0.1 * len(asked)
    followed = [one for one in asked if not one[0].startswith("What is at")]
    assert sum(len(one) for one in followed) > 2 * len(followed)
    assert {question[:8] for one in followed for question in one[1:]} == {"How many", "What col"}
    starts_of = {"counting": "How many", "position": "What is at", "colour": "What colour", "caption": "Describe"}
    for record in read(folder, "test"):
        ((question, _),) = questions(record)
        assert question.startswith(f"<image>\n{starts_of[record['kind']]}")
    assert Counter(record["kind"] for record in read(folder, "test")) == dict.fromkeys(KINDS, 30)


def test_no_answer_is_right_nearly_always(folder: Path) -> None:
    """A model that does not look must not score: the commonest answer to each question is not far above half."""
    answers: dict[str, Counter[str]] = {}
    for record in read(folder, "train"):
        for question, answer in questions(record):
            start = " ".join(question.removeprefix("<image>\n").split()[:3])
            last = answer.split()[-1] if start.startswith(("How many", "What colour")) else answer
            answers.setdefault("colour count" if start.split()[2] in COLOURS else start, Counter())[last] += 1
    assert set(answers) == {"How many shapes", "colour count", "What is at", "What colour is", "Describe the picture."}
    for counter in answers.values():
        assert max(counter.values()) < 0.6 * sum(counter.values()), counter


# --- the split -----------------------------------------------------------------------------------------------------------


def test_contents_do_not_cross_the_split(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "other", **SIZES, seed=1)
    learnt = {
        content_of(record) for out in (folder, tmp_path / "other") for split in ("align", "train") for record in read(out, split)
    }
    held_out = {content_of(record) for out in (folder, tmp_path / "other") for record in read(out, "test")}
    assert not learnt & held_out
    assert all(map(is_test, held_out))
    assert not any(map(is_test, learnt))


def test_contents_are_distinct_while_there_are_enough(folder: Path) -> None:
    assert len({content_of(record) for record in read(folder, "test")}) == SIZES["test"]
    for split in ("align", "train"):
        contents = Counter(content_of(record) for record in read(folder, split))
        assert all(len(content) - content.count(None) == 1 for content, times in contents.items() if times > 1)


def test_number_of_objects_is_balanced(folder: Path) -> None:
    counts = Counter(len(record["objects"]) for record in read(folder, "train"))
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 0.15 * SIZES["train"]
    assert set(Counter(len(record["objects"]) for record in read(folder, "test"))) == {1, 2, 3, 4}


def test_the_split_of_a_content_is_fixed() -> None:
    """Changing it would let a set written today leak into one written yesterday."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    singles = [tuple(thing if index == cell else None for index in range(4)) for cell in range(4) for thing in things]
    assert [number for number, content in enumerate(singles) if is_test(content)] == [
        1,
        2,
        4,
        9,
        13,
        14,
        23,
        26,
        44,
        47,
        55,
        59,
        60,
    ]


# --- on disk -------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    random.seed(5)  # the global generator has no say
    write_shapes(tmp_path / "again", **SIZES)
    again = all_bytes(tmp_path / "again")
    assert again == all_bytes(folder)
    assert len(again) == sum(SIZES.values()) + 4
    write_shapes(tmp_path / "other", **SIZES, seed=1)
    other = all_bytes(tmp_path / "other")
    assert set(other) == set(again)
    assert {name for name in other if other[name] == again[name]} == set()


def test_files_are_read_by_records(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    files = write_shapes(folder, **SIZES)
    assert files == {split: folder / f"{split}.json" for split in SPLITS}
    for split, file in files.items():
        dataset = open_records(file)
        assert len(dataset) == SIZES[split]
        record = dataset[7]
        assert record.id == f"{split}-00007"
        assert record.source == f"{split}.json:9"
        assert record.images == (str(folder / f"images/{split}/00007.png"),)
        assert [turn.text for turn in record.turns] == [text for pair in questions(read(folder, split)[7]) for text in pair]


def test_written_set_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "set"
    files = write_shapes(out, align=1, train=1, test=1)
    monkeypatch.setattr("diffvl.demo.shapes.draw_image", lambda *_: pytest.fail("drawn again"))
    assert write_shapes(out, align=1, train=1, test=1) == files
    with pytest.raises(
        DataError, match=r"set: holds built-in images of another request \(.*shapes\.json\); remove the folder or"
    ):
        write_shapes(out, align=1, train=1, test=1, seed=1)
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="full: is not empty and holds no built-in images; name another folder"):
        write_shapes(tmp_path / "full", align=1, train=1, test=1)
    with pytest.raises(DataError, match=r"notes\.txt: is a file; the built-in images need a folder of their own"):
        write_shapes(tmp_path / "full" / "notes.txt", align=1, train=1, test=1)
    assert all_bytes(tmp_path / "full") == {"notes.txt": b"mine"}


def test_empty_folder_and_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "train.json").write_text("cut")
    write_shapes(tmp_path / "set", align=1, train=1, test=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(all_bytes(tmp_path / "set")) == 7


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> Image.Image:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffvl.demo.shapes.draw_image", full_disk)
    with pytest.raises(DataError, match="set: the built-in images cannot be written .*No space left on device"):
        write_shapes(tmp_path / "set", align=1, train=1, test=1)
    assert list(tmp_path.iterdir()) == []


def test_sizes_out_of_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="built-in images: train must be at least 1 record, got 0"):
        write_shapes(tmp_path / "set", train=0)
    image = Image.new("RGB", (1, 1))
    monkeypatch.setattr("diffvl.demo.shapes.draw_image", lambda *_: image)
    monkeypatch.setattr(image, "save", lambda path: None)
    with pytest.raises(DataError, match="test asks for more scenes than there are; it must be well below 16628 records"):
        write_shapes(tmp_path / "set", test=16700)
    assert list(tmp_path.iterdir()) == []


def test_numbers_cover_the_cells() -> None:
    assert len(NUMBERS) == len(CELLS) + 1
