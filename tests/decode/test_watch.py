"""What `diffvl generate --watch` draws: cells from real decoding, colours, the rate, and the command on a terminal."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_checkpoints import BLOCK, block_checkpoint, fed, ids_of, tokenizer
from rich.console import Console
from shared_fixtures import Loaded
from tiny_runs import Ended, command, refused, succeed

from diffvl.decode.answer import Answer, Decoder, Watcher, answer_chats
from diffvl.decode.watch import PLACEHOLDER, BlockWatch, colour_of
from diffvl.hub.answers_diffvl import DenoisingStep
from diffvl.hub.settings_diffvl import DecodeSettings

MASK = 999
CHAT = [[{"role": "user", "content": "Tell me more."}]]


class Clock:
    """Stands still unless told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(width: int = 80, height: int = 20) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, height=height, color_system="truecolor"
    )


def frames(console: Console) -> list[str]:
    """What was drawn, image by image, without colours."""
    assert isinstance(console.file, io.StringIO)
    images = re.split(r"(?:\r|\x1b\[\?25[lh])(?:\x1b\[2K|\x1b\[1A|\x1b\[\?25[lh])*", console.file.getvalue())
    return [re.sub(r"\x1b\[[0-9;]*m", "", image) for image in images if image.strip()]


def step(ids: list[int], settled: list[bool], confidence: list[float]) -> DenoisingStep:
    return DenoisingStep(torch.tensor([ids]), torch.tensor([settled]), torch.tensor([confidence]), [0])


def styles(watch: BlockWatch) -> list[tuple[str, str]]:
    body = watch.body()
    return [(body.plain[span.start : span.end], str(span.style)) for span in body.spans]


# --- what stands where ----------------------------------------------------------------------------------------------------


def test_masked_settled_and_committed_look_different():
    """A block whose first token is the prompt's tail and whose last is padding; then one more."""
    words = tokenizer()
    a, b, c, d = ids_of(words, "aXbY")
    watch = BlockWatch(screen(), words, clock=Clock())
    watch.put(torch.tensor([[1, 2]]))
    watch.on_step(step([7, a, MASK, MASK], [False, True, False, False], [0.0, 0.5, 0.25, 0.0]))
    assert styles(watch) == [("a", f"bold {colour_of(0.5)}"), (PLACEHOLDER, "grey42")]
    assert watch.footer() == "block 1, step 1, 1.00 tokens per forward"
    watch.on_step(step([7, a, b, MASK], [False, False, True, False], [0.0, 0.0, 1.0, 0.0]))
    assert styles(watch) == [("a", f"not bold {colour_of(0.5)}"), ("X", f"bold {colour_of(1.0)}")]
    watch.put(torch.tensor([a, b]))
    assert (watch.body().plain, styles(watch), watch.text) == ("aX", [], "aX")
    watch.on_step(step([MASK, d, c, MASK], [False, True, True, False], [0.1, 0.9, 0.8, 0.7]))
    assert [text for text, _ in styles(watch)] == [PLACEHOLDER, "Y", "b", PLACEHOLDER]
    assert watch.body().plain == f"aX{PLACEHOLDER}Yb{PLACEHOLDER}"
    assert watch.footer() == "block 2, step 1, 1.33 tokens per forward"


def test_colours_go_from_red_over_yellow_to_green():
    channels = [tuple(int(colour_of(value / 10)[start : start + 2], 16) for start in (1, 3, 5)) for value in range(11)]
    red, green = [one[0] for one in channels], [one[1] for one in channels]
    assert red[0] > 2 * green[0] and abs(red[5] - green[5]) < 50 and green[10] > 1.5 * red[10]
    assert green[:6] == sorted(green[:6]) and red[5:] == sorted(red[5:], reverse=True)
    assert colour_of(-1) == colour_of(0) and colour_of(2) == colour_of(1)


def test_characters_over_several_tokens_and_white_space_between_blocks():
    words = tokenizer()
    ids = ids_of(words, "so 漢 é")
    watch = BlockWatch(screen(), words, clock=Clock())
    watch.put(torch.tensor([[1]]))
    watch.put(torch.tensor(ids[:3]))  # "so "
    assert watch.body().plain == "so"
    rest = ids[3:]
    first = len(rest) - 2
    settled = [place < first for place in range(len(rest))]
    watch.on_step(step([*rest[:first], MASK, MASK], settled, [0.9] * len(rest)))
    assert watch.body().plain == f"so 漢 {PLACEHOLDER}{PLACEHOLDER}"
    watch.on_step(step(rest, [not one for one in settled], [0.9] * len(rest)))
    assert watch.body().plain == "so 漢 é"


def test_control_characters_are_not_sent_to_the_terminal():
    words = tokenizer()
    watch = BlockWatch(screen(), words, clock=Clock())
    watch.put(torch.tensor([[1]]))
    watch.put(torch.tensor(ids_of(words, "a\x1b[2Jb")))
    watch.on_step(step(ids_of(words, "\x1b\n\x07"), [True] * 3, [0.5] * 3))
    assert watch.body().plain == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}\n\N{REPLACEMENT CHARACTER}"


# --- when it is drawn -----------------------------------------------------------------------------------------------------


def test_at_most_fifteen_images_a_second_and_always_the_last():
    console, clock, words = screen(), Clock(), tokenizer()
    with BlockWatch(console, words, clock=clock) as watch:
        watch.put(torch.tensor([[1]]))
        for number in range(90):  # twenty-five a second, of which every second one is drawn
            clock.now += 0.04
            (token,) = ids_of(words, "xyz"[number % 3])
            watch.on_step(step([token], [True], [0.5]))
            watch.put(torch.tensor([token]))
        watch.finish(Answer("xyz" * 30, 90, 91, 90 / 91, 0.1, 2.9, 3.0))
    shown = frames(console)
    assert len(shown) == 45 + 1
    end = "".join(shown[-1].split())
    assert end == "xyz" * 30 + "90tokensin90blocks,91forwards,0.99tokensperforward,3.0s"


def test_a_long_answer_shows_its_end_and_at_last_the_whole():
    console, words, clock = screen(width=20, height=8), tokenizer(), Clock()
    lines = [f"line {number}" for number in range(30)]
    with BlockWatch(console, words, clock=clock) as watch:
        fed(watch, ids_of(words, "\n".join(lines)), 16)
        watch.on_step(step([MASK], [False], [0.5]))
        watch.finish(Answer("\n".join(lines), 1, 1, 1.0, 0.0, 0.0, 0.0))
    live, last = frames(console)[-2:]
    assert "line 29" in live and "line 20" not in live and len(live.splitlines()) <= 8
    assert [line.strip() for line in last.splitlines()[:30]] == lines


# --- real decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("grid", ["absolute", "response"])
def test_what_is_drawn_is_what_is_decoded(context: str, grid: str, loaded: Callable[[str], Loaded]):
    model, processor = loaded("qwen3")
    model.config.set_decoding("blocks", BLOCK, context, grid, "same")
    settings = DecodeSettings(max_new_tokens=11, denoising_steps=2)
    plain = answer_chats(Decoder(model, processor), CHAT, settings)[0]
    console, clock = screen(), Clock()
    seen: list[list[int | None]] = []
    with BlockWatch(console, processor.tokenizer, prefill_forwards=int(context == "causal"), clock=clock) as watch:

        def on_step(one: DenoisingStep) -> None:
            clock.now += 1.0
            watch.on_step(one)
            seen.append([cell.token for cell in watch.cells])

        (answer,) = answer_chats(Decoder(model, processor), CHAT, settings, watcher=Watcher(watch, on_step))
        footer = watch.footer()
        watch.finish(answer)
    assert (answer.text, answer.tokens, answer.forwards) == (plain.text, plain.tokens, plain.forwards)
    # Every block fills up from masks, and holds no more than its tokens of the answer.
    blocks = [one for one in seen if None not in one]
    assert all(None in one for one in seen if one not in blocks) and all(1 <= len(one) <= BLOCK for one in blocks)
    assert sum(map(len, blocks)) >= answer.tokens > sum(map(len, blocks[:-1]))
    assert (
        footer
        == f"block {len(blocks)}, step {2 if len(blocks[-1]) > 1 else 1}, {answer.tokens_per_forward:.2f} tokens per forward"
    )
    assert frames(console)[-1].split()[-1] == "s" and f"{answer.forwards} forwards" in " ".join(frames(console)[-1].split())
    assert len(frames(console)) == len(seen) + 1


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(prepared: Callable[[str], Path], tmp_path: Path) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path / "llama")


def on_a_terminal(patch: pytest.MonkeyPatch, *words: object) -> Ended:
    """The command with an output that says of itself that it is a terminal of 20 lines."""
    for name, value in {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "60", "LINES": "20", "TERM": "xterm"}.items():
        patch.setenv(name, value)
    return command("generate", *words)


def test_generate_draws_on_a_terminal(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    words = (checkpoint, "--prompt", "Hi", "--max-new-tokens", 12, "--steps", 2)
    reply = succeed("generate", *words).out.strip()
    ended = on_a_terminal(monkeypatch, *words, "--watch")
    assert (ended.code, ended.err) == (0, "")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ended.out)
    assert PLACEHOLDER.strip() in shown and "block 1, step 1" in shown
    end = "".join(shown.rpartition("\r")[2].split())
    visible = "".join("\N{REPLACEMENT CHARACTER}" if ord(sign) < 32 and sign not in "\n\t" else sign for sign in reply)
    assert end.startswith("".join(visible.split())) and "tokensperforward" in end
    assert ended.out.count("\x1b[?25l") == ended.out.count("\x1b[?25h") == 1, "the cursor is given back"


def test_watching_and_the_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """A refusal leaves the terminal as it was."""
    ended = on_a_terminal(monkeypatch, checkpoint, "--prompt", "Hi", "--watch", "--steps", 5)
    assert (ended.code, ended.out) == (2, "") and "--steps is 5" in ended.err
    monkeypatch.undo()
    refused("generate", checkpoint, "--prompt", "Hi", "--watch", says=["--watch draws in a terminal"])


def test_an_error_while_decoding_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch):
    console: Any = screen()
    with pytest.raises(ZeroDivisionError), BlockWatch(console, tokenizer(), clock=Clock()) as watch:
        watch.put(torch.tensor([[1]]))
        watch.on_step(step([MASK], [False], [0.5]))
        raise ZeroDivisionError
    assert console.file.getvalue().endswith("\x1b[?25h")
