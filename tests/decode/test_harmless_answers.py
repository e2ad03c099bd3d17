"""Answers with control characters, and terminals that lack characters: what each command that decodes or converts prints."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from block_checkpoints import block_checkpoint
from helpers import pairwise, random_image
from tiny_runs import stage, write_recipe

from diffvl.cli import main as cli
from diffvl.decode import answer as decode
from diffvl.terminal.console import visible

NASTY = "a\x1b]0;owned\x07\x9b2J\rb\u202e [/bold] é漢"
QUESTION = "What is it?"


class Terminal(io.TextIOWrapper):
    """A stream of an encoding that may say of itself that it is a terminal."""

    def __init__(self, encoding: str, is_terminal: bool) -> None:
        self.raw_bytes, self.is_terminal = io.BytesIO(), is_terminal
        super().__init__(self.raw_bytes, encoding=encoding, errors="strict", write_through=True)

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def text(self) -> str:
        return self.raw_bytes.getvalue().decode(self.encoding)


def ended(encoding: str, is_terminal: bool, lines: str | None, *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command; `lines` None: its stdin was closed by the caller."""
    out, err = Terminal(encoding, is_terminal), Terminal(encoding, False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"stdout": out, "stderr": err, "stdin": None if lines is None else io.StringIO(lines)}.items():
            patch.setattr(sys, name, value)
        patch.setattr(sys, "argv", ["diffvl", *map(str, words)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out.text, err.text


@pytest.fixture(scope="module")
def checkpoint(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("[x] harmless") / "llama")


@contextmanager
def answering(text: str) -> Iterator[None]:
    """Every answer is this text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "text_of", lambda *_: text)
        yield


def lossy(text: str, encoding: str) -> str:
    return text.encode(encoding, "replace").decode(encoding)


@pytest.mark.parametrize(
    ("way", "is_terminal", "encoding"), pairwise(["", "--stream", "--json"], [True, False], ["utf-8", "ascii", "latin-1"])
)
def test_generate(way: str, is_terminal: bool, encoding: str, checkpoint: Path):
    words = ("--prompt", "x", "--max-new-tokens", 4, *([way] if way else []))
    with answering(NASTY):
        code, out, err = ended(encoding, is_terminal, "", "generate", checkpoint, *words)
    assert (code, err) == (0, "")
    if way == "--json":
        assert json.loads(out)["text"] == NASTY and visible(out) == out
    else:
        assert out == lossy(visible(NASTY) if is_terminal else NASTY, encoding) + "\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generate_batch(is_terminal: bool, checkpoint: Path, tmp_path: Path):
    (tmp_path / "ask.jsonl").write_text(json.dumps({"prompt": "x", "id": NASTY}) + "\n", encoding="utf-8")
    with answering(NASTY):
        words = ("generate", checkpoint, "--batch", tmp_path / "ask.jsonl", "--max-new-tokens", 4)
        code, out, _ = ended("ascii", is_terminal, "", *words)
    line = json.loads(out)
    assert (code, line["text"], line["id"]) == (0, NASTY, NASTY) and visible(out) == out


@pytest.mark.parametrize("is_terminal", [True, False])
def test_chat(is_terminal: bool, checkpoint: Path, tmp_path: Path):
    image = tmp_path / "a\x1b[2J.png"
    random_image().save(image)
    lines = f"Hi\n/image {image}\n/image {image}x\n/no\x07order\n"
    with answering(NASTY):
        code, out, err = ended("utf-8", is_terminal, lines, "chat", checkpoint, "--max-new-tokens", 4)
    assert code == 0 and visible(err) == err and f"{visible(str(image))}x does not exist" in err
    shown = f"{NASTY}\n{image}, 40 x 40, goes with the next message\n"
    assert out == (visible(shown) if is_terminal else shown)


def test_chat_without_a_stdin_ends(checkpoint: Path):
    assert ended("utf-8", False, None, "chat", checkpoint) == (0, "", "")


def test_messages_name_the_image(checkpoint: Path, tmp_path: Path):
    image = tmp_path / "it's [x]\x1b.png"
    code, out, err = ended("utf-8", False, "", "generate", checkpoint, "--prompt", "x", "--image", image)
    assert (code, out, err) == (2, "", f"error: --image: image {visible(str(image))} does not exist\n")
    image.write_text("no image", encoding="utf-8")
    code, _, err = ended("ascii", False, "", "generate", checkpoint, "--prompt", "x", "--image", image)
    assert code == 2 and err.startswith(f"error: --image: image {tmp_path}/it's [x]") and "cannot be read" in err


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("utf-8", marks=pytest.mark.slow)])
def test_convert_and_evaluate(encoding: str, source: Callable[[str], Path], tower: Path, tmp_path: Path):
    """Both stages in folders whose names are markup; questions and answers that act on a terminal; a terminal without é."""
    folder = tmp_path / "[bold]data [x] é :cat:"
    folder.mkdir()
    random_image().save(folder / "a.png")
    turns = [{"from": "human", "value": f"<image>\n{NASTY}"}, {"from": "gpt", "value": "A red dot [/b].\x1b[2J"}]
    data = folder / "data.json"
    data.write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 4), encoding="utf-8")
    shown = {"data": {"holdout": 1}, "eval_every": 2, "eval_limit": 1}
    stages: dict[str, dict[str, Any]] = {name: stage(name, data, **shown) for name in ("align", "diffuse")}
    recipe = write_recipe(folder / "recipe.yaml", tower, **stages)
    with answering(NASTY):
        words = ("convert", source("llama"), "--recipe", recipe, "--out", folder / "run")
        code, out, err = ended(encoding, False, "", *words)
        assert code == 0 and "Traceback" not in err
    run = lossy(str(folder / "run"), encoding)
    assert out.count(run) >= 7 and visible(out) == out and f"data {lossy(str(data), encoding)} ->" in out
    assert f"  after   {lossy(visible(NASTY), encoding)}  [wrong]" in out
    code, out, err = ended(encoding, False, "", "evaluate", folder / "run" / "diffuse", "--data", data)
    assert code == 0 and lossy(str(data), encoding) in out and "Traceback" not in err
