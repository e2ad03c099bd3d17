"""The pages for people say what the code does: paths and names on them exist, the map shows the rooms, the walks are walked."""

import ast
import re
import sys
import tokenize
import tomllib
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import FrameType

import pytest
from block_checkpoints import block_checkpoint
from helpers import stage_recipe
from tiny_runs import record, succeed, write_data
from training_runs import run

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "diffvl"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = [file for folder in ("src", "tests", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]
ROOMS = sorted(path.stem for path in SOURCE.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed"))

PATH = re.compile(r"(?<![\w/.-])(?:src|tests|docs|tools|recipes|convert)/[\w/.-]*[\w/]")
TEST = re.compile(r"`(?P<file>[\w/]+\.py)?::(?P<name>test_\w+)`")
DOTTED = re.compile(rf"`(?P<name>(?:{'|'.join(ROOMS)})\.\w+(?:\.\w+)+)`")
OUTSIDE = re.compile(r"\bDESIGN\b|STYLE_GUIDE|\.\./shared|\bspec/\w+\.md|\bissue \d|\blater issue\b")


def defined_in(file: Path) -> set[str]:
    """Names of functions, classes, methods and module constants."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {
        target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)
    }


def explained_in(file: Path) -> str:
    """What a file tells its reader: of Python its comments and docstrings, of anything else, and of what cites nothing, all."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py" or not OUTSIDE.search(text):
        return text
    comments = [token.string for token in tokenize.generate_tokens(StringIO(text).readline) if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return "\n".join([*comments, *docstrings])


# --- what pages name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_on_a_page_exists(page: Path):
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_test_file_that_code_names_exists():
    named = {(file.name, path) for file in CODE for path in re.findall(r"\btests/[\w/]+\.py", file.read_text(encoding="utf-8"))}
    assert not [pair for pair in named if not (ROOT / pair[1]).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_on_a_page_exists(page: Path):
    """A file with `::test_z` after it; a `::test_z` alone is of the file before it."""
    file = ""
    for found in TEST.finditer(page.read_text(encoding="utf-8")):
        file = found["file"] or file
        assert found["name"] in defined_in(ROOT / file), (file, found["name"])


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md", "docs/objective.md"])
def test_every_function_on_a_page_exists(name: str):
    """`room.module.function`, or a method after its class. (On other pages such names may be settings.)"""
    page = ROOT / name
    for found in DOTTED.finditer(page.read_text(encoding="utf-8")):
        room, module, *names = found["name"].split(".")
        assert set(names) <= defined_in(SOURCE / room / f"{module}.py"), found["name"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_on_a_page_exists(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)) <= targets


def test_nothing_cites_what_is_outside_of_the_repository():
    """A reader has these files and no others."""
    files = [*PAGES, *CODE, ROOT / "Makefile", ROOT / "pyproject.toml"]
    files += [*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "convert").iterdir())]
    assert not [(file.relative_to(ROOT), found[0]) for file in files for found in OUTSIDE.finditer(explained_in(file))]


def test_counts_of_the_study_stand_on_its_own_page_alone():
    """That page is made of the results; counts that are written elsewhere by hand were of another study in the end."""
    section = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8").partition("## The fidelity study\n")[2]
    told = section.rpartition("```")[2]
    counts = r"(?i)\b(\d[\d,]*|two|three|seven|eight|twenty-?\w*) (test |night |of )?(forms|seeds|runs|steps|questions|hours)\b"
    assert "docs/fidelity.md" in told and not re.search(counts, told)


# --- the map of rooms ------------------------------------------------------------------------------------------------------


def test_the_map_shows_the_rooms_in_the_order_of_the_import_linter():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [sorted(layer.split(" | ")) for layer in settings["contracts"][0]["layers"]]
    shown: dict[int, list[str]] = {}
    for level, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", ARCHITECTURE, flags=re.MULTILINE):
        shown.setdefault(int(level), []).append(room)
    assert list(shown) == list(range(1, len(layers) + 1)) and [sorted(rooms) for rooms in shown.values()] == layers
    assert sorted(room for rooms in layers for room in rooms) == ROOMS


# --- the walks -------------------------------------------------------------------------------------------------------------


def walk(heading: str) -> list[tuple[str, str]]:
    """(file, function) of each step of a walk on the page."""
    section = ARCHITECTURE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/.]+)` `(\w+)`", section, flags=re.MULTILINE)


def calls_in(work: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of every call of this package's functions, in order."""
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)):
            seen.append((str(Path(code.co_filename).relative_to(ROOT)), code.co_name))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def assert_walked(steps: list[tuple[str, str]], work: Callable[[], object], most: int) -> None:
    """Every step is called, each after the one before it."""
    assert 3 < len(steps) <= most
    calls = iter(calls_in(work))
    for step in steps:
        assert step in calls, f"{step} is not called after the steps before it"


def test_a_record_walks_through_training_as_the_page_says(prepared: Callable[[str], Path], tmp_path: Path):
    data = write_data(tmp_path, *[{**record(), "id": f"{tmp_path}-{number}"} for number in range(2)])  # in no cache yet
    recipe = stage_recipe(data, steps=1)
    steps = walk("The walk of one record through training")
    assert_walked(steps, lambda: run(prepared("llama"), recipe, tmp_path / "out"), most=8)


def test_a_prompt_walks_through_decoding_as_the_page_says(prepared: Callable[[str], Path], tmp_path: Path):
    directory = block_checkpoint(prepared("llama"), tmp_path / "llama", context="causal")
    steps = walk("The walk of one prompt through decoding")
    assert_walked(steps, lambda: succeed("generate", directory, "--prompt", "Hi", "--max-new-tokens", 8), most=7)
