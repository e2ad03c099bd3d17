"""The built-in image set: scenes of coloured shapes with questions whose answers are exactly right.

A scene is a 2 x 2 grid of cells with one to four objects in it; its content is the mapping cell -> (colour, shape). Size and
place inside the cell vary from image to image and are no part of the content.

`align` shows one object an image and asks what it is and where: names, which a connector learns in front of a frozen trunk.
`train` has whole scenes, each with a few questions about it. Answers to counting and colour questions look first: they describe
the image and end in the answer proper, so that what has to be found stands in the text before it is used. After a description
the conversation goes on with more such questions, which need no second look: cheap tokens that teach the last step. `test` asks
one question a scene, in equal shares of `KINDS`.

Invariant: contents never cross the split. A hash of the content alone, independent of the seed and of the sizes asked for,
says whether a content belongs to `test` or to `align` and `train`; so two sets of different seeds do not cross either.
Everything else follows from the seed: the same request gives the same bytes.

On disk it is LLaVA format like any user's data, read back through `records`:

    OUT/align.json  OUT/train.json  OUT/test.json  OUT/images/{align,train,test}/00000.png  OUT/shapes.json (the request)
"""

import hashlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from diffvl.errors import DataError

SPLITS = ("align", "train", "test")
KINDS = ("counting", "position", "colour", "caption")
CELLS = ("top left", "top right", "bottom left", "bottom right")  # reading order
COLOURS = {"red": (220, 30, 40), "green": (30, 160, 60), "blue": (40, 80, 230), "yellow": (255, 205, 0)}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("zero", "one", "two", "three", "four")

# per cell, in reading order: None or (colour, shape)
Content = tuple[tuple[str, str] | None, ...]

_FORMAT = 3  # raise it when the same request gives other bytes
_NUM_FOLDS = 5
_TEST_FOLD = 2  # with a fair share of the few one-object contents in it
_NAME_SHARE = 0.6  # of the align records; the others ask about a cell
_FIRST_SHARES = (0.35, 0.15, 0.25, 0.25)  # of `KINDS` among the first questions of the train records
_NUM_MORE = 2  # questions after a description, at most
_MORE_COUNTING = 0.75  # of these, the share of counting questions: their last step takes longest to learn
_TOTAL_SHARE = 0.5  # of the counting questions: all shapes, not those of a colour
_MOST_SHARE = 0.5  # of the questions for the shapes of a colour: the colour that comes most often
_EMPTY_SHARE = 0.25  # of the position questions: an empty cell, if there is one
_CELL = 56  # pixels
_BACKGROUND = (240, 240, 240)
_SCALE = 4  # drawn so many times larger, then averaged down: smooth edges
_RADIUS = (18.0, 22.0)  # pixels from an object's centre to its rim
_SHIFT = 4.0  # pixels an object's centre may lie off the cell's


def write_shapes(out: Path, align: int = 1000, train: int = 2000, test: int = 200, seed: int = 0) -> dict[str, Path]:
    """Writes the three files and their images, or finds them written. Returns split -> data file.

    Args:
        out: a new or empty folder, or one that the same request has filled (then it is left as it is).
        align, train, test: number of records; test contents are distinct, the others repeat once all were used.
    Raises:
        DataError: `out` holds something else, or a number is out of range.
    """
    sizes = {"align": align, "train": train, "test": test}
    request = json.dumps({"format": _FORMAT, **sizes, "seed": seed}, indent=1) + "\n"
    files = {split: out / f"{split}.json" for split in SPLITS}
    if _is_written(out, request):
        return files
    for split, size in sizes.items():
        if size < 1:
            raise DataError(f"built-in images: {split} must be at least 1 record, got {size}")
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    try:
        _remove(partial)  # left by a run that was killed
        for split in reversed(SPLITS):  # test first: it is the one that can ask for too much
            _write_split(partial, split, sizes[split], seed)
        (partial / "shapes.json").write_text(request, encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: the built-in images cannot be written ({error}); name another folder") from error
    finally:
        _remove(partial)
    return files


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _is_written(out: Path, request: str) -> bool:
    """True: the same request is there, whole. False: nothing is there. Raises DataError for anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise DataError(f"{out}: is a file; the built-in images need a folder of their own")
    if not any(out.iterdir()):
        return False
    manifest = out / "shapes.json"
    if not manifest.is_file():
        raise DataError(f"{out}: is not empty and holds no built-in images; name another folder")
    if manifest.read_text(encoding="utf-8") != request:
        raise DataError(f"{out}: holds built-in images of another request ({manifest}); remove the folder or name another one")
    return True


def _write_split(out: Path, split: str, size: int, seed: int) -> None:
    images = out / "images" / split
    images.mkdir(parents=True)
    rng = random.Random(f"{seed}/{split}")
    lines = []
    for number, (content, turns, extra) in enumerate(_draw_records(split, size, rng)):
        name = f"{number:05d}"
        draw_image(content, rng).save(images / f"{name}.png")
        record = {"id": f"{split}-{name}", "image": f"images/{split}/{name}.png", "conversations": _conversation(turns), **extra}
        lines.append(json.dumps(record))
    (out / f"{split}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's form, with the image before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        messages.append({"from": "gpt", "value": answer})
    return messages


# --- which scenes, which questions ---------------------------------------------------------------------------------------


def is_test(content: Content) -> bool:
    """Whether a content belongs to the test split."""
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _NUM_FOLDS == _TEST_FOLD


class _Deck:
    """The contents of one split, one shuffled pile per number of objects.

    Scenes with one object are few and those with four are many: drawing the number first keeps the counts balanced.
    """

    def __init__(self, split: str, rng: random.Random) -> None:
        self._rng = rng
        self._may_repeat = split != "test"  # once a pile is used up
        self._contents: dict[int, list[Content]] = {count: [] for count in range(1, len(CELLS) + 1)}
        things = (None, *itertools.product(COLOURS, SHAPES))
        for content in itertools.product(things, repeat=len(CELLS)):
            count = len(CELLS) - content.count(None)
            if count and is_test(content) == (split == "test"):
                self._contents[count].append(content)
        self.size = sum(len(pile) for pile in self._contents.values())
        self._piles: dict[int, list[Content]] = {count: [] for count in self._contents}
        for count in self._piles:
            self._refill(count)

    def draw(self, for_colour: bool, counts: tuple[int, ...]) -> Content:
        """A content with one of these numbers of objects, not drawn yet, where asked `for_colour` one with a shape that stands
        alone. See `_may_repeat`."""
        for count in self._rng.sample(counts, len(counts)):
            if not self._piles[count] and self._may_repeat:
                self._refill(count)
            pile = self._piles[count]
            for index in range(len(pile) - 1, -1, -1):
                if not for_colour or _unique_shapes(pile[index]):
                    return pile.pop(index)
        raise DataError(f"built-in images: test asks for more scenes than there are; it must be well below {self.size} records")

    def _refill(self, count: int) -> None:
        self._piles[count] = list(self._contents[count])
        self._rng.shuffle(self._piles[count])


def _draw_records(split: str, size: int, rng: random.Random) -> Iterator[tuple[Content, list[tuple[str, str]], dict[str, Any]]]:
    """(content, [(question, answer)], extra keys) of every record."""
    deck = _Deck(split, rng)
    kinds = [KINDS[number % len(KINDS)] for number in range(size)]  # of the test split: equal shares, mixed
    rng.shuffle(kinds)
    for kind in kinds:
        content = deck.draw(split == "test" and kind == "colour", counts=(1,) if split == "align" else (1, 2, 3, 4))
        extra: dict[str, Any] = {"objects": describe_objects(content)}
        if split == "test":
            turns = [ask(kind, content, rng)]
            extra["kind"] = kind
        elif split == "align":
            turns = [_ask_name(content) if rng.random() < _NAME_SHARE else _ask_position(content, rng)]
        else:
            turns = _conversation_about(content, rng)
        yield content, turns, extra


def _conversation_about(content: Content, rng: random.Random) -> list[tuple[str, str]]:
    """A question of any kind and, after a description, more about it; questions about a cell come two by two."""
    reasoned = ["counting"] + (["colour"] if _unique_shapes(content) else [])
    (first,) = rng.choices(KINDS, weights=_FIRST_SHARES)
    if first == "position":
        return list(dict(ask(first, content, rng) for _ in range(2)).items())  # the same question once
    turns = dict([ask(first if first in ("caption", *reasoned) else "counting", content, rng)])
    for _ in range(_NUM_MORE):
        question, answer = ask(reasoned[0] if rng.random() < _MORE_COUNTING else reasoned[-1], content, rng)
        turns.setdefault(question, answer.removeprefix(f"{_describe(content)} "))
    return list(turns.items())


def describe_objects(content: Content) -> list[dict[str, str]]:
    """What is in the scene, in reading order, for the records' `objects` key."""
    placed = zip(CELLS, content, strict=True)
    return [{"cell": cell, "colour": thing[0], "shape": thing[1]} for cell, thing in placed if thing is not None]


def ask(kind: str, content: Content, rng: random.Random) -> tuple[str, str]:
    """A question of one of the `KINDS` about the scene, and its answer."""
    if kind == "caption":
        return _ask_caption(content)
    return {"counting": _ask_count, "position": _ask_position, "colour": _ask_colour}[kind](content, rng)


def _ask_name(content: Content) -> tuple[str, str]:
    ((cell, thing),) = [(cell, thing) for cell, thing in zip(CELLS, content, strict=True) if thing is not None]
    return "What is in the picture?", _shown(cell, thing)


def _ask_count(content: Content, rng: random.Random) -> tuple[str, str]:
    things = [thing for thing in content if thing is not None]
    if rng.random() < _TOTAL_SHARE:
        return "How many shapes are there?", f"{_describe(content)} Shapes: {NUMBERS[len(things)]}."
    # First the number, then a colour that has it: most colours of a scene come once, and "one" would be right too often.
    counts = {colour: sum(thing[0] == colour for thing in things) for colour in COLOURS}
    count = max(counts.values()) if rng.random() < _MOST_SHARE else rng.choice(sorted(set(counts.values())))
    colour = rng.choice([colour for colour in COLOURS if counts[colour] == count])
    return f"How many {colour} shapes are there?", f"{_describe(content)} {colour.capitalize()}: {NUMBERS[count]}."


def _ask_position(content: Content, rng: random.Random) -> tuple[str, str]:
    full = [number for number, thing in enumerate(content) if thing is not None]
    empty = [number for number, thing in enumerate(content) if thing is None]
    cell = rng.choice(empty) if empty and rng.random() < _EMPTY_SHARE else rng.choice(full)
    return f"What is at the {CELLS[cell]}?", _shown(CELLS[cell], content[cell])


def _shown(cell: str, thing: tuple[str, str] | None) -> str:
    """Place first, as in a description: what is learnt there holds here."""
    return f"{cell.capitalize()} {_name(thing)}."


def _name(thing: tuple[str, str] | None) -> str:
    return "nothing" if thing is None else f"a {thing[0]} {thing[1]}"


def _ask_colour(content: Content, rng: random.Random) -> tuple[str, str]:
    colour, shape = rng.choice(_unique_shapes(content))
    return f"What colour is the {shape}?", f"{_describe(content)} The {shape} is {colour}."


def _ask_caption(content: Content) -> tuple[str, str]:
    return "Describe the picture.", _describe(content)


def _describe(content: Content) -> str:
    parts = [f"{cell} {_name(thing)}" for cell, thing in zip(CELLS, content, strict=True)]
    return f"{', '.join(parts).capitalize()}."


def _unique_shapes(content: Content) -> list[tuple[str, str]]:
    """The objects whose shape stands alone in the scene: only of these has "What colour is the ...?" one right answer."""
    things = [thing for thing in content if thing is not None]
    shapes = [shape for _, shape in things]
    return [thing for thing in things if shapes.count(thing[1]) == 1]


# --- drawing -------------------------------------------------------------------------------------------------------------


def draw_image(content: Content, rng: random.Random) -> Image.Image:
    """The scene as an RGB image, two cells wide and high; `rng` gives sizes and places."""
    side = 2 * _CELL
    image = Image.new("RGB", (side * _SCALE, side * _SCALE), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, thing in enumerate(content):
        if thing is None:
            continue
        row, column = divmod(number, 2)
        x = (column + 0.5) * _CELL + rng.uniform(-_SHIFT, _SHIFT)
        y = (row + 0.5) * _CELL + rng.uniform(-_SHIFT, _SHIFT)
        _draw_object(draw, x * _SCALE, y * _SCALE, rng.uniform(*_RADIUS) * _SCALE, thing)
    return image.reduce(_SCALE)


def _draw_object(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, thing: tuple[str, str]) -> None:
    colour, shape = COLOURS[thing[0]], thing[1]
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = 0.9 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon(_corners(x, y + 0.2 * radius, [1.15 * radius] * 3), fill=colour)
    else:
        draw.polygon(_corners(x, y, [1.15 * radius, 0.5 * radius] * 5), fill=colour)


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Points around (x, y), evenly by angle, the first one straight up."""
    angles = [2 * math.pi * number / len(radii) for number in range(len(radii))]
    return [(x + radius * math.sin(angle), y - radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]
