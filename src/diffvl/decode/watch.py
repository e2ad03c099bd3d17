"""`diffvl generate --watch`: the answer in the terminal while its blocks settle, drawn from what `generate` tells its watchers.

What is committed stands plain; of the open block, what is masked is a grey placeholder, what has just settled is bold and what
settled earlier is not, both in the colour of the confidence they settled with. Invariant: decoding does not wait for the
drawing. It is drawn at most `RATE` times a second, and once more at the end.

Shapes: D block size.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.style import Style
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from diffvl.decode.answer import UNFINISHED, Answer, text_of
from diffvl.hub.answers_diffvl import DenoisingStep
from diffvl.terminal.console import visible

RATE = 15.0  # frames a second
PLACEHOLDER, GREY = " ░░", Style(color="grey42")
FOOTER = Style(dim=True)
RED, YELLOW, GREEN = (224, 80, 72), (222, 184, 64), (88, 184, 104)
CONTEXT = 4  # committed tokens that are decoded along, because a token's text may depend on the ones before it


@dataclass
class Cell:
    """One token of the open block: its id or None while masked, the confidence it settled with, and the step."""

    token: int | None = None
    confidence: float = 0.0
    step: int = 0


class BlockWatch(BaseStreamer):
    """A streamer and an `on_step` of `generate`, for one prompt, that keep a live view of the answer.

        with BlockWatch(console, tokenizer) as watch:
            answer = ... generate(streamer=watch, on_step=watch.on_step)
            watch.finish(answer)

    Attributes:
        text: what is committed.
        cells: the open block's tokens of the answer.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Any,
        stops: tuple[str, ...] = (),
        prefill_forwards: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prefill_forwards`: passes of the trunk before the first denoising step."""
        self._tokenizer, self._stops, self._clock = tokenizer, stops, clock
        self._ids: list[int] = []
        self._prompt_is_next = True
        self._forwards, self._step, self._block = prefill_forwards, 0, 0
        self._places: list[int] = []  # of the answer's tokens in the block
        self._drawn = -math.inf
        self._answer: Answer | None = None
        self.text = ""
        self.cells: list[Cell] = []
        self._live = Live(self, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> "BlockWatch":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()  # draws once more

    # --- what generate tells -------------------------------------------------------------------------------------------------

    def on_step(self, step: DenoisingStep) -> None:
        ids, settled, confidence = step.ids[0].tolist(), step.settled[0].tolist(), step.confidence[0].tolist()
        if not self.cells:
            # Every token of the answer is predicted in a block's first step; the others are the prompt's tail or padding.
            self._places = [place for place, value in enumerate(confidence) if value > 0 or settled[place]]
            self.cells = [Cell() for _ in self._places]
            self._block, self._step = self._block + 1, 0
        self._step += 1
        self._forwards += 1
        for cell, place in zip(self.cells, self._places, strict=True):
            if settled[place]:
                cell.token, cell.confidence, cell.step = ids[place], confidence[place], self._step
        if self._clock() - self._drawn >= 1 / RATE:
            self._live.refresh()
            self._drawn = self._clock()

    def put(self, value: torch.Tensor) -> None:
        """Takes the tokens of a finished block, up to where the answer ends."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._ids.extend(value.flatten().tolist())
        self.text = text_of(self._tokenizer, self._ids, self._stops)
        self.cells = []

    def end(self) -> None:
        """Nothing: `finish` knows more."""

    def finish(self, answer: Answer) -> None:
        """Shows the whole answer and its exact figures."""
        self.text, self.cells, self._answer = answer.text, [], answer

    # --- what is drawn -------------------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The last lines that fit the terminal; in the end, all of them."""
        body = self.body().wrap(console, options.max_width)
        if self._answer is None:
            body = body[-max(console.height - 3, 1) :]
        yield from body
        yield Text()
        yield Text(self.footer(), style=FOOTER)

    def body(self) -> Text:
        """The answer as far as it is known."""
        text = Text(visible(self.text))
        if self.cells and self.text:
            text.append(self._space_after_text())
        for cell, piece in zip(self.cells, self._pieces(), strict=True):
            if cell.token is None:
                text.append(PLACEHOLDER, GREY)
            else:
                style = Style(color=colour_of(cell.confidence), bold=cell.step == self._step)
                text.append(visible(piece), style)
        return text

    def footer(self) -> str:
        if self._answer is not None:
            given = self._answer
            return (
                f"{given.tokens} tokens in {self._block} blocks, {given.forwards} forwards, "
                f"{given.tokens_per_forward:.2f} tokens per forward, {given.seconds:.1f} s"
            )
        known = len(self._ids) + sum(cell.token is not None for cell in self.cells)
        speed = known / self._forwards if self._forwards else 0.0
        return f"block {self._block}, step {self._step}, {speed:.2f} tokens per forward"

    def _space_after_text(self) -> str:
        """White space at the end of what is committed, which `text` leaves out."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[len(whole.rstrip()) :]

    def _pieces(self) -> list[str]:
        """The text that each cell adds to the one before it; stop tokens by their names."""
        pieces, run = [], self._ids[-CONTEXT:]
        before = self._decoded(run)
        for cell in self.cells:
            if cell.token is None:
                pieces.append("")
                run, before = [], ""
                continue
            run = [*run, cell.token]
            after = self._decoded(run)
            pieces.append(after[len(before) :])
            before = after
        return pieces

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False).rstrip(UNFINISHED) if ids else ""


def colour_of(confidence: float) -> str:
    """Red at 0, yellow at a half, green at 1."""
    share = min(max(confidence, 0.0), 1.0) * 2
    start, end = (RED, YELLOW) if share < 1 else (YELLOW, GREEN)
    part = share - math.floor(share) if share < 2 else 1.0
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))
