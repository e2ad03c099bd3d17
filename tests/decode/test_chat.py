"""`diffvl chat` as a script sees it, and as somebody at a terminal does."""

import io
import os
import pty
import re
import select
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from block_checkpoints import BLOCK, block_checkpoint
from helpers import random_image
from tiny_runs import Ended, command, refused

from diffvl.decode import chat
from diffvl.decode.answer import Decoder, answer_chats, load_for_decoding
from diffvl.decode.chat import Chat, converse, meant_path
from diffvl.hub.settings_diffvl import DecodeSettings

TOKENS = 10


@pytest.fixture(scope="module")
def checkpoint(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("chat") / "llama", context="causal")


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return load_for_decoding(checkpoint)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    random_image(3).save(tmp_path / "seen it.png")
    return tmp_path / "seen it.png"


def scripted(directory: Path, lines: str, *words: object) -> Ended:
    """The command with these lines on its standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        return command("chat", directory, "--max-new-tokens", TOKENS, *words)


class Listener:
    """A chat in this process. out: what was written; complaints: what did not work."""

    def __init__(self, decoder: Decoder, **settings: Any) -> None:
        self.out, self.complaints = "", list[str]()
        self.chat = Chat(
            decoder, DecodeSettings(**{"max_new_tokens": TOKENS, **settings}), self.write, self.say, self.complaints.append
        )

    def write(self, text: str) -> None:
        self.out += text

    def say(self, text: str) -> None:
        self.out += text + "\n"

    def take(self, line: str) -> str:
        """What a line gets as an answer."""
        before = len(self.out)
        assert self.chat.take(line)
        return self.out[before:]


def expected(decoder: Decoder, messages: list[Any], **settings: Any) -> str:
    """The answer to a whole conversation, from nothing."""
    return answer_chats(decoder, [messages], DecodeSettings(**{"max_new_tokens": TOKENS, **settings}))[0].text


def parts(text: str, *images: Any) -> dict[str, Any]:
    content = [{"type": "image", "image": one} for one in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# --- turns ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"denoising_steps": 2}, {"mode": "speculative"}, {"mode": "ar"}], ids=str)
def test_an_answer_has_the_history_and_a_prefix_changes_nothing(settings: dict[str, Any], decoder: Decoder, image: Path):
    listener = Listener(decoder, **settings)
    seen = random_image(3)
    messages: list[Any] = [parts("What is it?")]
    first = expected(decoder, messages, **settings)
    assert listener.take("What is it?\n") == first + "\n"
    assert listener.take(f'/image "{image}"\n') == f"{image}, 40 x 40, goes with the next message\n"
    messages += [said(first), parts("\nAnd this?", seen)]
    second = expected(decoder, messages, **settings)
    assert listener.take("And this?") == second + "\n"
    messages += [said(second), parts("Why?")]
    third = expected(decoder, messages, **settings)
    assert listener.take("Why?") == third + "\n" and listener.complaints == []
    assert len({first, second, third, expected(decoder, [parts("Why?")], **settings)}) == 4 or settings.get("mode")
    turns = listener.chat.turns
    assert turns[0].reused == 0 and turns[0].prompt < turns[1].prompt < turns[2].prompt
    if "mode" in settings:
        assert turns[2].reused == 0
        assert f"(--mode {settings['mode']} keeps no prefix)" in listener.take("/stats")
    else:
        assert turns[0].prompt - BLOCK < turns[1].reused < turns[1].prompt
        assert turns[1].prompt - BLOCK < turns[2].reused < turns[2].prompt


def test_stats_are_those_of_the_turns(decoder: Decoder):
    listener = Listener(decoder, denoising_steps=2)
    assert listener.take("/stats") == "no answers yet\n"
    listener.take("Hi")
    listener.take("And then?")
    one, two = listener.chat.turns
    last, prompt, total = listener.take("/stats").splitlines()
    speed = two.answer.tokens / two.answer.forwards
    assert last.startswith(
        f"last answer: {two.answer.tokens} tokens, {two.answer.forwards} forwards, {speed:.2f} tokens per forward"
    )
    assert prompt == f"its prompt: {two.prompt} tokens, {two.reused} of them reused; context 512 tokens" and two.reused > 0
    tokens, forwards = (getattr(one.answer, name) + getattr(two.answer, name) for name in ("tokens", "forwards"))
    assert total.startswith(f"all 2 answers: {tokens} tokens, {forwards} forwards, {tokens / forwards:.2f} tokens per forward, ")
    assert total.endswith(f"; {two.reused} of {one.prompt + two.prompt} prompt tokens reused")


def test_reset_forgets_everything(decoder: Decoder, image: Path):
    listener = Listener(decoder)
    listener.take("Hello")
    listener.take(f"/image {image}")
    assert listener.take("/reset") == "the conversation is forgotten\n"
    assert listener.take("Why?") == expected(decoder, [parts("Why?")]) + "\n"
    assert listener.chat.turns[-1].reused == 0


def test_a_message_may_say_where_its_images_stand(decoder: Decoder, image: Path):
    listener = Listener(decoder)
    listener.take(f"/image {image}")
    listener.take(f"/image {image}")
    listener.take("Only one <image>?")
    assert listener.complaints == ["the prompt has 1 <image> markers, 2 images were given"]
    between: dict[str, Any] = {"role": "user", "content": []}
    for text in ("Is ", " like ", "?"):
        between["content"] += [{"type": "text", "text": text}, {"type": "image", "image": random_image(3)}]
    del between["content"][-1]
    assert listener.take("Is <image> like <image>?") == expected(decoder, [between]) + "\n"


@pytest.mark.parametrize("name", ["seen.png", "seen it's.png", 'a "b" c.png', "back\\slash x.png", "é[x].png", "-n.png"])
@pytest.mark.parametrize("how", ["as it is", "quoted", "double", "escaped", "home"])
def test_a_path_is_taken_as_it_is_typed_or_dropped(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Terminals paste a file that is dropped on them as for a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / name
    random_image(3).save(path)
    typed = {
        "as it is": str(path),
        "quoted": shlex.quote(str(path)),
        "double": '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"',
        "escaped": re.sub(r"([^A-Za-z0-9/._é-])", r"\\\1", str(path)),
        "home": f"~/{name}",
    }[how]
    assert meant_path(typed) == path


def test_a_path_that_is_not_there_is_told_without_its_quotes(decoder: Decoder, tmp_path: Path):
    listener = Listener(decoder)
    for typed in (f"'{tmp_path}/no ne.png'", f'"{tmp_path}/no ne.png"', f"{tmp_path}/no\\ ne.png", f"  {tmp_path}/no ne.png "):
        listener.take(f"/image {typed}")
        if "ne.png" in listener.complaints[-1] and "\\" not in typed:
            assert listener.complaints[-1] == f"/image: image {tmp_path}/no ne.png does not exist"
    for typed in ("''", '""', "~nobody-here/x.png", "x" * 5000 + ".png"):
        listener.take(f"/image {typed}")
    assert len(listener.complaints) == 8 and listener.chat.images == []


# --- what does not work ---------------------------------------------------------------------------------------------------


def test_mistakes_are_told_and_the_chat_goes_on(checkpoint: Path, image: Path, tmp_path: Path):
    (tmp_path / "text.png").write_text("I am no image", encoding="utf-8")
    wrong = [
        "/image",
        f"/image {tmp_path}/none.png",
        f"/image {tmp_path}/text.png",
        "/foo bar",
        "/reset now",
        "<|MASK|>",
        "\udcff",
    ]
    ended = scripted(checkpoint, "\n".join(["", *wrong, "Why?", "/quit", "Never said"]) + "\n")
    assert ended.code == 0
    told = ended.err.splitlines()
    assert [line.partition(": ")[0] for line in told[:4]] == ["/image", "/image", "/image", "/foo"]
    assert "name an image's file" in told[0] and "none.png does not exist" in told[1] and "text.png cannot be read" in told[2]
    assert told[3] == "/foo: no such command; /help lists them" and told[4] == "/reset takes nothing after it"
    assert "'<|MASK|>', which stands for a token not known yet" in told[5] and "not valid UTF-8 text" in told[6]
    assert len(told) == len(wrong)
    assert ended.out == scripted(checkpoint, "Why?\n").out != "\n"


def test_a_line_with_a_space_before_its_slash_is_a_message(decoder: Decoder):
    listener = Listener(decoder)
    assert listener.take(" /etc?") == expected(decoder, [parts("/etc?")]) + "\n"


def test_a_history_that_fills_the_context(decoder: Decoder):
    """There is no answer, a shorter one, and after /reset a whole one again. What was refused is not kept."""
    listener = Listener(decoder, max_new_tokens=100)
    listener.take("Hi " * 100)
    (turn,) = listener.chat.turns
    assert turn.prompt < 412 and listener.complaints == []
    history = list(listener.chat.history)
    words = "so " * ((512 - turn.prompt - turn.answer.tokens) // 3)
    assert listener.take(words) == ""
    assert re.fullmatch(
        r"the message has \d+ tokens with all that stands before it, and the context 512; /reset forgets the conversation so far",
        listener.complaints[-1],
    )
    assert listener.chat.history == history and listener.chat.prefix is not None
    assert len(listener.take("so " * 10)) > 1
    assert re.fullmatch(
        r"the context of 512 tokens has room for \d+ more; /reset forgets the conversation so far", listener.complaints[-1]
    )
    assert listener.chat.turns[-1].reused > turn.prompt - BLOCK
    listener.take("/reset")
    assert listener.take("so " * 10) == expected(decoder, [parts(("so " * 10).strip())], max_new_tokens=100) + "\n"
    assert len(listener.complaints) == 2
    listener.take("/reset")
    listener.take("long " * 200)
    assert listener.complaints[-1].endswith("and the context 512: shorten it, or forget its images with /reset")


def test_settings_are_refused_before_the_first_line(checkpoint: Path):
    refused("chat", checkpoint, "--steps", 5, says=["--steps is 5, expected 1 to the block size, 4"])
    refused("chat", checkpoint, "--threshold", 0.5, says=["--threshold 0.5 has no effect with --strategy low_confidence_static"])
    refused("chat", checkpoint / "nowhere", says=["nowhere: no such directory"])


# --- Ctrl-C and Ctrl-D ----------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(decoder: Decoder):
    listener = Listener(decoder, max_new_tokens=40)
    listener.take("Hello")
    write, count = listener.chat.write, 0

    def interrupted(text: str) -> None:
        nonlocal count
        write(text)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    listener.chat.write = interrupted
    partial = listener.take("Go on.")
    listener.chat.write = write
    assert listener.complaints == ["interrupted: the answer is kept as it stands"]
    kept = listener.chat.history[-1]["content"]
    assert kept and partial == kept + "\n" and len(listener.chat.turns) == 1
    whole = list(listener.chat.history)
    assert listener.take("Why?") == expected(decoder, [*whole, parts("Why?")], max_new_tokens=40) + "\n"


def test_ctrl_c_before_anything_was_said_forgets_the_message(decoder: Decoder, image: Path, monkeypatch: pytest.MonkeyPatch):
    listener = Listener(decoder)
    listener.take("Hello")
    listener.take(f"/image {image}")
    before = list(listener.chat.history)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("encode", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(chat, name, interrupted)
            assert listener.take("Go on.") == ""
    assert listener.complaints == ["interrupted: the message is forgotten"] * 2
    assert listener.chat.history == before and len(listener.chat.images) == 1
    assert listener.take("Why?") == expected(decoder, [*before, parts("\nWhy?", random_image(3))]) + "\n"


def lines_of(*lines: str | type[BaseException]) -> Callable[[], str]:
    """What somebody types; a class is a key that raises it."""
    typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def read() -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_ctrl_c_between_answers(decoder: Decoder):
    listener = Listener(decoder)
    converse(listener.chat, lines_of(KeyboardInterrupt, "Hi"), at_terminal=True)
    assert len(listener.chat.turns) == 1 and "Ctrl-D or /quit ends the chat" in listener.complaints[0]
    with pytest.raises(KeyboardInterrupt):
        converse(listener.chat, lines_of("Hi", KeyboardInterrupt, "Hi"), at_terminal=False)
    assert len(listener.chat.turns) == 2


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows, up to and including a text."""
    shown = b""
    while text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], 120)
        try:
            piece = os.read(terminal, 4096) if ready else b""
        except OSError:  # how Linux says that the other side is closed
            piece = b""
        assert piece, f"{text!r} never came: {shown.decode(errors='replace')}"
        shown += piece
    return shown.decode(errors="replace")


@pytest.mark.slow  # a key must arrive while an answer is on its way: on a busy machine it may come too late
def test_at_a_terminal(checkpoint: Path):
    """A process of its own behind a pseudo-terminal: a prompt, keys that end an answer and the chat, and no traceback."""
    ours, theirs = pty.openpty()
    program = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\nfrom diffvl.cli.main import main\nmain()"
    words = [sys.executable, "-c", program, "chat", str(checkpoint), "--max-new-tokens", "440"]
    # The child makes the terminal on its stdin that of its session, so that keys become signals.
    environment = {**os.environ, "PYTHONPATH": str(Path(chat.__file__).parents[2]), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    running = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    try:
        assert "/help lists the commands, Ctrl-D ends" in read_until(ours, "you> ")
        os.write(ours, b"/help\n")
        assert "forget the conversation and its images" in read_until(ours, "you> ")
        os.write(ours, b"Tell me.\n")
        if read_until(ours, "Tell me.\r\n").endswith("\n"):
            os.read(ours, 1)  # the answer has begun
        os.write(ours, b"\x03")
        assert "interrupted: the answer is kept as it stands" in read_until(ours, "you> ")
        os.write(ours, b"/stats\n")
        assert "no answers yet" in read_until(ours, "you> ")
        os.write(ours, b"\x04")
        assert running.wait(timeout=60) == 0
    finally:
        running.kill()
        running.wait()
        os.close(ours)
