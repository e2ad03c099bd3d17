"""What reaches a terminal, a pipe and a full disk: any text shown harmless, markup of nobody but ours, suggestions that can be
typed, and one message where a stream takes no more."""

import ast
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from shell_words import QUESTIONS, typed

from diffvl.cli import main as cli
from diffvl.terminal import console as terminal
from diffvl.terminal.console import UNSHOWN, console, json_text, shell_line, streams, visible

SOURCE = Path(cli.__file__).parents[1]
HARMFUL = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;file:///etc\x1b\\link\x1b]8;;\x1b\\", "\x1b]52;c;AAAA\x07", "a\rb", "a\bb", "\x7f",
    "\x9b2J", "\x00", "\x85", "\x0b\x0c", "\u202eabc", "\u2066abc\u2069", "\udce9", "\ud83d",
]  # fmt: skip
HARMLESS = ["", "a\n\tb", "é漢字한국어", "👩‍👩‍👧", "می‌خواهم", "\u200fעברית", "[x] [/bold] :cat:", "\\n"]


def is_harmless(text: str) -> bool:
    return not any(
        (ord(sign) < 32 and sign not in "\n\t") or 0x7F <= ord(sign) < 0xA0 or sign in "\u202e\u2066\u2069\udce9\ud83d"
        for sign in text
    )


@contextmanager
def output(encoding: str, errors: str = "strict") -> Iterator[io.BytesIO]:
    """stdout and stderr of this process as a terminal or a pipe of that encoding would be."""
    raw = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        both = [io.TextIOWrapper(raw, encoding=encoding, errors=errors, write_through=True) for _ in range(2)]
        patch.setattr(sys, "stdout", both[0])
        patch.setattr(sys, "stderr", both[1])
        yield raw
        for stream in both:
            stream.detach()  # else it closes the bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- any text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARMFUL, ids=ascii)
def test_what_acts_on_a_terminal_is_shown(text: str):
    assert is_harmless(visible(text)) and UNSHOWN in visible(text) and len(visible(text)) == len(text)
    assert is_harmless(json_text({text: [text]})) and json.loads(json_text({text: [text]})) == {text: [text]}


@pytest.mark.parametrize("text", HARMLESS, ids=ascii)
def test_what_does_not_is_left_alone(text: str):
    assert visible(text) == text
    assert json_text(text) == json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252", "shift_jis"])
def test_json_says_the_same_in_every_encoding(encoding: str):
    value = [*HARMFUL, *HARMLESS]
    with output(encoding) as raw:
        print(json_text(value))
    assert json.loads(raw.getvalue().decode(encoding)) == value


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_is_exact_for_a_program_and_harmless_for_a_person(is_terminal: bool, monkeypatch: pytest.MonkeyPatch):
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    text = "a\x1b[2Jb"
    terminal.put(text)
    terminal.put(text, end="")
    shown = visible(text) if is_terminal else text
    assert stream.getvalue() == f"{shown}\n{shown}"


def test_log_lines_and_warnings_are_harmless(monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    handler = logging.StreamHandler(shown)
    logger = logging.getLogger("diffvl.test")
    monkeypatch.setattr(logger, "handlers", [handler])
    with streams():
        shown.write(warnings.formatwarning("model type \x1b[2J", UserWarning, "x.py", 1))
        logger.warning("a %s of %s", "\x1b]0;x\x07", "%s")
    assert is_harmless(shown.getvalue()) and f"a {UNSHOWN}]0;x{UNSHOWN} of %s" in shown.getvalue()
    assert f"model type {UNSHOWN}[2J" in shown.getvalue()
    logger.warning("%s", "\x1b")
    assert "\x1b" in shown.getvalue(), "outside the block nothing is changed"


# --- markup -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[x]", "[/bold]", "[bold red]x[/]", "a/:cat:/b", "\\[x]", "[link=file:///etc]x[/link]", "1.5 'a'"]
)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_console_shows_every_text_as_it_is(text: str, is_terminal: bool):
    """Strings, tables, titles, columns of bars; a text that is given with a style has that style and no other."""
    table = Table(text, title=text)
    table.add_row(text)
    out = console(file=io.StringIO(), force_terminal=is_terminal, color_system="truecolor" if is_terminal else None, width=200)
    out.print(text)
    out.print(table)
    terminal.say(out, "a ", (text, "bold"), "\x1b[2J")
    with Progress(TextColumn("{task.description}", markup=False), console=out, auto_refresh=False) as bar:
        bar.add_task(f"{text}\x9b")
    assert isinstance(out.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue())
    assert shown.count(text) >= 5 and f"a {text}{UNSHOWN}[2J" in shown and "\x9b" not in shown
    if is_terminal:
        assert f"a \x1b[1m{text}\x1b[0m{UNSHOWN}[2J" in out.file.getvalue()


def test_a_table_stays_straight():
    table = Table("a", "b")
    table.add_row("x\x1b\x07", Text("y\x1b"))
    table.add_row("long enough", "z")
    out = console(file=io.StringIO(), width=60)
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    assert len({len(line) for line in out.file.getvalue().splitlines()}) == 1 and is_harmless(out.file.getvalue())


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the package, with the file and line it stands in."""
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(SOURCE)}:{node.lineno}", node


def named(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_nobody_makes_a_console_or_prints_a_text_on_his_own():
    """The mistake cannot be made: consoles come from `terminal.console`, and what is printed on one is an object of rich's."""
    wrong = []
    for place, call in calls():
        keywords = {word.arg: word.value for word in call.keywords}
        name = named(call.func)
        if place.startswith("terminal/console.py"):
            continue
        if name in ("Console", "from_markup") or "markup" in keywords and ast.unparse(keywords["markup"]) != "False":
            wrong.append(place)
        if name == "TextColumn" and "markup" not in keywords:
            wrong.append(place)
        is_builtin = isinstance(call.func, ast.Name)
        if name == "print" and not is_builtin and any(isinstance(part, ast.Constant | ast.JoinedStr) for part in call.args):
            wrong.append(place)
        if name == "print" and is_builtin and not place.startswith(("cli", "demo/standins.py")):
            wrong.append(place)
    assert wrong == []


# --- words to type ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_shell_takes_the_words_as_they_are(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with output(encoding):
        lines = [shell_line("program", "generate", "--prompt", question) for question in QUESTIONS]
    for locale in ("C.UTF-8", "C"):
        words = typed("\n".join(lines), LC_ALL=locale)
        assert words == [part.encode() for question in QUESTIONS for part in ("generate", "--prompt", question)]
    assert list(tmp_path.iterdir()) == []
    for line in lines:
        assert is_harmless(line) and "\n" not in line
        line.encode(encoding)
    assert lines[0] == "program generate --prompt 'What is it?'"


def test_paths_that_are_no_text_or_look_like_options():
    words = shell_line("program", Path("-x/a b"), Path(os.fsdecode(b"caf\xe9")), Path("plain"), "nul\0")
    assert words == "program './-x/a b' $'caf\\xe9' plain 'nul '"
    assert typed(words) == [b"./-x/a b", b"caf\xe9", b"plain", b"nul "]


def test_an_interactive_shell_too(tmp_path: Path):
    """Where ! means something, and what is pasted is typed."""
    line = shell_line("printf", "%s\\n", "it's !here and !!", "a'\x1b!b")
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(["bash", "--norc", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path)
    out, _ = shell.communicate(f"set -H\n{line}\nexit\n".encode())
    os.close(ours)
    os.close(theirs)
    assert out == b"it's !here and !!\na'\x1b!b\n"


# --- streams that lack characters, or room ------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "COLUMNS": "100"}
PROGRAM = f"{sys.executable} -c 'from diffvl.cli.main import main; main()'"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash, in which `diffvl` is the command."""
    script = f'diffvl() {{ {PROGRAM} "$@"; }}\n{line}\n'
    return subprocess.run(["bash", "-c", script], capture_output=True, check=False, env={**ENVIRONMENT, **environment})


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252"])
@pytest.mark.parametrize(
    "words", ["models", "recipes", "--help", "convert --help", "generate --help", "convert [/bold]\x1b --stage x"]
)
def test_every_encoding_takes_everything(encoding: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["diffvl", *words.split()])
    with output(encoding) as raw, pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == (2 if "--stage" in words else 0)
    assert raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str
)
def test_a_process_in_ascii(variables: dict[str, str]):
    done = shell("diffvl models; diffvl é漢; diffvl --help", **variables)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"qwen2.5-7b" in done.stdout
    done.stdout.decode("ascii")
    done.stderr.decode("ascii")


def test_a_reader_that_goes_away_is_no_fault():
    done = shell('diffvl models | true; echo "${PIPESTATUS[0]}"; diffvl --help | true; echo "${PIPESTATUS[0]}"')
    assert done.stderr == b"" and b"Traceback" not in done.stdout
    assert [line for line in done.stdout.decode().splitlines() if line.isdigit()] == ["141", "141"]


@pytest.mark.parametrize(("words", "unbuffered"), [("models", ""), ("--version", "1"), ("--help", "")])
def test_a_full_disk_is_one_message(words: str, unbuffered: str):
    done = shell(f"diffvl {words} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    says = (
        b"error: standard output takes no more (No space left on device): what follows is lost; make room, or send it elsewhere\n"
    )
    assert (done.returncode, done.stderr) == (2, says)


def test_streams_that_are_full_or_closed_end_nothing_in_a_traceback():
    lines = ["diffvl models &> /dev/full", "diffvl nonsense 2> /dev/full", "diffvl models >&- <&-", "diffvl models 2>&-"]
    done = shell("; echo $?; ".join(lines))
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert done.stdout.decode().splitlines()[:3] == ["2", "2", "0"] and b"qwen2.5-7b" in done.stdout


def test_no_room_for_a_file_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Wherever it happens; the fault of another kind keeps its traceback."""

    def app() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "[x]"))

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/[x] cannot be written: no space is left on the device. ") and said.count("\n") == 1

    def other() -> None:
        raise OSError(5, "Input/output error", "x")

    monkeypatch.setattr(cli, "app", other)
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


def test_a_message_shows_what_it_quotes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def app() -> Any:
        raise cli.UsageError("data/[/bold]\x1b[2J.json:3: the answer holds '\x07' and :cat:")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: data/[/bold]{UNSHOWN}[2J.json:3: the answer holds '{UNSHOWN}' and :cat:\n"
