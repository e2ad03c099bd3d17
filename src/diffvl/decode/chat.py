"""`diffvl chat`: lines -> answers, with the history of the conversation and the computed prefix of it.

Invariant: the history holds whole turns only. A message that was refused is not in it; an answer that was interrupted is, as far
as it went. The prefix is the decoder's memory of the history: it saves time and changes no answer.
"""

import contextlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from diffvl.data.images import open_image
from diffvl.data.videos import open_video
from diffvl.decode.answer import (
    Answer,
    Decoder,
    Message,
    TextPieces,
    Watcher,
    check_settings,
    context_length,
    decode,
    encode,
    user_message,
)
from diffvl.errors import DiffvlError, UsageError
from diffvl.hub.blocks_diffvl import Prefix
from diffvl.hub.clips_diffvl import Clip
from diffvl.hub.settings_diffvl import DecodeSettings

HELP = """\
/image PATH   add an image to the next message
/video PATH   add a video, or a folder of its frames
/reset        forget the conversation and its images
/stats        tokens, forwards and seconds of the last answer and of all
/help         this list
/quit         end (so does Ctrl-D)
Anything else is a message; Ctrl-C ends the answer under way. A space before it sends a line that begins with /."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class AnsweredTurn:
    """One answered message. prompt: tokens of the history with the message; reused: how many of them were not computed again."""

    answer: Answer
    prompt: int
    reused: int


@dataclass
class Chat:
    """A conversation. write: takes the pieces of answers, as they come; say: takes lines that a command asked for; complain:
    takes lines about what did not work."""

    decoder: Decoder
    settings: DecodeSettings
    write: Say
    say: Say
    complain: Say
    history: list[Message] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)  # for the next message
    videos: list[Clip] = field(default_factory=list)
    turns: list[AnsweredTurn] = field(default_factory=list)
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        """Raises UsageError if the checkpoint cannot be decoded like this."""
        self.settings = replace(self.settings, mode=check_settings(self.settings, self.decoder.model.config).mode)

    def take(self, line: str) -> bool:
        """Does what a line asks for; False if that is to end."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._answer(line.strip())
            return True
        command, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_image,
            "/video": self._add_video,
            "/reset": self._reset,
            "/stats": self._show_stats,
            "/help": lambda _: self.say(HELP),
        }
        if command == "/quit":
            return False
        if command not in commands:
            self.complain(f"{command}: no such command; /help lists them")
        elif rest and command not in ("/image", "/video"):
            self.complain(f"{command} takes nothing after it")
        else:
            commands[command](rest.strip())
        return True

    # --- messages ------------------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        pieces = TextPieces(self.decoder.processor.tokenizer, self.settings.stop_strings, self.write)
        try:
            message = user_message(text, self.images, self.videos)
            self._decode(message, pieces)
        except DiffvlError as error:
            self.complain(f"{error}{self._advice()}")
        except KeyboardInterrupt:
            if pieces.text:
                self.write("\n")
                self._remember(message, pieces.text)
            self.complain("interrupted: " + ("the answer is kept as it stands" if pieces.text else "the message is forgotten"))

    def _decode(self, message: Message, pieces: TextPieces) -> None:
        inputs = encode(self.decoder, [[*self.history, message]])
        length, limit = inputs["input_ids"].shape[1], context_length(self.decoder)
        settings = self.settings
        if limit is not None and length >= limit:
            raise UsageError(
                f"the message has {length} tokens with all that stands before it, and the context {limit}"
                + ("" if self.history else ": shorten it, or forget its images with /reset")
            )
        if limit is not None and length + settings.max_new_tokens > limit:
            self.complain(f"the context of {limit} tokens has room for {limit - length} more{self._advice()}")
            settings = replace(settings, max_new_tokens=limit - length)
        # The decoder uses the prefix up, and leaves it half done where it is interrupted.
        prefix, self.prefix = self.prefix if settings.mode == "blocks" else None, None
        answers, output = decode(self.decoder, inputs, settings, Watcher(pieces), prefix)
        self.write("\n")
        self.prefix = output.prefix
        self.turns.append(AnsweredTurn(answers[0], length, output.reused or 0))
        self._remember(message, answers[0].text)

    def _remember(self, message: Message, text: str) -> None:
        self.history += [message, {"role": "assistant", "content": text}]
        self.images, self.videos = [], []

    def _advice(self) -> str:
        return "; /reset forgets the conversation so far" if self.history else ""

    # --- commands ------------------------------------------------------------------------------------------------------------

    def _add_image(self, typed: str) -> None:
        if not typed.strip("'\""):
            self.complain("/image: name an image's file: /image PATH")
            return
        try:
            path = meant_path(typed)
            self.images.append(open_image(str(path), "/image"))
        except (DiffvlError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
            self.complain(str(error))
            return
        width, height = self.images[-1].size
        self.say(f"{path}, {width} x {height}, goes with the next message")

    def _add_video(self, typed: str) -> None:
        sampler = self.decoder.processor.sampler
        if not typed.strip("'\""):
            self.complain("/video: name a video's file, or a folder of its frames: /video PATH")
            return
        try:
            path = meant_path(typed)
            self.videos.append(open_video(str(path), "/video", sampler))
        except (DiffvlError, RuntimeError) as error:
            self.complain(str(error))
            return
        size = self.videos[-1].size
        self.say(f"{path}, {size.width} x {size.height}, {len(size.indices)} frames of {size.total}, goes with the next message")

    def _reset(self, _: str) -> None:
        self.history, self.images, self.videos, self.prefix = [], [], [], None
        self.say("the conversation is forgotten")

    def _show_stats(self, _: str) -> None:
        if not self.turns:
            self.say("no answers yet")
            return
        last, answers = self.turns[-1], [turn.answer for turn in self.turns]
        limit = context_length(self.decoder)
        self.say(
            f"last answer: {_figures([last.answer])}\n"
            f"its prompt: {last.prompt} tokens, {last.reused} of them reused"
            + ("" if limit is None else f"; context {limit} tokens")
            + ("" if self.settings.mode == "blocks" else f" (--mode {self.settings.mode} keeps no prefix)")
            + f"\nall {len(answers)} answers: {_figures(answers)}; "
            f"{sum(turn.reused for turn in self.turns)} of {sum(turn.prompt for turn in self.turns)} prompt tokens reused"
        )


def meant_path(typed: str) -> Path:
    """The path that somebody typed or dropped on the terminal, which pastes it as for a shell: in quotes, or with backslashes
    before its spaces. What exists as it stands is meant as it stands.

    Raises:
        RuntimeError: for ~ of an unknown user.
    """
    readings = [typed]
    if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"":
        readings.append(typed[1:-1])
    with contextlib.suppress(ValueError):  # a quote that is not closed
        parts = shlex.split(typed)
        readings += parts if len(parts) == 1 else []
    paths = [Path(reading).expanduser() for reading in readings]
    return next((path for path in paths if os.path.exists(path)), paths[-1])


def _figures(answers: list[Answer]) -> str:
    tokens, forwards = (sum(getattr(answer, name) for answer in answers) for name in ("tokens", "forwards"))
    prefill, decoding = (sum(getattr(answer, name) for answer in answers) for name in ("prefill_seconds", "decode_seconds"))
    return (
        f"{tokens} tokens, {forwards} forwards, {tokens / forwards:.2f} tokens per forward, "
        f"prefill {prefill:.2f} s, decoding {decoding:.2f} s"
    )


def converse(chat: Chat, read: Callable[[], str], at_terminal: bool) -> None:
    """Takes lines until there are no more, or /quit.

    Args:
        read: gives the next line; raises EOFError where there is none.
        at_terminal: somebody types. Ctrl-C between two answers then ends nothing; elsewhere it is raised.
    """
    while True:
        try:
            if not chat.take(read()):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            chat.complain("\nCtrl-D or /quit ends the chat")
